"""From unlabeled text to masked documents (paper 3.2 and 3.3).

    load_passages   a corpus as passages: local files or a hub data set
    find_entities   the named entities of each, by spaCy, cached on disk
    Corpus          document i: a pivot, related and random passages, one entity masked everywhere, cut into chunks
    draw_recall     one chunk with one entity replaced by [TARGET], and the later memory that must supply it

    python masking.py FILE.jsonl        # precision and recall of the entity finder on labelled spans
"""

import hashlib
import json
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import spacy
from tqdm import tqdm

from retrieval import BM25
from rewards import normalize

MASK, TARGET = "[MASK]", "[TARGET]"
QUESTION = "Judging from the whole text, what does [MASK] stand for?"
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
ATTEMPTS = 200  # draws for one document before giving up


class UserError(Exception):
    """A mistake of the user: one line that says what, where and what to do. The commands print it and exit with 2."""


@dataclass
class Passage:
    """A paragraph or a few of one article; entities are (start, end) character spans of `text`."""

    title: str
    text: str
    entities: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Document:
    """A long text in chunks, a question about it, and the entities of each chunk that recall may ask for."""

    index: int
    title: str  # the pivot's
    question: str
    answers: list[str]
    chunks: list[str]  # joined, they are the document
    recall: list[list[str]]
    leaks: int = 0  # draws thrown away because a part of the answer's name stayed readable
    redraws: int = 0  # draws thrown away for any reason


@dataclass
class Recall:
    """After chunk `memory_step` was read: which entity stands at [TARGET] in `section`, which is chunk number `chunk`?"""

    memory_step: int  # k, counted from 1
    chunk: int  # l < k
    entity: str
    section: str


# ---- corpora -----------------------------------------------------------------------------------------


def load_passages(
    corpus: str, config: str | None = None, split: str = "train", text_field: str = "text",
    max_passages: int | None = None, passage_words: int = 200,
) -> list[Passage]:  # fmt: skip
    """Passages of a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set (streamed).

    Articles longer than `passage_words` words are split at paragraph ends. Empty passages, and those that hold a
    literal [MASK] or [TARGET], are left out. Raises UserError for whatever can't be read.
    """
    passages: list[Passage] = []
    for row, where in _rows(corpus, config, split):
        if not isinstance(row.get(text_field), str):
            raise UserError(f"--corpus {where}: no text in field {text_field!r}; --text-field names it, fields are {sorted(row)}")
        title = row.get("title")
        for text in split_paragraphs(row[text_field], passage_words):
            if text and MASK not in text and TARGET not in text:
                passages.append(Passage(title if isinstance(title, str) and title else text[:40], text))
        if max_passages and len(passages) >= max_passages:
            break
    if not passages:
        raise UserError(f"--corpus {corpus}: holds no passage")
    return passages[:max_passages]


def _rows(corpus: str, config: str | None, split: str):
    """(row, where it stands) of a corpus, one by one."""
    path = Path(corpus)
    if not path.exists():
        looks_local = path.suffix in FORMATS or corpus.startswith((".", "/")) or corpus.count("/") != 1
        if looks_local:
            raise UserError(f"--corpus {corpus}: no such file or folder")
        try:
            yield from ((row, corpus) for row in datasets.load_dataset(corpus, config, split=split, streaming=True))
        except Exception as error:  # the hub, the network, the name, the configuration: all of them the user's to mend
            raise UserError(f"--corpus {corpus}: could not be streamed from the hub ({str(error).splitlines()[0]})") from None
        return
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in FORMATS)
    if not files:
        raise UserError(f"--corpus {corpus}: the folder holds no {', '.join(FORMATS)} file")
    for file in files:
        if file.suffix not in FORMATS:
            raise UserError(f"--corpus {file}: not one of {', '.join(FORMATS)}")
        extra = {"sample_by": "document"} if file.suffix == ".txt" else {}
        try:
            if file.stat().st_size:
                for row in datasets.load_dataset(FORMATS[file.suffix], data_files=str(file), split="train", streaming=True, **extra):
                    yield ({"title": file.stem} if file.suffix == ".txt" else {}) | row, file
        except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(f"--corpus {file}: {_malformed_line(file) or str(error).splitlines()[0]}") from None


def _malformed_line(file: Path) -> str | None:
    """Where the first line of a .jsonl file is that isn't a JSON object; the reader of `datasets` does not tell."""
    if file.suffix != ".jsonl":
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
            except ValueError as error:
                return f"line {number} is not JSON ({error}); mend or remove it"
    return None


def split_paragraphs(text: str, words: int) -> list[str]:
    """`text` in pieces of about `words` words, cut at paragraph ends only; a longer paragraph stays whole."""
    pieces: list[list[str]] = [[]]
    count = 0
    for paragraph in filter(str.strip, text.split("\n")):
        size = len(paragraph.split())
        if pieces[-1] and count + size > words:
            pieces.append([])
            count = 0
        pieces[-1].append(paragraph.strip())
        count += size
    return ["\n".join(piece) for piece in pieces if piece]


# ---- entities ----------------------------------------------------------------------------------------

MONTHS = "January February March April May June July August September October November December".split()
NAME = {"TEXT": {"REGEX": r"^[^\W\d_a-zß-öø-ÿ][\w'’&.-]*\w$"}, "IS_STOP": False}
LINK = {"LOWER": {"IN": ["of", "the", "de", "da", "di", "la", "le", "van", "von", "der", "and"]}, "OP": "{1,2}"}
DAY = {"TEXT": {"REGEX": r"^\d{1,2}(st|nd|rd|th)?$"}}
YEAR = {"TEXT": {"REGEX": r"^(1\d|20)\d\d$"}}


def pipeline(ner: str, titles=()):
    """A spaCy pipeline that sets doc.ents. Raises UserError where `ner` is not installed."""
    if ner != "rules":
        try:
            return spacy.load(ner)
        except OSError:
            raise UserError(f"--ner {ner}: not installed; run `python -m spacy download {ner}`, or use --ner rules") from None
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    month = {"TEXT": {"IN": MONTHS}}
    patterns = [
        [NAME, NAME | {"OP": "+"}],
        [NAME, LINK, NAME | {"OP": "+"}],
        [month, DAY, {"TEXT": ","}, YEAR], [month, YEAR], [month, DAY], [DAY, month, YEAR], [DAY, month],
        [YEAR], [{"TEXT": {"REGEX": r"^\d[\d,]*(\.\d+)?$"}}],
    ]  # fmt: skip
    # A title in brackets is told apart from its namesakes; in text it stands without them.
    bare = {re.sub(r"\s*\(.*\)$", "", title).strip() for title in titles}
    known = sorted(t for t in bare if len(t) > 2 and t[0].isupper() and t.lower() not in nlp.Defaults.stop_words)
    ruler.add_patterns([{"label": "NAME", "pattern": p} for p in patterns] + [{"label": "TITLE", "pattern": t} for t in known])
    return nlp


def find_entities(passages: list[Passage], ner: str, cache: Path) -> None:
    """Set the entities of every passage, once: a later run on the same text reads them from the folder `cache`.

    Raises UserError if the pipeline is missing or finds nothing at all.
    """
    digest = hashlib.sha256(f"2 {ner} {spacy.__version__}".encode())
    for passage in passages:
        digest.update(f"{passage.title}\0{passage.text}\0".encode("utf-8", "surrogatepass"))
    file = cache / f"{digest.hexdigest()[:24]}.json"
    if file.exists():
        for passage, spans in zip(passages, json.loads(file.read_text()), strict=True):
            passage.entities = [tuple(span) for span in spans]
        return
    nlp = pipeline(ner, {passage.title for passage in passages})
    texts = (passage.text for passage in passages)
    for passage, doc in zip(tqdm(passages, desc=f"entities ({ner})", leave=False), nlp.pipe(texts, batch_size=64)):
        passage.entities = [(e.start_char, e.end_char) for e in doc.ents if normalize(e.text)]
    if not any(passage.entities for passage in passages):
        raise UserError(f"--ner {ner}: found no entity in the corpus, so there is nothing to mask; try another pipeline")
    cache.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([passage.entities for passage in passages]))


# ---- masking -----------------------------------------------------------------------------------------


def fold(text: str) -> tuple[str, list[int]]:
    """`text` in NFKC and lower case, and for each of its characters (and its end) the place in `text` it comes from."""
    if text.isascii():
        return text.lower(), range(len(text) + 1)
    folded, origin, start = [], [], 0
    while start < len(text):
        end = start + 1  # a letter and its combining marks are normalised together
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        piece = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[start:end]).casefold())
        folded.append(piece)
        origin += [start] * len(piece)
        start = end
    return "".join(folded), [*origin, len(text)]


@lru_cache(maxsize=4096)
def form(entity: str) -> re.Pattern:
    """What counts as an occurrence of `entity` in folded text: whole words, any white space; 5 is not in 5.2."""
    words = [re.escape(word) for word in fold(entity)[0].split()]
    before = r"(?<!\w)(?<!\d[.,])" if entity[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if entity[-1:].isdigit() else r"(?!\w)"
    return re.compile(before + r"\s+".join(words) + after)


def occurrences(text: str, entity: str) -> list[tuple[int, int]]:
    """Character spans of every form of `entity` in `text`."""
    folded, origin = fold(text)
    spans = []
    for match in form(entity).finditer(folded):
        end = match.end()
        while end < len(folded) and origin[end] == origin[end - 1]:  # a ligature is masked whole
            end += 1
        spans.append((origin[match.start()], origin[end]))
    return spans


def mask(text: str, entity: str, token: str = MASK) -> str:
    """`text` with every form of `entity` replaced by `token`."""
    return mask_spans(text, [], entity, token)[0]


def mask_spans(text: str, spans: list[tuple[int, int]], entity: str, token: str) -> tuple[str, list, list]:
    """(masked text, `spans` at their new places, less those the mask touched, the places of `token`)."""
    pieces, places, moved, done, shift = [], [], [], 0, 0
    rest = sorted(spans)
    for start, end in [*occurrences(text, entity), (len(text), len(text) + 1)]:
        while rest and rest[0][0] < end:
            span = rest.pop(0)
            if span[1] <= start:
                moved.append((span[0] + shift, span[1] + shift))
        if start < len(text):
            pieces += [text[done:start], token]
            places.append((start + shift, start + shift + len(token)))
            shift += len(token) - (end - start)
            done = end
    return "".join([*pieces, text[done:]]), moved, places


def name_words(entity: str) -> list[str]:
    """The words of a name that would give it away: capitalised, of four letters or more."""
    return [word for word in re.findall(r"[^\W\d_]{4,}", entity) if word[0].isupper()]


# ---- chunks ------------------------------------------------------------------------------------------


def cut_chunks(text: str, keep: list[tuple[int, int]], tokenizer, max_tokens: int) -> list[str]:
    """`text` in pieces of at most `max_tokens` tokens, each measured as it stands; joined they are `text`.

    A cut falls at a paragraph's, a sentence's or a word's end, in this order, where one lies in the last part of the
    chunk; never inside a span of `keep` or a combined character. Only a span longer than a whole chunk is cut.
    """
    starts = np.array([s for s, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]])
    keep = sorted(keep)
    keep_starts = [s for s, _ in keep]
    chunks, place = [], 0
    while place < len(text):
        first, budget = int(np.searchsorted(starts, place)), max_tokens
        while True:
            end = int(starts[first + budget]) if first + budget < len(starts) else len(text)
            end = max(_good_cut(text, keep, keep_starts, place, end), place + 1)
            # A piece may take more tokens alone than it took within the text.
            over = len(tokenizer(text[place:end], add_special_tokens=False)["input_ids"]) - max_tokens
            if over <= 0 or budget == 1:
                break
            budget = max(1, budget - over)
        chunks.append(text[place:end])
        place = end
    return chunks


def _good_cut(text: str, keep: list[tuple[int, int]], keep_starts: list[int], start: int, end: int) -> int:
    """The best place to cut in text[start:end], at `end` at the latest."""
    if end < len(text):
        tail = start + (end - start) // 2
        for ending in ("\n", ". ", " "):
            found = text.rfind(ending, tail, end)
            if found >= 0 and ending != " ":
                end = found + len(ending)
                break
            if found >= 0:
                end = found + 1
    while True:
        n = int(np.searchsorted(keep_starts, end)) - 1  # the last span that starts before the cut
        if n >= 0 and keep[n][0] > start and end < keep[n][1]:
            end = keep[n][0]
            continue
        break
    while start + 1 < end < len(text) and (unicodedata.combining(text[end]) or "\u200d" in text[end - 1 : end + 1]):
        end -= 1
    return end


# ---- documents ---------------------------------------------------------------------------------------


class Corpus:
    """Masked documents: document(i, split) is a pure function of the passages, the seed, the split and i.

    With `n_chunks` a document gets as many passages as fill that many chunks; without, `n_passages` passages.
    `heldout` is the share of titles that are pivots of the split "heldout" only: in "train" they are never a pivot, an
    answer or a recall target. Raises UserError for too few passages.
    """

    def __init__(
        self, passages: list[Passage], tokenizer, *, seed: int, chunk_tokens: int, n_chunks: int | None = None,
        n_passages: int | None = None, n_related: int = 0, keep_leaky: bool = False, heldout: float = 0.2,
    ):  # fmt: skip
        self.passages, self.tokenizer, self.seed = passages, tokenizer, seed
        self.chunk_tokens, self.n_chunks, self.n_passages = chunk_tokens, n_chunks, n_passages
        self.n_related, self.keep_leaky = n_related, keep_leaky
        if n_passages and n_passages > len(passages):
            raise UserError(f"--passages {n_passages}: the corpus has only {len(passages)}; ask for fewer or bring more text")
        self.same_title: dict[str, list[int]] = {}
        for n, passage in enumerate(passages):
            self.same_title.setdefault(passage.title, []).append(n)
        self.heldout = {t for t in self.same_title if int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) / 16**8 < heldout}
        self.never_in_train = {normalize(title) for title in self.heldout}
        self.pivots = {
            split: [n for n, p in enumerate(passages) if p.entities and (p.title in self.heldout) == (split == "heldout")]
            for split in ("train", "heldout")
        }
        for split, pivots in self.pivots.items():
            if not pivots:
                raise UserError(f"the corpus has no passage with an entity for the split {split!r}: bring more text, or change --heldout")
        self.index = BM25([f"{p.title} {p.text}" for p in passages]) if n_related else None
        self.lengths: dict[int, int] = {}

    def document(self, i: int, split: str = "train", chunks: int | None = None) -> Document:
        """Document number i of a split, of `chunks` chunks or of the corpus' own size. Raises UserError if none can be made."""
        rng = np.random.default_rng([self.seed, split == "heldout", i])
        leaks = 0
        for attempt in range(ATTEMPTS):
            made = self._draw(rng, i, split, chunks or self.n_chunks)
            if isinstance(made, Document):
                made.leaks, made.redraws = leaks, attempt
                return made
            leaks += made == "leaky"
        raise UserError(f"no document could be built in {ATTEMPTS} draws: too few passages, or entities, for {chunks or self.n_chunks or self.n_passages} chunks or passages")

    def _draw(self, rng, i: int, split: str, n_chunks: int | None) -> Document | str:
        """One attempt: the document, or why not."""
        pivot = int(rng.choice(self.pivots[split]))
        passage = self.passages[pivot]
        entities = {normalize(passage.text[s:e]): passage.text[s:e] for s, e in passage.entities}
        allowed = [e for n, e in entities.items() if split == "heldout" or n not in self.never_in_train]
        if not allowed:
            return "no entity"
        answer = allowed[int(rng.integers(len(allowed)))]
        chosen = [pivot, *self._related(pivot)]
        others = rng.permutation(len(self.passages))
        skip = {*chosen, *self.same_title[passage.title]}
        chosen += [n for n in others.tolist() if n not in skip]
        places = rng.random(len(chosen))  # the order of the passages, however many there will be

        size = self.n_passages or self._fill(chosen, n_chunks)
        if size > len(chosen):
            return "too few passages"
        for _ in range(8):  # the estimate is nearly right: a passage more or less
            order = [chosen[n] for n in np.argsort(places[:size])]
            text, keep, spans = self._join(order, answer)
            pieces = cut_chunks(text, keep, self.tokenizer, self.chunk_tokens)
            if self.n_passages or len(pieces) == n_chunks:
                break
            size += 1 if len(pieces) < n_chunks else -1
            if not 1 <= size <= len(chosen):
                return "too few passages"
        else:
            return "wrong length"
        if not self.keep_leaky and any(occurrences(text, word) for word in name_words(answer)):
            return "leaky"
        return Document(i, passage.title, QUESTION, [answer], pieces, self._recallable(text, pieces, spans, answer, split))

    def _related(self, pivot: int) -> list[int]:
        """The n_related passages nearest to the pivot, other versions of its own article aside."""
        if not self.n_related:
            return []
        own = set(self.same_title[self.passages[pivot].title])
        (found,) = self.index.search([f"{self.passages[pivot].title} {self.passages[pivot].text}"], self.n_related + len(own))
        return [n for n, _ in found if n not in own][: self.n_related]

    def _fill(self, chosen: list[int], n_chunks: int) -> int:
        """How many of `chosen` fill about `n_chunks` chunks, by the unmasked passages' lengths."""
        used = 0
        for size, n in enumerate(chosen):
            if n not in self.lengths:
                self.lengths[n] = len(self.tokenizer(self.passages[n].text, add_special_tokens=False)["input_ids"]) + 1
            used += self.lengths[n]
            if used > n_chunks * self.chunk_tokens * 0.9:
                return max(1, size)
        return len(chosen)

    def _join(self, order: list[int], answer: str) -> tuple[str, list, list]:
        """(masked text, spans that no cut may fall into, spans of the entities that are left)."""
        texts, keep, spans, offset = [], [], [], 0
        for n in order:
            text, moved, masks = mask_spans(self.passages[n].text, self.passages[n].entities, answer, MASK)
            spans += [(s + offset, e + offset) for s, e in moved]
            keep += [(s + offset, e + offset) for s, e in [*moved, *masks]]
            texts.append(text)
            offset += len(text) + 2
        return "\n\n".join(texts), keep, spans

    def _recallable(self, text: str, pieces: list[str], spans: list, answer: str, split: str) -> list[list[str]]:
        """For each chunk the distinct entities wholly inside it that are no part of the answer and touch no mask."""
        recall, start, spans = [], 0, sorted(spans)
        for piece in pieces:
            end, found = start + len(piece), {}
            while spans and spans[0][0] < end:
                s, e = spans.pop(0)
                touches = text[max(0, s - len(MASK)) : s] == MASK or text[e : e + len(MASK)] == MASK
                entity, name = text[s:e], normalize(text[s:e])
                alias = occurrences(entity, answer) or occurrences(answer, entity) or set(name_words(entity)) & set(name_words(answer))
                if s >= start and e <= end and not touches and not alias and (split == "heldout" or name not in self.never_in_train):
                    found.setdefault(name, entity)
            recall.append(list(found.values()))
            start = end
        return recall


def draw_recall(document: Document, rng) -> Recall | None:
    """Draw k in 2..T-1, l in 1..k-1 and an entity of chunk l; None if no chunk but the last has any."""
    sources = [n for n, entities in enumerate(document.recall[:-1], 1) if entities]
    if not sources:
        return None
    k = int(rng.integers(sources[0] + 1, len(document.chunks) + 1))
    earlier = [n for n in sources if n < k]
    chunk = earlier[int(rng.integers(len(earlier)))]
    entities = document.recall[chunk - 1]
    entity = entities[int(rng.integers(len(entities)))]
    return Recall(k, chunk, entity, mask(document.chunks[chunk - 1], entity, TARGET))


def measure(file: str, ner: str = "rules") -> None:
    """Print exact-span precision and recall, labels aside, on lines of {"text", "entities": [[start, end, label]]}."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    right = found = gold = 0
    for row, doc in zip(rows, pipeline(ner).pipe(row["text"] for row in rows)):
        spans, wanted = {(e.start_char, e.end_char) for e in doc.ents}, {(s, e) for s, e, _ in row["entities"]}
        right, found, gold = right + len(spans & wanted), found + len(spans), gold + len(wanted)
    print(f"{ner}: {len(rows)} sentences, precision {right / found:.3f}, recall {right / gold:.3f} ({found} found, {gold} labelled)")


if __name__ == "__main__":
    measure(*sys.argv[1:])
