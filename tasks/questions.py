"""Files of questions, in the layouts in which people publish them.

    load_questions   records of HotpotQA, 2WikiMultihopQA or MuSiQue in one form, or MemAgent's with their own texts
    load_search      questions and answers without text: FlashRAG's fields, NQ-open, HotpotQA, MuSiQue
    split_questions  train, dev and test, by a hash of the subject
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import UserError
from text.rows import read_rows

Paragraph = tuple[str, str]  # (title, text)


@dataclass
class Question:
    """A question, what answers it, and the paragraphs that came with it."""

    id: str
    question: str
    answers: list[str]  # any one of them is right
    gold: list[Paragraph]  # what the answer follows from
    other: list[Paragraph]  # distractors
    context: str | None = None  # the text to read, where the source brings it along


# ---- records --------------------------------------------------------------------------------------


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a file in the layout of HotpotQA, 2WikiMultihopQA or MuSiQue, or of MemAgent (arXiv 2507.02259).

    MemAgent's files bring their texts along. Raises UserError naming the file, the record and what it lacks.
    """
    questions: list[Question] = []
    for record, where in _records(path):
        if {"input", "extra_info", "reward_model"} & record.keys():
            id, question, answers, context = _memagent(record, where)
            id = len(questions) if id is None else id
            questions.append(Question(str(id), question, answers, [], [], context))
            continue
        if "context" in record:
            gold, other = _from_context(record, where)
        elif "paragraphs" in record:
            gold, other = _from_paragraphs(record, where)
        else:
            fields = ", ".join(record)
            raise UserError(f"{where}: neither 'context' (HotpotQA) nor 'paragraphs' (MuSiQue), it has {fields}")
        id = str(record.get("_id", record.get("id", len(questions))))
        questions.append(Question(id, _text(record, "question", where), _answers(record, where), gold, other))
    return questions


def load_search(path: str | Path) -> list[tuple[str, list[str]]]:
    """(question, answers) of a file with the fields question and golden_answers, answers or answer. UserError."""
    return [(_text(record, "question", where), _answers(record, where)) for record, where in _records(path)]


def _records(path: str | Path) -> Iterator[tuple[dict, str]]:
    """read_rows, of at least one."""
    found = False
    for found in read_rows(Path(path)):
        yield found
    if not found:
        raise UserError(f"{path}: holds no record")


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: " + (f"field {field!r} holds no text" if field in record else f"no field {field!r}"))
    return _unquote(value.strip())


def _unquote(text: str) -> str:
    """`'"Who said ""I am""?"'` is `'Who said "I am"?'`: some published sets kept the quotes of a CSV file."""
    if re.fullmatch(r'"([^"]|"")+"', text) and '""' in text[1:-1]:
        return text[1:-1].replace('""', '"')
    return text


def _answers(record: dict, where: str) -> list[str]:
    """The gold answers, each once, of whichever field the set has them in."""
    field = next((name for name in ("golden_answers", "answers", "answer") if name in record), "answer")
    found, aliases = record.get(field), record.get("answer_aliases") or []
    found = (found if isinstance(found, list) else [found]) + (aliases if isinstance(aliases, list) else [aliases])
    answers = dict.fromkeys(_unquote(a.strip()) for a in found if isinstance(a, str) and a.strip())
    if not answers:
        raise UserError(f"{where}: no answer in field {field!r}")
    return list(answers)


def _memagent(record: dict, where: str) -> tuple[object, str, list[str], str]:
    """(id or None, question, answers, text) of MemAgent's layouts.

    Evaluation: context, input, answers, index. Training: context, extra_info {question, index}, reward_model
    {ground_truth}.
    """
    if "input" in record:
        id, question, answers = record.get("index"), _text(record, "input", where), _answers(record, where)
    else:
        parts = (record.get(name) for name in ("extra_info", "reward_model"))
        extra, reward = (part if isinstance(part, dict) else {} for part in parts)
        id, question = extra.get("index"), _text(extra, "question", f"{where}, extra_info")
        answers = _answers({"answers": reward.get("ground_truth")}, f"{where}, reward_model.ground_truth")
    _text(record, "context", where)
    return id, question, answers, record["context"]  # as it is, not stripped


def _from_context(record: dict, where: str) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, other) of HotpotQA's layout: context [[title, [sentence]]], supporting_facts [[title, sentence number]].

    Where two paragraphs have a gold title, both are gold: the facts don't tell which is meant.
    """
    try:
        context = record["context"]
        paragraphs = dict.fromkeys((" ".join(title.split()), _join(sentences)) for title, sentences in context)
        titles = dict.fromkeys(" ".join(title.split()) for title, _ in record.get("supporting_facts") or [])
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{where}: 'context' is not [[title, [sentence]]], or 'supporting_facts' not [[title, number]]"
        ) from None
    gold = [(title, text) for wanted in titles for title, text in paragraphs if title == wanted and text]
    if missing := titles.keys() - {title for title, _ in gold}:
        raise UserError(f"{where}: 'context' has no text for the supporting fact {sorted(missing)[0]!r}")
    if not gold:
        raise UserError(f"{where}: no 'supporting_facts', so no gold paragraph")
    return gold, [(title, text) for title, text in paragraphs if title not in titles and text]


def _join(sentences: list[str]) -> str:
    """One text; HotpotQA's sentences begin with their space, 2WikiMultihopQA's don't."""
    text = ""
    for sentence in filter(None, sentences):
        text += sentence if not text or text[-1].isspace() or sentence[0].isspace() else f" {sentence}"
    return text.strip()


def _from_paragraphs(record: dict, where: str) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, other) of MuSiQue's layout: paragraphs [{title, paragraph_text, is_supporting}]."""
    if record.get("answerable") is False:
        raise UserError(f"{where}: is marked unanswerable; use the answerable questions (musique_ans)")
    gold, other = {}, {}  # as sets that keep their order
    try:
        for paragraph in record["paragraphs"]:
            title, text = " ".join(paragraph["title"].split()), paragraph["paragraph_text"].strip()
            (gold if paragraph["is_supporting"] else other)[title, text] = True
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{where}: a paragraph of 'paragraphs' lacks 'title', 'paragraph_text' or 'is_supporting'"
        ) from None
    if not all(text for _, text in gold) or not gold:
        why = "a supporting paragraph is empty" if gold else "no paragraph with 'is_supporting' true"
        raise UserError(f"{where}: {why}")
    return list(gold), [(title, text) for title, text in other if text and (title, text) not in gold]


# ---- splits ---------------------------------------------------------------------------------------


def subject(question: Question) -> str:
    """The longest gold title that the question names; its id if it names none.

    Not the first supporting fact: facts come in the order of the paragraphs, not in that of the reasoning.
    """
    return max((title for title, _ in question.gold if title in question.question), key=len, default=question.id)


def split_of(key: str) -> str:
    """Which of "train" (0.6), "dev" (0.1) and "test" (0.3) a subject or an id belongs to: its own hash tells."""
    # Salted: masking.is_heldout takes the lowest hashes of bare titles, and unsalted all of those would be "train".
    digest = hashlib.sha256(b"question:" + key.encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:4]) / 2**32
    return "train" if share < 0.6 else "dev" if share < 0.7 else "test"


def split_questions(train: list, other: list | None, key) -> dict[str, list]:
    """{"train", "dev", "test"}: of one list by split_of(key(item)); with `other`, all of that is dev and test."""
    if other is not None:
        return {"train": train, "dev": other, "test": other}
    return {name: [item for item in train if split_of(key(item)) == name] for name in ("train", "dev", "test")}


def draw(items: list, index: int, seed: int):
    """Item `index` of an endless sequence that goes through `items` again and again, each time in another order."""
    epoch, place = divmod(index, len(items))
    return items[np.random.default_rng([seed, epoch]).permutation(len(items))[place]]
