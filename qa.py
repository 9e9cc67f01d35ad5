"""Questions people asked: long-text QA for the reading agent, search QA for the searching one (paper 4.2 and 4.3).

    load_questions    records of HotpotQA, 2WikiMultihopQA or MuSiQue in one form, or MemAgent's with their own texts
    Pool              passages to fill a long text with
    long_document     one question's gold paragraphs hidden in a text of any length, cut into chunks
    load_search       questions and answers without text: FlashRAG's fields, NQ-open, HotpotQA, MuSiQue
    objectives        n questions asked as one
    LongQA, SearchQA  both as sources of documents to train and evaluate on, like masking.Corpus

MemAgent shuffled the texts of all its samples with one seed, so gold paragraphs stand at the same places in every
sample of a length. Here each question has places of its own.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from errors import UserError
from masking import Document, cut_chunks
from matching import Span
from rewards import normalize

Paragraph = tuple[str, str]  # (title, text)
TOLERANCE = 0.05  # of the wanted number of tokens


@dataclass
class Question:
    """A question, what answers it, and the paragraphs that came with it."""

    id: str
    question: str
    answers: list[str]  # any one of them is right
    gold: list[Paragraph]  # what the answer follows from
    other: list[Paragraph]  # distractors
    context: str | None = None  # the text to read, where the source brings it along


@dataclass
class LongDocument(Document):
    """A Document about a real question: `title` is the question's id, nothing is masked, nothing is there to recall."""

    gold: str = ""  # the gold paragraphs alone: the memory of an oracle; "" where the source doesn't tell

# ---- records -----------------------------------------------------------------------------------------


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a .jsonl file or a .json list in the layout of HotpotQA, 2WikiMultihopQA or MuSiQue; or of MemAgent's
    .json (evaluation) and .parquet (training) files (arXiv 2507.02259), which bring their texts along.

    Raises UserError naming the file, the record and what it lacks.
    """
    path, questions = Path(path), []
    for record, where in _parquet(path) if path.suffix == ".parquet" else _records(path):
        if {"input", "extra_info", "reward_model"} & record.keys():
            id, question, answers, context = _memagent(record, where)
            questions.append(Question(str(len(questions)) if id is None else str(id), question, answers, [], [], context))
            continue
        if "context" in record:
            gold, other = _from_context(record, where)
        elif "paragraphs" in record:
            gold, other = _from_paragraphs(record, where)
        else:
            raise UserError(f"{where}: neither 'context' (HotpotQA) nor 'paragraphs' (MuSiQue), it has {', '.join(record)}")
        id = str(record.get("_id", record.get("id", len(questions))))
        questions.append(Question(id, _text(record, "question", where), _answers(record, where), gold, other))
    return questions


def _records(path: Path) -> Iterator[tuple[dict, str]]:
    """(record, "file: line 3") of a .jsonl file or of a .json list; which of them it is, its first character tells."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    if text.lstrip()[:1] == "[":
        try:
            records = [(record, f"{path}: record {n}") for n, record in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise UserError(f"{path}: is not JSON ({error})") from None
    else:
        records = []
        for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON allows U+2028 inside a text
            try:
                records += [(json.loads(line), f"{path}: line {n}")] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{path}: line {n} is not JSON ({error})") from None
    if not records:
        raise UserError(f"{path}: holds no record")
    halves = re.search(r"\\u[dD]", text)  # maybe of surrogate pairs, which JSON can spell and no tokenizer takes
    for record, where in records:
        if not isinstance(record, dict):
            raise UserError(f"{where} is {type(record).__name__}, not an object with fields")
        if halves:
            record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        yield record, where


def _parquet(path: Path) -> Iterator[tuple[dict, str]]:
    """(row, "file: row 3") of a .parquet file."""
    try:
        for n, row in enumerate(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1):
            yield row, f"{path}: row {n}"
    except Exception as error:  # each kind of damage has its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is no readable .parquet file ({reason})") from None


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
    """(id or None, question, answers, text) of MemAgent's layouts. Evaluation: context, input, answers, index. Training: context,
    extra_info {question, index}, reward_model {ground_truth}."""
    if "input" in record:
        id, question, answers = record.get("index"), _text(record, "input", where), _answers(record, where)
    else:
        extra, reward = (record[name] if isinstance(record.get(name), dict) else {} for name in ("extra_info", "reward_model"))
        id, question = extra.get("index"), _text(extra, "question", f"{where}, extra_info")
        answers = _answers({"answers": reward.get("ground_truth")}, f"{where}, reward_model.ground_truth")
    _text(record, "context", where)
    return id, question, answers, record["context"]  # as it is, not stripped


def _from_context(record: dict, where: str) -> tuple[list[Paragraph], list[Paragraph]]:
    """(gold, other) of HotpotQA's layout: context [[title, [sentence]]], supporting_facts [[title, sentence number]].

    Where two paragraphs have a gold title, both are gold: the facts don't tell which is meant.
    """
    try:
        paragraphs = dict.fromkeys((" ".join(title.split()), _join(sentences)) for title, sentences in record["context"])
        titles = dict.fromkeys(" ".join(title.split()) for title, _ in record.get("supporting_facts") or [])
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{where}: 'context' is not [[title, [sentence]]], or 'supporting_facts' not [[title, number]]") from None
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
        raise UserError(f"{where}: a paragraph of 'paragraphs' lacks 'title', 'paragraph_text' or 'is_supporting'") from None
    if not all(text for _, text in gold) or not gold:
        raise UserError(f"{where}: " + ("a supporting paragraph is empty" if gold else "no paragraph with 'is_supporting' true"))
    return list(gold), [(title, text) for title, text in other if text and (title, text) not in gold]


def subject(question: Question) -> str:
    """The gold title that the question names, where it begins to look; its id where it names none.

    Not the first supporting fact: facts come in the order of the paragraphs, not in that of the reasoning.
    """
    return max((title for title, _ in question.gold if title in question.question), key=len, default=question.id)


def split_of(key: str) -> str:
    """Which of "train" (0.6), "dev" (0.1) and "test" (0.3) a subject or an id belongs to: its own hash tells."""
    # Salted, because masking.is_heldout takes the lowest hashes of bare titles: unsalted, all of those would be "train".
    digest = hashlib.sha256(b"question:" + key.encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:4]) / 2**32
    return "train" if share < 0.6 else "dev" if share < 0.7 else "test"


# ---- long texts --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """A paragraph, what it costs as one document of a long text, and the keys that tell whether two are the same."""

    title: str
    text: str
    tokens: int
    title_key: str
    text_key: str


def measure(paragraphs: Iterable[Paragraph], tokenizer) -> list[Measured]:
    """`paragraphs` with their costs and keys, in one call of the tokenizer; empty ones are left out."""
    paragraphs = [(" ".join(title.split()), text.strip()) for title, text in paragraphs if text.strip()]
    texts = [numbered_document(1, title, text) for title, text in paragraphs]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [
        Measured(title, text, len(tokens), normalize(unicodedata.normalize("NFKC", title)), "".join(text.split()))
        for (title, text), tokens in zip(paragraphs, encoded, strict=True)
    ]


def numbered_document(number: int, title: str, text: str) -> str:
    return f"Document {number}: {title}\n{text}\n\n"


class Pool:
    """Passages to fill long texts with, measured once by `tokenizer`; build it once for all lengths."""

    def __init__(self, paragraphs: Iterable[Paragraph], tokenizer):
        self.tokenizer = tokenizer
        self.passages = measure(paragraphs, tokenizer)
        self.mean_tokens = float(np.mean([passage.tokens for passage in self.passages])) if self.passages else None


def long_documents(questions: list[Question], pool: Pool, **how) -> list[LongDocument]:
    """long_document() of every question, its index being its place in the list."""
    return [long_document(question, index, pool, **how) for index, question in enumerate(questions)]


def long_document(
    question: Question, index: int, pool: Pool, *, seed: int, chunk_tokens: int, target_tokens: int | None = None,
    documents: int | None = None,
) -> LongDocument:  # fmt: skip
    """The gold paragraphs among numbered documents: `documents` of them, or `target_tokens` tokens within 5 %.

    A pure function of its arguments, random by (seed, index) alone. Filler is first the question's own distractors, then
    the pool; none of it repeats a text, none from the pool has a gold title. The chunks joined are the text. With one seed
    and index, a longer text keeps the relative order of a shorter one's documents.
    Raises UserError for a pool that is too small and for gold paragraphs that are too long.
    """
    if (target_tokens is None) == (documents is None):
        raise ValueError("give either target_tokens or documents")
    rng = np.random.default_rng([seed, index])
    gold, own = measure(question.gold, pool.tokenizer), measure(question.other, pool.tokenizer)
    passages, first = gold + own + pool.passages, len(gold) + len(own)
    places = rng.random(len(passages))  # drawn for all of them, so that each keeps its place at every length
    order = [*range(len(gold), first), *(first + rng.permutation(len(pool.passages))).tolist()]
    gold_titles, texts, filler = {passage.title_key for passage in gold}, {passage.text_key for passage in gold}, []
    for n in order:
        # A pool's other passage of a gold title may answer the question too; a distractor is labelled as not doing so.
        if passages[n].text_key not in texts and (n < first or passages[n].title_key not in gold_titles):
            texts.add(passages[n].text_key)
            filler.append(n)
    if documents is not None:
        taken = [*range(len(gold)), *filler[: max(0, documents - len(gold))]]
        text, headings = _numbered(passages, taken, places)
        fits = len(taken) == documents
    else:
        budget = target_tokens
        for _ in range(4):  # with most tokenizers the costs add up at once; with the others the sum is put right
            taken = _fill(passages, len(gold), filler, budget)
            text, headings = _numbered(passages, taken, places)
            length = _count(text, pool.tokenizer)
            if fits := abs(length - target_tokens) <= TOLERANCE * target_tokens:
                break
            budget += target_tokens - length
    if not fits:
        wanted = f"{documents} documents" if documents is not None else f"{target_tokens} tokens"
        remedy = "bring a larger pool" if len(taken) > len(gold) or not filler else "ask for a longer text"
        raise UserError(
            f"question {question.id}: {wanted} wanted, but its {len(gold)} gold paragraphs with what fits of {len(filler)} "
            f"passages make {len(taken)} documents, {_count(text, pool.tokenizer)} tokens; {remedy}"
        )
    chunks = cut_chunks(text, headings, pool.tokenizer, chunk_tokens)
    oracle = "\n\n".join(f"{passage.title}\n{passage.text}" for passage in gold)
    return LongDocument(index, question.id, question.question, question.answers, chunks, [[] for _ in chunks], gold=oracle)


def _count(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fill(passages: list[Measured], n_gold: int, filler: list[int], budget: float) -> list[int]:
    """The gold passages and, in order, each one of `filler` that still fits, until `budget` tokens are all but used."""
    taken, used, left = list(range(n_gold)), sum(passage.tokens for passage in passages[:n_gold]), []
    for n in filler:
        if used >= 0.99 * budget:
            break
        cost = passages[n].tokens + len(str(len(taken) + 1)) - 1  # measured with a number of one digit
        if used + cost <= budget:
            taken.append(n)
            used += cost
        else:
            left.append(n)
    if left and used < 0.98 * budget:
        # A short text can end in a gap that nothing fits: one too many may come nearer, or one in another's place.
        choices = [(budget - used, taken)]
        for out in [None, *taken[n_gold:]]:
            gap = budget - used + (0 if out is None else passages[out].tokens)
            best = min(left, key=lambda n: abs(passages[n].tokens - gap))
            choices.append((abs(passages[best].tokens - gap), [n for n in taken if n != out] + [best]))
        taken = min(choices, key=lambda choice: choice[0])[1]
    return taken


def _numbered(passages: list[Measured], taken: list[int], places: np.ndarray) -> tuple[str, list[Span]]:
    """(the passages `taken` as one text in the order of their places, spans in which it must not be cut).

    A heading and the first character below it are such a span: a chunk that ended between them would lose the title.
    """
    texts, headings, offset = [], [], 0
    for number, n in enumerate(sorted(taken, key=lambda n: places[n]), 1):
        document = numbered_document(number, passages[n].title, passages[n].text)
        headings.append((offset, offset + len(document) - len(passages[n].text) - 1))
        texts.append(document)
        offset += len(document)
    return "".join(texts).rstrip("\n"), headings


# ---- questions without text --------------------------------------------------------------------------


def load_search(path: str | Path) -> list[tuple[str, list[str]]]:
    """(question, answers) of a .jsonl file or .json list with the fields question and golden_answers, answers or answer."""
    return [(_text(record, "question", where), _answers(record, where)) for record, where in _records(Path(path))]


def objectives(items: list[tuple[str, list[str]]], n: int = 2) -> list[tuple[str, list[list[str]]]]:
    """Every `n` questions in a row as one, joined by "; ", with the answers to each in that order (MEM1, arXiv 2506.15841).

    What remains at the end is dropped: objectives([(q1, a1), (q2, a2), (q3, a3)]) is [("q1; q2", [a1, a2])].
    """
    groups = [items[start : start + n] for start in range(0, len(items) - n + 1, n)]
    return [("; ".join(question for question, _ in group), [answers for _, answers in group]) for group in groups]


# ---- as sources of documents ----------------------------------------------------------------------------


def split_questions(train: list, other: list | None, key) -> dict[str, list]:
    """{"train", "dev", "test"}: from one list by split_of(key(item)), or all of `train` and all of `other` where given."""
    if other is not None:
        return {"train": train, "dev": other, "test": other}
    return {name: [item for item in train if split_of(key(item)) == name] for name in ("train", "dev", "test")}


def draw(items: list, index: int, seed: int):
    """Item `index` of an endless sequence that goes through `items` again and again, each time in another order."""
    epoch, place = divmod(index, len(items))
    return items[np.random.default_rng([seed, epoch]).permutation(len(items))[place]]


class LongQA:
    """Long-text QA: document i of a split, filled to `chunks` chunks; a pure function of (seed, split, i, chunks).

    A question that brings its text is as long as that is.
    """

    def __init__(self, questions: dict[str, list[Question]], pool: Pool, *, seed: int, chunk_tokens: int, chunks: int):
        self.questions, self.pool, self.seed, self.chunk_tokens, self.chunks = questions, pool, seed, chunk_tokens, chunks

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> LongDocument:
        """Raises UserError where the question can't be brought to that length; in training the next one is tried."""
        for n in range(index, index + (20 if split == "train" else 1)):
            try:
                return self._filled(draw(self.questions[split], n, self.seed), index, chunks or self.chunks)
            except UserError as error:
                last = error
        raise last

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """The lengths to evaluate at: those asked for, or one, as the first has it, where the texts are given."""
        return asked if self.questions[split][0].context is None else [len(self.document(0, split).chunks)]

    def _filled(self, question: Question, index: int, chunks: int) -> LongDocument:
        """With as many documents as `chunks` chunks hold: a chunk ends with a paragraph where it can, so few are quite full."""

        if question.context is not None:
            given = cut_chunks(question.context, [], self.pool.tokenizer, self.chunk_tokens)
            return LongDocument(index, question.id, question.question, question.answers, given, [[] for _ in given])

        def build(documents: int) -> LongDocument:
            return long_document(question, index, self.pool, seed=self.seed, chunk_tokens=self.chunk_tokens, documents=documents)

        least = len(question.gold)
        document = build(least)
        if len(document.chunks) > chunks:
            raise UserError(f"question {question.id}: its {least} gold paragraphs take {len(document.chunks)} chunks of {self.chunk_tokens} "
                            f"tokens, {chunks} wanted; ask for a longer text or longer chunks")  # fmt: skip
        mean = self.pool.mean_tokens or self.chunk_tokens
        fits, too_many, size = least, None, max(least + 1, int(0.9 * chunks * self.chunk_tokens / mean))
        while too_many != fits + 1:
            try:
                tried = build(size)
            except UserError:  # there are not so many passages
                if size == fits + 1 and len(document.chunks) < chunks:
                    raise
                too_many, size = size, (fits + size) // 2
                continue
            if len(tried.chunks) <= chunks:
                document, fits = tried, size
            else:
                too_many = size
            # As many as at this rate would reach into the last chunk, but between what is known.
            size = max(fits + 1, int(size * (chunks - 0.3) / (len(tried.chunks) - 0.5)))
            size = min(size, too_many - 1) if too_many else size
        return document


class SearchQA:
    """Search QA: questions of n objectives without any text; `answers` holds a list of answers for each objective."""

    def __init__(self, questions: dict[str, list[tuple[str, list[list[str]]]]], seed: int):
        self.questions, self.seed = questions, seed

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """One: the number of objectives."""
        return [len(self.questions[split][0][1])]

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> Document:
        question, answers = draw(self.questions[split], index, self.seed)
        return Document(index, question, question, answers, [], [])
