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

SEEDS, STEPS, LENGTHS, FAR = (0, 1, 2), (0, 2, 4, 8, 16), (2, 6), 10
ASIDE = ("search", "label", "end_to_end", "decoupled")  # only seeds 0 and 1 have them
SETTINGS = {  # not those of the script
    "seeds": SEEDS, "steps": STEPS, "budget": [8], "labels": (4, 64), "chunks": [2], "lengths": LENGTHS,
    "far": [FAR], "far_steps": (0, 8), "side_seeds": (0, 1), "search_steps": (0, 8),
    "claimed": [6], "claimed_steps": (2, 4, 8), "rate": ["1e-5"], "other_rate": ["2e-5"],
}
TYPES = ["single", "bridge", "bridge", "single", "bridge"] * 6  # of each seed's test questions, in the file's order


@pytest.fixture
def measured(tmp_path):
    """A reproduction's folder of three seeds, and its made-up scores: {(name, chunks): a list for each seed}."""
    rng, made, out = np.random.default_rng(0), {}, tmp_path / "runs"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({name: list(map(str, own)) for name, own in SETTINGS.items()}))
    names = [f"{run}-{step}" for run in ("base", "memtrain") for step in STEPS]
    names += [f"{run}-other-{step}" for run in ("base", "memtrain") for step in (2, 4, 8)]
    names += [f"{run}-label-{label}" for run in ("base", "memtrain") for label in (4, 64)]
    names += [f"{run}-{step}" for run in ("end_to_end", "decoupled", "shuffled_rewards") for step in (0, 8)]
    names += ["ceiling", *(f"{run}-search-{step}" for run in ("base", "memtrain") for step in (0, 8))]
    for seed in SEEDS:
        (out / f"test-{seed}.jsonl").write_text("".join(json.dumps({"type": kind}) + "\n" for kind in TYPES))
        for part in ("qa", "memtrain", "base-task", "memtrain-task"):
            (out / str(seed) / part).mkdir(parents=True)
        for number, name in enumerate(names):
            if seed == 2 and any(part in name for part in ASIDE):
                continue
            lengths = [*LENGTHS, FAR] if re.fullmatch("ceiling|(base|memtrain)-[08]", name) else LENGTHS
            task, lengths, asks = ("searchqa", [1], range(24)) if "search" in name else ("longqa", lengths, asked(seed))
            rows = []
            for chunks in lengths:
                scores = (rng.random(len(asks)) < (number + 1) / 30).astype(float).tolist()
                made.setdefault((name, chunks), []).append(scores)
                rows += [metrics.row("now", task, chunks, "kept", dict(zip(asks, scores, strict=True)))]
                rows += [metrics.row("now", task, chunks, "empty", dict.fromkeys(asks, 0.0))]
            (out / str(seed) / "qa" / f"{name}.json").write_text(json.dumps(rows))
        for run, steps in (("memtrain", 10), ("base-task", 16), ("memtrain-task", 16)):
            line = json.dumps({"seconds_rollout": 4.0, "seconds_update": 2.0, "reward": 9.0}) + "\n"
            (out / str(seed) / run / "metrics.jsonl").write_text(line * steps)
    return out, made


def asked(seed: int) -> list[int]:
    """The numbers of a seed's 20, 21 or 22 questions; question 3 couldn't reach a length, so it was left out."""
    return [number for number in range(21 + seed) if number != 3]


def rescore(out, seed: int, name: str, chunks: int, scores: dict[int, float]) -> None:
    """Replace the scores, given by question number, in `name`'s file at this length."""
    file = out / f"{seed}/qa/{name}.json"
    rows = [one for one in json.loads(file.read_text()) if (one["chunks"], one["memory"]) != (chunks, "kept")]
    file.write_text(json.dumps([*rows, metrics.row("now", "longqa", chunks, "kept", scores)]))


def cells(text: str, name: str) -> list[list[str]]:
    """The cells after the name, for each table row that begins with it."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return [cells for first, *cells in rows if first == name]


def run_tables(monkeypatch, out, docs) -> tuple[str, str]:
    """The page and the appendix that were written."""
    if pyplot := tables.load_pyplot():
        pyplot.close("all")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(out), str(docs)])
    tables.main()
    return (docs / "results-tiny.md").read_text(), (docs / "results-tiny-tables.md").read_text()


def difference(text: str, name: str) -> list[float]:
    """The numbers in the row of this name: mean, low and high over questions, over seeds; then one for each seed."""
    (row,) = cells(text, name)
    return [float(number) for number in re.findall(r"[+-]\d\.\d+", " ".join(row))]


def test_tables_say_what_was_measured(measured, monkeypatch, tmp_path):
    """Means, intervals, minutes and differences worked out here; only the text between the page's two marks changes."""
    out, made = measured
    (tmp_path / "results-tiny.md").write_text(f"above\n{tables.BEGIN}\nstale\n{tables.END}\nbelow\n")
    (tmp_path / "results-tiny-tables.md").write_text("stale")
    page, appendix = run_tables(monkeypatch, out, tmp_path)
    assert page.startswith("above\n") and page.endswith("below\n") and "stale" not in page + appendix
    (steps,) = [part for part in page.split("**") if part.startswith(", from both starts")]
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
        name = f"MemTrain and {n} steps ({1 + n / 10:.1f} minutes) minus the base's {equal} ({equal / 10:.1f})"
        trained, base = (made[run, 6] for run in (f"memtrain-{n}", f"base-{equal}"))
        wanted = [np.mean(one) - np.mean(other) for one, other in zip(trained, base, strict=True)]
        assert difference(appendix, f"{name}, 6 chunks")[5:] == pytest.approx(wanted, abs=0.006)
    assert "MemTrain and 0 steps (1.0 minutes) minus the base's 8 (0.8), 6 chunks" in appendix
    assert "MemTrain took 1.0 minutes per seed, 16 steps of task RL 1.6." in appendix


def test_the_page_has_the_answers_and_the_appendix_the_rest(measured, monkeypatch, tmp_path):
    """Where each section, each figure and each seed's numbers go; the appendix says which command wrote it."""
    out, _ = measured
    page, appendix = run_tables(monkeypatch, out, tmp_path)
    for text, sections, figures in (
        (page, ["The claim", "Steps of task RL", "Share of the ceiling reached", "Hops", "Search QA"], ["curves"]),
        (
            appendix, ["The claim", "Hops", "Search QA", "Equal minutes", "Labels", "Ablations"],
            ["labels", "ablations"],
        ),
    ):
        assert re.findall(r"^\*\*(.+?)\*\*", text, re.M) == sections
        assert re.findall(r"!\[.+?\]\((.+?)\)", text) == [f"{name}.png" for name in figures]
        assert "\n\n\n" not in text
    assert len(page.splitlines()) < 70 and "[results-tiny-tables.md](results-tiny-tables.md)" in page
    head, *_ = appendix.splitlines()
    assert "results-tiny.md" in head and f"`python -m experiments.tables {out} {tmp_path}`" in head
    claimed = "MemTrain minus base, {} chunks, mean of 2 to 8 steps of task RL"
    for chunks in (2, 6):
        shown, full = (difference(text, claimed.format(chunks)) for text in (page, appendix))
        assert shown == full[:5] and len(full) == 8
    for name in ("one hop", "two hops"):
        assert [f"| {name}, {times} x the" in page for times in (1, 3)] == [False, True]
        assert [f"| {name}, {times} x the" in appendix for times in (1, 3)] == [True, False]


def test_the_claim_and_its_control(measured, monkeypatch, tmp_path):
    """Steps 2 to 8 and the second length, as in the settings; the control before and after task RL."""
    out, made = measured
    page, appendix = run_tables(monkeypatch, out, tmp_path)
    claim = page.split("**Steps of task RL**")[0]
    name = "MemTrain minus base, {} chunks, mean of 2 to 8 steps of task RL"
    control = "shuffled rewards minus base, 6 chunks, {} steps of task RL"
    assert "**The claim**, at 3 x the trained length" in claim
    assert [line.split("|")[1].strip() for line in claim.splitlines() if " minus " in line] == [
        *map(name.format, (2, 6)), f"{name.format(6)} at a rate of 2e-5",
        *(f"MemTrain minus base, 10 chunks, {step} steps of task RL" for step in (0, 8)), *map(control.format, (0, 8)),
    ]
    mean, low, high, seeds_low, seeds_high, *shown = difference(appendix, name.format(6))
    assert difference(page, name.format(6)) == [mean, low, high, seeds_low, seeds_high]
    gains = []
    for task in ("other-", ""):
        scores = {run: [made[f"{run}-{task}{n}", 6] for n in (2, 4, 8)] for run in ("base", "memtrain")}
        means = [[np.mean([step[seed] for step in own]) for seed in SEEDS] for own in scores.values()]
        gains.append(np.subtract(means[1], means[0]))
    assert difference(appendix, f"{name.format(6)} at a rate of 2e-5")[5:] == pytest.approx(gains[0], abs=0.006)
    by_seed = gains[1]
    assert shown == pytest.approx(by_seed, abs=0.006)
    half = 4.303 * np.std(by_seed, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert (seeds_low, seeds_high) == pytest.approx((np.mean(by_seed) - half, np.mean(by_seed) + half), abs=2e-3)
    assert low < mean < high and mean == pytest.approx(np.average(by_seed, weights=[20, 21, 22]), abs=6e-4)
    for step in (0, 8):
        shuffled, base = (made[f"{run}-{step}", 6] for run in ("shuffled_rewards", "base"))
        wanted = [np.mean(one) - np.mean(other) for one, other in zip(shuffled, base, strict=True)]
        full = difference(appendix, control.format(step))
        assert full[5:] == pytest.approx(wanted, abs=0.006) and difference(page, control.format(step)) == full[:5]


def test_each_start_beside_the_ceiling(measured, monkeypatch, tmp_path):
    """The seeds' ceilings are 1, 0.5 and 0.5, the base 0.25: 0.25, 0.5 and 0.5 of it, with a deviation of 0.1443.

    The ceiling is the last row of each table of long-text QA: by steps, of one hop, of two, by labels, ablations.
    """
    out, _ = measured
    for seed, ceiling in enumerate((1.0, 0.5, 0.5)):
        for name, score in (("ceiling", ceiling), ("base-4", 0.25), ("memtrain-4", 1.0)):
            rescore(out, seed, name, 6, dict.fromkeys(asked(seed), score))
    page, appendix = run_tables(monkeypatch, out, tmp_path)
    text = page + appendix
    (reached,) = [part for part in page.split("**") if part.startswith(", by steps of task RL, ± over seeds")]
    assert [row[2] for row in cells(reached, "base, 6 chunks")] == ["0.42 ± 0.36"]  # 4.303 x 0.1443 / 1.732 = 0.3586
    assert [row[2] for row in cells(reached, "MemTrain, 6 chunks")] == ["1.67 ± 1.43"]  # of 1, 2 and 2
    name = "ceiling: the base, told to focus"
    assert [len(cells(text, f"{name}, {chunks} chunks")) for chunks in (2, 6, 10)] == [4, 4, 1]
    for n, row in enumerate(cells(text, f"{name}, 6 chunks")):  # the last by labels, of two seeds: 30.5 / 41
        assert len(set(row)) == 1 and row[0].startswith("0.7" if n == 3 else "0.6")
    ((_, before, _, after),) = cells(text, name)
    assert before == after == cells(text, f"{name}, 6 chunks")[3][0] and before.startswith("0.74 [")
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        assert not line.startswith(f"| {name}") or above.startswith(("| MemTrain, ", "| shuffled rewards"))


def test_hops_are_those_of_the_questions_that_were_asked(measured, monkeypatch, tmp_path):
    """A task's own source says which question a number stands for; exactly those of two hops are answered right."""
    out, _ = measured
    for seed in SEEDS:
        source = SearchQA({"test": [(kind, [["answer"]]) for kind in TYPES]}, seed)
        kinds = {number: source.document(number, "test").question for number in asked(seed)}
        assert [*kinds.values()] != TYPES[: len(kinds)] and len(set(kinds.values())) == 2
        rescore(out, seed, "base-2", 6, {number: float(kind == "bridge") for number, kind in kinds.items()})
    page, _ = run_tables(monkeypatch, out, tmp_path)
    rows = cells(page, "base, 6 chunks")
    whole, one, two = (row[1].split()[0] for row in rows if "[" in row[1])
    assert (one, two) == ("0.00", "1.00") and 0.3 < float(whole) < 0.9


def test_search_has_seeds_and_steps_of_its_own(measured, monkeypatch, tmp_path):
    """Two seeds of three, 0 and 8 steps; differences as for long-text QA; all but the claim has two seeds."""
    out, made = measured
    page, appendix = run_tables(monkeypatch, out, tmp_path)
    section = page.split("**Search QA**")[1]
    for title in ("Search QA", "Labels", "Ablations"):
        assert "2 seeds" in (page + appendix).split(f"**{title}**")[1].splitlines()[0]
    for title, run in (("base", "base"), ("MemTrain", "memtrain")):
        wanted = [f"{np.mean(sum(made[f'{run}-search-{n}', 1], [])):.2f}" for n in (0, 8)]
        assert [[cell.split()[0] for cell in row] for row in cells(section, title)] == [wanted]
    base, trained = (made[f"{run}-search-8", 1] for run in ("base", "memtrain"))
    wanted = [np.mean(one) - np.mean(other) for one, other in zip(trained, base, strict=True)]
    assert difference(appendix, "MemTrain minus base, search QA, 8 steps")[5:] == pytest.approx(wanted, abs=0.006)


def test_other_questions_are_refused(measured, monkeypatch, tmp_path):
    """Differences are per question, so all files must have the same questions, at all lengths."""
    out, _ = measured
    file = out / "1/qa/decoupled-8.json"
    before = file.read_text()
    rescore(out, 1, "decoupled-8", 6, dict.fromkeys(range(21), 1.0))
    with pytest.raises(UserError, match="1/qa/decoupled-8.json: at 6 chunks, its questions aren't the other files'"):
        run_tables(monkeypatch, out, tmp_path)
    file.write_text(json.dumps([one for one in json.loads(before) if one["chunks"] != 2]))
    with pytest.raises(UserError, match="1/qa/decoupled-8.json: at 2 chunks, its"):
        run_tables(monkeypatch, out, tmp_path)


def test_a_difference_that_never_varies_has_no_interval(measured, monkeypatch, tmp_path):
    """Every question gains the same, so both intervals are points."""
    out, _ = measured
    for seed in SEEDS:
        rows = json.loads((out / f"{seed}/qa/base-8.json").read_text())
        rows = [row | {"scores": [score + 0.25 for score in row["scores"]]} for row in rows]
        (out / f"{seed}/qa/memtrain-8.json").write_text(json.dumps(rows))
    _, appendix = run_tables(monkeypatch, out, tmp_path)
    assert difference(appendix, "MemTrain minus base, 6 chunks, 8 steps of task RL") == [0.25] * 7


def test_tables_wait_for_all_seeds(measured, monkeypatch, tmp_path):
    """One missing file is named, and nothing is written."""
    out, _ = measured
    (out / "1/qa/decoupled-8.json").unlink()
    with pytest.raises(UserError, match="1/qa/decoupled-8.json is missing"):
        run_tables(monkeypatch, out, tmp_path)
    assert not [*tmp_path.glob("*.md")]


def test_figures_are_drawn(measured, monkeypatch, tmp_path):
    """Three PNGs that can be read back, none blank; each panel of long-text QA has the ceiling as a dashed line."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib draws the figures")
    out, made = measured
    run_tables(monkeypatch, out, tmp_path)
    names = {"curves": [2, 6] * 2, "labels": [2, 6], "ablations": [(2, 6)] * 2}
    for (name, lengths), number in zip(names.items(), pyplot.get_fignums(), strict=True):
        picture = pyplot.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200 and picture.std() > 0.05
        for axes, chunks in zip(pyplot.figure(number).axes, lengths, strict=False):
            (dashed,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
            ceilings = [made["ceiling", n] for n in (chunks if isinstance(chunks, tuple) else [chunks])]
            seeds = 3 if name == "curves" else 2
            wanted = [np.mean([np.mean(seed) for seed in own[:seeds]]) for own in ceilings]
            heights = dashed.get_ydata()
            assert heights == pytest.approx(wanted * (len(heights) // len(wanted)))
            solid = [line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "-"]
            first, *_, last = dashed.get_xdata()
            assert (first, last) == (min(x[0] for x in solid), max(x[-1] for x in solid))  # from end to end
