"""Reads question files in their published layouts into one form, and splits them."""

import ast
import hashlib
import io
import json
import math
import re
import tokenize
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.errors import UserError
from text.rows import read_rows

Paragraph = tuple[str, str]  # (title, text)


@dataclass
class Question:
    """A question, its answers, and the paragraphs that came with it."""

    id: str
    question: str
    answers: list[str]  # any one of them is right
    gold: list[Paragraph]  # those that the answer follows from
    other: list[Paragraph]  # distractors
    context: str | None = None  # the text to read, if the source includes it


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a file in the layout of HotpotQA, 2WikiMultihopQA or MuSiQue, or of MemAgent (arXiv 2507.02259).

    MemAgent's files include their texts. Raises UserError with the file, the record and what it lacks.
    """
    return [_question(record, where, number) for number, (record, where) in enumerate(_records(path))]


def load_search(path: str | Path) -> list[tuple[str, list[str]]]:
    """[(question, answers), ...] of a file with the fields question and golden_answers, answers or answer.

    Raises UserError with the file, the record and what it lacks.
    """
    return [(_text(record, "question", where), _answers(record, where)) for record, where in _records(path)]


def _records(path: str | Path) -> list[tuple[dict, str]]:
    records = list(read_rows(Path(path)))
    if not records:
        raise UserError(f"{path}: contains no record")
    return records


def _question(record: dict, where: str, number: int) -> Question:
    if isinstance(source := _written_out(record.get("metadata")), dict):  # FlashRAG's: the source's other fields
        record = source | record
    if {"input", "extra_info", "reward_model"} & record.keys():
        return _memagent(record, where, number)
    try:
        answerable = _truth(record.get("answerable", True))
    except ValueError as error:
        raise UserError(f"{where}: field 'answerable' is {error}") from None
    if not answerable:
        raise UserError(f"{where}: is marked unanswerable; use the answerable questions (musique_ans)")
    read = _hotpotqa if record.get("context") else _musique
    try:
        gold, paragraphs = map(dict.fromkeys, read(record))  # each paragraph once, in order
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{where}: lacks HotpotQA's 'context' [[title, [sentence]]] and 'supporting_facts' [[title, number]], or "
            f"MuSiQue's 'paragraphs' [{{'title', 'paragraph_text', 'is_supporting'}}]{_fields(record)}"
        ) from None
    empty = [title for title, text in gold if not text]
    if empty or not gold:
        raise UserError(f"{where}: no text that 'supporting_facts' or 'is_supporting' marks as gold {empty or ''}")
    other = [(title, text) for title, text in paragraphs if text and (title, text) not in gold]
    id = str(record.get("_id", record.get("id", number)))
    return Question(id, _text(record, "question", where), _answers(record, where), list(gold), other)


def _hotpotqa(record: dict) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, all) of context [[title, [sentence]]] and supporting_facts [[title, sentence number]].

    If two paragraphs have the same gold title, both are gold: the facts don't say which one is meant.
    """
    paragraphs = [(" ".join(title.split()), _join(sentences)) for title, sentences in _pairs(record["context"])]
    gold = []
    for fact, _ in _pairs(record.get("supporting_facts")):
        fact = " ".join(fact.split())
        gold += [(title, text) for title, text in paragraphs if title == fact and text] or [(fact, "")]
    return gold, paragraphs


def _pairs(table) -> list:
    """The pairs in a list of pairs, in records of a title and another field, or in two columns, as on the hub."""
    return [tuple(_title_first(row)) if isinstance(row, dict) else row for row in _rows(table)]


def _title_first(row: dict) -> tuple:
    (other,) = (value for name, value in row.items() if name != "title")
    return row["title"], other


def _rows(table) -> list:
    """The rows of a list, or of a dict of columns; either may be written out as text."""
    table = _written_out(table) or []
    if isinstance(table, dict):
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return table


def _musique(record: dict) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, all) of paragraphs [{title, paragraph_text, is_supporting}]."""
    given = _rows(record["paragraphs"])
    paragraphs = [(" ".join(one["title"].split()), one["paragraph_text"].strip()) for one in given]
    return [own for own, one in zip(paragraphs, given, strict=True) if _truth(one["is_supporting"])], paragraphs


def _join(sentences: list[str] | str) -> str:
    """The sentences as one text; HotpotQA's begin with a space, 2WikiMultihopQA's don't."""
    text, sentences = "", [sentences] if isinstance(sentences, str) else sentences
    for sentence in filter(None, sentences):
        text += sentence if not text or text[-1].isspace() or sentence[0].isspace() else f" {sentence}"
    return text.strip()


def _memagent(record: dict, where: str, number: int) -> Question:
    """The question of a record of MemAgent's evaluation set: context, input, answers, index.

    Or of its training set: context, extra_info {question, index}, reward_model {ground_truth}.
    """
    _text(record, "context", where)  # only a check: the context is used unstripped
    if "input" in record:
        index, question, answers = record.get("index"), _text(record, "input", where), _answers(record, where)
    else:
        parts = (record.get(name) for name in ("extra_info", "reward_model"))
        extra, reward = (part if isinstance(part, dict) else {} for part in parts)
        index, question = extra.get("index"), _text(extra, "question", f"{where}, extra_info")
        answers = _answers({"answers": reward.get("ground_truth")}, f"{where}, reward_model.ground_truth")
    return Question(str(number if index is None else index), question, answers, [], [], record["context"])


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no text in field {field!r}{_fields(record)}")
    return _unquote(value.strip())


def _fields(record: dict) -> str:
    """The end of an error about a record: which fields hold something. A name may contain a line break."""
    names = " ".join(", ".join(name for name, value in record.items() if value is not None).split())
    return f"; its fields are {names}" if names else ""


ANSWERS = ("golden_answers", "answers", "possible_answers", "answer", "Answer")  # fields, in this order
PARTS = ("value", "Value", "aliases", "Aliases", "text", "target")  # of a record: TriviaQA's, SQuAD's, Search-R1's


def _answers(record: dict, where: str) -> list[str]:
    """The gold answers, each once, from whichever field the data set uses."""
    there = [name for name in ANSWERS if name in record] or ["answer"]
    field = next((name for name in there if record.get(name) not in (None, [], "")), there[0])
    try:
        found = [text for name in (field, "answer_aliases", "aliases") for text in _texts(record.get(name))]
    except ValueError as error:
        raise UserError(f"{where}: field {field!r} {error}") from None
    whole = (text.encode("utf-8", "replace").decode() for text in found)  # half a surrogate pair becomes "?"
    answers = dict.fromkeys(_unquote(text.strip()) for text in whole if text.strip())
    if not answers:
        raise UserError(f"{where}: no answer in field {field!r}{_fields(record)}")
    return list(answers)


def _texts(answer) -> list[str]:
    """The texts of an answer: a text, a number, a list of these, or a record with some of PARTS; ValueError otherwise.

    A list or a record may be written out as text; "(0, 255, 0)" and "{x}" are answers.
    """
    if isinstance(answer, str):
        found = _written_out(answer)
        if isinstance(found, list) or isinstance(found, tuple | set) and any(isinstance(one, str) for one in found):
            answer = sorted(found, key=str) if isinstance(found, set) else list(found)
        elif isinstance(found, dict) and found.keys() & set(PARTS):
            answer = found
        elif re.match(r"""\s*\[\s*['"]""", answer) and answer.rstrip().endswith("]"):
            raise ValueError(f"holds {answer!r:.60}, which looks like a list, but can't be read as one")
        else:
            return [answer]
    if answer is None or isinstance(answer, float) and math.isnan(answer):
        return []
    if isinstance(answer, list):
        return [text for one in answer for text in _texts(one)]
    if isinstance(answer, dict) and answer.keys() & set(PARTS):
        return [text for name in PARTS for text in _texts(answer.get(name))]
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return [str(answer)]
    raise ValueError(f"holds {answer!r:.60}, which is not a text, a number or a list of these")


def _written_out(value):
    """The list or record written out in a text, in JSON or Python; any other value unchanged.

    "['Ulm' 'U']", as numpy prints it, stays a text: Python would join the two strings.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{", "("):
        return value
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(value)
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        tokens = tokenize.generate_tokens(io.StringIO(value.strip()).readline)
        kinds = [token.type for token in tokens if token.type != tokenize.NL]
        if found is None and (tokenize.STRING, tokenize.STRING) not in pairwise(kinds):
            found = ast.literal_eval(value.strip())
    # Not a number in brackets: "(7)" is a text.
    return found if isinstance(found, list | tuple | set | dict) else value


def _truth(value) -> bool:
    """The value of a boolean, possibly saved as text: "false" is False. Raises ValueError for other texts."""
    if not isinstance(value, str):
        return bool(value)
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if value.strip().lower() not in words:
        raise ValueError(f"neither true nor false: {value!r}")
    return words[value.strip().lower()]


def _unquote(text: str) -> str:
    """`'"Who said ""I am""?"'` becomes `'Who said "I am"?'`: some published sets kept the quotes of a CSV file."""
    if re.fullmatch(r'"([^"]|"")+"', text) and '""' in text[1:-1]:
        return text[1:-1].replace('""', '"')
    return text


def subject(question: Question) -> str:
    """The longest gold title that the question mentions; the question's id if it mentions none.

    Not the first supporting fact: facts are in the order of the paragraphs, not of the reasoning.
    """
    return max((title for title, _ in question.gold if title in question.question), key=len, default=question.id)


def split_of(key: str) -> str:
    """The split of a subject or an id, by its hash: "train" (60 %), "dev" (10 %) or "test" (30 %)."""
    # Salted: masking.is_heldout takes titles with the lowest hashes, all of which would be "train" without a salt.
    digest = hashlib.sha256(b"question:" + key.encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:4]) / 2**32
    return "train" if share < 0.6 else "dev" if share < 0.7 else "test"


def split_questions(train: list, other: list | None, key) -> dict[str, list]:
    """{"train", "dev", "test"}: `train` split by split_of(key(item)); given `other`, all of it is both dev and test."""
    if other is not None:
        return {"train": train, "dev": other, "test": other}
    return {name: [item for item in train if split_of(key(item)) == name] for name in ("train", "dev", "test")}


def draw(items: list, index: int, seed: int):
    """Item `index` of an endless sequence that repeats `items`, each time in a different order."""
    epoch, place = divmod(index, len(items))
    return items[np.random.default_rng([seed, epoch]).permutation(len(items))[place]]
