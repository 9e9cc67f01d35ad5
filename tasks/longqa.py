"""Long-text QA for the reading agent (paper 4.2): a question's gold paragraphs hidden in a text of any length.

    Pool            passages to fill a long text with
    long_document   one question's gold paragraphs among numbered documents, cut into chunks
    LongQA          a source of such documents to train and evaluate on, like masking.Corpus

MemAgent shuffled the texts of all its samples with one seed, so gold paragraphs stand at the same places in every
sample of a length. Here each question has places of its own.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from masking import Document
from rewards import normalize
from tasks.questions import Paragraph, Question, draw
from text.chunking import cut_chunks
from text.matching import Span

TOLERANCE = 0.05  # of the wanted number of tokens


@dataclass
class LongDocument(Document):
    """A Document about a real question: `title` is its id. Nothing is masked, nothing can be recalled."""

    gold: str = ""  # the gold paragraphs alone: an oracle's memory; "" where the source doesn't tell


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
) -> LongDocument:
    """The gold paragraphs among numbered documents: `documents` of them, or `target_tokens` tokens within 5 %.

    Random by (seed, index) alone; a longer text keeps the order of a shorter one's documents. Filler is first the
    question's own distractors, then the pool; none repeats a text, none from the pool has a gold title.
    Raises UserError for a pool that is too small and for gold paragraphs that are too long.
    """
    if (target_tokens is None) == (documents is None):
        raise ValueError("give either target_tokens or documents")
    rng = np.random.default_rng([seed, index])
    gold, own = measure(question.gold, pool.tokenizer), measure(question.other, pool.tokenizer)
    passages, first = gold + own + pool.passages, len(gold) + len(own)
    places = rng.random(len(passages))  # drawn for all of them, so that each keeps its place at every length
    order = [*range(len(gold), first), *(first + rng.permutation(len(pool.passages))).tolist()]
    gold_titles = {passage.title_key for passage in gold}
    texts, filler = {passage.text_key for passage in gold}, []
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
            f"question {question.id}: {wanted} wanted, but its {len(gold)} gold paragraphs with what fits of "
            f"{len(filler)} passages make {len(taken)} documents, {_count(text, pool.tokenizer)} tokens; {remedy}"
        )
    chunks = cut_chunks(text, headings, pool.tokenizer, chunk_tokens)
    oracle = "\n\n".join(f"{passage.title}\n{passage.text}" for passage in gold)
    nothing = [[] for _ in chunks]  # to recall
    return LongDocument(index, question.id, question.question, question.answers, chunks, nothing, gold=oracle)


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

    A heading and the first character below it are such a span, or the next chunk would lose the title.
    """
    texts, headings, offset = [], [], 0
    for number, n in enumerate(sorted(taken, key=lambda n: places[n]), 1):
        document = numbered_document(number, passages[n].title, passages[n].text)
        headings.append((offset, offset + len(document) - len(passages[n].text) - 1))
        texts.append(document)
        offset += len(document)
    return "".join(texts).rstrip("\n"), headings


class LongQA:
    """Long-text QA: document i of a split, filled to `chunks` chunks; a pure function of (seed, split, i, chunks).

    A question that brings its text is as long as that is.
    """

    def __init__(self, questions: dict[str, list[Question]], pool: Pool, *, seed: int, chunk_tokens: int, chunks: int):
        self.questions, self.pool, self.seed = questions, pool, seed
        self.chunk_tokens, self.chunks = chunk_tokens, chunks

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> LongDocument:
        """Raises UserError where the question can't be brought to that length; in training others are tried before."""
        questions = self.questions[split]
        rng = np.random.default_rng([self.seed, index, 1])
        question = draw(questions, index, self.seed)
        for _ in range(20 if split == "train" else 1):
            try:
                return self._filled(question, index, chunks or self.chunks)
            except UserError as error:
                last = error
            question = questions[int(rng.integers(len(questions)))]
        raise last

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """The lengths to evaluate at: those asked for, or one, as the first has it, where the texts are given."""
        return asked if self.questions[split][0].context is None else [len(self.document(0, split).chunks)]

    def _filled(self, question: Question, index: int, chunks: int) -> LongDocument:
        """With as many documents as `chunks` chunks hold: chunks end with paragraphs, so few are quite full."""
        if question.context is not None:
            given = cut_chunks(question.context, [], self.pool.tokenizer, self.chunk_tokens)
            return LongDocument(index, question.id, question.question, question.answers, given, [[] for _ in given])

        def build(documents: int) -> LongDocument:
            how = {"seed": self.seed, "chunk_tokens": self.chunk_tokens, "documents": documents}
            return long_document(question, index, self.pool, **how)

        least = len(question.gold)
        document = build(least)
        if len(document.chunks) > chunks:
            raise UserError(
                f"question {question.id}: its {least} gold paragraphs take {len(document.chunks)} chunks of "
                f"{self.chunk_tokens} tokens, {chunks} wanted; ask for a longer text or longer chunks"
            )
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
