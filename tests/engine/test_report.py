"""engine/report.py: rows that are compared document by document."""

import pytest

from engine.report import differences, row


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
