"""engine/parallel.py: two gloo processes do what one does, whatever each of them kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import start, wait
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import memtrain
from engine import models, parallel
from engine.config import Config
from masking import Document
from rollout import Trajectory, Turn

ROOT = Path(__file__).parents[2]
KEPT = [[0, 1, 2, 4], [0, 2, 4], [1], [], [0, 1, 2, 3, 4]]  # documents of five steps: one of two may have none
ANSWERS = ["Ada Lovelace", "Ulm", "1815", "the river Po", "Bern"]  # a document's, by its place


def model(seed: int = 0) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=0,
    )
    with torch.random.fork_rng():  # each process goes on with numbers of its own
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def turns_of(step: int, place: int) -> list[Turn]:
    """The turns of a document of a step, the same in every process."""
    generator = torch.Generator().manual_seed(10 * step + place)
    turns = []
    for n in range(place + 2):
        ids = torch.randint(0, 50, (9 + n,), generator=generator).tolist()
        advantage = torch.randn((), generator=generator).item()
        prompt = turns[-1].prompt_ids if n == 1 else ids[:5]  # two of a document share theirs
        turns.append(Turn(prompt, ids[5:], True, "", place=place, advantage=advantage))
    return turns


class Source:
    """Stands in for a task: two trajectories a document, of which the first is right where the document is kept."""

    def __init__(self):
        self.drawn = []

    def document(self, index: int) -> Document:
        return Document(index, "", "Who?", [ANSWERS[index % 5]], [], [])

    def read(self, sample, documents, config, samples: int) -> list[Trajectory]:
        self.drawn.append(torch.rand(3))
        trajectories = []
        for document in documents:
            step, turns = document.index // 5, turns_of(document.index // 5, document.place)
            right = document.answers[0] if document.place in KEPT[step] else "nobody"
            trajectories += [Trajectory(document, turns[:1], [], right), Trajectory(document, turns[1:], [], "nobody")]
        return trajectories


class Capture:
    """Stands in for the optimizer: keeps the gradients that it would have stepped with, and leaves the weights."""

    def __init__(self, model):
        self.weights = self.masters = list(model.parameters())
        self.gradients = []

    def step(self, lr, grad_clip):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        parallel.sum_gradients(gradients)
        self.gradients.append(torch.cat([g.flatten() for g in gradients]))
        for p in self.weights:
            p.grad = None
        return 0.0


def five_steps(folder: Path, fast: bool, capture: bool) -> None:
    """memtrain.py's loop on stand-ins, in `folder`/run; leaves gradients at fixed weights, or the trained weights."""
    source, policy = Source(), model()
    optimizer = Capture(policy)
    memtrain.load_task = lambda *more: (source, source.read)
    memtrain.check_sampler = lambda *more: None
    models.load_policy = lambda *more: (policy, AutoTokenizer.from_pretrained(ROOT / "tiny/model"))
    models.load_reference = lambda *more: model(seed=1)
    if capture:
        memtrain.make_optimizer = lambda *more: optimizer
    memtrain.main(
        Config(
            out=str(folder / "run"), documents=5, g1=2, steps=5, update_batch=3, train_tokens=40, kl=0.1, lr=1e-3,
            lr_warmup=1, lr_schedule="constant", eval_documents=0, ablation="end_to_end", fast=fast,
        )
    )
    found = {"drawn": torch.stack(source.drawn)}
    found |= {"weights": torch.cat([p.detach().flatten() for p in policy.parameters()])}
    found |= {"gradients": torch.stack(optimizer.gradients)} if capture else {}
    torch.save(found, folder / f"{os.environ.get('RANK', 'alone')}.pt")


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fast, capture", [(False, True), (True, True), (False, False)])
def test_two_processes_equal_one(tmp_path, fast, capture):
    """Same gradient (1e-6) for every update, also where a process kept nothing; weights stay equal to the bit. Each
    draws numbers of its own, and a line of metrics is of the samples and updates of both."""
    (tmp_path / "one").mkdir()
    both, one = start(five_steps, tmp_path, fast, capture, ranks=2), start(five_steps, tmp_path / "one", fast, capture)
    assert wait(both) == [0, 0] and wait(one) == [0]
    files = [tmp_path / "0.pt", tmp_path / "1.pt", tmp_path / "one/alone.pt"]
    first, second, alone = (torch.load(file, weights_only=True) for file in files)
    assert torch.equal(first["weights"], second["weights"]) and not (first["drawn"] == second["drawn"]).any()
    if capture:
        assert len(alone["gradients"]) == 7  # an update in which nobody kept a document is left out, by everybody
        assert alone["gradients"].norm(dim=1).min() > 1e-3
        assert torch.equal(first["gradients"], second["gradients"])
        scale = alone["gradients"].norm(dim=1, keepdim=True)
        assert ((first["gradients"] - alone["gradients"]).norm(dim=1, keepdim=True) / scale).max() < 1e-6
    else:
        torch.testing.assert_close(first["weights"], alone["weights"], atol=2e-3, rtol=0)  # Adam magnifies rounding
        assert not torch.equal(alone["weights"], torch.cat([p.detach().flatten() for p in model().parameters()]))
    lines = metrics_of(tmp_path), metrics_of(tmp_path / "one")
    assert [line["end_to_end"] for line in lines[0]] == [len(kept) / 10 for kept in KEPT]
    assert [line["updates"] for line in lines[0]] == [2, 2, 1, 0, 2]
    assert lines[0][0]["loss"] and lines[0][0]["kl"] > 0 < lines[0][0]["entropy"]
    close = 1e-5 if capture else 1e-1
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {name for name in ours if "second" in name}:
            assert ours[name] == (theirs[name] and pytest.approx(theirs[name], rel=close, abs=close)), name


@pytest.mark.slow
def test_torchrun_writes_one_run(tmp_path):
    """`torchrun --nproc_per_node 2 memtrain.py`: one line of metrics, one end, and all questions in the rows."""
    size = "--steps 1 --chunks 2 --chunk_tokens 32 --documents 3 --g1 2 --g2 2 --memory_tokens 16".split()
    size += ["--eval_documents", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "memtrain.py"), *size, "--fast", "True", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path)) == 1 == done.stdout.count("checkpoint in")
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert all(row["n"] == 2 for row in rows if row["task"] == "end_to_end")
