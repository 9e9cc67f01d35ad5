"""Build masked documents (paper 3.2), and draw the questions of the recall task (3.3).

    mask_spans    replaces every form of an entity in a text by [MASK] or [TARGET]
    Corpus        document i: the passage whose entity is asked for (the pivot), passages related to it and random
                  ones, the entity masked in all of them, cut into chunks
    draw_recall   an earlier chunk with one entity replaced by [TARGET], and the later memory that must supply it

A form of an entity: its whole words in any case. Two names are akin if one may be part of the other, or its alias.
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
from text.matching import MASK, TARGET, akin, name_words, occurrences

QUESTION = "Judging from the whole text, what does [MASK] stand for?"
ATTEMPTS = 200  # draws for one document before giving up
TRIES = 5  # documents to try under one number, in training
SMALLEST_CHUNK = 16  # tokens: cut_chunks never splits a [MASK], nor a character
GAP = "\n\n"  # between the passages of a document
Span = tuple[int, int]  # character positions, the end excluded


@dataclass
class Document:
    """A long text in chunks, a question about it, and the entities of each chunk that recall may ask for."""

    index: int  # in its split
    title: str  # the pivot's; a reader never sees it
    question: str
    answers: list[str]  # y
    chunks: list[str]  # joined, they are the document
    recall_candidates: list[list[str]]  # of each chunk, the names that recall may ask for
    leaks: int = 0  # draws, the kept one included, that gave y away
    redraws: int = 0  # draws thrown away, for a leak or as the pivot didn't fit
    place: int = 0  # 0..documents-1 in its step, over all processes; Run.draw sets it


@dataclass
class RecallTarget:
    """A recall question: name the entity at [TARGET] in chunk l from the memory m_k."""

    memory_turn: int  # k, counted from 1
    chunk: int  # l < k
    entity: str
    masked_chunk: str  # chunk l, with the entity as [TARGET]
    leaky: bool = False  # one of the entity's long words is still in the section


# ---- masking -----------------------------------------------------------------------------------------


def mask(text: str, entity: str, token: str = MASK) -> str:
    """`text` with every form of `entity` replaced: "Ulm and ULM, not Ulmer" -> "[MASK] and [MASK], not Ulmer"."""
    return mask_spans(text, [], entity, token)[0]


def mask_spans(text: str, spans: list[Span], entity: str, token: str = MASK) -> tuple[str, list[Span], list[Span]]:
    """Replace every form of `entity` -> masked text, the given spans moved along, the spans of the new tokens.

    Given spans that overlap a form of the entity are left out.
    """
    forms = occurrences(text, entity)
    pieces, tokens, copied, length = [], [], 0, 0
    for start, end in forms:
        pieces += [text[copied:start], token]
        length += start - copied + len(token)
        tokens.append((length - len(token), length))
        copied = end
    # shifts[n] is added to the positions behind the first n forms.
    shifts = [0, *(new_end - end for (_, new_end), (_, end) in zip(tokens, forms, strict=True))]
    starts = [start for start, _ in forms]
    moved = []
    for start, end in spans:
        n = bisect_left(starts, end)  # forms that start before the span's end
        if n == 0 or forms[n - 1][1] <= start:
            moved.append((start + shifts[n], end + shifts[n]))
    return "".join([*pieces, text[copied:]]), moved, tokens


def gives_away(text: str, name: str) -> bool:
    """Whether `text` holds a long word of a name, so that the rest of it can be guessed."""
    return any(occurrences(text, word) for word in name_words(name))


# ---- documents ---------------------------------------------------------------------------------------


def is_heldout(title: str, share: float) -> bool:
    """Whether a title is kept for evaluation: by a hash of the title, so it is the same in every run."""
    digest = hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) < share * 2**32


class Corpus:
    """Masked documents: document(i, split) is a pure function of the passages, the seed, the split and i.

    With `n_chunks` a document gets as many passages as fill that many chunks. Without, it gets `n_passages` passages,
    cut to at most `max_chunks` chunks. In the split "train" a passage with a held-out title is never the pivot, and its
    title is never masked; in "heldout" such a passage is always the pivot. Raises UserError for too few passages.
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
            asked = f"--passages {n_passages}" if (n_passages or 0) > n_related else f"--related {n_related}"
            raise UserError(
                f"the corpus has {len(passages)} passages, too few for {asked}: bring more text, or ask for fewer"
            )
        self.same_title: dict[str, list[int]] = {}
        for n, passage in enumerate(passages):
            self.same_title.setdefault(passage.title, []).append(n)
        self.heldout = {title for title in self.same_title if is_heldout(title, heldout)}
        self.never_in_train = {normalize(passage.name) for passage in passages if passage.title in self.heldout}
        # Numbers of the passages that have a name of several words (True) or of one (False).
        self.pivots: dict[str, dict[bool, list[int]]] = {split: {True: [], False: []} for split in ("train", "heldout")}
        counts = {split: {True: 0, False: 0} for split in self.pivots}
        for n, passage in enumerate(passages):
            split = "heldout" if passage.title in self.heldout else "train"
            kinds = [" " in name for name in self._names(n, split)]
            for several in set(kinds):
                self.pivots[split][several].append(n)
                counts[split][several] += kinds.count(several)
        self.several = {split: count[True] / max(1, sum(count.values())) for split, count in counts.items()}
        if not any(numbers for split in self.pivots.values() for numbers in split.values()):
            raise UserError("the corpus has no passage with an entity to mask: bring other text, or another --ner")
        self.index = BM25([f"{passage.title} {passage.text}" for passage in passages])
        self.passage_tokens: dict[int, int] = {}  # passage -> its tokens, of those counted so far

    longest_question = QUESTION

    def document(self, i: int, split: str = "train", chunks: int | None = None) -> Document:
        """Document number i of a split, of `chunks` chunks or of the corpus' own size.

        The first draws don't depend on `chunks`, so most pivots and answers are the same at every length. Raises
        UserError if the document can't be built, in training only after other draws, which no other number makes.
        """
        tries = TRIES if split == "train" else 1
        for attempt in range(tries):
            try:
                return self._draw(i, split, chunks or self.n_chunks, attempt)
            except UserError:
                if attempt == tries - 1:
                    raise

    def _draw(self, i: int, split: str, n_chunks: int | None, attempt: int) -> Document:
        if not any(self.pivots[split].values()):
            raise UserError(
                f"no passage with an entity is left for the split {split!r}: bring more titles, or change --heldout"
            )
        rng = np.random.default_rng([self.seed, split == "heldout", i] + [attempt] * (attempt > 0))
        # Names of several words are given away more often. Drawn first, this kind is as frequent as in the text.
        wanted = bool(rng.random() < self.several[split])
        leaks, draws = 0, 0
        while draws < ATTEMPTS:
            other = draws > ATTEMPTS / 2 and self.pivots[split][not wanted]  # the wanted kind can't be had
            several = not wanted if other else wanted
            pivot = int(rng.choice(self.pivots[split][several]))
            pool, keys = self._pool(pivot, rng)
            size = self._estimate(pool, n_chunks) if n_chunks else self.n_passages
            names = [name for name in self._names(pivot, split) if (" " in name) == several]
            for n in rng.permutation(len(names)).tolist():  # until one of them makes a document
                draws += 1
                document = None
                # Before all is cut, if all is kept.
                leaky = not (self.keep_leaky or self.max_chunks) and self._leaks(pool[:size], names[n])
                if not leaky:
                    document = self._build(i, split, pool, keys, names[n], n_chunks, size)
                    leaky = document is not None and any(gives_away(chunk, names[n]) for chunk in document.chunks)
                leaks += leaky
                if document and (self.keep_leaky or not leaky):
                    document.leaks, document.redraws = leaks, draws - 1
                    return document
        raise UserError(
            f"document {i} ({split}) could not be built in {draws} draws, {leaks} of them leaky: bring more text, "
            "longer chunks or --keep-leaky"
        )

    def _leaks(self, passages: np.ndarray, name: str) -> bool:
        """Whether one of these passages gives `name` away when it is masked."""
        for word in name_words(name):
            holding = self.index.holding(word)
            for n in holding[np.isin(holding, passages)].tolist():
                if gives_away(mask(self.passages[n].text, name), name):
                    return True
        return False

    def _names(self, n: int, split: str) -> list[str]:
        """The distinct entities of passage n that may be masked."""
        passage = self.passages[n]
        return self._allowed([passage.text[start:end] for start, end in passage.entities], split)

    def _allowed(self, names: list[str], split: str) -> list[str]:
        """Each name once, without those that normalise to nothing and, in training, those that are held out."""
        named = {normalize(name): " ".join(name.split()) for name in names}
        return [name for key, name in named.items() if key and (split == "heldout" or key not in self.never_in_train)]

    def _pool(self, pivot: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """Passages by priority (the pivot, related, random ones), and a random key for each.

        A document takes passages from the front and sorts them by key, so more of them keep the order of the fewer.
        Other passages of the pivot's own title are left out: they would all but repeat it.
        """
        own = self.same_title[self.passages[pivot].title]
        related = []
        if self.n_related:
            query = f"{self.passages[pivot].title} {self.passages[pivot].text}"
            (found,) = self.index.search([query], self.n_related + len(own))
            related = [n for n, _ in found if n not in own][: self.n_related]
        others = rng.permutation(len(self.passages))
        others = others[~np.isin(others, [*own, *related])]
        return np.array([pivot, *related, *others]), rng.random(1 + len(related) + len(others))

    def _build(
        self, i: int, split: str, pool: np.ndarray, keys: np.ndarray, answer: str, n_chunks: int | None, size: int
    ) -> Document | None:
        """The document with `answer` masked, or None where its chunks can't hold the whole pivot."""
        text, masks, entities, (pivot_start, pivot_end), chunks = self._fill(pool, keys, answer, n_chunks, size)
        most = n_chunks or self.max_chunks or len(chunks)
        # Keep a window of `most` chunks: the first ones, or shifted to end with the pivot's last chunk.
        chunk_ends = list(accumulate(map(len, chunks)))
        first_kept = max(0, bisect_left(chunk_ends, pivot_end) + 1 - most)
        start = chunk_ends[first_kept - 1] if first_kept else 0
        if pivot_start < start or not masks:
            return None
        mask_edges = {edge for span in masks for edge in span}  # [MASK]-Berlin may be one name
        chunks = chunks[first_kept : first_kept + most]
        recall = []
        for chunk in chunks:
            end = start + len(chunk)
            inside = [(s, e) for s, e in entities if start <= s and e <= end]
            apart = [text[s:e] for s, e in inside if s not in mask_edges and e not in mask_edges]
            recall.append([name for name in self._allowed(apart, split) if not akin(name, answer)])
            start = end
        return Document(i, self.passages[pool[0]].title, QUESTION, [answer], chunks, recall)

    def _fill(self, pool: np.ndarray, keys: np.ndarray, answer: str, n_chunks: int | None, size: int) -> tuple:
        """Join passages, `size` or as many as fill the chunks -> text, masks, entities, pivot's span, chunks."""
        few, enough = 0, len(pool) + 1  # numbers of passages that were too few, and that were more than enough
        while True:
            if size > len(pool):
                wanted = f"{n_chunks} chunks of {self.chunk_tokens} tokens" if n_chunks else f"--passages {size}"
                raise UserError(
                    f"the corpus has {len(self.passages)} passages, too few for {wanted} (other passages of the "
                    "pivot's title are not used)"
                )
            order = pool[np.argsort(keys[:size])]
            text, masks, entities, pivot_span = self._join(order, pool[0], answer)
            chunks = cut_chunks(text, entities, self.tokenizer, self.chunk_tokens)
            found = text, masks, entities, pivot_span, chunks
            if not n_chunks or n_chunks <= len(chunks) <= 1.05 * n_chunks:
                return found
            few, enough = (size, enough) if len(chunks) < n_chunks else (few, size)
            if size == enough == few + 1:
                return found
            # Each try cuts the whole text, so aim by the chunks that a passage makes.
            size = min(max(few + 1, int(size * (n_chunks + 0.5) / len(chunks))), max(few + 1, enough - 1))

    def _estimate(self, pool: np.ndarray, n_chunks: int) -> int:
        """Passages whose tokens should fill the chunks: a first guess, which _fill puts right."""
        used = 0
        for taken, n in enumerate(pool.tolist()):
            if used >= n_chunks * self.chunk_tokens:
                return taken
            if n not in self.passage_tokens:
                self._count([m for m in pool[taken : taken + 256].tolist() if m not in self.passage_tokens])
            used += self.passage_tokens[n]
        return len(pool)

    def _count(self, numbers: list[int]) -> None:
        texts = [self.passages[n].text for n in numbers]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        self.passage_tokens |= {n: len(ids) for n, ids in zip(numbers, encoded, strict=True)}

    def _join(self, order: np.ndarray, pivot: int, answer: str) -> tuple[str, list[Span], list[Span], Span]:
        """-> the masked text, its masks, the entities it still has, the pivot's span."""
        texts, masks, entities, offset = [], [], [], 0
        for n in order.tolist():
            text, kept, masked = mask_spans(self.passages[n].text, self.passages[n].entities, answer)
            masks += [(s + offset, e + offset) for s, e in masked]
            entities += [(s + offset, e + offset) for s, e in kept]
            if n == pivot:
                pivot_span = offset, offset + len(text)
            texts.append(text)
            offset += len(text) + len(GAP)
        return GAP.join(texts), masks, entities, pivot_span


def draw_recall(document: Document, rng) -> RecallTarget | None:
    """Draw k in 2..T-1, then a chunk l < k, then one of its names; None if no chunk but the last has any.

    k is drawn from those that have such a chunk before them, l from the chunks that have names, and the name from those
    that masking takes out of the chunk with all their long words, where there are any.
    """
    sources = [number for number, names in enumerate(document.recall_candidates[:-1], 1) if names]
    if not sources:
        return None
    k = int(rng.integers(sources[0] + 1, len(document.chunks), endpoint=True))
    chunk = int(rng.choice([number for number in sources if number < k]))
    names = document.recall_candidates[chunk - 1]
    for n in rng.permutation(len(names)).tolist():
        section = mask(document.chunks[chunk - 1], names[n], TARGET)
        leaky = gives_away(section, names[n])
        if not leaky:
            return RecallTarget(k, chunk, names[n], section)
    return RecallTarget(k, chunk, names[n], section, leaky)


def load_corpus(config, tokenizer, left_out=None) -> Corpus:
    """The masked documents of the settings. Raises UserError."""
    from text.corpus import find_entities, load_passages

    passages = load_passages(
        config.corpus_name, config=config.corpus_config, split=config.corpus_split, text_field=config.text_field,
        max_passages=config.max_passages, left_out=left_out,
    )
    find_entities(passages, config.ner, config.cache)
    return Corpus(
        passages, tokenizer, seed=config.seed, n_passages=config.passages, n_related=config.related,
        n_chunks=None if config.passages else config.chunks, chunk_tokens=config.chunk_tokens,
        max_chunks=config.chunks if config.passages else None, keep_leaky=config.keep_leaky, heldout=config.heldout,
    )
