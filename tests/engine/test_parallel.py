"""engine/parallel.py: two gloo processes do what one does, whatever each of them kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import start, wait
from transformers import Qwen3Config, Qwen3ForCausalLM

from engine import packing, parallel
from engine.config import Config
from engine.optimizer import MasterAdamW
from engine.run import Run
from memtrain import store_reference_logprobs, update
from rollout import Turn

ROOT = Path(__file__).parents[2]
KEPT = [[0, 1, 2, 4], [0, 2, 4], [1], [], [0, 1, 2, 3, 4]]  # documents of five steps: one of two may have none


def model(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def step_turns(kept) -> list[Turn]:
    generator = torch.Generator().manual_seed(len(kept))
    turns = []
    for document in kept:
        for n in range(document + 2):
            ids = torch.randint(0, 50, (9 + n,), generator=generator).tolist()
            advantage = torch.randn((), generator=generator).item()
            prompt = turns[-1].prompt_ids if n == 1 else ids[:5]  # two of a document share theirs
            turns.append(Turn(prompt, ids[5:], True, "", place=document, advantage=advantage))
    return turns


class Capture:
    """Stands in for the optimizer: keeps the gradient that it would have stepped with."""

    def __init__(self, model):
        self.weights, self.gradients = list(model.parameters()), []

    def step(self, lr, grad_clip):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        parallel.sum_gradients(gradients)
        self.gradients.append(torch.cat([g.flatten() for g in gradients]))
        for p in self.weights:
            p.grad = None
        return 0.0


def five_steps(rank: int, processes: int) -> dict:
    """Gradients of the five steps at fixed weights, and the weights after five real updates."""
    config, policy, reference = Config(documents=5, update_batch=3, train_tokens=40, kl=0.1), model(), model(seed=1)
    packing.enable(policy, reference)
    capture = Capture(policy)
    for optimizer in (capture, MasterAdamW(policy, 1e-3)):
        for kept in KEPT:
            mine = [turn for turn in step_turns(kept) if turn.place % processes == rank]
            store_reference_logprobs(reference, mine, config, "cpu")
            update(policy, optimizer, mine, 1e-3, config)
    return {
        "gradients": torch.stack(capture.gradients),
        "weights": torch.cat([p.detach().flatten() for p in policy.parameters()]),
    }


def joined(folder: Path) -> None:
    """What a process of its own does: it joins the others, and leaves its results in `folder`."""
    run = Run(Config(out=str(folder / "run"), documents=2))
    drawn = torch.rand(3)
    torch.save(five_steps(run.rank, run.processes) | {"drawn": drawn}, folder / f"{run.rank}.pt")
    run.out.mkdir(exist_ok=True)
    log_samples(run, run.rank)
    parallel.stop()


def log_samples(run: Run, rank: int) -> None:
    """A line of metrics, of three samples that process 0 has and of one of process 1."""
    run.seconds, run.bar = {"rollout": 2.0}, SimpleNamespace(set_postfix=print)
    samples, name = ([1.0, 0.0, 0.0], "tokens") if rank == 0 else ([1.0], "clipped")
    names = "correct reward recalled recall_leaky degenerate leaks draws truncated unboxed memory_tokens prompt_tokens"
    rows = dict.fromkeys([*names.split(), "padding", "completion_tokens"], samples)
    rows["answers"] = ["Ada Lovelace", "Ulm", "1815"] if rank == 0 else ["the river Po"]
    stats = {"loss": 0.5 + rank, "used_tokens": 3, "padded_tokens": 4, name: 10 * (1 + rank)}
    run.log(0, rows, stats | {"grad_norm": 7.0, "updates": 1, "bad_updates": 0}, {"lr": 0.1})


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path):
    """Same gradient (1e-6) for every update, also where a process kept nothing; weights stay equal to the bit. Each
    draws numbers of its own, and a line of metrics is of the samples of both."""
    both = start(joined, tmp_path, ranks=2)
    alone = five_steps(0, 1)
    assert wait(both) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(alone["gradients"]) == 7  # an update in which nobody kept a document is left out, by everybody
    assert alone["gradients"].norm(dim=1).min() > 1e-3
    assert torch.equal(first["gradients"], second["gradients"]) and torch.equal(first["weights"], second["weights"])
    scale = alone["gradients"].norm(dim=1, keepdim=True)
    assert ((first["gradients"] - alone["gradients"]).norm(dim=1, keepdim=True) / scale).max() < 1e-6
    torch.testing.assert_close(first["weights"], alone["weights"], atol=2e-3, rtol=0)  # Adam magnifies rounding
    assert not torch.equal(alone["weights"], torch.cat([p.detach().flatten() for p in model().parameters()]))
    assert not torch.equal(first["drawn"], second["drawn"])
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["end_to_end"] == metrics["truncated"] == 0.5 and metrics["end_to_end_std"] == 0.5
    assert [metrics[f"y_{kind}"] for kind in ("number", "person", "several", "word")] == [0.25] * 4
    assert metrics["loss"] == 2.0 and metrics["clip_fraction"] == 2.0 and metrics["padding_update"] == 0.25
    assert metrics["tokens_per_second"] == 2.0 and metrics["grad_norm"] == 7.0 and metrics["step"] == 1


def test_torchrun_writes_one_run(tmp_path):
    """`torchrun --nproc_per_node 2 memtrain.py`: one line of metrics, one end, and all questions in the rows."""
    size = "--steps 1 --chunks 2 --documents 3 --g1 2 --g2 2 --memory_tokens 16 --eval_documents 2".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "memtrain.py"), *size, "--out", str(tmp_path / "run")], capture_output=True, text=True,
        timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "run")) == 1 == done.stdout.count("checkpoint in")
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert all(row["n"] == 2 for row in rows if row["task"] == "end_to_end")
