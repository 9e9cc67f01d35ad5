"""Precision and recall of an entity finder, on texts whose entities are labelled.

    python -m benchmarks.ner FILE.jsonl [--ner rules]    # lines of {"text", "entities": [[start, end, label]]}

Spans count if they are exactly right, whatever their labels. The corpus' titles, which `rules` also knows in a run, are
not given. Dates and numbers are not counted, as such files label names only.
"""

import argparse
from pathlib import Path

from engine.errors import UserError, first_line, run_script
from masking import common_words, load_pipeline, worth_masking
from text.rows import read_rows

QUANTITIES = {"DATE", "TIME", "NUMBER", "CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY"}


def measure(file: Path, ner: str) -> str:
    """A line with the figures. Raises UserError."""
    try:
        rows = [row for row, _ in read_rows(file)]
        texts = [str(row["text"]) for row in rows]
        labelled = [{(start, end) for start, end, _ in row["entities"]} for row in rows]
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{file}: no lines of {{"text", "entities"}} ({first_line(error)})') from None
    if not rows:
        raise UserError(f"{file}: holds no text")
    common, right, found, gold = common_words(texts), 0, 0, 0
    for theirs, doc in zip(labelled, load_pipeline(ner).pipe(texts), strict=True):
        ours = {(start, end) for start, end, label in worth_masking(doc, common) if label not in QUANTITIES}
        right += len(ours & theirs)
        found += len(ours)
        gold += len(theirs)
    precision, recall = right / max(found, 1), right / max(gold, 1)
    figures = f"precision {precision:.3f}, recall {recall:.3f} ({found} found, {gold} labelled)"
    return f"{ner}: {len(texts)} texts, {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ner", default="rules", help="'rules', or an installed spaCy pipeline")
    arguments = parser.parse_args()
    print(measure(arguments.file, arguments.ner))


if __name__ == "__main__":
    run_script(main)
