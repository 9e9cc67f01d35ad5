"""memtrain.py and eval.py as commands: a run on the tiny default, real tokenizers and text, and bad input."""

import json
import runpy
import subprocess
import sys
from itertools import cycle, groupby
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import shared
from helpers import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import memtrain
from helpers import command
from engine import packing, sampling
from engine.attention import enable_packing
from engine.config import Config
from engine.optimizer import MasterAdamW
from grpo import token_logprobs
from memtrain import learning_rate, update
from rollout import Turn

ROOT = Path(__file__).parents[1]


def process(*arguments):
    """`python memtrain.py` as users run it."""
    command = [sys.executable, ROOT / "memtrain.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


SMALL = ["--documents", 2, "--g1", 2, "--g2", 2, "--eval_documents", 0]


@pytest.fixture
def every_group_counts(monkeypatch):
    """Every second answer is right, whatever it says, so no group of two is degenerate."""
    for name in ("answer_reward", "recall_reward"):
        right = cycle([0.0, 1.0])
        monkeypatch.setattr(memtrain, name, lambda said, wanted, right=right: next(right))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    done = process(
        "--steps", 2, "--chunks", 2, "--documents", 3, "--g1", 4, "--g2", 2, "--eval_documents", 2, "--out", out,
        "--kl", 1e-3,
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_writes_all_it_promises(tiny_run):
    """Metrics, samples, evaluation and config are there and make sense."""
    out, done = tiny_run
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert 0 <= m["end_to_end"] <= 1 and 0 <= m["degenerate"] <= 1 and 0 < m["memory_tokens"] <= 64
        assert m["entropy"] >= 0 and m["tokens_per_second"] > 0 and m["seconds_update"] > 0
        assert 0 <= m["padding_rollout"] < 0.15 and 0 <= m["padding_update"] < 0.15
        assert m["approx_kl"] == pytest.approx(0, abs=1e-6) and m["clip_fraction"] == 0  # one update a rollout
    rows = json.loads((out / "eval.json").read_text())
    assert {(r["when"], r["task"], r["memory"], r["chunks"]) for r in rows} == {
        (w, t, m, c)
        for w in ("before", "after") for t in ("end_to_end", "recall") for m in ("kept", "empty")
        for c in (1, 2, 4, 8, 16) if c > 1 or t == "end_to_end"  # nothing was read before the only chunk
    }
    assert all(r["low"] <= r["accuracy"] <= r["high"] and 0 < r["n"] <= 2 for r in rows)
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])["step"] == 1
    assert json.loads((out / "config.json").read_text())["g1"] == 4
    assert "step 1:" in done.stdout + done.stderr and "| end_to_end, before | kept |" in done.stdout


def test_the_checkpoint_loads_and_differs(tiny_run, monkeypatch, capsys):
    """AutoModelForCausalLM, AutoTokenizer and eval.py load it; training moved the weights; a model card is there."""
    out, _ = tiny_run
    trained = AutoModelForCausalLM.from_pretrained(out / "checkpoint").state_dict()
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model", dtype=torch.float32).state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[n], base[n].to(trained[n].dtype)) for n in base)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out / "checkpoint", ROOT / "tiny/model")]
    assert tokenizers[0]("Ulm")["input_ids"] == tokenizers[1]("Ulm")["input_ids"]
    assert (out / "checkpoint/README.md").read_text().startswith("---")
    assert (out / "checkpoint/model.safetensors").exists()
    settings = ["--model", str(out / "checkpoint"), "--eval_documents", "2", "--lengths", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *settings])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")  # as `python eval.py`, without a process's imports
    said = capsys.readouterr().out
    assert f"settings are those of {out / 'config.json'}" in said and "3 chunks" in said


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    """--seed and --steps do what they say: equal metrics for equal seeds (times aside), different ones otherwise."""
    seen = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        done = command(*SMALL, "--steps", 1, "--seed", seed, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        (line,) = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        seen.append({k: v for k, v in json.loads(line).items() if "second" not in k})
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("extra, updates, lr", [
    (["--ablation", "end_to_end", "--lr", 1e-4, "--lr_warmup", 1], 1, 1e-4),
    (["--ablation", "decoupled", "--shared_recall_draw", "True", "--lr", 1e-4, "--lr_warmup", 4], 1, 2.5e-5),
    (["--update_batch", 1, "--dtype", "bfloat16", "--gradient_checkpointing", "True"], 2, 1e-4),
])
def test_ablations_and_switches_run(tmp_path, every_group_counts, extra, updates, lr):
    """End-to-end has no recall figures, decoupled has; the step's updates are counted, and its rate is logged."""
    done = command(*SMALL, "--steps", 1, "--out", tmp_path / "run", *extra)
    assert done.returncode == 0, done.stderr
    m = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (m["recall"] is None) == ("end_to_end" in extra)
    assert (m["reward"] == m["end_to_end"] == 0.5) == ("--ablation" in extra)
    assert (m["updates"], m["bad_updates"], m["lr"]) == (updates, 0, pytest.approx(lr))


def test_batches_keep_their_budgets_and_only_evaluation_is_greedy(tmp_path, monkeypatch, every_group_counts):
    """--rollout-tokens bounds all sampling, --train-tokens all passes of reference, pi_old and policy."""
    sampled, passes = [], {}

    def generate(*given, budget, sample=sampling.generate):
        sampled.append((given[-1], budget.tokens))  # the last one is `greedy`
        return sample(*given, budget=budget)

    def token_logprobs(model, turns, with_entropy=False, compute=packing.token_logprobs):
        _, padded = packing.batch_tokens(model, turns)
        passes.setdefault((id(model), torch.is_grad_enabled()), []).append(padded)
        return compute(model, turns, with_entropy)

    monkeypatch.setattr(sampling, "generate", generate)
    monkeypatch.setattr(packing, "token_logprobs", token_logprobs)
    monkeypatch.setattr(memtrain, "default_lengths", lambda chunks: [2])
    done = command(
        *SMALL, "--eval_documents", 1, "--chunks", 2, "--steps", 1, "--update_batch", 1, "--kl", 0.1,
        "--rollout_tokens", 1700, "--train_tokens", 250, "--out", tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert {tokens for _, tokens in sampled} == {1700}
    assert [greedy for greedy, _ in groupby(sampled, key=lambda call: call[0])] == [True, False, True]
    assert len(passes) == 3 and all(max(tokens) <= 250 < sum(tokens) for tokens in passes.values())


@pytest.mark.parametrize("task", ["memtrain", "longqa", "searchqa"])
def test_the_plain_twins_run_every_task(tmp_path, task):
    """--plain True samples and trains by the lesson's own code; nothing of engine/ is asked for tokens or log-probs."""
    with mock.patch("engine.sampling.generate_batch", None), mock.patch("engine.packing.layout", None):
        done = command(
            "--task", task, *SMALL, "--chunks", 1 if task == "longqa" else 2, "--steps", 1, "--eval_documents", 1,
            "--searches", 1, "--plain", "True", "--out", tmp_path / "run",
        )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and (tmp_path / "run/checkpoint/model.safetensors").exists()
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert {row["when"] for row in rows} == {"before", "after"}


@pytest.mark.parametrize("name", [
    "smollm2-instruct", pytest.param("qwen3-4b-instruct-2507", marks=pytest.mark.slow),
    pytest.param("qwen2.5-instruct", marks=pytest.mark.slow),
])
def test_two_steps_on_real_text_with_real_tokenizers(tmp_path, name):
    """Real chat templates, real Wikipedia passages, 512-token chunks, a small random Qwen3-shaped model."""
    tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    model = tiny_model(
        vocab_size=len(tokenizer), initializer_range=0.02, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = command(
        "--model", tmp_path / "model", "--corpus", shared("wiki/passages.jsonl"), "--max_passages", 600,
        "--chunk_tokens", 512, "--memory_tokens", 32, "--answer_tokens", 8, "--chunks", 2, "--steps", 2,
        "--out", tmp_path / "run", *SMALL,
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    for m in metrics:
        assert m["padding_rollout"] < 0.15 and m["padding_update"] < 0.15


def test_a_mistake_as_a_process(tmp_path):
    """As users see it: one line on stderr, exit code 2 and no folder; tests/engine/test_bad_input.py has many."""
    (tmp_path / "malformed.jsonl").write_text('{"title": "B", "te\n')
    done = process("--corpus", tmp_path / "malformed.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_learning_rate_schedule():
    """Linear warm-up to the peak, then constant, or a cosine towards zero."""
    constant = Config(lr=1.0, lr_warmup=4, lr_schedule="constant", steps=10)
    assert [learning_rate(constant, s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = Config(lr=1.0, lr_warmup=1, lr_schedule="cosine", steps=10)
    assert learning_rate(cosine, 5) == pytest.approx(0.5) and learning_rate(cosine, 9) < 0.03


def test_a_positive_advantage_raises_the_probability():
    """One update makes the rewarded completion likelier and the other less so: the sign of everything together."""
    model = tiny_model()
    assert enable_packing(model)
    turns = [
        Turn([1, 2, 3], [4, 5, 6], True, "", place=0, advantage=1.0),
        Turn([1, 2, 3], [7, 8], True, "", place=0, advantage=-1.0),
    ]
    before = token_logprobs(model, turns)[0].sum(1)
    stats = update(model, MasterAdamW(model, 1e-3), turns, 1e-3, Config())
    after = token_logprobs(model, turns)[0].sum(1)
    assert after[0] > before[0] and after[1] < before[1] and stats["tokens"] == 5 and stats["updates"] == 1
