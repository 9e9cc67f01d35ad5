"""`memtrain.py --explain`: what it shows is what training does, and nothing is left behind."""

import re

import pytest
import torch
from helpers import command

from engine import parallel
from engine.config import Config
from grpo import grpo_loss, turn_weights
from look import explain
from look.explain import loss_by_hand
from rollout import Turn

SMALL = ["--documents", 4, "--g1", 4, "--g2", 3, "--seed", 3]


FLAGS = {
    "default": [],
    "kl": ["--fast", "--kl", 0.1, "--advantage", "mean", "--lr", 5e-5],
    "clipped": ["--fast", "--update_batch", 1, "--eps_low", 0.001, "--lr", 0.02],
}


@pytest.mark.parametrize("flags", [
    pytest.param(flags, id=name, marks=[] if name == "kl" else pytest.mark.slow) for name, flags in FLAGS.items()
])
def test_the_loss_by_hand_is_the_loss_by_code(tmp_path, monkeypatch, flags):
    """Before the update and after it, by both twins, with a KL, with a clip that bites; the update lowers the loss."""
    given = []
    monkeypatch.setattr(explain, "loss_by_hand", lambda *own: given.append(own) or loss_by_hand(*own))
    done = command("--explain", *SMALL, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (before, before_code), (after, after_code) = (
        map(float, line.split()[-2:]) for line in done.stdout.strip().splitlines()[-2:]
    )
    assert before == pytest.approx(before_code, abs=2e-6) and after == pytest.approx(after_code, abs=2e-6)
    assert after != 0 and (after < before - 1e-4 or "--update_batch" in flags)
    turns, old, new, config = given[-1]
    clipped = sum(
        ratio > 1 + config.eps_high if turn.advantage > 0 else ratio < 1 - config.eps_low
        for turn, was, now in zip(turns, old, new, strict=True)
        for ratio in (torch.tensor(now) - torch.tensor(was)).exp().tolist()
    )
    assert clipped > 20 or "--update_batch" not in flags
    assert not (tmp_path / "run").exists() and [file.name for file in tmp_path.iterdir()] == [".entities"]


def test_every_part_of_a_step_is_shown(tmp_path, monkeypatch):
    """The document, a prompt, memories, recall, the group's rewards by Eq. 2 and 3, tokens and their ratios; in lines
    that the terminal holds."""
    monkeypatch.setenv("COLUMNS", "80")
    done = command("--explain", *SMALL, "--fast", "--advantage", "mean", "--out", tmp_path / "run")
    assert re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE) == list("123345678")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "[MASK]" in done.stdout and "[TARGET]" in done.stdout and "<section>" in done.stdout
    group = re.findall(r"^ +\d: .* +(\S+) +(\S+) +(\S+) +(\S+)$", done.stdout.split("\n5. ")[1].split("\n6. ")[0], re.M)
    group = torch.tensor([[float(value) for value in row] for row in group])  # (samples, EM, recall, R^E, A)
    assert len(group) == 4 and torch.allclose(group[:, 0] + group[:, 1] / 2, group[:, 2], atol=1e-3)
    assert torch.allclose(group[:, 3], group[:, 2] - group[:, 2].mean(), atol=2e-3) and group[:, 3].any()
    tokens = re.findall(r"^ +'.*' +(\S+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
    assert 0 < len(tokens) <= 12
    for token in tokens:
        before, after, ratio = map(float, token)
        assert ratio == pytest.approx(torch.tensor(after - before).exp().item(), abs=2e-3)


def test_the_loss_by_hand_clips():
    """On random turns of three documents, ratios far from 1, with a KL: that of grpo_loss; many are clipped."""
    torch.manual_seed(0)
    turns = [Turn([1], [2] * n, True, "", place=n % 3, advantage=(-1.0) ** n * n) for n in (1, 2, 3, 4, 5, 6, 7)]
    rows = [[torch.randn(7, dtype=torch.float64) - 2 for _ in turns] for _ in range(3)]
    old, new, reference = (torch.stack(own) for own in rows)  # each (turns, 7)
    for turn, own in zip(turns, reference, strict=True):
        turn.reference_logprobs = own
    lengths = torch.tensor([len(turn.completion_ids) for turn in turns])
    mask = torch.arange(7) < lengths[:, None]
    advantages = torch.tensor([turn.advantage for turn in turns], dtype=torch.float64)
    weights = turn_weights([turn.place for turn in turns]).double()
    loss, stats = grpo_loss(new, old, reference, mask, advantages, weights, 0.2, 0.3, 0.1)
    cut = [[row[:n].tolist() for row, n in zip(own, lengths.tolist(), strict=True)] for own in (old, new)]
    assert loss_by_hand(turns, *cut, Config(eps_low=0.2, eps_high=0.3, kl=0.1)) == pytest.approx(loss.item(), abs=1e-6)
    assert stats["clipped"] > 5


@pytest.mark.parametrize("rewards, shown", [
    ([0.5] * 4, ["1, the best"]), ([0.5, 0.5, 0.0, 1.0], ["1, the worst", "2, the best"]),
])
def test_a_step_without_a_document_or_a_difference(tmp_path, monkeypatch, rewards, shown):
    """Search has no text to show and several answers; of equal rewards one trajectory is shown, else worst and best."""
    given = iter(rewards)
    monkeypatch.setattr(explain, "answer_reward", lambda *_: next(given))
    done = command("--explain", "--task", "searchqa", "--documents", 2, "--g1", 2, "--out", tmp_path / "run")
    assert done.returncode == 0 and "no text" in done.stdout and "[[" in done.stdout, done.stderr
    assert re.findall(r"^3\. The memories of trajectory (.*) rewarded$", done.stdout, re.MULTILINE) == shown


def test_no_folder_can_be_made(tmp_path):
    """Entities found in the corpus can't be kept in a folder inside a file: a line says so."""
    (tmp_path / "file").write_text("")
    done = command("--explain", "--out", tmp_path / "file/a/b")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: ") and str(tmp_path / "file/a") in last and "name another folder" in last


def test_several_processes_are_refused(tmp_path, monkeypatch):
    """Under torchrun it ends with one line that names --explain."""
    monkeypatch.setattr(parallel, "count", lambda: 2)
    done = command("--explain", "--out", tmp_path / "run")
    assert done.returncode == 2 and "--explain: shows the step of one process" in done.stderr and not done.stdout
