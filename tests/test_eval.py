"""eval.py: intervals, rows, the table."""

import json
import random
import shutil
from pathlib import Path

from command import command

from engine.report import table, wilson
from eval import default_lengths

ROOT = Path(__file__).parents[1]


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


def test_lengths_around_the_trained_one():
    """Half, once, twice, four and eight times the trained length, never below one chunk."""
    assert default_lengths(4) == [2, 4, 8, 16, 32] and default_lengths(1) == [1, 2, 4, 8]


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


def test_a_config_of_another_program_holds_no_settings(tmp_path):
    """Hugging Face's own trainer writes a config.json above its checkpoints, too; a length given twice counts once."""
    shutil.copytree(ROOT / "tiny/model", tmp_path / "checkpoint-5", ignore=shutil.ignore_patterns(".*"))
    for text in ('{"dtype": "float16", "chunks": 9}', "[1]", "{"):
        (tmp_path / "config.json").write_text(text)
        done = command(
            "--model", tmp_path / "checkpoint-5", "--eval_documents", 2, "--lengths", 1, 1, "--out",
            tmp_path / "rows.json", script="eval",
        )
        assert done.returncode == 0 and "settings are" not in done.stdout, done.stderr
        assert [row["n"] for row in json.loads((tmp_path / "rows.json").read_text())] == [2, 2]
