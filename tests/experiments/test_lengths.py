"""experiments/lengths.py: several runs' evaluations as one."""

import json

import pytest

from engine.errors import UserError
from engine.metrics import row
from experiments.lengths import together


def test_runs_count_by_their_documents(tmp_path):
    """3 of 4 and 1 of 2 are 4 of 6; other places stay apart; a run that lacks its evaluation is named."""
    for name, scores in (("a", [1.0, 1.0, 1.0, 0.0]), ("b", [0.0, 1.0])):
        rows = [row("after", "recall", chunks, "kept", dict(enumerate(scores))) for chunks in (2, 4)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps(rows + [row("before", "recall", 2, "kept", {0: 0.0})]))
    rows = together([str(tmp_path / "a"), str(tmp_path / "b")])
    figures = {(r["when"], r["chunks"]): (r["n"], pytest.approx(r["accuracy"])) for r in rows}
    assert figures == {("after", 2): (6, 4 / 6), ("after", 4): (6, 4 / 6), ("before", 2): (2, 0.0)}
    with pytest.raises(UserError, match="c/eval.json"):
        together([str(tmp_path / "a"), str(tmp_path / "c")])
