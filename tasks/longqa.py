"""Long-text QA for the reading agent (paper 4.2): a question's gold paragraphs hidden in a text of any length.

    Pool            passages to fill a long text with
    long_document   one question's gold paragraphs among numbered documents, cut into chunks
    LongQA          a source of such documents to train and evaluate on, like masking.Corpus

MemAgent shuffled the texts of all its samples with one seed, so gold paragraphs stand at the same places in every
sample of a length. Here each question has places of its own.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm import tqdm

from engine.errors import UserError
from masking import Document
from rewards import normalize
from tasks.questions import Paragraph, Question, draw
from text.chunking import cut_chunks
from text.matching import Span


@dataclass
class LongDocument(Document):
    """A Document about a real question: `title` is its id. Nothing is masked, nothing can be recalled."""

    gold: str = ""  # the gold paragraphs alone: an oracle's memory; "" where the source doesn't tell
    gold_texts: tuple[str, ...] = ()  # the same one by one, without their titles


@dataclass(slots=True)
class Measured:
    """A paragraph, what it costs as one document of a long text, and the keys that tell whether two are the same."""

    title: str
    text: str
    tokens: int
    title_key: int
    text_key: int


def key(text: str) -> int:
    """A number for a text: equal for equal texts, and as good as never for others."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def measured(paragraphs: Iterable[Paragraph], tokenizer) -> list[Measured]:
    """`paragraphs` with their costs and keys; empty ones are left out."""
    paragraphs = [(" ".join(title.split()), text.strip()) for title, text in paragraphs if text.strip()]
    texts = [numbered_document(1, title, text) for title, text in paragraphs]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [
        Measured(title, text, len(tokens), key(normalize(title)), key("".join(text.split())))
        for (title, text), tokens in zip(paragraphs, encoded, strict=True)
    ]


def numbered_document(number: int, title: str, text: str) -> str:
    return f"Document {number}: {title}\n{text}\n\n"


class Pool:
    """Passages to fill long texts with, measured once by `tokenizer`; build it once for all lengths."""

    def __init__(self, paragraphs: Iterable[Paragraph], tokenizer):
        self.tokenizer = tokenizer
        self.passages: list[Measured] = []
        paragraphs = iter(paragraphs)
        bar = tqdm(desc="pool", unit=" passages", delay=5, mininterval=1)
        while some := list(islice(paragraphs, 4096)):  # token ids of all at once are gigabytes
            self.passages += measured(some, tokenizer)
            bar.update(len(some))
        bar.close()


def shuffled(n: int, rng) -> Iterator[int]:
    """0..n-1 in random order, drawn one by one as they are asked for (Fisher and Yates, with the swaps in a dict)."""
    swapped: dict[int, int] = {}
    for i in range(n):
        other = int(rng.integers(i, n))
        yield swapped.get(other, other)
        swapped[other] = swapped.get(i, i)


class Draft:
    """A question's gold paragraphs and, behind them, as much filler as is asked for; each has its place in the text.

    Random by (seed, index) alone: a longer text keeps the order of a shorter one's documents. Filler is first the
    question's own distractors, then the pool; none repeats a text, none from the pool has a gold title.
    """

    def __init__(self, question: Question, index: int, pool: Pool, seed: int):
        self.passages = measured(question.gold, pool.tokenizer)
        self.gold, self.places = len(self.passages), []
        self.filler = self._filler(measured(question.other, pool.tokenizer), pool, np.random.default_rng([seed, index]))
        self.rng = np.random.default_rng([seed, index, 2])

    def _filler(self, own: list[Measured], pool: Pool, rng) -> Iterator[Measured]:
        titles = {passage.title_key for passage in self.passages}
        texts = {passage.text_key for passage in self.passages}
        for passage in own:
            if passage.text_key not in texts:
                texts.add(passage.text_key)
                yield passage
        for passage in (pool.passages[n] for n in shuffled(len(pool.passages), rng)):
            # A pool's other passage of a gold title may answer the question; a distractor is labelled as not doing so.
            if passage.text_key not in texts and passage.title_key not in titles:
                texts.add(passage.text_key)
                yield passage

    def reach(self, n: int) -> bool:
        """Whether there are n passages; they are drawn then."""
        self.passages += islice(self.filler, max(0, n - len(self.passages)))
        self.places += self.rng.random(len(self.passages) - len(self.places)).tolist()
        return len(self.passages) >= n

    def in_order(self, taken: Iterable[int]) -> list[Measured]:
        """These passages, as they stand in the text."""
        return [self.passages[n] for n in sorted(taken, key=lambda n: self.places[n])]


def long_documents(questions: list[Question], pool: Pool, **how) -> list[LongDocument]:
    """long_document() of every question, its index being its place in the list."""
    return [long_document(question, index, pool, **how) for index, question in enumerate(questions)]


def long_document(
    question: Question, index: int, pool: Pool, *, seed: int, chunk_tokens: int, documents: int
) -> LongDocument:
    """The gold paragraphs among so many numbered documents. Raises UserError for a pool that is too small."""
    draft = Draft(question, index, pool, seed)
    if documents < draft.gold:
        gold = f"{draft.gold} are gold; ask for more"
        raise UserError(f"question {question.id}: {documents} documents wanted, but {gold}")
    if not draft.reach(documents):
        made = len(draft.passages)
        raise UserError(
            f"question {question.id}: {documents} documents wanted, but the pool makes {made}; bring a larger pool"
        )
    return finished(draft, range(documents), question, index, pool.tokenizer, chunk_tokens)


def finished(
    draft: Draft, taken: Iterable[int], question: Question, index: int, tokenizer, chunk_tokens: int
) -> LongDocument:
    """The passages `taken` of a draft as a document."""
    text, headings = _numbered(draft.in_order(taken))
    chunks = cut_chunks(text, headings, tokenizer, chunk_tokens)
    gold = draft.passages[: draft.gold]
    oracle, texts = "\n\n".join(f"{one.title}\n{one.text}" for one in gold), tuple(one.text for one in gold)
    nothing = [[] for _ in chunks]  # to recall
    return LongDocument(
        index, question.id, question.question, question.answers, chunks, nothing, gold=oracle, gold_texts=texts
    )


def _numbered(passages: list[Measured]) -> tuple[str, list[Span]]:
    """(these passages as one text, spans in which it must not be cut).

    A heading and the first character below it are such a span, or the next chunk would lose the title.
    """
    texts, headings, offset = [], [], 0
    for number, passage in enumerate(passages, 1):
        document = numbered_document(number, passage.title, passage.text)
        headings.append((offset, offset + len(document) - len(passage.text) - 1))
        texts.append(document)
        offset += len(document)
    return "".join(texts).rstrip("\n"), headings


def predicted_chunks(passages: list[Measured], limit: int) -> int:
    """Chunks that cut_chunks should make of these: it ends one with a document, if the chunk is half full by then."""
    chunks, used = 1, 0
    for passage in passages:
        if used + passage.tokens > limit and used >= limit / 2:
            chunks, used = chunks + 1, 0
        used += passage.tokens
        while used > limit:
            chunks, used = chunks + 1, used - limit
    return chunks


class LongQA:
    """Long-text QA: document i of a split, filled to `chunks` chunks; a pure function of (seed, split, i, chunks).

    A question that brings its text keeps that text's length.
    """

    def __init__(self, questions: dict[str, list[Question]], pool: Pool, *, seed: int, chunk_tokens: int, chunks: int):
        self.questions, self.pool, self.seed = questions, pool, seed
        self.chunk_tokens, self.chunks = chunk_tokens, chunks
        self.kept: dict[tuple, LongDocument] = {}  # of evaluations: asked for before and after, and for every model

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> LongDocument:
        """Raises UserError where the question can't be brought to that length; in training others are tried before."""
        chunks = chunks or self.chunks
        if split != "train" and (index, split, chunks) in self.kept:
            return self.kept[index, split, chunks]
        questions = self.questions[split]
        rng = np.random.default_rng([self.seed, index, 1])
        question = draw(questions, index, self.seed)
        for _ in range(20 if split == "train" else 1):
            try:
                document = self._filled(question, index, chunks)
            except UserError as error:
                last = error
                question = questions[int(rng.integers(len(questions)))]
                continue
            if split != "train":
                self.kept[index, split, chunks] = document
            return document
        raise last

    def texts(self) -> list[str]:
        """Every question that may be asked."""
        return [item.question for items in self.questions.values() for item in items]

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """`asked`. Where questions bring texts, the first one's length: it then labels texts of any length."""
        return asked if self.questions[split][0].context is None else [len(self.document(0, split).chunks)]

    def _filled(self, question: Question, index: int, chunks: int) -> LongDocument:
        """With about as many documents as `chunks` chunks hold."""
        tokenizer, limit = self.pool.tokenizer, self.chunk_tokens
        if question.context is not None:
            given = cut_chunks(question.context, [], tokenizer, limit)
            return LongDocument(index, question.id, question.question, question.answers, given, [[] for _ in given])
        draft = Draft(question, index, self.pool, self.seed)
        size = self._estimate(draft, chunks)
        few, many, best = 0, None, None  # numbers of documents: too few, too many
        while True:
            document = finished(draft, range(size), question, index, tokenizer, limit)
            made = len(document.chunks)
            if made == chunks:
                return document
            if made < chunks:
                few, best = size, document
            elif size == draft.gold:
                raise UserError(
                    f"question {question.id}: its {size} gold paragraphs take {made} chunks of {limit} tokens, "
                    f"{chunks} wanted; ask for a longer text or longer chunks"
                )
            else:
                many = size
            if many == few + 1:  # the next document takes two chunks
                return best
            size = max(few + 1, draft.gold, round(size * (chunks - 0.5) / (made - 0.5)))
            size = min(size, many - 1) if many else size
            if not draft.reach(size):
                size = len(draft.passages)
                if size == few:
                    raise UserError(
                        f"question {question.id}: {chunks} chunks wanted, but all {size} passages make "
                        f"{len(best.chunks)}; bring a larger pool"
                    )

    def _estimate(self, draft: Draft, chunks: int) -> int:
        """The largest number of documents that should make no more than these chunks."""
        size, used = 0, 0
        while used < chunks * self.chunk_tokens and draft.reach(size + 1):
            used += draft.passages[size].tokens
            size += 1
        low, high = draft.gold, max(size, draft.gold)
        draft.reach(high)
        while low < high:
            middle = (low + high + 1) // 2
            fits = predicted_chunks(draft.in_order(range(middle)), self.chunk_tokens) <= chunks
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
