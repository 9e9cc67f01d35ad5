"""engine/metrics.py: intervals, rows, tables, and a step's metrics by hand."""

import json
import random

import pytest

from engine.metrics import row, step_metrics, step_values, table, wilson
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
