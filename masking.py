"""Masked documents from plain passages (paper 3.2), and the questions of the recall task (3.3), step by step:

    find_entities    spaCy finds the named entities of every passage
    Corpus.document  draw a passage, the pivot, and one of its entities: y, the answer
                     add passages related to the pivot, and random ones, in random order
                     replace every form of y with [MASK], in all of them
                     cut the text into chunks; draw again if it still gives y away, or if the pivot doesn't fit
                     list the other entities of each chunk: recall may ask for them
    draw_recall      draw one of these and replace it with [TARGET] in its chunk; a later memory must supply it

A form of an entity is its whole words in any case. A name's giveaway words are its capitalised words of four letters
or more (text/matching.py: name_words). What is random follows from a list of the seed, the place and the purpose.
"""

import hashlib
import inspect
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import spacy
from spacy.lang.en.stop_words import STOP_WORDS

from engine.errors import UserError, reason_of
from rewards import normalize
from text.bm25 import BM25
from text.chunking import cut_chunks
from text.corpus import Passage, kept_by_passage, load_text
from text.matching import INVISIBLE, MASK, TARGET, Span, may_be_same_entity, name_words, occurrences
from text.rules import check_ner, rules_pipeline

QUESTION = "Judging from the whole text, what does [MASK] stand for?"
GAP = "\n\n"  # between the passages of a document
SMALLEST_CHUNK = 16  # tokens: fewer may not fit a [MASK] or an emoji
MAX_DRAWS = 200  # of a pivot and y, in one attempt at a document
MAX_REPLACEMENTS = 4  # further attempts at a training document, with other draws
OVERSHOOT = 1.05  # passages may fill up to this multiple of the chunks asked for; the rest is cut off
# The number, in the list that a random stream follows from, that tells the streams apart: what is drawn from it.
DOCUMENT_DRAW, RECALL_DRAW, HELDOUT_RECALL_DRAW, SHUFFLE_DRAW = range(4)
# What _mask_and_cut returns: the chunks; then spans in their joined text: the pivot, each [MASK], the other entities,
# the held-out passages.
Draft = tuple[list[str], Span, list[Span], list[Span], list[Span]]


@dataclass
class Document:
    """A long text in chunks, a question about it, and the entities of each chunk that recall may ask for."""

    index: int  # in its split
    title: str  # the pivot's; the model never sees it
    question: str
    answers: list[str]  # y; for a task the gold answers, see rewards.answer_reward
    chunks: list[str]  # joined, they are the document
    recall_candidates: list[list[str]]  # for each chunk, the names that recall may ask for
    leaks: int = 0  # draws that gave y away, the kept one included
    redraws: int = 0  # draws rejected for a leak, or because the pivot didn't fit
    place: int = 0  # 0..documents-1 in its step, over all processes; set by rollout.draw_documents


@dataclass
class RecallTarget:
    """A recall question: name the entity at [TARGET] in chunk l from the memory m_k."""

    memory_turn: int  # k, counted from 1
    chunk: int  # l < k
    entity: str
    masked_chunk: str  # chunk l, with the entity replaced by [TARGET]
    leaky: bool = False  # whether one of the entity's giveaway words is still in masked_chunk


# ---- entities ----------------------------------------------------------------------------------------

AROUND = rf"\s\"'“”‘’{INVISIBLE}"
TRIM = re.compile(rf"(?s)[{AROUND}]*(?:(?:the|an?)\s+)?(.*?)[{INVISIBLE}]*(?:['’]s)?[{AROUND},;:]*")


def find_entities(passages: list[Passage], ner: str, cache: Path) -> None:
    """Set the entities of every passage, by a spaCy pipeline, and cache them in the folder `cache`.

    Raises UserError if the pipeline is missing or finds no entity in any passage.
    """

    def prepare():
        names = frozenset(passage.name for passage in passages) if ner == "rules" else frozenset()
        common = common_words(passage.text for passage in passages) | {"mask", "target"}
        return partial(entities_of, ner=ner, names=names, common=common)

    settings = (code_of_finder(ner), ner, spacy.__version__, spacy.util.get_package_version(ner))
    found = kept_by_passage("entities", passages, settings, cache, prepare)
    for passage, spans in zip(passages, found, strict=True):
        passage.entities = [tuple(span) for span in spans]
    if not any(passage.entities for passage in passages):
        raise UserError(
            f"--ner {ner}: found no entity in the corpus, so there is nothing to mask; try another pipeline or text"
        )


def code_of_finder(ner: str) -> list[str]:
    """The code that finds entities. It is part of the cache's name, so that they are found anew after an edit."""
    parts = [find_entities, entities_of, load_pipeline, common_words, worth_masking, Passage]
    parts.append(inspect.getmodule(occurrences))
    return [TRIM.pattern, *map(inspect.getsource, parts + [inspect.getmodule(rules_pipeline)] * (ner == "rules"))]


def entities_of(texts: list[str], ner: str, names: frozenset[str], common: set[str]) -> list[list[Span]]:
    """For each text, the spans of the entities worth masking."""
    nlp = load_pipeline(ner, names)
    nlp.max_length = max(nlp.max_length, *(len(text) + 1 for text in texts))  # a line may be a whole book
    return [[(start, end) for start, end, _ in worth_masking(doc, common)] for doc in nlp.pipe(texts, batch_size=64)]


@lru_cache(maxsize=1)  # entities_of is called once for each block of texts
def load_pipeline(ner: str, names: frozenset[str] = frozenset()) -> spacy.Language:
    """The spaCy pipeline `ner`, which sets doc.ents; `rules` also finds `names`. Raises UserError if it can't load."""
    check_ner(ner)
    try:
        return rules_pipeline(names) if ner == "rules" else spacy.load(ner, exclude=["parser", "lemmatizer"])
    except (OSError, ValueError) as error:
        raise UserError(f"--ner {ner}: can't be loaded ({reason_of(error)}); use --ner rules") from None


def common_words(texts) -> set[str]:
    """Words with at least a tenth of their occurrences in lower case: hardly names, even when capitalised."""
    total, small = Counter(), Counter()
    for text in texts:
        words = re.findall(r"[^\W\d_]+", text)
        total.update(word.lower() for word in words)
        small.update(word for word in words if word.islower())
    return {word for word, count in small.items() if 10 * count >= total[word]}


def worth_masking(doc, common: set[str]) -> list[tuple[int, int, str]]:
    """(start, end, label) of the entities of a spaCy doc, trimmed of a lower-case article, quotes and a final 's.

    Left out: spans that masking would not find again (not at word boundaries), and spans that would mask ordinary
    words: stop words, a single word of `common`, names with neither capital nor digit (in scripts with capitals).
    """
    found, text = [], doc.text  # spaCy rebuilds it at each access
    for entity in doc.ents:
        core = TRIM.fullmatch(entity.text)
        name, start, end = core[1], entity.start_char + core.start(1), entity.start_char + core.end(1)
        plain = name.islower() and not any(c.isdigit() or c.isalpha() and c == c.title() for c in name)
        ordinary = name.lower() in common or all(word in STOP_WORDS for word in name.lower().split())
        if not 0 < len(name) <= 80 or plain or ordinary:
            continue
        # Masking matches NFKC text, where Ulm\u2122 becomes UlmTM: in context, a word boundary can vanish.
        first = max(0, start - 8)
        if (start - first, end - first) in occurrences(text[first : end + 8], name):
            found.append((start, end, entity.label_))
    return found


# ---- masking -----------------------------------------------------------------------------------------


def mask(text: str, entity: str, token: str = MASK) -> str:
    """`text` with every form of `entity` replaced: "Ulm and ULM, not Ulmer" -> "[MASK] and [MASK], not Ulmer"."""
    return mask_spans(text, [], entity, token)[0]


def mask_spans(text: str, spans: list[Span], entity: str, token: str = MASK) -> tuple[str, list[Span], list[Span]]:
    """Replace every form of `entity` -> (masked text, `spans` shifted to it, the spans of the new tokens).

    Spans that overlap a form of the entity are left out. Masking Ada in "Ada met Bob.", given the spans of both names:

        mask_spans("Ada met Bob.", [(0, 3), (8, 11)], "Ada") == ("[MASK] met Bob.", [(11, 14)], [(0, 6)])
    """
    forms = occurrences(text, entity)
    starts, ends = [start for start, _ in forms], [end for _, end in forms]
    masked = token.join(text[start:end] for start, end in zip([0, *ends], [*starts, len(text)], strict=True))
    # shifts[n] is added to the positions after the first n forms.
    shifts = [0, *accumulate(len(token) - (end - start) for start, end in forms)]
    tokens = [(start + shift, start + shift + len(token)) for start, shift in zip(starts, shifts[:-1], strict=True)]
    moved = []
    for start, end in spans:
        n = bisect_left(starts, end)  # forms that start before the span's end
        if n == 0 or ends[n - 1] <= start:
            moved.append((start + shifts[n], end + shifts[n]))
    return masked, moved, tokens


def gives_away(text: str, name: str) -> bool:
    """Whether `text` contains a giveaway word of a name, so that the rest of the name can be guessed."""
    return any(occurrences(text, word) for word in name_words(name))


# ---- documents ---------------------------------------------------------------------------------------


def is_heldout(title: str, share: float) -> bool:
    """Whether a title is kept for evaluation: by a hash of the title, so it is the same in every run."""
    digest = hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) < share * 2**32


class Corpus:
    """Masked documents: document(i, split) is a pure function of the passages, the seed, the split and i.

    A document gets as many passages as fill `n_chunks` chunks; or `n_passages` passages, of which at most `n_chunks`
    chunks are kept. In the split "train" a passage with a held-out title is never the pivot, its title is never masked,
    and recall asks for nothing in it; in "heldout" the pivot is such a passage. Raises UserError for too few passages.
    """

    longest_question = QUESTION

    def __init__(
        self, passages: list[Passage], tokenizer, *, seed: int, chunk_tokens: int, n_chunks: int | None = None,
        n_passages: int | None = None, n_related: int = 0, keep_leaky: bool = False, heldout: float = 0.2,
    ):
        self.passages, self.tokenizer, self.seed, self.chunk_tokens = passages, tokenizer, seed, chunk_tokens
        self.n_chunks, self.n_passages, self.n_related, self.keep_leaky = n_chunks, n_passages, n_related, keep_leaky
        if chunk_tokens < SMALLEST_CHUNK:
            raise UserError(f"--chunk-tokens {chunk_tokens}: a chunk needs at least {SMALLEST_CHUNK} tokens")
        if (n_passages or 0) > len(passages):
            raise self._too_few(f"--passages {n_passages}")
        if n_related >= len(passages):
            raise self._too_few(f"--related {n_related}")
        self.same_title: dict[str, list[int]] = {}
        for n, passage in enumerate(passages):
            self.same_title.setdefault(passage.title, []).append(n)
        self.heldout_titles = {title for title in self.same_title if is_heldout(title, heldout)}
        self.never_in_train = {normalize(passage.name) for passage in passages if passage.title in self.heldout_titles}
        # Keys: the split, and whether a name has several words. Values: passages with such names; number of such names.
        self.pivots: dict[tuple[str, bool], list[int]] = defaultdict(list)
        self.name_counts: dict[tuple[str, bool], int] = Counter()
        for n, passage in enumerate(passages):
            split = "heldout" if passage.title in self.heldout_titles else "train"
            kinds = [(split, " " in name) for name in self._names(passage.text, passage.entities, split)]
            self.name_counts.update(kinds)
            for kind in set(kinds):
                self.pivots[kind].append(n)
        if not self.pivots:
            raise UserError("the corpus has no passage with an entity to mask: use another corpus, or another --ner")
        self.index = BM25([f"{passage.title} {passage.text}" for passage in passages])
        self.passage_tokens: dict[int, int] = {}  # passage -> its number of tokens, filled as needed

    def document(self, i: int, split: str = "train", chunks: int | None = None) -> Document:
        """Document number i of a split, with `chunks` chunks (default: the corpus's own size).

        The first draws don't depend on `chunks`, so most pivots and answers are the same at every length. Raises
        UserError if the document can't be built; in training only after MAX_REPLACEMENTS more attempts, with random
        streams that no other document uses.
        """
        n_chunks = chunks or (None if self.n_passages else self.n_chunks)
        replacements = MAX_REPLACEMENTS if split == "train" else 0
        for attempt in range(replacements):
            with suppress(UserError):
                return self._draw(i, split, n_chunks, attempt)
        return self._draw(i, split, n_chunks, replacements)

    def _draw(self, i: int, split: str, n_chunks: int | None, attempt: int) -> Document:
        """Draw a pivot and try its names as y, in random order; then another pivot.

        Names of several words leak, and so are rejected, more often. So whether y has one word or several is drawn
        first, with the frequencies of the corpus.
        """
        rng = np.random.default_rng([self.seed, split == "heldout", i, DOCUMENT_DRAW, attempt])
        several_words, one_word = self.name_counts[split, True], self.name_counts[split, False]
        if not several_words + one_word:
            raise UserError(
                f"no passage with an entity is left for the split {split!r}; of {len(self.same_title)} titles, "
                f"{len(self.heldout_titles)} are held out: use a larger corpus, or change --heldout"
            )
        several_drawn = bool(rng.random() < several_words / (several_words + one_word))
        draws = leaks = 0
        while draws < MAX_DRAWS:
            several = several_drawn
            if draws > MAX_DRAWS / 2 and self.pivots[split, not several_drawn]:  # what was drawn doesn't work out
                several = not several_drawn
            pivot = int(rng.choice(self.pivots[split, several]))
            pool, keys = self._pool(pivot, rng)
            passage = self.passages[pivot]
            names = [name for name in self._names(passage.text, passage.entities, split) if (" " in name) == several]
            for n in rng.permutation(len(names)).tolist():
                draws += 1
                chunks, candidates, leaky = self._build(split, pool, keys, n_chunks, names[n])
                leaks += leaky
                if chunks and (self.keep_leaky or not leaky):
                    return Document(i, passage.title, QUESTION, [names[n]], chunks, candidates, leaks, draws - 1)
        either = " or --keep-leaky" if leaks and not self.keep_leaky else ""
        raise UserError(
            f"document {i} ({split}) could not be built in {draws} draws: {leaks} gave the answer away, in "
            f"{draws - leaks} the answer's passage didn't fit; use a larger corpus, longer chunks{either}"
        )

    def _names(self, text: str, spans: list[Span], split: str) -> list[str]:
        """The names at these spans that may be masked, each once.

        Left out: names that normalise to nothing and, in training, held-out names.
        """
        names = [text[start:end] for start, end in spans]
        named = {normalize(name): " ".join(name.split()) for name in names}
        return [name for key, name in named.items() if key and (split == "heldout" or key not in self.never_in_train)]

    def _pool(self, pivot: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """The passages a document may use -> (passages,) pivot, related, then random ones; (passages,) sort keys.

        A document takes the first of them and sorts them by these random keys, so a longer document keeps the order
        of a shorter one. Other passages with the pivot's title are left out: they would largely repeat it.
        """
        own = self.same_title[self.passages[pivot].title]
        related = []
        if self.n_related:
            query = f"{self.passages[pivot].title} {self.passages[pivot].text}"
            (found,) = self.index.search([query], self.n_related + len(own))
            related = [n for n, _ in found if n not in own][: self.n_related]
        others = rng.permutation(len(self.passages))
        others = others[~np.isin(others, [*own, *related])]
        pool = np.array([pivot, *related, *others])
        return pool, rng.random(len(pool))

    def _build(
        self, split: str, pool: np.ndarray, keys: np.ndarray, n_chunks: int | None, answer: str
    ) -> tuple[list[str], list[list[str]], bool]:
        """(chunks with `answer` masked, recall candidates of each chunk, whether a chunk gives the answer away).

        No chunks if they can't hold the whole pivot, or if a single passage gives the answer away.
        """
        size = self._estimate(pool, n_chunks) if n_chunks else self.n_passages
        # Checking single passages finds leaks before anything is cut. (It may reject slightly too much: the document
        # may take fewer passages than estimated.) Not done if many chunks will be cut off.
        check_passages = not self.keep_leaky and not (self.n_passages and self.n_chunks)
        if check_passages and self._leaks(pool[:size], answer):
            return [], [], True
        chunks, (pivot_start, pivot_end), masks, entities, heldout = self._fill(pool, keys, size, n_chunks, answer)
        text = "".join(chunks)
        edges = [0, *accumulate(map(len, chunks))]  # chunk n is text[edges[n] : edges[n + 1]]
        # Keep a window of at most `most` chunks: the first ones, or shifted to end with the pivot's last chunk.
        # (A pivot that ends at an edge belongs to the chunk before it.)
        most = n_chunks or self.n_chunks or len(chunks)
        first = max(0, bisect_left(edges, pivot_end) - most)
        if pivot_start < edges[first] or not masks:
            return [], [], False
        chunks, edges = chunks[first : first + most], edges[first : first + most + 1]
        mask_edges = {edge for span in masks for edge in span}
        apart = [span for span in entities if mask_edges.isdisjoint(span)]  # without those that touch a [MASK]
        in_window = ((max(start, edges[0]), min(end, edges[-1])) for start, end in heldout if split == "train")
        heldout_texts = [text[start:end] for start, end in in_window]

        @cache
        def stands_in_heldout(name: str) -> bool:
            return any(occurrences(piece, name) for piece in heldout_texts)

        candidates = []
        for start, end in pairwise(edges):
            inside = [span for span in apart if start <= span[0] and span[1] <= end]
            names = [name for name in self._names(text, inside, split) if not may_be_same_entity(name, answer)]
            candidates.append([name for name in names if not stands_in_heldout(name)])
        return chunks, candidates, any(gives_away(chunk, answer) for chunk in chunks)

    def _estimate(self, pool: np.ndarray, n_chunks: int) -> int:
        """How many passages of the pool should fill the chunks, judging by their tokens."""
        used = 0
        for size, n in enumerate(pool):
            if used >= n_chunks * self.chunk_tokens:
                return size
            if n not in self.passage_tokens:
                encoded = self.tokenizer(self.passages[n].text, add_special_tokens=False, verbose=False)
                self.passage_tokens[n] = len(encoded["input_ids"])
            used += self.passage_tokens[n]
        return len(pool)

    def _leaks(self, passages: np.ndarray, name: str) -> bool:
        """Whether one of these passages still gives `name` away after masking."""
        holding = (n for word in name_words(name) for n in np.intersect1d(self.index.holding(word), passages))
        return any(gives_away(mask(self.passages[n].text, name), name) for n in holding)

    def _fill(self, pool: np.ndarray, keys: np.ndarray, size: int, n_chunks: int | None, answer: str) -> Draft:
        """The draft of about as few passages as fill `n_chunks` chunks; if that is None, of `size` passages.

        It may have a few chunks too many, which _build cuts off. Raises UserError if the pool is too small.
        """
        low, high = 1, len(pool)  # fewer than `low` passages are too few, `high + 1` are more than needed
        while size <= len(pool):
            made = self._mask_and_cut(pool[np.argsort(keys[:size])], pool[0], answer)
            filled = len(made[0])
            if not n_chunks or n_chunks <= filled <= OVERSHOOT * n_chunks:
                return made
            if filled < n_chunks:
                low = size + 1
            elif size == low:
                return made
            else:
                high = size - 1
            # Each try cuts the whole text, so estimate the next size from the chunks per passage in this one.
            size = max(low, min(int(size * (n_chunks + 0.5) / filled), high))
        raise self._too_few(f"{n_chunks} chunks of {self.chunk_tokens} tokens" if n_chunks else f"--passages {size}")

    def _mask_and_cut(self, passages: np.ndarray, pivot: int, answer: str) -> Draft:
        """These passages in this order, with `answer` masked, joined and cut into chunks."""
        texts, masks, entities, heldout, offset = [], [], [], [], 0
        for n in passages:
            text, others, tokens = mask_spans(self.passages[n].text, self.passages[n].entities, answer)
            masks += [(start + offset, end + offset) for start, end in tokens]
            entities += [(start + offset, end + offset) for start, end in others]
            heldout += [(offset, offset + len(text))] if self.passages[n].title in self.heldout_titles else []
            if n == pivot:
                whole_pivot = offset, offset + len(text)
            texts.append(text)
            offset += len(text) + len(GAP)
        chunks = cut_chunks(GAP.join(texts), entities, self.tokenizer, self.chunk_tokens)
        return chunks, whole_pivot, masks, entities, heldout

    def _too_few(self, asked: str) -> UserError:
        return UserError(
            f"the corpus has {len(self.passages)} passages, too few for {asked} (a document uses only one passage with "
            "the pivot's title): use a larger corpus (in a .txt file, a paragraph on each line), or ask for less"
        )


def load_corpus(config, tokenizer, left_out: Counter | None = None) -> Corpus:
    """The Corpus of the settings; `left_out` counts unusable passages by reason. Raises UserError."""
    passages = load_text(config, left_out)
    find_entities(passages, config.ner, config.cache)
    return Corpus(
        passages, tokenizer, seed=config.seed, chunk_tokens=config.chunk_tokens, n_chunks=config.chunks,
        n_passages=config.passages, n_related=config.related, keep_leaky=config.keep_leaky, heldout=config.heldout,
    )


# ---- recall ------------------------------------------------------------------------------------------


def draw_recall(document: Document, rng) -> RecallTarget | None:
    """Draw k in 2..number of chunks, then a chunk l < k, then one of its names; None if only the last chunk has names.

    k is drawn from the turns with such a chunk before them, l from the chunks with names, and the name, if possible,
    from those that leave no giveaway word in the masked chunk.
    """
    sources = [number for number, names in enumerate(document.recall_candidates[:-1], 1) if names]
    if not sources:
        return None
    k = int(rng.integers(sources[0] + 1, len(document.chunks), endpoint=True))
    number = int(rng.choice([number for number in sources if number < k]))
    chunk, names = document.chunks[number - 1], document.recall_candidates[number - 1]
    drawn = [names[n] for n in rng.permutation(len(names)).tolist()]
    gone = (name for name in drawn if not gives_away(mask(chunk, name, TARGET), name))
    entity = next(gone, drawn[-1])
    masked_chunk = mask(chunk, entity, TARGET)
    return RecallTarget(k, number, entity, masked_chunk, leaky=gives_away(masked_chunk, entity))
