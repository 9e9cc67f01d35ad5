"""experiments/tables.py: the tables and figures of a reproduction, from made-up runs."""

import json
import re
import sys

import numpy as np
import pytest

from engine import metrics
from engine.errors import UserError
from experiments import tables
from tasks.search import SearchQA

SEEDS, STEPS, LENGTHS = (0, 1, 2), (0, 2, 4, 8, 16), (2, 6, 10)
SETTINGS = {  # other ones than the script's
    "seeds": SEEDS, "steps": STEPS, "budget": [8], "labels": (4, 64), "chunks": [2], "lengths": LENGTHS,
    "shorter": (2, 6), "search_seeds": (0, 1), "search_steps": (0, 8),
}
TYPES = ["single", "bridge", "bridge", "single", "bridge"] * 6  # of each seed's test questions, in the file's order


@pytest.fixture
def measured(tmp_path):
    """A reproduction's folder of three seeds with made-up scores, and the scores by (name, chunks): a list a seed."""
    rng, made, out = np.random.default_rng(0), {}, tmp_path / "runs"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({name: list(map(str, own)) for name, own in SETTINGS.items()}))
    names = [f"{run}-{step}" for run in ("base", "memtrain") for step in STEPS]
    names += [f"{run}-label-{label}" for run in ("base", "memtrain") for label in (4, 64)]
    names += [f"{run}-{step}" for run in ("end_to_end", "decoupled", "shuffled_rewards") for step in (0, 8)]
    names += ["ceiling", *(f"{run}-search-{step}" for run in ("base", "memtrain") for step in (0, 8))]
    for seed in SEEDS:
        (out / f"test-{seed}.jsonl").write_text("".join(json.dumps({"type": kind}) + "\n" for kind in TYPES))
        for part in ("qa", "habits", "memtrain", "base-task", "memtrain-task"):
            (out / str(seed) / part).mkdir(parents=True)
        for number, name in enumerate(names):
            if "search" in name and seed == 2:
                continue
            task, lengths, asks = ("searchqa", [1], range(24)) if "search" in name else ("longqa", LENGTHS, asked(seed))
            rows = []
            for chunks in lengths:
                scores = (rng.random(len(asks)) < (number + 1) / 30).astype(float).tolist()
                made.setdefault((name, chunks), []).append(scores)
                rows += [metrics.row("now", task, chunks, "kept", dict(zip(asks, scores, strict=True)))]
                rows += [metrics.row("now", task, chunks, "empty", dict.fromkeys(asks, 0.0))]
            (out / str(seed) / "qa" / f"{name}.json").write_text(json.dumps(rows))
        for run in ("base", "memtrain", "end_to_end", "decoupled", "shuffled_rewards"):
            recalled = {str(n): [1.0, 0.0] if n < 3 else [0.0, 0.0] for n in range(1, 16)}
            rows = [
                {"chunks": 4, "recall": dict(list(recalled.items())[:3]), "unchanged": [True, False]},
                {"chunks": 16, "recall": recalled, "unchanged": [True, seed > 0]},
            ]
            (out / str(seed) / "habits" / f"{run}.json").write_text(json.dumps(rows))
        for run, steps in (("memtrain", 10), ("base-task", 16), ("memtrain-task", 16)):
            line = json.dumps({"seconds_rollout": 4.0, "seconds_update": 2.0, "reward": 9.0}) + "\n"
            (out / str(seed) / run / "metrics.jsonl").write_text(line * steps)
    return out, made


def asked(seed: int) -> list[int]:
    """The numbers of a seed's questions: 20, 21 or 22, and one that could not be brought to a length is left out."""
    return [number for number in range(21 + seed) if number != 3]


def rescore(out, seed: int, name: str, chunks: int, scores: dict[int, float]) -> None:
    """Other scores, by question, in `name`'s file at this length."""
    file = out / f"{seed}/qa/{name}.json"
    rows = [one for one in json.loads(file.read_text()) if (one["chunks"], one["memory"]) != (chunks, "kept")]
    file.write_text(json.dumps([*rows, metrics.row("now", "longqa", chunks, "kept", scores)]))


def cells(text: str, name: str) -> list[list[str]]:
    """The cells behind the name, of each table's row that begins with it."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return [cells for first, *cells in rows if first == name]


def run_tables(monkeypatch, out, docs) -> str:
    """The page that the tables were written to."""
    if pyplot := tables.load_pyplot():
        pyplot.close("all")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(out), str(docs)])
    tables.main()
    return (docs / "results-tiny.md").read_text()


def difference(text: str, name: str) -> list[float]:
    """The numbers behind the name in its line: mean, low and high over questions, over seeds, and one of each seed."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"- {name}: ")]
    return [float(number) for number in re.findall(r"[+-]\d\.\d+", line.removeprefix(f"- {name}: "))]


def test_tables_say_what_was_measured(measured, monkeypatch, tmp_path):
    """Means, intervals, minutes and differences counted here by hand; the page changes between its two marks only."""
    out, made = measured
    (tmp_path / "results-tiny.md").write_text(f"above\n{tables.BEGIN}\nstale\n{tables.END}\nbelow\n")
    text = run_tables(monkeypatch, out, tmp_path)
    assert text.startswith("above\n") and text.endswith("below\n") and "stale" not in text
    (steps,) = [part for part in text.split("**") if part.startswith(", from both starts")]
    for title, names in (
        ("base, 6 chunks", [f"base-{n}" for n in STEPS]), ("MemTrain, 6 chunks", [f"memtrain-{n}" for n in STEPS]),
        ("ceiling: the base, told to focus, 6 chunks", ["ceiling"] * len(STEPS)),
    ):
        wanted = [f"{np.mean(sum(made[name, 6], [])):.2f}" for name in names]
        assert [[cell.split()[0] for cell in row] for row in cells(steps, title)] == [wanted]
    assert [line.split("|")[1] for line in steps.splitlines() if line.startswith("| ") and " x " in line] == [
        " 1 x the trained length ", " 3 x the trained length ", " 5 x the trained length ",
    ]
    for n in STEPS:  # the base has done the most steps that take no longer
        equal = max(m for m in STEPS if m <= n + 10)
        assert f"MemTrain and {n} steps ({1 + n / 10:.1f} minutes) minus the base's {equal} ({equal / 10:.1f})" in text
    assert "MemTrain took 1.0 minutes a seed, 16 steps of task RL 1.6." in text
    unchanged, means = "0.50 ± 0.00", [0.5, 1.0, 1.0]
    shown = f"{np.mean(means):.2f} ± {4.303 * np.std(means, ddof=1) / 3**0.5:.2f}"
    assert f"| base | {unchanged} | {shown} | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.00 ± 0.00 |" in text  # at 1, 2, 3-4
    assert "MemTrain and 0 steps (1.0 minutes) minus the base's 8 (0.8), 6 chunks" in text


def test_the_claim_and_its_control(measured, monkeypatch, tmp_path):
    """Steps 2 to 8 and the second length, as the settings say; the control before and after task RL."""
    out, made = measured
    text = run_tables(monkeypatch, out, tmp_path)
    claim = text.split("**Steps of task RL**")[0]
    name = "from MemTrain minus from the base, 6 chunks, mean of 2 to 8 steps"
    control = "shuffled rewards minus base, 6 chunks, {} steps of task RL"
    assert "**The claim**, at 3 x the trained length" in claim
    assert [line.split(":")[0] for line in claim.splitlines() if line.startswith("- ")] == [
        f"- {one}" for one in (name, control.format(0), control.format(8))
    ]
    mean, low, high, seeds_low, seeds_high, *shown = difference(text, name)
    by_seed = []
    for seed in SEEDS:
        means = [[np.mean(made[f"{run}-{n}", 6][seed]) for n in (2, 4, 8)] for run in ("base", "memtrain")]
        by_seed.append(np.mean(means[1]) - np.mean(means[0]))
    assert shown == pytest.approx(by_seed, abs=0.006)
    half = 4.303 * np.std(by_seed, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert (seeds_low, seeds_high) == pytest.approx((np.mean(by_seed) - half, np.mean(by_seed) + half), abs=2e-3)
    assert low < mean < high and mean == pytest.approx(np.average(by_seed, weights=[20, 21, 22]), abs=6e-4)
    for step in (0, 8):
        shuffled, base = (made[f"{run}-{step}", 6] for run in ("shuffled_rewards", "base"))
        wanted = [np.mean(one) - np.mean(other) for one, other in zip(shuffled, base, strict=True)]
        assert difference(text, control.format(step))[5:] == pytest.approx(wanted, abs=0.006)


def test_each_start_beside_the_ceiling(measured, monkeypatch, tmp_path):
    """Seed by seed the ceiling is 1, 0.5 and 0.5, the base 0.25: 0.25, 0.5 and 0.5 of it, with a deviation of 0.1443.

    The ceiling's row stands beneath each table of the claim: by steps, of one hop, of two, by labels, ablations.
    """
    out, _ = measured
    for seed, ceiling in enumerate((1.0, 0.5, 0.5)):
        for name, score in (("ceiling", ceiling), ("base-4", 0.25), ("memtrain-4", 1.0)):
            rescore(out, seed, name, 6, dict.fromkeys(asked(seed), score))
    text = run_tables(monkeypatch, out, tmp_path)
    (reached,) = [part for part in text.split("**") if part.startswith(", by steps of task RL, ± over seeds")]
    assert [row[2] for row in cells(reached, "base, 6 chunks")] == ["0.42 ± 0.36"]  # 4.303 x 0.1443 / 1.732 = 0.3586
    assert [row[2] for row in cells(reached, "MemTrain, 6 chunks")] == ["1.67 ± 1.43"]  # of 1, 2 and 2
    name = "ceiling: the base, told to focus"
    assert [len(cells(text, f"{name}, {chunks} chunks")) for chunks in (2, 6, 10)] == [4, 4, 3]
    for row in cells(text, f"{name}, 6 chunks"):
        assert len(set(row)) == 1 and row[0].startswith("0.6")
    ((_, before, _, after),) = cells(text, name)
    assert before == after == cells(text, f"{name}, 6 chunks")[0][0] and before.startswith("0.66 [")  # 41.5 / 63
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        assert not line.startswith(f"| {name}") or above.startswith(("| MemTrain, ", "| shuffled rewards"))


def test_hops_are_those_of_the_questions_that_were_asked(measured, monkeypatch, tmp_path):
    """A task's own source says which question each number asks: right are those of two hops, and only those."""
    out, _ = measured
    for seed in SEEDS:
        source = SearchQA({"test": [(kind, [["answer"]]) for kind in TYPES]}, seed)
        kinds = {number: source.document(number, "test").question for number in asked(seed)}
        assert [*kinds.values()] != TYPES[: len(kinds)] and len(set(kinds.values())) == 2
        rescore(out, seed, "base-2", 6, {number: float(kind == "bridge") for number, kind in kinds.items()})
    text = run_tables(monkeypatch, out, tmp_path)
    rows = cells(text.split("**Labels**")[0], "base, 6 chunks")
    whole, one, two = (row[1].split()[0] for row in rows if "[" in row[1])
    assert (one, two) == ("0.00", "1.00") and 0.3 < float(whole) < 0.9


def test_search_has_seeds_and_steps_of_its_own(measured, monkeypatch, tmp_path):
    """Two seeds of three, 0 and 8 steps, and the same differences."""
    out, made = measured
    text = run_tables(monkeypatch, out, tmp_path)
    section = text.split("**Search**")[1].split("**Habits**")[0]
    for title, run in (("base", "base"), ("MemTrain", "memtrain")):
        wanted = [f"{np.mean(sum(made[f'{run}-search-{n}', 1], [])):.2f}" for n in (0, 8)]
        assert [[cell.split()[0] for cell in row] for row in cells(section, title)] == [wanted]
    base, trained = (made[f"{run}-search-8", 1] for run in ("base", "memtrain"))
    wanted = [np.mean(one) - np.mean(other) for one, other in zip(trained, base, strict=True)]
    shown = difference(section, "from MemTrain minus from the base, search, 8 steps")[5:]
    assert shown == pytest.approx(wanted, abs=0.006)


def test_other_questions_are_refused(measured, monkeypatch, tmp_path):
    """Differences are taken question by question, so all files must have the same ones; and all the lengths."""
    out, _ = measured
    file = out / "1/qa/decoupled-8.json"
    before = file.read_text()
    rescore(out, 1, "decoupled-8", 6, dict.fromkeys(range(21), 1.0))
    with pytest.raises(UserError, match="1/qa/decoupled-8.json: at 6 chunks not the questions that other files ask"):
        run_tables(monkeypatch, out, tmp_path)
    file.write_text(json.dumps([one for one in json.loads(before) if one["chunks"] != 2]))
    with pytest.raises(UserError, match="1/qa/decoupled-8.json: at 2 chunks not"):
        run_tables(monkeypatch, out, tmp_path)


def test_a_difference_that_never_varies_has_no_interval(measured, monkeypatch, tmp_path):
    """Better by the same for every question: both intervals are points."""
    out, _ = measured
    for seed in SEEDS:
        rows = json.loads((out / f"{seed}/qa/base-8.json").read_text())
        rows = [row | {"scores": [score + 0.25 for score in row["scores"]]} for row in rows]
        (out / f"{seed}/qa/memtrain-8.json").write_text(json.dumps(rows))
    text = run_tables(monkeypatch, out, tmp_path)
    assert difference(text, "MemTrain, full minus base, 6 chunks, 8 steps of task RL") == [0.25] * 8


def test_tables_wait_for_all_seeds(measured, monkeypatch, tmp_path):
    """One missing file is named, and nothing is written."""
    out, _ = measured
    (out / "1/qa/decoupled-8.json").unlink()
    with pytest.raises(UserError, match="1/qa/decoupled-8.json is missing"):
        run_tables(monkeypatch, out, tmp_path)
    assert not (tmp_path / "results-tiny.md").exists()


def test_figures_are_drawn(measured, monkeypatch, tmp_path):
    """Four PNGs that can be read back, no line of them blank; in each panel of the claim's the ceiling is dashed."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib draws the figures")
    out, made = measured
    run_tables(monkeypatch, out, tmp_path)
    names = {"curves": [2, 6, 10] * 2, "labels": [2, 6], "ablations": [(2, 6)] * 2, "distance": []}
    for (name, lengths), number in zip(names.items(), pyplot.get_fignums(), strict=True):
        picture = pyplot.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200 and picture.std() > 0.05
        for axes, chunks in zip(pyplot.figure(number).axes, lengths, strict=False):
            (dashed,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
            ceilings = [made["ceiling", n] for n in (chunks if isinstance(chunks, tuple) else [chunks])]
            wanted = [np.mean([np.mean(seed) for seed in own]) for own in ceilings]
            heights = dashed.get_ydata()
            assert heights == pytest.approx(wanted * (len(heights) // len(wanted)))
            solid = [line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "-"]
            first, *_, last = dashed.get_xdata()
            assert (first, last) == (min(x[0] for x in solid), max(x[-1] for x in solid))  # from end to end
