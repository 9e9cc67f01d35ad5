"""`memtrain.py --explain`: what it shows is what training does, and nothing stays behind."""

import re

import pytest
import torch

from command import command
from engine import parallel

SMALL = ["--documents", 4, "--g1", 4, "--g2", 3, "--seed", 3]


@pytest.mark.parametrize(
    "flags",
    [[], ["--kl", 0.1, "--advantage", "mean"], ["--update_batch", 1, "--eps_low", 0.001, "--lr", 0.02]],
    ids=["default", "kl", "clipped"],
)
def test_the_loss_by_hand_is_the_loss_by_code(tmp_path, flags):
    """Before the update and after it, with a KL, with a clip that bites; the update lowers the loss."""
    done = command("--explain", *SMALL, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (before, before_code), (after, after_code) = (
        map(float, line.split()[-2:]) for line in done.stdout.strip().splitlines()[-2:]
    )
    assert before == pytest.approx(before_code, abs=2e-6) and after == pytest.approx(after_code, abs=2e-6)
    assert after != 0 and (after < before - 1e-4 or "--update_batch" in flags)
    assert not (tmp_path / "run").exists() and [file.name for file in tmp_path.iterdir()] == [".entities"]


def test_every_part_of_a_step_is_shown(tmp_path):
    """The document, a prompt, memories, recall, the group's rewards by Eq. 2 and 3, tokens and their ratios."""
    done = command("--explain", *SMALL, "--advantage", "mean", "--out", tmp_path / "run")
    assert re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE) == list("123345678")
    assert "[MASK]" in done.stdout and "[TARGET]" in done.stdout and "<section>" in done.stdout
    group = re.findall(r"^ +\d: .* +(\S+) +(\S+) +(\S+) +(\S+)$", done.stdout.split("\n5. ")[1].split("\n6. ")[0], re.M)
    group = torch.tensor([[float(value) for value in row] for row in group])  # (samples, EM, lambda x recall, R^E, A)
    assert len(group) == 4 and torch.allclose(group[:, 0] + group[:, 1], group[:, 2])
    assert torch.allclose(group[:, 3], group[:, 2] - group[:, 2].mean(), atol=1e-4) and group[:, 3].any()
    for token in re.findall(r"^ +'.*' +(\S+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE):
        before, after, ratio = map(float, token)
        assert ratio == pytest.approx(torch.tensor(after - before).exp().item(), abs=2e-4)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda: (0, 2, "cpu"))
    done = command("--explain", "--out", tmp_path / "run")
    assert done.returncode == 2 and "--explain" in done.stderr and len(done.stderr.strip().splitlines()) == 1
