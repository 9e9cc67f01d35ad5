"""From unlabeled text to masked documents (paper 3.2 and 3.3).

    load_passages   a corpus as passages: local files or a hub data set
    find_entities   the named entities of each, by spaCy, cached on disk
    Corpus          document i: a pivot, related and random passages, one entity masked everywhere, cut into chunks
    draw_recall     one chunk with one entity replaced by [TARGET], and the later memory that must supply it

    python masking.py --measure-ner FILE.jsonl [--ner rules]    # precision and recall on labelled spans
"""

import argparse
import hashlib
import json
import os
import re
import sys
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path

import datasets
import numpy as np
import spacy
from spacy.lang.en.stop_words import STOP_WORDS
from tqdm import tqdm

from retrieval import BM25, UserError
from rewards import normalize

MASK, TARGET = "[MASK]", "[TARGET]"
QUESTION = "Judging from the whole text, what does [MASK] stand for?"
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}  # suffix -> builder of `datasets`
ATTEMPTS = 200  # draws for one document before giving up
SMALLEST_CHUNK = 16  # tokens; any tokenizer fits [MASK] and any one character into that

Span = tuple[int, int]  # character positions, the end excluded


@dataclass
class Passage:
    """A paragraph or a few of one article; entities are character spans of `text`, in order, none overlapping."""

    title: str
    text: str
    entities: list[Span] = field(default_factory=list)


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


# ---- corpora -----------------------------------------------------------------------------------------


def load_passages(
    corpus: str, *, config: str | None = None, split: str = "train", text_field: str = "text", title_field: str = "title",
    max_passages: int | None = None, passage_words: int = 200,
) -> list[Passage]:  # fmt: skip
    """Passages of a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set OWNER/NAME (streamed).

    Articles of more than `passage_words` words are split at paragraph ends. Left out, with a note on stderr: empty
    passages, and those that hold a literal [MASK] or [TARGET]. A passage without a title goes by the name of its .txt
    file if that holds no other, or else by its first words. Raises UserError for whatever can't be read.
    """
    passages, empty, marked = [], 0, 0
    for row, where in _rows(corpus, config, split):
        for name in {text_field, title_field} - {"title"}:
            if name not in row:
                raise UserError(f"--corpus {where}: no field {name!r}, its fields are {', '.join(sorted(row))}; name one of them")
        if not isinstance(row[text_field] or "", str):
            raise UserError(f"--corpus {where}: field {text_field!r} holds {type(row[text_field]).__name__}, not text")
        pieces = split_paragraphs(row[text_field] or "", passage_words)
        title = row.get(title_field) or (Path(where).stem if len(pieces) == 1 and str(where).endswith(".txt") else None)
        empty += not pieces
        for text in pieces:
            if any(token in text.lower() for token in ("[mask]", "[target]")):  # in any case, as y is masked in any case
                marked += 1
            else:
                passages.append(Passage(str(title or text[:40]), text))
        if max_passages and len(passages) >= max_passages:
            break
    if empty or marked:
        print(f"{corpus}: left out {empty} empty passages and {marked} that hold a literal {MASK} or {TARGET}", file=sys.stderr)
    if not passages:
        raise UserError(f"--corpus {corpus}: holds no passage")
    return passages[:max_passages]


def _rows(corpus: str, config: str | None, split: str):
    """(row, where it stands) of a corpus, one by one, nothing written to disk."""
    path = Path(corpus)
    if not path.exists():
        if path.suffix in FORMATS or corpus.startswith((".", "/", "~")) or corpus.count("/") != 1:
            raise UserError(f"--corpus {corpus}: no such file or folder (a hub data set is called OWNER/NAME)")
        try:
            yield from ((row, corpus) for row in datasets.load_dataset(corpus, config, split=split, streaming=True))
        except Exception as error:  # the network, the name, the configuration, the split: all the user's to mend
            raise UserError(f"--corpus {corpus}: no local file, and not to be had from the hub: {_first_line(error)}") from None
        return
    files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.suffix in FORMATS)
    if not files:
        raise UserError(f"--corpus {corpus}: no {', '.join(FORMATS)} file, nor a folder that holds one")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs its own lines about what is reported below
    for file in files:
        whole = {"sample_by": "document"} if file.suffix == ".txt" else {}
        try:
            if file.stat().st_size:  # `datasets` ends in a bare StopIteration on an empty file
                rows = datasets.load_dataset(FORMATS[file.suffix], data_files=str(file), split="train", streaming=True, **whole)
                yield from ((row, file) for row in rows)
        except Exception as error:  # each builder has its own kinds
            raise UserError(f"--corpus {file}: {_malformed_line(file) or _first_line(error)}; mend or remove it") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _malformed_line(file: Path) -> str | None:
    """Which line of a .jsonl file is no JSON object, and why; `datasets` does not tell."""
    for number, line in enumerate(file.open("rb") if file.suffix == ".jsonl" else [], 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number} is not a JSON object"
        except ValueError as error:
            return f"line {number} is not JSON ({error})"
    return None


def split_paragraphs(text: str, words: int) -> list[str]:
    """`text` in pieces of about `words` words, cut at line ends only: a longer paragraph stays whole, a heading is never alone."""
    pieces, size = [], 0
    for paragraph in (line.strip() for line in text.split("\n") if line.strip()):
        length = len(paragraph.split())
        if not pieces or (size + length > words and size > words // 8):
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += length
    return ["\n".join(piece) for piece in pieces]


# ---- entities ----------------------------------------------------------------------------------------

FOUND = 4  # raise when find_entities finds something else than before: it is part of the cache's name
MONTHS = "January February March April May June July August September October November December".split()
LINKS = "of de la le du des van von der den di da del al bin ibn - &".split()
QUANTITIES = {"DATE", "TIME", "NUMBER", "CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY"}


def pipeline(ner: str, titles=()):
    """A spaCy pipeline that sets doc.ents. Raises UserError where `ner` is not installed."""
    if ner != "rules":
        try:
            return spacy.load(ner, exclude=["parser", "lemmatizer"])
        except OSError:
            raise UserError(f"--ner {ner}: not installed; run `python -m spacy download {ner}`, or use --ner rules") from None
    capital, link = {"SHAPE": {"REGEX": "^X"}, "IS_STOP": False}, {"LOWER": {"IN": LINKS}, "OP": "{1,3}"}
    month, year = {"TEXT": {"IN": MONTHS}}, {"TEXT": {"REGEX": r"^(1\d|20)\d\d$"}}
    day, comma = {"TEXT": {"REGEX": r"^\d{1,2}(st|nd|rd|th)?$"}}, {"TEXT": ",", "OP": "?"}
    capitals = capital | {"OP": "+"}
    patterns = {
        "NAME": [
            [capitals, capital, {"TEXT": "I", "OP": "?"}],  # World War I: I is a stop word elsewhere
            [capitals, link, capitals], [capitals, link, capitals, link, capitals],
            [capitals, {"LOWER": "of"}, {"LOWER": "the"}, capitals],
            [capital | {"IS_SENT_START": False, "LENGTH": {">=": 2}}],  # inside a sentence a capital means a name
        ],
        "DATE": [[month, day, comma, year], [day, month, year], [month, year], [month, day], [day, month], [month], [year],
                 [{"TEXT": {"REGEX": r"^\d{2,3}0s$"}}]],
        "NUMBER": [[{"TEXT": {"REGEX": r"^\d+([.,]\d+)*$"}}]],
        "TITLE": sorted(name for name in map(bare, titles) if name[:1].isupper() and name.lower() not in STOP_WORDS),
    }  # fmt: skip
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": label, "pattern": pattern} for label, some in patterns.items() for pattern in some])
    return nlp


def bare(title: str) -> str:
    """The title as it stands in running text: "Mercury (planet)" without what tells it from its namesakes."""
    return re.sub(r"\s*\([^()]*\)$", "", title).strip()


def common_words(texts) -> set[str]:
    """The words that `texts` write small at least once in ten times: such a word is hardly a name, even with a capital."""
    total, small = Counter(), Counter()
    for text in texts:
        words = re.findall(r"[^\W\d_]+", text)
        total.update(word.lower() for word in words)
        small.update(word for word in words if word.islower())
    return {word for word, count in small.items() if 10 * count >= total[word]}


def spans(doc, common: set[str]) -> list[tuple[int, int, str]]:
    """(start, end, label) of the entities worth masking in a spaCy doc.

    Trimmed of a lower-case article, quotes and a final 's. Left out: what masking would not find again (no word edge),
    what SQuAD's normalisation empties, and what would mask ordinary words: stop words, a single word of `common`,
    names with neither a capital nor a digit.
    """
    found = []
    for entity in doc.ents:
        core = re.fullmatch(r"(?s)[\s\"'“”‘’]*(?:(?:the|an?)\s+)?(.*?)(?:['’]s)?[\s\"'“”‘’,;:]*", entity.text)
        start, end = entity.start_char + core.start(1), entity.start_char + core.end(1)
        plain = core[1].islower() and not any(c.isdigit() for c in core[1])
        ordinary = core[1].lower() in common or all(word in STOP_WORDS for word in core[1].lower().split())
        if normalize(core[1]) and not plain and not ordinary and len(core[1]) <= 80 and is_whole(doc.text, start, end):
            found.append((start, end, entity.label_))
    return found


def find_entities(passages: list[Passage], ner: str, cache: Path) -> None:
    """Set the entities of every passage, once: a later call on the same text reads them from the folder `cache`.

    Raises UserError if the pipeline is missing or finds nothing at all; then nothing is written.
    """
    digest = hashlib.sha256(repr((FOUND, ner, spacy.__version__, spacy.util.get_package_version(ner))).encode())
    for passage in passages:
        digest.update(f"{passage.title}\0{passage.text}\0".encode("utf-8", "surrogatepass"))
    file = Path(cache) / f"entities-{digest.hexdigest()[:24]}.json"
    if file.exists():
        for passage, found in zip(passages, json.loads(file.read_text()), strict=True):
            passage.entities = [tuple(span) for span in found]
        return
    nlp = pipeline(ner, {passage.title for passage in passages})
    common = common_words(passage.text for passage in passages) | {"mask", "target"}
    docs = nlp.pipe((passage.text for passage in passages), batch_size=64)
    for passage, doc in zip(tqdm(passages, desc=f"entities ({ner})"), docs, strict=True):
        passage.entities = [(start, end) for start, end, _ in spans(doc, common)]
    if not any(passage.entities for passage in passages):
        raise UserError(f"--ner {ner}: found no entity in the corpus, so there is nothing to mask; try another pipeline or text")
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")  # several processes may write it at once
    fresh.write_text(json.dumps([passage.entities for passage in passages]))
    fresh.replace(file)


# ---- masking -----------------------------------------------------------------------------------------

ALIKE = str.maketrans("’‘‐‑–", "''---")  # curly quotes and dashes are no other name


def fold(text: str):
    """(`text` in NFKC and caseless, for each of its characters and its end the place in `text` it comes from).

    `fold("Ⅳ é")` (the é written as e and an accent) is `("iv é", [0, 0, 1, 2, 4])`.
    """
    folded = text.casefold()
    if len(folded) == len(text) and unicodedata.is_normalized("NFKC", text) and unicodedata.is_normalized("NFKC", folded):
        return folded.translate(ALIKE), range(len(text) + 1)
    pieces, origin = [], []
    for run in re.finditer(r"[\x00-\x7f]+(?=[\x00-\x7f]|\Z)|[\x00-\x7f]?[^\x00-\x7f]+", text):
        if run[0].isascii():
            pieces.append(run[0].lower())
            origin += range(*run.span())
            continue
        start = run.start()
        for end in range(start + 1, run.end() + 1):
            if end < run.end() and _merge(text[start:end], text[end]):
                continue
            piece = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[start:end]).casefold())
            pieces.append(piece)
            origin += [start] * len(piece)
            start = end
    return "".join(pieces).translate(ALIKE), [*origin, len(text)]


def _merge(before: str, character: str) -> bool:
    """Whether normalising `before` and the next character together differs from normalising them apart."""
    if character.isascii():
        return False
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", character)
    return unicodedata.combining(character) > 0 or unicodedata.normalize("NFKC", before + character) != apart


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] has no word character on either side; 5 is not in 5.2, nor in 1,500; MASK not in [MASK]."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    if _wordy(before[-1:]) or _wordy(after[:1]) or text[max(0, start - 1) : end + 1].upper() in (MASK, TARGET):
        return False
    in_number = re.fullmatch(r"\d[.,]", before) and text[start].isdigit() or re.fullmatch(r"[.,]\d", after) and text[end - 1].isdigit()
    return not in_number


def _wordy(character: str) -> bool:
    """A letter, a digit, an underscore, or a mark that combines with the letter before it."""
    return character.isalnum() or character == "_" or character != "" and unicodedata.category(character)[0] == "M"


@lru_cache(maxsize=4096)
def _form(entity: str) -> re.Pattern:
    return re.compile(r"\s+".join(re.escape(word) for word in fold(entity)[0].split()))


def occurrences(text: str, entity: str) -> list[Span]:
    """Every form of `entity` in `text`: whole words, NFKC, any case, any white space between its words."""
    folded, origin = fold(text)
    found, place = [], 0
    while match := _form(entity).search(folded, place):
        start, end = match.span()
        place = start + 1
        if is_whole(folded, start, end):
            place = end
            while origin[end] == origin[end - 1]:  # half of one character, as 1 in ½: masked with all of it
                end += 1
            if not found or origin[start] >= found[-1][1]:
                found.append((origin[start], origin[end]))
    return found


def mask(text: str, entity: str, token: str = MASK) -> str:
    """`text` with every form of `entity` replaced by `token`."""
    return mask_spans(text, [], entity, token)[0]


def mask_spans(text: str, spans: list[Span], entity: str, token: str = MASK) -> tuple[str, list[Span], list[Span]]:
    """(`text` with every form of `entity` replaced, `spans` at their new places less those it met, the places of `token`)."""
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
        n = bisect_left(starts, end)  # hits that start before the span's end: the last of them must end before its start
        if n == 0 or hits[n - 1][1] <= start:
            moved.append((start + shifts[n], end + shifts[n]))
    return "".join([*pieces, text[done:]]), moved, places


def name_words(entity: str) -> list[str]:
    """The words of a name that would give it away: capitalised, of four letters or more."""
    return [word for word in re.findall(r"[^\W\d_]{4,}", unicodedata.normalize("NFKC", entity)) if word[0].isupper()]


@lru_cache(maxsize=65536)
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", fold(name)[0]))


def _initials(name: str) -> str:
    return "".join(word[0] for word in re.findall(r"\w{2,}", name) if word[0].isupper())


def akin(one: str, other: str) -> bool:
    """Whether two names may mean the same: one is a part of the other or its initials, or they share a long word."""
    if shared := _words(one) & _words(other):
        long = any(len(word) >= 4 and word.isalpha() for word in shared)
        return bool(long or occurrences(one, other) or occurrences(other, one))
    return one.replace(".", "") == _initials(other) or other.replace(".", "") == _initials(one)


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
    return _merge(before, after)


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
            raise UserError(f"the corpus has {len(passages)} passages, too few for --passages {n_passages} with --related {n_related}")
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

        It begins with the same draws whatever `chunks` is, so most pivots and answers are the same at every length.
        """
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
            size = max(size + 1, int(size * 0.95 * n_chunks / len(chunks)))
        most = n_chunks or self.max_chunks or len(chunks)
        # What is too much goes at the end; also at the front where the pivot would be lost otherwise.
        chunk_ends = list(accumulate(map(len, chunks)))
        begin = max(0, bisect_left(chunk_ends, last) + 1 - most)
        start = chunk_ends[begin - 1] if begin else 0
        if first < start:
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


def measure(file: str, ner: str) -> str:
    """Precision and recall of exact spans, labels aside, on lines of {"text", "entities": [[start, end, label]]}.

    Without titles as a gazetteer; dates and numbers are not counted, as such files label names only.
    """
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    common, right, found, gold = common_words(row["text"] for row in rows), 0, 0, 0
    for row, doc in zip(rows, pipeline(ner).pipe(row["text"] for row in rows), strict=True):
        mine = {(start, end) for start, end, label in spans(doc, common) if label not in QUANTITIES}
        theirs = {(start, end) for start, end, _ in row["entities"]}
        right, found, gold = right + len(mine & theirs), found + len(mine), gold + len(theirs)
    return f"{ner}: {len(rows)} texts, precision {right / found:.3f}, recall {right / gold:.3f} ({found} found, {gold} labelled)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure-ner", metavar="FILE", required=True, help='lines of {"text", "entities": [[start, end, label]]}')
    parser.add_argument("--ner", default="rules", help="'rules', or an installed spaCy pipeline")
    arguments = parser.parse_args()
    try:
        print(measure(arguments.measure_ner, arguments.ner))
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
