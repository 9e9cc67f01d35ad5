"""Long-text QA for the reading agent (paper 4.2): a question's gold paragraphs hidden in a text of any length.

MemAgent shuffled the texts of all its samples with one seed, so gold paragraphs stand at the same places in every
sample of a length. Here each question has places of its own.
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
    """A Document about a real question: `title` is its id. Nothing is masked, nothing can be recalled."""

    gold: tuple[Paragraph, ...] = ()  # an oracle's memory; empty where the source doesn't tell


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
    """`paragraphs` with their tokens; empty ones are left out. A pool is measured once, for texts of any length."""
    paragraphs = [(" ".join(title.split()), text.strip()) for title, text in paragraphs if text.strip()]
    found = []
    for start in tqdm(range(0, len(paragraphs), 4096), desc="pool", delay=5):  # token ids of all at once are gigabytes
        some = paragraphs[start : start + 4096]
        texts = [numbered_document(1, title, text) for title, text in some]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        found += [Measured(title, text, len(ids)) for (title, text), ids in zip(some, encoded, strict=True)]
    return found


def shuffled(n: int, rng) -> Iterator[int]:
    """0..n-1 in random order, drawn one by one as they are asked for (Fisher and Yates, with the swaps in a dict)."""
    swapped: dict[int, int] = {}
    for i in range(n):
        other = int(rng.integers(i, n))
        yield swapped.get(other, other)
        swapped[other] = swapped.get(i, i)


def filler(gold: list[Measured], own: list[Measured], pool: list[Measured], rng) -> Iterator[Measured]:
    """The question's own distractors, then the pool in random order. No text comes twice.

    A pool's other paragraph of a gold title is left out: it may answer the question. A distractor is labelled not to.
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
    """A question's gold paragraphs and, behind them, as much filler as is asked for; each has its place in the text.

    Random by (seed, index) alone: a longer text keeps the order of a shorter one's paragraphs.
    """

    def __init__(self, question: Question, index: int, pool: list[Measured], tokenizer, seed: int, chunk_tokens: int):
        self.question, self.index, self.seed = question, index, seed
        self.tokenizer, self.chunk_tokens = tokenizer, chunk_tokens
        self.gold, own = (measured(some, tokenizer) for some in (question.gold, question.other))
        self.paragraphs = list(self.gold)
        self.filler = filler(self.gold, own, pool, np.random.default_rng([seed, index]))

    def draw(self, n: int) -> int:
        """Draw filler up to n paragraphs in all. Returns n, or how many there are where the pool is too small."""
        self.paragraphs += islice(self.filler, max(0, n - len(self.paragraphs)))
        return min(n, len(self.paragraphs))

    def in_order(self, n: int) -> list[Measured]:
        """The first n paragraphs, as they stand in the text."""
        places = np.random.default_rng([self.seed, self.index, 2]).random(n)  # of any n the same at the beginning
        return [self.paragraphs[i] for i in np.argsort(places, kind="stable")]

    def document(self, n: int) -> LongDocument:
        """A document of the first n paragraphs."""
        text, headings = "", []  # no cut within a heading or just below it: the next chunk would lose the title
        for number, (title, body, _) in enumerate(self.in_order(n), 1):
            numbered = numbered_document(number, title, body)
            headings.append((len(text), len(text) + len(numbered) - len(body) - 1))
            text += numbered
        chunks = cut_chunks(text.rstrip("\n"), headings, self.tokenizer, self.chunk_tokens)
        return long_document(self.question, self.index, chunks)

    def of_chunks(self, chunks: int) -> LongDocument:
        """A document of so many chunks; of fewer where the next paragraph takes several. Raises UserError."""
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
            size = round(size * (chunks - 0.5) / (made - 0.5))  # as if paragraphs were of one length
            size = self.draw(min(max(size, few + 1), many - 1))
        name = f"question {self.question.id}"
        if many == math.inf:
            raise UserError(f"{name}: {chunks} chunks wanted, but all {few} passages make {made}; bring a larger pool")
        if best is None:
            raise UserError(
                f"{name}: its {many} gold paragraphs take {made} chunks of {self.chunk_tokens} tokens, {chunks} "
                "wanted; ask for a longer text or longer chunks"
            )
        return best

    def estimate(self, chunks: int) -> int:
        """The largest number of paragraphs that should make no more than these chunks: saves cutting the text often."""
        least = most = len(self.gold)
        tokens = sum(paragraph.tokens for paragraph in self.gold)
        while tokens < chunks * self.chunk_tokens and self.draw(most + 1) > most:
            tokens += self.paragraphs[most].tokens
            most += 1
        sizes = range(most, least, -1)  # falling, as bisect_left finds the first for which the key is True
        return most - bisect_left(sizes, True, key=lambda n: self.predicted_chunks(n) <= chunks)

    def predicted_chunks(self, n: int) -> int:
        """Chunks that cut_chunks should make: it ends one with a paragraph, if the chunk is half full by then."""
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

    `pool` is measured() by the tokenizer. A question that brings its text keeps that text's length.
    """

    def __init__(
        self, questions: dict[str, list[Question]], pool: list[Measured], tokenizer, *, seed: int, chunk_tokens: int,
        chunks: int,
    ):
        self.questions, self.pool, self.tokenizer = questions, pool, tokenizer
        self.seed, self.chunk_tokens, self.chunks = seed, chunk_tokens, chunks
        self.kept: dict[tuple, LongDocument] = {}  # of evaluations: asked for before and after, and for every model

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> LongDocument:
        """Raises UserError where the question can't be brought to that length; in training others are tried before."""
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
        """`asked`. Where questions bring texts, the first one's length: it then labels texts of any length."""
        return asked if self.questions[split][0].context is None else [len(self.document(0, split).chunks)]

    def _made(self, question: Question, index: int, chunks: int) -> LongDocument:
        if question.context is not None:
            return long_document(question, index, cut_chunks(question.context, [], self.tokenizer, self.chunk_tokens))
        return LongText(question, index, self.pool, self.tokenizer, self.seed, self.chunk_tokens).of_chunks(chunks)
