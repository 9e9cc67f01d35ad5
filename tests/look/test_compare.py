"""look/compare.py: two models on the same documents, and the picture of an evaluation."""

import sys

import numpy as np
import pytest
from helpers import command

from engine.metrics import row
from look.compare import check_picture, differences, paired_bootstrap, plot


def test_differences_pair_the_same_documents_and_name_the_task():
    """A document that only one model has counts for neither."""
    first = row("a", "recall", 4, "kept", {0: 0.0, 1: 1.0, 2: 0.0})
    second = row("b", "recall", 4, "kept", {2: 0.0, 1: 1.0, 0: 1.0, 9: 0.0})
    (line,) = differences([first, second])
    name, figures = line.split(": ")
    assert name == "b - a, recall, kept, 4" and float(figures.split()[0]) == pytest.approx(1 / 3, abs=1e-3)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    """On random right and wrong; equal scores differ by nothing, surely."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2, 400).astype(float), rng.integers(0, 2, 400).astype(float)
    mean, low, high = paired_bootstrap(first.tolist(), second.tolist())
    half = 1.96 * (second - first).std() / 20
    assert mean == pytest.approx((second - first).mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    assert paired_bootstrap([0, 1, 0], [0, 1, 0]) == (0, 0, 0)


def test_a_plot_is_a_picture(tmp_path):
    """With matplotlib installed the rows' plot is written, in the format that its name ends with."""
    pytest.importorskip("matplotlib")
    rows = [row("now", "longqa", chunks, memory, {0: 1.0, 1: 0.0}) for memory in ("kept", "empty") for chunks in (2, 4)]
    check_picture(str(tmp_path / "plot.png"))
    plot(rows, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_evaluated(tmp_path, monkeypatch):
    """One line says what to install, and no rows are written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command("--plot", tmp_path / "plot.png", "--out", tmp_path / "rows.json", script="eval")
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and not list(tmp_path.iterdir())
