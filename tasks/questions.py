"""Files of questions, in the layouts in which people publish them, in one form; and their splits."""

import ast
import hashlib
import io
import json
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
    """A question, what answers it, and the paragraphs that came with it."""

    id: str
    question: str
    answers: list[str]  # any one of them is right
    gold: list[Paragraph]  # what the answer follows from
    other: list[Paragraph]  # distractors
    context: str | None = None  # the text to read, where the source brings it along


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a file in the layout of HotpotQA, 2WikiMultihopQA or MuSiQue, or of MemAgent (arXiv 2507.02259).

    MemAgent's files bring their texts along. Raises UserError naming the file, the record and what it lacks.
    """
    return [_question(record, where, number) for number, (record, where) in enumerate(_records(path))]


def load_search(path: str | Path) -> list[tuple[str, list[str]]]:
    """(question, answers) of a file with the fields question and golden_answers, answers or answer. UserError."""
    return [(_text(record, "question", where), _answers(record, where)) for record, where in _records(path)]


def _records(path: str | Path) -> list[tuple[dict, str]]:
    records = list(read_rows(Path(path)))
    if not records:
        raise UserError(f"{path}: holds no record")
    return records


def _question(record: dict, where: str, number: int) -> Question:
    if {"input", "extra_info", "reward_model"} & record.keys():
        return _memagent(record, where, number)
    try:
        answerable = _truth(record.get("answerable", True))
    except ValueError as error:
        raise UserError(f"{where}: field 'answerable' is {error}") from None
    if not answerable:
        raise UserError(f"{where}: is marked unanswerable; use the answerable questions (musique_ans)")
    if isinstance(record.get("metadata"), dict):  # FlashRAG's: what its source had beside question and answers
        record = record["metadata"] | record
    read = _hotpotqa if "context" in record else _musique
    try:
        gold, paragraphs = map(dict.fromkeys, read(record))  # each paragraph once, in order
    except (AttributeError, KeyError, TypeError, ValueError):
        fields = " ".join(", ".join(record).split())  # a name may hold a line break
        raise UserError(
            f"{where}: lacks HotpotQA's 'context' [[title, [sentence]]] and 'supporting_facts' [[title, number]], or "
            f"MuSiQue's 'paragraphs' [{{'title', 'paragraph_text', 'is_supporting'}}]; its fields are {fields}"
        ) from None
    empty = [title for title, text in gold if not text]
    if empty or not gold:
        raise UserError(f"{where}: no text that 'supporting_facts' or 'is_supporting' marks as gold {empty or ''}")
    other = [(title, text) for title, text in paragraphs if text and (title, text) not in gold]
    id = str(record.get("_id", record.get("id", number)))
    return Question(id, _text(record, "question", where), _answers(record, where), list(gold), other)


def _hotpotqa(record: dict) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, all) of context [[title, [sentence]]] and supporting_facts [[title, sentence number]].

    The hub's has columns, {"title": [...], "sentences": [...]} and {"title": [...], "sent_id": [...]}. Where two
    paragraphs have a gold title, both are gold: the facts don't tell which is meant.
    """
    context, facts = (_pairs(record.get(name) or []) for name in ("context", "supporting_facts"))
    paragraphs = [(" ".join(title.split()), _join(sentences)) for title, sentences in context]
    gold = []
    for fact, _ in facts:
        fact = " ".join(fact.split())
        gold += [(title, text) for title, text in paragraphs if title == fact and text] or [(fact, "")]
    return gold, paragraphs


def _pairs(table: list | dict) -> list[tuple]:
    """The pairs of a list of pairs, or of a dict of two columns of which one is called title; also as JSON."""
    table = json.loads(table) if isinstance(table, str) else table
    if not isinstance(table, dict):
        return table
    titles, (others,) = table["title"], [column for name, column in table.items() if name != "title"]
    return list(zip(titles, others, strict=True))


def _musique(record: dict) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, all) of paragraphs [{title, paragraph_text, is_supporting}]."""
    given = record["paragraphs"]
    paragraphs = [(" ".join(one["title"].split()), one["paragraph_text"].strip()) for one in given]
    return [own for own, one in zip(paragraphs, given, strict=True) if _truth(one["is_supporting"])], paragraphs


def _join(sentences: list[str]) -> str:
    """One text; HotpotQA's sentences begin with their space, 2WikiMultihopQA's don't."""
    text = ""
    for sentence in filter(None, sentences):
        text += sentence if not text or text[-1].isspace() or sentence[0].isspace() else f" {sentence}"
    return text.strip()


def _memagent(record: dict, where: str, number: int) -> Question:
    """A record of MemAgent's evaluation: context, input, answers, index.

    Or of its training: context, extra_info {question, index}, reward_model {ground_truth}.
    """
    _text(record, "context", where)  # only checked: it is read as it stands, not stripped
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
        raise UserError(f"{where}: no field {field!r} that holds a text")
    return _unquote(value.strip())


ANSWERS = ("golden_answers", "answers", "possible_answers", "answer")  # fields, in this order


def _answers(record: dict, where: str) -> list[str]:
    """The gold answers, each once, of whichever field the set has them in."""
    field = next((name for name in ANSWERS if name in record), "answer")
    try:
        found = [*_texts(record.get(field)), *_texts(record.get("answer_aliases"))]
    except ValueError as error:
        raise UserError(f"{where}: field {field!r} {error}") from None
    answers = dict.fromkeys(_unquote(answer.strip()) for answer in found if answer.strip())
    if not answers:
        raise UserError(f"{where}: no answer in field {field!r}")
    return list(answers)


def _texts(answer) -> list[str]:
    """The texts of an answer: a text, a number, a list of them (also one written out), or TriviaQA's or SQuAD's record.

    ValueError, "holds ...", for anything else.
    """
    if answer is None:
        return []
    if isinstance(answer, str):
        return _texts(_listed(answer)) if LISTED.fullmatch(answer) else [answer]
    if isinstance(answer, list):
        return [text for one in answer for text in _texts(one)]
    if isinstance(answer, dict) and {"value", "aliases", "text"} & answer.keys():
        return [text for name in ("value", "aliases", "text") for text in _texts(answer.get(name))]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return [str(answer)]
    raise ValueError(f"holds {answer!r:.60}, which is no text, number or list of them")


# "['Ulm', 'U']", "['1879', 1880]", "[7]": lists that were saved as texts; "[MASK]" is none.
LISTED = re.compile(r"(?s)\s*\[\s*(?:['\"].*|.*['\"]\s*|[\d.,\s]*)\]\s*")


def _listed(text: str) -> list:
    """The list that `text` writes out, in Python or JSON. ValueError for one that can't be read."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError, tokenize.TokenError):
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
        # Python joins strings without a comma between, which is how numpy prints an array.
        if (tokenize.STRING, tokenize.STRING) not in pairwise(kinds):
            return ast.literal_eval(text.strip())
    raise ValueError(f"holds {text!r:.60}, which looks like a list, but can't be read as one")


def _truth(value) -> bool:
    """What a flag says, also one that was saved as a text: "false" is not true. ValueError for other texts."""
    if not isinstance(value, str):
        return bool(value)
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if value.strip().lower() not in words:
        raise ValueError(f"neither true nor false: {value!r}")
    return words[value.strip().lower()]


def _unquote(text: str) -> str:
    """`'"Who said ""I am""?"'` is `'Who said "I am"?'`: some published sets kept the quotes of a CSV file."""
    if re.fullmatch(r'"([^"]|"")+"', text) and '""' in text[1:-1]:
        return text[1:-1].replace('""', '"')
    return text


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
