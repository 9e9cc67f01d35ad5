"""From passages to masked documents (paper 3.2), and to what recall asks of them (3.3).

    mask_spans    every form of an entity in a text becomes [MASK] or [TARGET]
    Corpus        document i: a pivot, related and random passages, one entity masked everywhere, cut into chunks
    draw_recall   an earlier chunk with one entity replaced by [TARGET], and the later memory that must supply it
"""

import hashlib
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from engine.errors import UserError
from rewards import normalize
from text.bm25 import BM25
from text.chunking import cut_chunks
from text.matching import MASK, TARGET, akin, gives_away, occurrences

QUESTION = "Judging from the whole text, what does [MASK] stand for?"
ATTEMPTS = 200  # draws for one document before giving up
SMALLEST_CHUNK = 16  # tokens; any tokenizer fits [MASK] and any one character into that
Span = tuple[int, int]  # character positions, the end excluded


@dataclass
class Document:
    """A long text in chunks, a question about it, and the entities of each chunk that recall may ask for."""

    index: int
    title: str  # the pivot's; a reader never sees it
    question: str
    answers: list[str]  # y
    chunks: list[str]  # joined, they are the document
    recall: list[list[str]]
    leaks: int = 0  # draws, the kept one included, in which a part of y's name stayed readable
    redraws: int = 0  # draws thrown away, for a leak or any other reason
    place: int = 0  # among the documents of a step


@dataclass
class Recall:
    """After chunk `memory_step`: which entity stands at [TARGET] in `section`, which is chunk number `chunk`?"""

    memory_step: int  # k, counted from 1
    chunk: int  # l < k
    entity: str
    section: str


# ---- masking -----------------------------------------------------------------------------------------


def mask(text: str, entity: str, token: str = MASK) -> str:
    """`text` with every form of `entity` replaced: "Ulm and ULM, not Ulmer" -> "[MASK] and [MASK], not Ulmer"."""
    return mask_spans(text, [], entity, token)[0]


def mask_spans(text: str, spans: list[Span], entity: str, token: str = MASK) -> tuple[str, list[Span], list[Span]]:
    """(`text` with every form of `entity` replaced, `spans` at their new places, the places of `token`).

    Spans that overlap a form of the entity are left out.
    """
    pieces, places, done, length = [], [], 0, 0
    hits = occurrences(text, entity)
    for start, end in hits:
        pieces += [text[done:start], token]
        length += start - done + len(token)
        places.append((length - len(token), length))
        done = end
    shifts = [0, *(place[1] - hit[1] for place, hit in zip(places, hits, strict=True))]
    starts, moved = [start for start, _ in hits], []
    for start, end in spans:
        n = bisect_left(starts, end)  # hits that start before the span's end; the last must end before its start
        if n == 0 or hits[n - 1][1] <= start:
            moved.append((start + shifts[n], end + shifts[n]))
    return "".join([*pieces, text[done:]]), moved, places


# ---- documents ---------------------------------------------------------------------------------------


def is_heldout(title: str, share: float) -> bool:
    """Whether a title is kept for evaluation: its own hash decides, and nothing else."""
    digest = hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) < share * 2**32


class Corpus:
    """Masked documents: document(i, split) is a pure function of the passages, the seed, the split and i.

    With `n_chunks` a document gets as many passages as fill that many chunks; without, `n_passages` passages and at
    most `max_chunks` chunks. In the split "train" a held-out title is never a pivot, an answer or a recall target; in
    "heldout" it is always the pivot. Raises UserError for too few passages.
    """

    def __init__(
        self, passages: list, tokenizer, *, seed: int, chunk_tokens: int, n_chunks: int | None = None,
        n_passages: int | None = None, max_chunks: int | None = None, n_related: int = 0, keep_leaky: bool = False,
        heldout: float = 0.2,
    ):
        self.passages, self.tokenizer, self.seed, self.chunk_tokens = passages, tokenizer, seed, chunk_tokens
        self.n_chunks, self.n_passages, self.max_chunks = n_chunks, n_passages, max_chunks
        self.n_related, self.keep_leaky = n_related, keep_leaky
        if chunk_tokens < SMALLEST_CHUNK:
            raise UserError(f"--chunk-tokens {chunk_tokens}: a chunk needs at least {SMALLEST_CHUNK}")
        if max(n_passages or 1, n_related + 1) > len(passages):
            asked = f"--passages {n_passages}" if n_passages else f"--related {n_related}"
            raise UserError(
                f"the corpus has {len(passages)} passages, too few for {asked}: bring more text, or ask for fewer"
            )
        self.same_title: dict[str, list[int]] = {}
        for n, passage in enumerate(passages):
            self.same_title.setdefault(passage.title, []).append(n)
        self.heldout = {title for title in self.same_title if is_heldout(title, heldout)}
        self.never_in_train = {normalize(passage.name) for passage in passages if passage.title in self.heldout}
        self.pivots = {"train": [], "heldout": []}
        for n, passage in enumerate(passages):
            split = "heldout" if passage.title in self.heldout else "train"
            if self._names(n, split):
                self.pivots[split].append(n)
        if not any(self.pivots.values()):
            raise UserError("the corpus has no passage with an entity to mask: bring other text, or another --ner")
        self.index = BM25([f"{passage.title} {passage.text}" for passage in passages]) if n_related else None
        self.lengths: dict[int, int] = {}  # tokens of the passages seen so far

    def document(self, i: int, split: str = "train", chunks: int | None = None) -> Document:
        """Document number i of a split, of `chunks` chunks or of the corpus' own size.

        It begins with the same draws whatever `chunks` is, so most pivots and answers are the same at every length.
        Raises UserError if none can be made; in training the next number is tried before.
        """
        for n in range(i, i + (5 if split == "train" else 1)):
            try:
                return self._draw(n, split, chunks)
            except UserError as error:
                last = error
        raise last

    def _draw(self, i: int, split: str, chunks: int | None) -> Document:
        if not self.pivots[split]:
            raise UserError(
                f"no passage with an entity is left for the split {split!r}: bring more titles, or change --heldout"
            )
        rng = np.random.default_rng([self.seed, split == "heldout", i])
        leaks, draws = 0, 0
        while draws < ATTEMPTS:
            pivot = int(rng.choice(self.pivots[split]))
            pool, places = self._pool(pivot, rng)
            names = self._names(pivot, split)
            for n in rng.permutation(len(names)).tolist():  # the next one, if the document leaks the first
                draws += 1
                document = self._build(i, split, pool, places, names[n], chunks or self.n_chunks)
                leaky = document and any(gives_away(chunk, names[n]) for chunk in document.chunks)
                leaks += bool(leaky)
                if document and (self.keep_leaky or not leaky):
                    document.leaks, document.redraws = leaks, draws - 1
                    return document
        raise UserError(
            f"document {i} ({split}) could not be built in {draws} draws, {leaks} of them leaky: bring more text, "
            "longer chunks or --keep-leaky"
        )

    def _names(self, n: int, split: str) -> list[str]:
        """The distinct entities of passage n that may be masked."""
        passage = self.passages[n]
        return self._allowed([passage.text[start:end] for start, end in passage.entities], split)

    def _allowed(self, names: list[str], split: str) -> list[str]:
        """Each name once, without those that normalise to nothing and, in training, those that are held out."""
        named = {normalize(name): " ".join(name.split()) for name in names}
        return [name for key, name in named.items() if key and (split == "heldout" or key not in self.never_in_train)]

    def _pool(self, pivot: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """(pivot, related and random passages, to be taken from the front; random numbers that order those taken).

        Other passages of the pivot's own title are left out: they would all but repeat it.
        """
        own, related = self.same_title[self.passages[pivot].title], []
        if self.n_related:
            query = f"{self.passages[pivot].title} {self.passages[pivot].text}"
            (found,) = self.index.search([query], self.n_related + len(own))
            related = [n for n, _ in found if n not in own][: self.n_related]
        others = rng.permutation(len(self.passages))
        others = others[~np.isin(others, [*own, *related])]
        return np.array([pivot, *related, *others]), rng.random(1 + len(related) + len(others))

    def _build(
        self, i: int, split: str, pool: np.ndarray, places: np.ndarray, answer: str, n_chunks: int | None
    ) -> Document | None:
        """The document with `answer` masked, or None where the pivot doesn't fit into its chunks."""
        text, masks, entities, (first, last), chunks = self._fill(pool, places, answer, n_chunks)
        most = n_chunks or self.max_chunks or len(chunks)
        # Chunks that are too many go at the end; also at the front where the pivot would be lost otherwise.
        chunk_ends = list(accumulate(map(len, chunks)))
        begin = max(0, bisect_left(chunk_ends, last) + 1 - most)
        start = chunk_ends[begin - 1] if begin else 0
        if first < start or not masks:
            return None
        touching = {place for span in masks for place in span}
        recall, chunks = [], chunks[begin : begin + most]
        for chunk in chunks:
            end = start + len(chunk)
            inside = [(s, e) for s, e in entities if start <= s and e <= end]
            apart = [text[s:e] for s, e in inside if s not in touching and e not in touching]
            recall.append([name for name in self._allowed(apart, split) if not akin(name, answer)])
            start = end
        return Document(i, self.passages[pool[0]].title, QUESTION, [answer], chunks, recall)

    def _fill(self, pool: np.ndarray, places: np.ndarray, answer: str, n_chunks: int | None) -> tuple:
        """_join of as many passages as fill the chunks, or of `n_passages`, and the text in chunks."""
        size = self._estimate(pool, n_chunks) if n_chunks else self.n_passages
        while True:
            if size > len(pool):
                chunks = f"{n_chunks} chunks of {self.chunk_tokens} tokens"
                raise UserError(
                    f"the corpus has {len(self.passages)} passages, too few for "
                    f"{chunks if n_chunks else f'--passages {self.n_passages}'} (a title comes once beside a pivot)"
                )
            text, masks, entities, pivot = self._join(pool[np.argsort(places[:size])], pool[0], answer)
            chunks = cut_chunks(text, entities, self.tokenizer, self.chunk_tokens)
            if not n_chunks or len(chunks) >= n_chunks:
                return text, masks, entities, pivot, chunks
            # Near the end of a long text not one passage a time: each try cuts all of it.
            size = max(size + 1 + size // 100, int(size * 0.95 * n_chunks / len(chunks)))

    def _estimate(self, pool: np.ndarray, n_chunks: int) -> int:
        """A number of passages that should not quite fill the chunks, by the length of the unmasked passages."""
        used = 0
        for size, n in enumerate(pool.tolist()):
            if used > n_chunks * self.chunk_tokens / 2:
                return size
            if n not in self.lengths:
                encoded = self.tokenizer(self.passages[n].text, add_special_tokens=False, verbose=False)
                self.lengths[n] = len(encoded["input_ids"])
            used += self.lengths[n]
        return len(pool)

    def _join(self, order: np.ndarray, pivot: int, answer: str) -> tuple[str, list[Span], list[Span], Span]:
        """(masked text, its masks, the entities it still has, the pivot's span)."""
        texts, masks, entities, offset = [], [], [], 0
        for n in order.tolist():
            text, moved, tokens = mask_spans(self.passages[n].text, self.passages[n].entities, answer)
            masks += [(s + offset, e + offset) for s, e in tokens]
            entities += [(s + offset, e + offset) for s, e in moved]
            if n == pivot:
                where = offset, offset + len(text)
            texts.append(text)
            offset += len(text) + 2
        return "\n\n".join(texts), masks, entities, where


def draw_recall(document: Document, rng) -> Recall | None:
    """Draw k in 2..T-1, l in 1..k-1 and an entity of chunk l, of T-1 chunks; None if there is nothing to draw."""
    sources = [n for n, entities in enumerate(document.recall[:-1], 1) if entities]
    if not sources:
        return None
    k = int(rng.integers(sources[0] + 1, len(document.chunks) + 1))
    chunk = int(rng.choice([n for n in sources if n < k]))
    names = document.recall[chunk - 1]
    entity = names[int(rng.integers(len(names)))]
    return Recall(k, chunk, entity, mask(document.chunks[chunk - 1], entity, TARGET))
