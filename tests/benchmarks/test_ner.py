"""benchmarks/ner.py: figures of an entity finder on labelled text."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers import shared

from benchmarks.ner import measure
from engine.errors import UserError


def test_the_figures_by_hand(tmp_path):
    """Exact spans count, whatever their labels; a part of a name is wrong, and numbers don't count."""
    texts = [
        ("He met Ada Lovelace and Charles Babbage in 1833.", [[7, 19, "X"], [24, 31, "PER"]]),
        ("They saw Rome.", [[9, 13, "LOC"]]),
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"text": text, "entities": spans}) + "\n" for text, spans in texts))
    assert measure(file, "rules") == "rules: 2 texts, precision 0.667, recall 0.667 (3 found, 3 labelled)"


def test_the_rules_on_labelled_text(monkeypatch, capsys):
    """Exact spans on 3,000 WikiNEuRal sentences, by the command that docs/results-real.md quotes."""
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks.ner", str(shared("ner/wikineural_3000.jsonl"))])
    monkeypatch.delitem(sys.modules, "benchmarks.ner")  # as in a new process
    runpy.run_module("benchmarks.ner", run_name="__main__")
    said = capsys.readouterr().out
    precision, recall = map(float, re.search(r"precision (0\.\d+), recall (0\.\d+)", said).groups())
    assert precision > 0.8 and recall > 0.8


@pytest.mark.parametrize(
    "text", [None, "", "no JSON", '{"text": "Ulm"}', "[]", '["Ulm"]', '{"text": "Ulm", "entities": [[0, 3]]}']
)
def test_a_bad_label_file_is_one_line(tmp_path, text):
    """Missing, empty, not JSON, or without the fields: named, with the reason."""
    file: Path = tmp_path / "labels.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: "):
        measure(file, "rules")
