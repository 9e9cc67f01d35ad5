"""memtrain.py and eval.py as commands: a run on the tiny default, real tokenizers and text, and bad input."""

import gc
import json
import re
import runpy
import shutil
import subprocess
import sys
from itertools import cycle, groupby
from pathlib import Path

import pytest
import torch
from helpers import command, shared, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import memtrain
import rollout
from engine import models
from engine.config import Config
from engine.errors import UserError
from engine.models import load_model
from engine.run import worth_keeping
from fast import packing, sampling
from memtrain import learning_rate

ROOT = Path(__file__).parents[1]


def process(*arguments):
    """`python memtrain.py` as users run it."""
    command = [sys.executable, ROOT / "memtrain.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


SMALL = ["--documents", 2, "--g1", 2, "--g2", 2, "--chunks", 2, "--memory_tokens", 24, "--eval_documents", 0]


@pytest.fixture
def every_group_counts(monkeypatch):
    """Every second answer is right, whatever it says, so no group of two is degenerate."""
    for name in ("answer_reward", "recall_reward"):
        right = cycle([0.0, 1.0])
        monkeypatch.setattr(memtrain, name, lambda said, wanted, right=right: next(right))


@pytest.fixture
def one_length(monkeypatch):
    """Evaluations are of two chunks only: eight times as many take eight times as long."""
    real = memtrain.evaluate
    monkeypatch.setattr(memtrain, "evaluate", lambda *given: real(*given, lengths=[2]))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    done = process(
        "--steps", 2, "--chunks", 2, "--documents", 3, "--g1", 4, "--g2", 2, "--eval_documents", 2, "--out", out,
        "--kl", 1e-3, "--memory_tokens", 24,
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_writes_all_it_promises(tiny_run):
    """Metrics, samples, evaluation and config are there and make sense."""
    out, done = tiny_run
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert 0 <= m["end_to_end"] <= 1 and 0 <= m["degenerate"] <= 1 and 0 < m["memory_tokens"] <= 24
        assert m["entropy"] >= 0 and m["tokens_per_second"] > 0 and m["seconds_update"] > 0
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
    assert "step 1:" in done.stdout + done.stderr and "| end_to_end | kept   |" in done.stdout


def test_the_checkpoint_loads_and_differs(tiny_run, monkeypatch, capsys):
    """AutoModelForCausalLM, AutoTokenizer and eval.py load it; training moved the weights."""
    out, _ = tiny_run
    trained = AutoModelForCausalLM.from_pretrained(out / "checkpoint").state_dict()
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model", dtype=torch.float32).state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[n], base[n].to(trained[n].dtype)) for n in base)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out / "checkpoint", ROOT / "tiny/model")]
    assert tokenizers[0]("Ulm")["input_ids"] == tokenizers[1]("Ulm")["input_ids"]
    assert (out / "checkpoint/model.safetensors").exists()
    settings = ["--model", str(out / "checkpoint"), "--eval_documents", "2", "--lengths", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *settings])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")  # as `python eval.py`, without a process's imports
    said = capsys.readouterr().out
    assert f"settings are from {out / 'config.json'}" in said and re.search(r"\| (1-)?3 +\|", said)


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


@pytest.mark.parametrize("fast", [False, True])
def test_batches_keep_their_budgets_and_only_evaluation_is_greedy(
    tmp_path, monkeypatch, every_group_counts, one_length, fast
):
    """--rollout-tokens bounds all sampling, --train-tokens all passes of reference, pi_old and policy."""
    sampled, passes = [], {}
    sampler, trainer = (sampling, packing) if fast else (rollout, grpo)

    def generate(*given, sample=sampler.generate):
        *_, greedy, budget = given
        sampled.append((greedy, budget.tokens))
        return sample(*given)

    def token_logprobs(model, turns, with_entropy=False, compute=trainer.token_logprobs):
        rows = packing.rows_of(model, turns)
        padded = len(rows) * max(packing.row_tokens([turns[i] for i in row]) for row in rows)
        passes.setdefault((id(model), torch.is_grad_enabled()), []).append(padded)
        return compute(model, turns, with_entropy)

    monkeypatch.setattr(sampler, "generate", generate)
    monkeypatch.setattr(trainer, "token_logprobs", token_logprobs)
    done = command(
        *SMALL, "--eval_documents", 1, "--steps", 1, "--update_batch", 1, "--kl", 0.1, "--fast", fast,
        "--rollout_tokens", 1700, "--train_tokens", 250, "--out", tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert {tokens for _, tokens in sampled} == {1700}
    assert [greedy for greedy, _ in groupby(sampled, key=lambda call: call[0])] == [True, False, True]
    assert len(passes) == 3 and all(max(tokens) <= 250 < sum(tokens) for tokens in passes.values())


# ---- the plain functions and their twins ------------------------------------------------------------------


def watch(monkeypatch, *places) -> list[str]:
    """The names of these functions, each given as (module, name), whenever one is called."""
    called = []

    def watched(module, name):
        real = getattr(module, name)

        def wrapper(*given, **named):
            called.append(f"{module.__name__}.{name}")
            return real(*given, **named)

        return wrapper

    for module, name in places:
        monkeypatch.setattr(module, name, watched(module, name))
    return called


PLAIN = (rollout, "generate"), (grpo, "micro_batches"), (grpo, "token_logprobs")
TWINS = (sampling, "generate"), (packing, "micro_batches"), (packing, "token_logprobs")


def names(places) -> set[str]:
    return {f"{module.__name__}.{name}" for module, name in places}


@pytest.mark.parametrize("task", ["memtrain", "longqa", "searchqa"])
def test_the_default_is_the_lesson(tmp_path, monkeypatch, every_group_counts, one_length, task):
    """Every task samples and trains by the functions of rollout.py and grpo.py; fast/ can't even be imported."""
    for name in ["fast", *(name for name in sys.modules if name.startswith("fast."))]:
        monkeypatch.setitem(sys.modules, name, None)
    called = watch(monkeypatch, *PLAIN)
    done = command(
        "--task", task, *SMALL, "--steps", 1, "--eval_documents", 1, "--out", tmp_path / "run",
        *(["--searches", 1] if task == "searchqa" else []),
    )
    assert done.returncode == 0, done.stderr
    assert set(called) == names(PLAIN)
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and (tmp_path / "run/checkpoint/model.safetensors").exists()
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert {row["when"] for row in rows} == {"before", "after"}


def test_fast_puts_the_twins_in_their_place(tmp_path, monkeypatch, every_group_counts, one_length):
    """With --fast True none of the plain three is called; greedy rows, before any update, are the same."""
    arguments = [*SMALL, "--steps", 1, "--eval_documents", 8]
    rows = []
    for fast, places in ((False, PLAIN), (True, TWINS)):
        with monkeypatch.context() as patched:
            called = watch(patched, *PLAIN, *TWINS)
            done = command(*arguments, "--fast", fast, "--out", tmp_path / f"fast{fast}")
        assert done.returncode == 0, done.stderr
        assert set(called) == names(places)
        rows.append(json.loads((tmp_path / f"fast{fast}/eval.json").read_text()))
    first, second = ([row for row in some if row["when"] == "before"] for some in rows)
    assert first == second and any(row["accuracy"] for row in first)


@pytest.mark.slow
def test_a_run_that_an_exception_ended_resumes(tmp_path, monkeypatch):
    """A user's error is its line, a bug its traceback; the same command resumes after the last checkpoint.

    The weights in the end are those of a run that never stopped, and so are the metrics, times aside.
    """
    arguments = [*SMALL, "--steps", 3, "--save_every", 1, "--out"]
    assert command(*arguments, tmp_path / "whole").returncode == 0
    real = memtrain.draw_targets

    def stopped_at(bad_step: int, error: type[Exception]):
        def fails(trajectories, config, step):
            if step == bad_step:
                raise error("it gave out")
            real(trajectories, config, step)

        torch.manual_seed(123)  # what this process drew in between must not matter
        with monkeypatch.context() as patched:
            patched.setattr(memtrain, "draw_targets", fails)
            done = command(*arguments, tmp_path / "run")
        gc.collect()  # the folder's lock goes with the last frame that holds it, here not with a process
        folder = (tmp_path / "run/checkpoint").resolve().name
        last = done.stderr.strip().rpartition("\n")[2]
        return done.returncode, last, "Traceback" in done.stderr, folder, done.stdout

    *ended, _ = stopped_at(1, UserError)
    assert ended == [2, "error: it gave out", False, "step-000001"]
    *ended, told = stopped_at(2, KeyError)
    assert ended == [1, "KeyError: 'it gave out'", True, "step-000002"] and "resuming after step 1" in told
    *ended, told = stopped_at(3, KeyError)
    assert ended[::3] == [0, "step-000003"] and "resuming after step 2" in told and (tmp_path / "run/finished").exists()
    ours, theirs = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    ours, theirs = ([{k: v for k, v in json.loads(row).items() if "second" not in k} for row in own] for own in lines)
    assert ours == theirs and len(ours) == 3


# ---- real text --------------------------------------------------------------------------------------------


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
        *SMALL, "--model", tmp_path / "model", "--corpus", shared("wiki/passages.jsonl"), "--max_passages", 600,
        "--chunk_tokens", 512, "--memory_tokens", 32, "--answer_tokens", 8, "--steps", 2, "--fast", "True",
        "--out", tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    sizes = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in sample["document"]]
    assert len(sizes) == 2 and 400 < sizes[0] and max(sizes) <= 512


# ---- mistakes ---------------------------------------------------------------------------------------------


def test_a_mistake_as_a_process(tmp_path):
    """As users see it: one line on stderr, exit code 2, and no run in the folder; engine/test_bad_input.py has many."""
    (tmp_path / "malformed.jsonl").write_text('{"title": "B", "te\n')
    done = process("--corpus", tmp_path / "malformed.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not any(map(worth_keeping, (tmp_path / "run").iterdir()))


MISSING = {
    "--lora 4": "--lora 4: needs peft; run `pip install peft`",
    "--ner en_none": "--ner en_none: not installed; run `python -m spacy download en_none`, or use --ner rules",
    "--task longqa --questions no.json": "--questions no.json: no such file",
    "--task searchqa --eval_questions no.json": "--eval-questions no.json: no such file",
    "--g1 1": "--g1 and --g2 must be at least 2: an advantage compares the samples of a group",
}


@pytest.mark.parametrize("script", ["memtrain", "eval"])
@pytest.mark.parametrize("arguments", MISSING)
def test_what_is_missing_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, script, arguments):
    """No weights, no passages and no folder: a package, a pipeline or a file that isn't there is one line at once."""
    def reached(*given):
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(models, "load_model", reached)
    monkeypatch.setattr(models, "load_policy", reached)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    done = command(*arguments.split(), "--out", tmp_path / "out", script=script)
    assert done.returncode == 2 and done.stderr.strip() == f"error: {MISSING[arguments]}"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def model_copy(tmp_path):
    shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("template, why", [
    ("{{ raise_exception('roles must alternate') }}", "one user message \\(.*roles must alternate"),
    ("{{ messages[0].content.no_such.field }}", "can't be rendered with one user message \\(.*no_such"),
    ("{% for %}", "can't be rendered with one user message \\(Expected"),
    ("{{ 'a template without the message' }}", "doesn't show the text of a user message exactly once"),
])
def test_a_chat_template_that_cannot_be_rendered_is_refused(model_copy, monkeypatch, template, why):
    """It is a program of the model's authors: refused before the weights, which may take minutes, are read."""
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model_copy)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **more: pytest.fail("too late"))
    with pytest.raises(UserError, match=why) as caught:
        load_model(str(model_copy), "cpu", given="--against")
    start = f"--against {model_copy}: its chat template "
    assert str(caught.value).startswith(start) and len(str(caught.value).splitlines()) == 1


# ---- the rate ---------------------------------------------------------------------------------------------


def test_learning_rate_schedule():
    """Linear warm-up to the peak, then constant, or a cosine towards zero."""
    constant = Config(lr=1.0, lr_warmup=4, lr_schedule="constant", steps=10)
    assert [learning_rate(constant, s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = Config(lr=1.0, lr_warmup=1, lr_schedule="cosine", steps=10)
    assert learning_rate(cosine, 5) == pytest.approx(0.5) and learning_rate(cosine, 9) < 0.03
