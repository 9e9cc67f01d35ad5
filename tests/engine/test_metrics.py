"""engine/report.py: intervals, rows that are compared document by document, tables and plots."""

import random
import sys

import numpy as np
import pytest
from helpers import command

from engine.report import check_files, differences, paired_bootstrap, plot, row, table, wilson


def test_a_row_is_in_the_order_of_its_documents():
    """Whatever the order in which processes bring them: accuracy, interval and scores are the same."""
    one = row("now", "recall", 4, "kept", {0: 1.0, 1: 0.0, 2: 1.0, 5: 1.0})
    other = row("now", "recall", 4, "kept", {5: 1.0, 2: 1.0, 0: 1.0, 1: 0.0})
    assert one == other and one["documents"] == [0, 1, 2, 5] and one["scores"] == [1.0, 0.0, 1.0, 1.0]
    assert one["n"] == 4 and one["accuracy"] == 0.75 and one["low"] < 0.75 < one["high"]


def test_differences_pair_the_same_documents_and_name_the_task():
    """A document that only one model has counts for neither."""
    first = row("a", "recall", 4, "kept", {0: 0.0, 1: 1.0, 2: 0.0})
    second = row("b", "recall", 4, "kept", {2: 0.0, 1: 1.0, 0: 1.0, 9: 0.0})
    (line,) = differences([first, second])
    name, figures = line.split(": ")
    assert name == "b - a, recall, kept, 4" and float(figures.split()[0]) == pytest.approx(1 / 3, abs=1e-3)


def test_wilson_covers_at_its_nominal_rate():
    """Simulation: over many draws the 95 % interval holds the true share about 95 % of the time, also near 0 and 1."""
    rng = random.Random(0)
    for p in (0.03, 0.3, 0.9):
        covered = 0
        for _ in range(2000):
            low, high = wilson(sum(rng.random() < p for _ in range(64)), 64)
            covered += low <= p <= high
        assert 0.92 <= covered / 2000 <= 0.985


def test_wilson_known_value_and_edges():
    """Textbook value for 8 of 10, and intervals that stay inside 0..1."""
    low, high = wilson(8, 10)
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert 0 <= wilson(0, 20)[0] < 1e-9 and 1 - 1e-9 < wilson(20, 20)[1] <= 1 and wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    """On random right and wrong; equal scores differ by nothing, surely."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2, 400).astype(float), rng.integers(0, 2, 400).astype(float)
    mean, low, high = paired_bootstrap(first.tolist(), second.tolist())
    half = 1.96 * (second - first).std() / 20
    assert mean == pytest.approx((second - first).mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    assert paired_bootstrap([0, 1, 0], [0, 1, 0]) == (0, 0, 0)


def test_table_has_a_cell_for_every_row():
    """A line per task, time and memory, a column per length, and a dash where nothing was measured."""
    row = dict(n=10, low=0.1, high=0.9)
    rows = [
        dict(row, when="before", task="recall", chunks=2, memory="kept", accuracy=0.25),
        dict(row, when="before", task="recall", chunks=4, memory="kept", accuracy=0.5),
        dict(row, when="after", task="recall", chunks=4, memory="kept", accuracy=0.75),
    ]
    lines = table(rows).splitlines()
    assert lines[0].count("chunks") == 2 and len(lines) == 4
    assert "0.25" in lines[2] and "0.50" in lines[2] and "before" in lines[2]
    assert "0.75" in lines[3] and "| - |" in lines[3]
    row |= dict(when="now", task="longqa", memory="kept", accuracy=0.25, f1=0.375, substring=0.5)
    rows = [dict(row, n=n, chunks=n) for n in (4, 8)]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and all("| 4-8 |" in line for line in lines[2:])
    assert "0.38" in lines[3] and "F1" in lines[3] and "0.50" in lines[4] and "substring" in lines[4]


def test_a_plot_is_a_picture(tmp_path):
    """With matplotlib installed the rows' plot is written, in the format that its name ends with."""
    pytest.importorskip("matplotlib")
    rows = [row("now", "longqa", chunks, memory, {0: 1.0, 1: 0.0}) for memory in ("kept", "empty") for chunks in (2, 4)]
    check_files(tmp_path / "rows.json", str(tmp_path / "plot.png"))
    plot(rows, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_evaluated(tmp_path, monkeypatch):
    """One line says what to install, and no rows are written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command("--plot", tmp_path / "plot.png", "--out", tmp_path / "rows.json", script="eval")
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and not list(tmp_path.iterdir())
