"""Long-text QA for the reading agent (paper 4.2): a question's gold paragraphs hidden in a text of any length.

MemAgent shuffled the texts of all its samples with one seed, so gold paragraphs are at the same places in every sample
of a length. Here each question has its own places.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.errors import UserError
from masking import Document
from rewards import normalize
from tasks.questions import Paragraph, Question, draw
from text.chunking import cut_chunks


@dataclass
class LongDocument(Document):
    """A Document about a real question: `title` is the question's id. Nothing is masked, and there is no recall."""

    gold: tuple[Paragraph, ...] = ()  # the oracle control's memory; empty if the source doesn't mark them


def long_document(question: Question, index: int, chunks: list[str]) -> LongDocument:
    nothing = [[] for _ in chunks]  # to recall
    gold = tuple(question.gold)
    return LongDocument(index, question.id, question.question, question.answers, chunks, nothing, gold=gold)


class Measured(NamedTuple):
    """A paragraph, and the tokens it takes as one numbered document of a long text."""

    title: str
    text: str
    tokens: int


def numbered_document(number: int, title: str, text: str) -> str:
    return f"Document {number}: {title}\n{text}\n\n"


def measured(paragraphs: list[Paragraph], tokenizer) -> list[Measured]:
    """`paragraphs`, without empty ones, and their token counts. A pool is measured once, for texts of any length."""
    paragraphs = [(" ".join(title.split()), text.strip()) for title, text in paragraphs if text.strip()]
    found = []
    for start in tqdm(range(0, len(paragraphs), 4096), desc="pool", delay=5):  # all token ids at once are gigabytes
        some = paragraphs[start : start + 4096]
        texts = [numbered_document(1, title, text) for title, text in some]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        found += [Measured(title, text, len(ids)) for (title, text), ids in zip(some, encoded, strict=True)]
    return found


def shuffled(n: int, rng) -> Iterator[int]:
    """Yields 0..n-1 in random order, drawn lazily (Fisher-Yates, with the swaps in a dict)."""
    swapped: dict[int, int] = {}
    for i in range(n):
        other = int(rng.integers(i, n))
        yield swapped.get(other, other)
        swapped[other] = swapped.get(i, i)


def filler(gold: list[Measured], own: list[Measured], pool: list[Measured], rng) -> Iterator[Measured]:
    """Yields the question's own distractors, then the pool in random order. No text occurs twice.

    The pool's other paragraphs with a gold title are left out: they may answer the question. Distractors are
    labelled not to.
    """
    titles = {normalize(paragraph.title) for paragraph in gold}
    texts = {"".join(paragraph.text.split()) for paragraph in gold}
    pooled = (pool[n] for n in shuffled(len(pool), rng))
    for paragraph in chain(own, (p for p in pooled if normalize(p.title) not in titles)):
        text = "".join(paragraph.text.split())
        if text not in texts:
            texts.add(text)
            yield paragraph


class LongText:
    """A question's gold paragraphs, then as much filler as is asked for; each paragraph has a random place in the text.

    Random by (seed, index) alone: a longer text keeps the order of a shorter one's paragraphs.
    """

    def __init__(self, question: Question, index: int, pool: list[Measured], tokenizer, seed: int, chunk_tokens: int):
        self.question, self.index, self.seed = question, index, seed
        self.tokenizer, self.chunk_tokens = tokenizer, chunk_tokens
        self.gold, own = (measured(some, tokenizer) for some in (question.gold, question.other))
        self.paragraphs = list(self.gold)
        self.filler = filler(self.gold, own, pool, np.random.default_rng([seed, index]))

    def draw(self, n: int) -> int:
        """Draw filler up to n paragraphs in all. Returns n, or the number of paragraphs if the pool is too small."""
        self.paragraphs += islice(self.filler, max(0, n - len(self.paragraphs)))
        return min(n, len(self.paragraphs))

    def in_order(self, n: int) -> list[Measured]:
        """The first n paragraphs, in the order in which they are in the text."""
        places = np.random.default_rng([self.seed, self.index, 2]).random(n)  # a larger n only adds numbers at the end
        return [self.paragraphs[i] for i in np.argsort(places, kind="stable")]

    def document(self, n: int) -> LongDocument:
        """A document of the first n paragraphs."""
        text, headings = "", []  # no cut in or just after a heading: the next chunk would lose the title
        for number, (title, body, _) in enumerate(self.in_order(n), 1):
            numbered = numbered_document(number, title, body)
            headings.append((len(text), len(text) + len(numbered) - len(body) - 1))
            text += numbered
        chunks = cut_chunks(text.rstrip("\n"), headings, self.tokenizer, self.chunk_tokens)
        return long_document(self.question, self.index, chunks)

    def of_chunks(self, chunks: int) -> LongDocument:
        """A document of `chunks` chunks, or fewer if the next paragraph alone takes several.

        Raises UserError if the pool is too small, or the gold paragraphs alone take more chunks.
        """
        few, many, best = len(self.gold) - 1, math.inf, None  # numbers of paragraphs: too few, too many
        size = self.estimate(chunks)
        while few < size < many:
            document = self.document(size)
            made = len(document.chunks)
            if made == chunks:
                return document
            if made < chunks:
                few, best = size, document
            else:
                many = size
            size = round(size * (chunks - 0.5) / (made - 0.5))  # as if all paragraphs had the same length
            size = self.draw(min(max(size, few + 1), many - 1))
        name = f"question {self.question.id}"
        if many == math.inf:
            raise UserError(f"{name}: {chunks} chunks wanted, but all {few} passages make {made}; use a larger corpus")
        if best is None:
            raise UserError(
                f"{name}: its {many} gold paragraphs take {made} chunks of {self.chunk_tokens} tokens, but {chunks} "
                "are wanted; ask for more or longer chunks"
            )
        return best

    def estimate(self, chunks: int) -> int:
        """The largest number of paragraphs that should make at most `chunks` chunks: so the text is cut less often."""
        least = most = len(self.gold)
        tokens = sum(paragraph.tokens for paragraph in self.gold)
        while tokens < chunks * self.chunk_tokens and self.draw(most + 1) > most:
            tokens += self.paragraphs[most].tokens
            most += 1
        sizes = range(most, least, -1)  # falling, since bisect_left finds the first for which the key is True
        return most - bisect_left(sizes, True, key=lambda n: self.predicted_chunks(n) <= chunks)

    def predicted_chunks(self, n: int) -> int:
        """The chunks that cut_chunks should make: it ends a chunk after a paragraph if the chunk is half full."""
        chunks, used = 1, 0
        for paragraph in self.in_order(n):
            if used + paragraph.tokens > self.chunk_tokens and used >= self.chunk_tokens / 2:
                chunks, used = chunks + 1, 0
            used += paragraph.tokens
            while used > self.chunk_tokens:
                chunks, used = chunks + 1, used - self.chunk_tokens
        return chunks


class LongQA:
    """Long-text QA: document i of a split, filled to `chunks` chunks; a pure function of (seed, split, i, chunks).

    `pool` comes from measured() with the same tokenizer. A question with its own text keeps that text's length.
    """

    def __init__(
        self, questions: dict[str, list[Question]], pool: list[Measured], tokenizer, *, seed: int, chunk_tokens: int,
        chunks: int,
    ):
        self.questions, self.pool, self.tokenizer = questions, pool, tokenizer
        self.seed, self.chunk_tokens, self.chunks = seed, chunk_tokens, chunks
        self.kept: dict[tuple, LongDocument] = {}  # for evaluations: used before and after training, by every model

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> LongDocument:
        """Document `index` of a split. In training, a question that can't have that length is replaced by another.

        Raises UserError if it can't be built; in training, if 20 questions in a row can't.
        """
        questions, chunks = self.questions[split], chunks or self.chunks
        question = draw(questions, index, self.seed)
        if split != "train":
            place = index, split, chunks
            if place not in self.kept:
                self.kept[place] = self._made(question, index, chunks)
            return self.kept[place]
        for other in np.random.default_rng([self.seed, index, 1]).integers(len(questions), size=20):
            try:
                return self._made(question, index, chunks)
            except UserError as error:
                question, failure = questions[other], error
        raise failure

    @property
    def longest_question(self) -> str:
        return max((item.question for items in self.questions.values() for item in items), key=len)

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """`asked`; if questions have their own texts, the length of the first one, which then labels them all."""
        return asked if self.questions[split][0].context is None else [len(self.document(0, split).chunks)]

    def _made(self, question: Question, index: int, chunks: int) -> LongDocument:
        if question.context is not None:
            return long_document(question, index, cut_chunks(question.context, [], self.tokenizer, self.chunk_tokens))
        return LongText(question, index, self.pool, self.tokenizer, self.seed, self.chunk_tokens).of_chunks(chunks)
