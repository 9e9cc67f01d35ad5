"""engine/metrics.py: intervals, rows, tables, and a step's metrics by hand."""

import json
import random

import pytest

from engine.metrics import changes, row, sample_line, step_metrics, step_values, summary, table, wilson
from engine.run import append
from masking import Document, RecallTarget
from rollout import Trajectory, Turn


def test_a_row_is_in_the_order_of_its_documents():
    """Whatever the order in which processes bring them: accuracy, interval and scores are the same."""
    one = row("now", "recall", 4, "kept", {0: 1.0, 1: 0.0, 2: 1.0, 5: 1.0})
    other = row("now", "recall", 4, "kept", {5: 1.0, 2: 1.0, 0: 1.0, 1: 0.0})
    assert one == other and one["documents"] == [0, 1, 2, 5] and one["scores"] == [1.0, 0.0, 1.0, 1.0]
    assert one["n"] == 4 and one["accuracy"] == 0.75 and one["low"] < 0.75 < one["high"]


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


def test_a_table_has_a_cell_for_every_row():
    """A line per task, memory and length, a column per time, a dash where nothing was measured; of the same width."""
    rows = [
        row("before", "recall", 2, "kept", {0: 1.0, 1: 0.0}), row("before", "recall", 4, "kept", {0: 1.0}),
        row("after", "recall", 4, "kept", {0: 0.0}),
    ]
    assert table(rows).splitlines() == [
        "|        | memory | chunks | n | before            | after             |",
        "| ------ | ------ | ------ | - | ----------------- | ----------------- |",
        "| recall | kept   | 2      | 2 | 0.50 [0.09, 0.91] | -                 |",
        "| recall | kept   | 4      | 1 | 1.00 [0.21, 1.00] | 0.00 [0.00, 0.79] |",
    ]


def test_no_two_lines_of_a_table_say_the_same():
    """Neighbouring lengths of the same cells share a line; F1 and substring have one only where they aren't the EM."""
    rows = [row("now", "longqa", n, "empty", {0: 0.0}, f1=0.0, substring=0.0) for n in (2, 4, 8, 16)]
    rows[2]["f1"] = 0.375
    assert [line.split("|")[1:4] for line in table(rows).splitlines()[2:]] == [
        [" longqa     ", " empty  ", " 2-16   "], [" longqa, F1 ", " empty  ", " 8      "],
    ]
    rows[1]["n"] = 2
    assert [line.split("|")[3].strip() for line in table(rows).splitlines()[2:]] == ["2", "4", "8-16", "8"]


def test_the_tables_of_the_default_fit_a_terminal():
    """Two tasks, two memories, five lengths, before and after, no two lines alike: within 80 columns and 24 lines."""
    rows = [
        row(when, task, chunks, memory, dict.fromkeys(range(64 + chunks), float(when == "after")))
        for when in ("before", "after") for task in ("end_to_end", "recall") for chunks in (2, 4, 8, 16, 32)
        for memory in ("kept", "empty")
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 22 and {len(line) for line in lines} == {77}
    assert summary(rows[:20]) == "end_to_end 0.00 to 0.00, recall 0.00 to 0.00 at 2-32 chunks"
    assert summary([*rows[:2], rows[22]]) == "end_to_end 0.00 to 1.00 at 2-4 chunks"


def test_a_line_says_what_rose():
    """Since the first step, where that was measured at both."""
    first = {"end_to_end": 0.25, "recall": None, "entropy": 0.5}
    assert changes(first, {"end_to_end": 0.75, "recall": 0.5, "entropy": 0.25}) == (
        "end_to_end 0.75 (+0.50), recall 0.50, entropy 0.25"
    )
    assert changes(first, first | {"end_to_end": 0.2499}) == "end_to_end 0.25 (+0.00), entropy 0.50"


def test_a_sample_is_one_line():
    """The answer and the last memory, cut where the terminal ends; searchqa may have no memory and no answer."""
    document = Document(0, "", "Who?", ["Ada", "Ada Lovelace"], [], [])
    trajectory = Trajectory(document, [], memories=["before", "In [MASK].\n\nShe"], prediction=" Ulm\n")
    line = "  y = Ada, Ada Lovelace, answered Ulm, from: In [MASK]. / She"
    assert sample_line(trajectory, len(line)) == line
    assert sample_line(trajectory, len(line) - 1) == "  y = Ada, Ada Lovelace, answered Ulm, from: In [MASK]. /..."
    assert sample_line(Trajectory(document, []), 80) == "  y = Ada, Ada Lovelace, answered nothing, from: "


def turn(prompt: int, completion: int, advantage: float, ended: bool = True) -> Turn:
    return Turn([1] * prompt, [2] * completion, ended, "", advantage=advantage)


def made_up_step() -> list[Trajectory]:
    """Two documents, read twice each: of the first one reading is right, of the second neither; one was asked."""
    ada = Document(0, "", "Who?", ["Ada Lovelace"], [], [], leaks=2, redraws=4, place=0)
    several = Document(1, "", "Who, when?", [["1815"], ["Ulm"]], [], [], place=1)
    target = RecallTarget(2, 1, "Ulm", "In [TARGET].", leaky=True)
    answers, thinking = [turn(5, 2, 0.5), turn(5, 2, -0.5, ended=False)], turn(7, 1, 0.0)
    thinking.thought = True
    return [
        Trajectory(ada, [turn(10, 4, 1.0), turn(8, 2, 1.0)], prediction="Ada", target=target, recalls=answers, em=1.0,
                   recall_rewards=[1.0, 0.0], reward=1.25),
        Trajectory(ada, [turn(10, 6, -1.0, ended=False), turn(8, 2, -1.0)], em=0.0, reward=0.25),
        Trajectory(several, [turn(9, 5, 0.0), turn(7, 1, 0.0)], prediction="1815", em=0.0, reward=0.0),
        Trajectory(several, [turn(9, 1, 0.0), thinking], prediction="Ulm", em=0.0, reward=0.0),
    ]


def test_the_metrics_of_a_step_by_hand():
    """Means over trajectories, turns, groups and documents, and sums of the update over its tokens."""
    sums = {"loss": -0.25, "tokens": 20, "clipped": 5, "kl": 2.0, "approx_kl": 1.0, "entropy": 30.0}
    found = step_metrics(step_values(made_up_step()), sums, {"rollout": 2.0, "update": 3.0})
    tokens = (14 + 10 + 16 + 10) + (14 + 8 + 10 + 8) + (7 + 7)  # of the turns of both documents, and of recall
    assert found == pytest.approx({
        "end_to_end": 0.25, "end_to_end_std": (3 / 16) ** 0.5, "recall": 0.5, "recall_std": 0.5,
        "reward": 0.375, "reward_std": ((0.875**2 + 0.125**2 + 2 * 0.375**2) / 4) ** 0.5,
        "degenerate": 1 / 3,  # of the groups of two documents and one recall that of the second document
        "leaky": 2 / 6, "recall_leaky": 1.0,  # two of the six documents that were drawn leaked
        "truncated": 2 / 10, "thinking": 1 / 10, "unboxed": 1 / 4, "memory_tokens": 4.0,
        "loss": -0.25, "kl": 0.1, "approx_kl": 0.05, "clip_fraction": 0.25, "entropy": 1.5,
        "tokens_per_second": tokens / 5, "seconds_rollout": 2.0, "seconds_update": 3.0,
    })


def test_a_step_without_recall_or_update(tmp_path):
    """What nothing was measured of is None, and null in the log; so is a number that is not finite."""
    trajectories = made_up_step()
    trajectories[0].target, trajectories[0].recalls, trajectories[0].recall_rewards = None, [], []
    found = step_metrics(step_values(trajectories), {"loss": float("nan")}, {"rollout": 2.0})
    assert found["recall"] is found["recall_std"] is found["recall_leaky"] is None
    assert found["kl"] == found["entropy"] == found["clip_fraction"] == 0 and found["degenerate"] == 0.5
    append(tmp_path / "log.jsonl", found)
    append(tmp_path / "log.jsonl", {"step": 2})
    first, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first) == found | {"loss": None} and json.loads(second) == {"step": 2}
