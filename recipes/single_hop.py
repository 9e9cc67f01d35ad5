"""Extractive questions of one hop, like those of Natural Questions and SQuAD, from the hops of MuSiQue's questions.

    python -m recipes.single_hop musique_train.json OUT.jsonl [more files of HotpotQA or MuSiQue, added as they are]

Each hop becomes a record in MuSiQue's layout: the paragraph that answers it is the only gold one, the others are
distractors. "#1" is replaced by the answer of hop 1, and "X >> father" becomes a question in words. A hop whose answer
isn't in its paragraph is left out.
"""

import json
import re
import sys
from pathlib import Path

from engine.errors import UserError, run_script
from engine.files import replace_text
from text.matching import occurrences
from text.rows import read_rows


def single_hops(record: dict) -> list[dict]:
    """The records of one question's hops."""
    hops, found = record["question_decomposition"], []
    for n, hop in enumerate(hops):
        question = re.sub(r"#(\d)", lambda match: hops[int(match[1]) - 1]["answer"], hop["question"])
        subject, _, relation = (part.strip() for part in question.partition(">>"))
        if relation:
            question = f"What is the {relation} of {subject}?"
        paragraphs = [
            paragraph | {"is_supporting": number == hop["paragraph_support_idx"]}
            for number, paragraph in enumerate(record["paragraphs"])
        ]
        if any(p["is_supporting"] and occurrences(p["paragraph_text"], hop["answer"]) for p in paragraphs):
            own = {"id": f"{record['id']}-{n + 1}", "question": question, "answer": hop["answer"]}
            found.append(own | {"paragraphs": paragraphs})
    return found


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError("give two files: python -m recipes.single_hop musique_train.json OUT.jsonl [MORE ...]")
    source, out, *more = map(Path, sys.argv[1:])
    found = []
    for record, where in read_rows(source):
        try:
            found += single_hops(record)
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"{where}: is not a MuSiQue question with a question_decomposition") from None
    count = len(found)
    found += [record for file in more for record, _ in read_rows(file)]
    if not found:
        raise UserError(f"{source}: contains no question")
    replace_text(out, "".join(json.dumps(record) + "\n" for record in found))
    print(f"{out}: {count} questions of one hop, {len(found)} in all")


if __name__ == "__main__":
    run_script(main, __doc__)
