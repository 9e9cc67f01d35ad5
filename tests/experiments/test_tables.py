"""experiments/tables.py: the tables and figures of a reproduction, from made-up runs."""

import json
import re
import sys

import numpy as np
import pytest

from engine.errors import UserError
from experiments import tables

LENGTHS, SEEDS = (2, 8), (0, 1, 2)


@pytest.fixture
def measured(tmp_path):
    """A reproduction's folder of three seeds with made-up scores, and the scores by (name, chunks): a list a seed."""
    rng, made, out = np.random.default_rng(0), {}, tmp_path / "runs"
    out.mkdir()
    settings = {"seeds": SEEDS, "steps": (0, 2, 4, 8, 16, 32, 64), "budget": [16], "labels": (4, 16, 64)}
    (out / "settings.json").write_text(json.dumps({name: list(map(str, own)) for name, own in settings.items()}))
    names = [f"{run}-{step}" for run in ("base", "memtrain") for step in (0, 2, 4, 8, 16, 32, 64)]
    names += [f"{run}-label-{label}" for run in ("base", "memtrain") for label in (4, 16, 64)]
    names += [f"{run}-{step}" for run in ("end_to_end", "decoupled", "shuffled_rewards") for step in (0, 16)]
    for seed in SEEDS:
        for part in ("qa", "habits", "memtrain", "base-task", "memtrain-task"):
            (out / str(seed) / part).mkdir(parents=True)
        for number, name in enumerate(names):
            rows = []
            for chunks in LENGTHS:
                scores = (rng.random(20 + seed) < (number + 1) / 30).astype(float).tolist()
                made.setdefault((name, chunks), []).append(scores)
                rows += [{"chunks": chunks, "memory": "kept", "scores": scores}]
                rows += [{"chunks": chunks, "memory": "empty", "scores": [0.0] * len(scores)}]
            (out / str(seed) / "qa" / f"{name}.json").write_text(json.dumps(rows))
        for run in ("base", "memtrain", "end_to_end", "decoupled", "shuffled_rewards"):
            recalled = {str(n): [1.0, 0.0] if n < 3 else [0.0, 0.0] for n in range(1, 16)}
            rows = [
                {"chunks": 4, "recall": dict(list(recalled.items())[:3]), "unchanged": [True, False]},
                {"chunks": 16, "recall": recalled, "unchanged": [True, seed > 0]},
            ]
            (out / str(seed) / "habits" / f"{run}.json").write_text(json.dumps(rows))
        for run, steps in (("memtrain", 10), ("base-task", 64), ("memtrain-task", 64)):
            line = json.dumps({"seconds_rollout": 4.0, "seconds_update": 2.0, "reward": 9.0}) + "\n"
            (out / str(seed) / run / "metrics.jsonl").write_text(line * steps)
    return out, made


def run_tables(monkeypatch, *folders):
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, folders)])
    tables.main()


def difference(text: str, name: str) -> list[float]:
    """The numbers behind the name in its line: mean, low and high over questions, over seeds, and one of each seed."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"- {name}: ")]
    return [float(number) for number in re.findall(r"[+-]\d\.\d+", line.removeprefix(f"- {name}: "))]


def test_tables_say_what_was_measured(measured, monkeypatch, tmp_path):
    """Means, intervals, minutes and differences counted here by hand; the page changes between its two marks only."""
    out, made = measured
    page = tmp_path / "results-tiny.md"
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    run_tables(monkeypatch, out, tmp_path)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    first = text.split("**Labels**")[0].splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in first if line.startswith("| ")}
    steps = (0, 2, 4, 8, 16, 32, 64)
    for title, run in (("base, 8 chunks", "base"), ("MemTrain, 8 chunks", "memtrain")):
        wanted = [f"{np.mean(sum(made[f'{run}-{n}', 8], [])):.2f}" for n in steps]
        assert [cell.split()[0] for cell in rows[title]] == wanted
    name, by_seed = "from MemTrain minus from the base, 8 chunks, mean of 2 to 16 steps", []
    mean, low, high, seeds_low, seeds_high, *shown = difference(text, name)
    for seed in SEEDS:
        means = [[np.mean(made[f"{run}-{n}", 8][seed]) for n in (2, 4, 8, 16)] for run in ("base", "memtrain")]
        by_seed.append(np.mean(means[1]) - np.mean(means[0]))
    assert shown == pytest.approx(by_seed, abs=0.006)
    half = 4.303 * np.std(by_seed, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert (seeds_low, seeds_high) == pytest.approx((np.mean(by_seed) - half, np.mean(by_seed) + half), abs=2e-3)
    assert low < mean < high and mean == pytest.approx(np.average(by_seed, weights=[20, 21, 22]), abs=6e-4)
    for n in steps:  # the base has done the most steps that take no longer
        equal = max(m for m in steps if m <= n + 10)
        assert f"MemTrain and {n} steps ({1 + n / 10:.1f} minutes) minus the base's {equal} ({equal / 10:.1f})" in text
    assert "MemTrain took 1.0 minutes a seed, 64 steps of task RL 6.4." in text
    unchanged, means = "0.50 ± 0.00", [0.5, 1.0, 1.0]
    shown = f"{np.mean(means):.2f} ± {4.303 * np.std(means, ddof=1) / 3**0.5:.2f}"
    assert f"| base | {unchanged} | {shown} | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.00 ± 0.00 |" in text  # at 1, 2, 3-4
    assert "MemTrain and 0 steps (1.0 minutes) minus the base's 8 (0.8), 8 chunks" in text


def test_a_difference_that_never_varies_has_no_interval(measured, monkeypatch, tmp_path):
    """Better by the same for every question: both intervals are points."""
    out, _ = measured
    for seed in SEEDS:
        rows = json.loads((out / f"{seed}/qa/base-16.json").read_text())
        rows = [row | {"scores": [score + 0.25 for score in row["scores"]]} for row in rows]
        (out / f"{seed}/qa/memtrain-16.json").write_text(json.dumps(rows))
    run_tables(monkeypatch, out, tmp_path)
    text = (tmp_path / "results-tiny.md").read_text()
    assert difference(text, "MemTrain, full minus base, 8 chunks, 16 steps of task RL") == [0.25] * 8


def test_tables_wait_for_all_seeds(measured, monkeypatch, tmp_path):
    """One missing file is named, and nothing is written."""
    out, _ = measured
    (out / "1/qa/decoupled-16.json").unlink()
    with pytest.raises(UserError, match="1/qa/decoupled-16.json is missing"):
        run_tables(monkeypatch, out, tmp_path)
    assert not (tmp_path / "results-tiny.md").exists()


def test_figures_are_drawn(measured, monkeypatch, tmp_path):
    """Four PNGs that can be read back, no line of them blank."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib draws the figures")
    run_tables(monkeypatch, measured[0], tmp_path)
    for name in ("curves", "labels", "ablations", "distance"):
        picture = pyplot.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200 and picture.std() > 0.05
