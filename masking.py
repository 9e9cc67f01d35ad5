"""From passages to masked documents (paper 3.2 and 3.3).

    cut_chunks    a text cut at safe places, each piece within a token limit
    Corpus        document i: a pivot, related and random passages, one entity masked everywhere, cut into chunks
    draw_recall   one chunk with one entity replaced by [TARGET], and the later memory that must supply it
"""

import hashlib
import re
import unicodedata
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from corpus import Passage, bare
from errors import UserError
from matching import MASK, TARGET, Span, akin, mask, mask_spans, merges, name_words, occurrences
from retrieval import BM25
from rewards import normalize

QUESTION = "Judging from the whole text, what does [MASK] stand for?"
ATTEMPTS = 200  # draws for one document before giving up
SMALLEST_CHUNK = 16  # tokens; any tokenizer fits [MASK] and any one character into that


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


@dataclass
class Recall:
    """After chunk `memory_step` was read: which entity stands at [TARGET] in `section`, which is chunk number `chunk`?"""

    memory_step: int  # k, counted from 1
    chunk: int  # l < k
    entity: str
    section: str

# ---- chunks ------------------------------------------------------------------------------------------


def cut_chunks(text: str, keep: list[Span], tokenizer, limit: int) -> list[str]:
    """`text` in pieces of at most `limit` tokens, each measured as it stands; joined they are `text`.

    A cut falls between words, in the last half of the chunk at the end of a paragraph or else a sentence if there is
    one. It never splits a [MASK], and a span of `keep`, a word or a combined character only where that alone is longer
    than a chunk.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    within_mask = {m.start() + n for m in re.finditer(re.escape(MASK), text) for n in range(1, len(MASK))}
    inside = {place for start, end in keep for place in range(start + 1, end)} | within_mask
    places, ranks = [], []  # between two words, and how good a cut it is: 2 after a paragraph, 1 a sentence, 0 a word
    for gap in re.finditer(r"(\S?\S?)(\s+)(?=\S)", text):
        if gap.end() not in inside and not _splits_character(text, gap.end()):
            places.append(gap.end())
            ranks.append(2 if "\n" in gap[2] else int(gap[1].rstrip("\"'”’)]").endswith((".", "!", "?"))))
    last_resorts = (
        lambda place: place not in inside and not _splits_character(text, place),  # for a word longer than a chunk
        lambda place: text[place - 1].isspace() and not _splits_character(text, place),  # for such an entity
        lambda place: place not in within_mask and not _splits_character(text, place),
        lambda place: place not in within_mask,  # an emoji can be a dozen codes
    )
    chunks, start = [], 0
    while start < len(text):
        last = bisect_right(token_ends, start) + limit - 1  # the last token that fits, counted within the whole text
        reach = max(token_ends[last], start + 1) if last < len(token_ends) - 1 else len(text)
        near, half = range(bisect_right(places, start), bisect_right(places, reach)), (start + reach) // 2
        best = sorted(near, key=lambda n: (ranks[n] if places[n] >= half else 0, places[n]), reverse=True)
        ends = chain(
            [reach] if reach == len(text) else [], (places[n] for n in best),
            (end for fits in last_resorts for end in range(reach, start, -1) if fits(end)),
        )  # fmt: skip
        for end in ends:  # a piece may take more tokens alone than it took within the text
            if len(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]) <= limit:
                break
        else:
            raise UserError(f"--chunk-tokens {limit}: too few for {text[start:start + 6]!r} with this tokenizer; make it larger")
        chunks.append(text[start:end])
        start = end
    return chunks


def _splits_character(text: str, place: int) -> bool:
    """Whether text[place] belongs to what a reader sees as one character with the code before it."""
    before, after = text[place - 1], text[place : place + 1]
    if after.isascii():  # so is the text's end
        return before + after == "\r\n"
    if "\U0001f1e6" <= after <= "\U0001f1ff":  # a flag is two of these, so the second of a pair has an odd number before
        return len(re.search("[\U0001f1e6-\U0001f1ff]*\\Z", text[max(0, place - 50) : place])[0]) % 2 == 1
    if unicodedata.category(after)[0] == "M" or "\u200d" in (before, after) or "\U0001f3fb" <= after <= "\U0001f3ff":
        return True  # an accent, a joined emoji, its skin
    return merges(before, after)


# ---- documents ---------------------------------------------------------------------------------------


def is_heldout(title: str, share: float) -> bool:
    """Whether a title is kept for evaluation: a matter of its own hash and nothing else."""
    return int.from_bytes(hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()[:4]) < share * 2**32


class Corpus:
    """Masked documents: document(i, split) is a pure function of the passages, the seed, the split and i.

    With `n_chunks` a document gets as many passages as fill that many chunks; without, `n_passages` passages and at most
    `max_chunks` chunks. In the split "train" a held-out title is never a pivot, an answer or a recall target; in
    "heldout" it is always the pivot. Raises UserError for too few passages.
    """

    def __init__(
        self, passages: list[Passage], tokenizer, *, seed: int, chunk_tokens: int, n_chunks: int | None = None,
        n_passages: int | None = None, max_chunks: int | None = None, n_related: int = 0, keep_leaky: bool = False,
        heldout: float = 0.2,
    ):  # fmt: skip
        self.passages, self.tokenizer, self.seed = passages, tokenizer, seed
        self.chunk_tokens, self.n_chunks, self.n_passages, self.max_chunks = chunk_tokens, n_chunks, n_passages, max_chunks
        self.n_related, self.keep_leaky = n_related, keep_leaky
        if chunk_tokens < SMALLEST_CHUNK:
            raise UserError(f"--chunk-tokens {chunk_tokens}: a chunk needs at least {SMALLEST_CHUNK}")
        if max(n_passages or 1, n_related + 1) > len(passages):
            asked = f"--passages {n_passages}" if n_passages else f"--related {n_related}"
            raise UserError(f"the corpus has {len(passages)} passages, too few for {asked}: bring more text, or ask for fewer")
        self.same_title: dict[str, list[int]] = {}
        for n, passage in enumerate(passages):
            self.same_title.setdefault(passage.title, []).append(n)
        self.heldout = {title for title in self.same_title if is_heldout(title, heldout)}
        self.never_in_train = {normalize(bare(title)) for title in self.heldout}
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
        """Document number i of a split, of `chunks` chunks or of the corpus' own size. Raises UserError if none can be made.

        In training the next number is tried then. It begins with the same draws whatever `chunks` is, so most pivots and
        answers are the same at every length.
        """
        for n in range(i, i + (5 if split == "train" else 1)):
            try:
                return self._draw(n, split, chunks)
            except UserError as error:
                last = error
        raise last

    def _draw(self, i: int, split: str, chunks: int | None) -> Document:
        if not self.pivots[split]:
            raise UserError(f"no passage with an entity is left for the split {split!r}: bring more titles, or change --heldout")
        rng = np.random.default_rng([self.seed, split == "heldout", i])
        leaks, draws = 0, 0
        while draws < ATTEMPTS:
            pivot = int(rng.choice(self.pivots[split]))
            pool, places = self._pool(pivot, rng)
            names = self._names(pivot, split)
            for n in rng.permutation(len(names)).tolist():  # the next one, if the document leaks the first
                draws += 1
                document = self._build(i, split, pool, places, names[n], chunks or self.n_chunks)
                leaky = document and any(occurrences(text, word) for word in name_words(names[n]) for text in document.chunks)
                leaks += bool(leaky)
                if document and (self.keep_leaky or not leaky):
                    document.leaks, document.redraws = leaks, draws - 1
                    return document
        raise UserError(
            f"document {i} ({split}) could not be built in {draws} draws, {leaks} of them leaky: bring more text, longer "
            "chunks or --keep-leaky"
        )

    def _names(self, n: int, split: str) -> list[str]:
        """The distinct entities of passage n that may be masked."""
        passage = self.passages[n]
        names = {normalize(passage.text[s:e]): " ".join(passage.text[s:e].split()) for s, e in passage.entities}
        return [name for key, name in names.items() if split == "heldout" or key not in self.never_in_train]

    def _pool(self, pivot: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """(passages to take from the front: pivot, related, random ones; random numbers that order those taken).

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

    def _build(self, i: int, split: str, pool: np.ndarray, places: np.ndarray, answer: str, n_chunks: int | None) -> Document | None:
        """The document with `answer` masked, or None where the pivot doesn't fit into its chunks."""
        size = self._estimate(pool, n_chunks) if n_chunks else self.n_passages
        while True:
            if size > len(pool):
                wanted = f"{n_chunks} chunks of {self.chunk_tokens} tokens" if n_chunks else f"--passages {self.n_passages}"
                raise UserError(f"the corpus has {len(self.passages)} passages, too few for {wanted} (a title comes once beside a pivot)")
            text, masks, entities, (first, last) = self._join(pool[np.argsort(places[:size])], pool[0], answer)
            chunks = cut_chunks(text, entities, self.tokenizer, self.chunk_tokens)
            if not n_chunks or len(chunks) >= n_chunks:
                break
            # Not one passage a time, near the end of a long text: each try cuts all of it.
            size = max(size + 1 + size // 100, int(size * 0.95 * n_chunks / len(chunks)))
        most = n_chunks or self.max_chunks or len(chunks)
        # What is too much goes at the end; also at the front where the pivot would be lost otherwise.
        chunk_ends = list(accumulate(map(len, chunks)))
        begin = max(0, bisect_left(chunk_ends, last) + 1 - most)
        start = chunk_ends[begin - 1] if begin else 0
        if first < start or not masks:
            return None
        touching = {place for span in masks for place in span}
        recall, chunks = [], chunks[begin : begin + most]
        for chunk in chunks:
            end = start + len(chunk)
            whole = [text[s:e] for s, e in entities if start <= s and e <= end and s not in touching and e not in touching]
            names = {normalize(name): " ".join(name.split()) for name in whole}
            allowed = (n for key, n in names.items() if split == "heldout" or key not in self.never_in_train)
            recall.append([name for name in allowed if not akin(name, answer)])
            start = end
        return Document(i, self.passages[pool[0]].title, QUESTION, [answer], chunks, recall)

    def _estimate(self, pool: np.ndarray, n_chunks: int) -> int:
        """A number of passages that should not quite fill the chunks, by the length of the unmasked passages."""
        used = 0
        for size, n in enumerate(pool.tolist()):
            if used > n_chunks * self.chunk_tokens / 2:
                return size
            if n not in self.lengths:
                self.lengths[n] = len(self.tokenizer(self.passages[n].text, add_special_tokens=False, verbose=False)["input_ids"])
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
    """Draw k in 2..T-1, l in 1..k-1 and an entity of chunk l (a document has T-1 chunks); None if there is nothing to draw."""
    sources = [n for n, entities in enumerate(document.recall[:-1], 1) if entities]
    if not sources:
        return None
    k = int(rng.integers(sources[0] + 1, len(document.chunks) + 1))
    chunk = int(rng.choice([n for n in sources if n < k]))
    names = document.recall[chunk - 1]
    entity = names[int(rng.integers(len(names)))]
    return Recall(k, chunk, entity, mask(document.chunks[chunk - 1], entity, TARGET))
