"""Unlabelled text as passages with their named entities: the proxy tasks are made of these (paper 3.2).

    load_passages   a corpus as passages: local files or a hub data set
    find_entities   the named entities of each, by spaCy, cached on disk

    python -m text.corpus --measure-ner FILE.jsonl [--ner rules]    # precision and recall on labelled spans
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import spacy
from spacy.lang.en.stop_words import STOP_WORDS
from tqdm import tqdm

from engine.errors import UserError, first_line, run_script
from engine.files import digest, must_write, replace_text
from text.matching import MASK, TARGET, Span, occurrences
from text.rows import read_rows

FORMATS = (".jsonl", ".json", ".parquet", ".txt")


@dataclass
class Passage:
    """A paragraph or a few of one article; entities are character spans of `text`, in order, none overlapping."""

    title: str
    text: str
    entities: list[Span] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The title as it stands in running text."""
        return bare(self.title)


# ---- passages -----------------------------------------------------------------------------------------


def load_passages(
    corpus: str, *, config: str | None = None, split: str = "train", text_field: str = "text",
    title_field: str = "title", max_passages: int | None = None, passage_words: int = 200,
    left_out: Counter | None = None,
) -> list[Passage]:
    """Passages of a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set OWNER/NAME (streamed).

    Articles of more than `passage_words` words are split at paragraph ends. Left out, told on stderr and counted in
    `left_out`: empty passages, those with a literal [MASK] or [TARGET], and those with bytes that are not UTF-8. A
    passage without a title goes by its .txt file's name, if that holds no other, else by its first words. UserError.
    """
    passages, left_out = [], Counter() if left_out is None else left_out
    for row, where in _rows(corpus, config, split):
        for name in {text_field, title_field} - {"title"}:
            if name not in row:
                fields = ", ".join(sorted(row))
                raise UserError(f"--corpus {where}: no field {name!r}, its fields are {fields}; name one of them")
        text = row[text_field] or ""
        if not isinstance(text, str):
            raise UserError(f"--corpus {where}: field {text_field!r} holds {type(text).__name__}, not text")
        pieces = split_paragraphs(text, passage_words)
        title = row.get(title_field) or (Path(where).stem if len(pieces) == 1 and where.endswith(".txt") else None)
        left_out["empty"] += not pieces
        for text in pieces:
            if any(token in text.lower() for token in ("[mask]", "[target]")):
                left_out[f"with a literal {MASK} or {TARGET}"] += 1
            elif "\ufffd" in text:  # what decoding puts where bytes made no sense
                left_out["not UTF-8"] += 1
            else:
                passages.append(Passage(str(title or text[:40]), text))
        if max_passages and len(passages) >= max_passages:
            break
    if left_out.total() and os.environ.get("RANK", "0") == "0":
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items() if n)
        print(f"{corpus}: passages left out: {reasons}", file=sys.stderr)
    if not passages:
        raise UserError(f"--corpus {corpus}: holds no passage")
    return passages[:max_passages]


def _rows(corpus: str, config: str | None, split: str) -> Iterator[tuple[dict, str]]:
    """(row, the place where it stands) of a corpus, one by one, nothing written to disk."""
    path = Path(corpus)
    if path.exists():
        files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.suffix in FORMATS)
        if not files:
            raise UserError(f"--corpus {corpus}: no {', '.join(FORMATS)} file, nor a folder that holds one")
        for file in files:
            yield from _text_file(file) if file.suffix == ".txt" else _file_rows(file)
        return
    if path.suffix in FORMATS or corpus.startswith((".", "/", "~")) or corpus.count("/") != 1:
        raise UserError(f"--corpus {corpus}: no such file or folder (a hub data set is called OWNER/NAME)")
    try:
        yield from ((row, corpus) for row in datasets.load_dataset(corpus, config, split=split, streaming=True))
    except Exception as error:  # the network, the name, the configuration, the split: all the user's to mend
        why = first_line(error)
        raise UserError(f"--corpus {corpus}: no local file, and not to be had from the hub: {why}") from None


def _text_file(file: Path) -> Iterator[tuple[dict, str]]:
    yield {"text": file.read_text("utf-8", errors="replace")}, str(file)


def _file_rows(file: Path) -> Iterator[tuple[dict, str]]:
    """The rows of a file, each with the fields of the first."""
    fields: dict = {}
    try:
        for row, where in read_rows(file, errors="replace"):
            fields = fields or dict.fromkeys(row)
            yield fields | row, where
    except UserError as error:
        raise UserError(f"--corpus {error}; mend or remove it") from None


def split_paragraphs(text: str, words: int) -> list[str]:
    """`text` in pieces of about `words` words, cut at line ends only; a heading that begins one is not alone."""
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

SHARD, PART = 20_000, 500  # passages of a file of the cache, and of a worker at a time
ENTITIES_FORMAT = 5  # raise when find_entities finds something else than before: it is part of the cache's name
MONTHS = "January February March April May June July August September October November December".split()
LINKS = "of de la le du des van von der den di da del al bin ibn - &".split()
TRIM = re.compile(r"(?s)[\s\"'“”‘’]*(?:(?:the|an?)\s+)?(.*?)(?:['’]s)?[\s\"'“”‘’,;:]*")
QUANTITIES = {"DATE", "TIME", "NUMBER", "CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY"}


def pipeline(ner: str, titles=()):
    """A spaCy pipeline that sets doc.ents. Raises UserError where `ner` is not installed."""
    if ner != "rules":
        try:
            return spacy.load(ner, exclude=["parser", "lemmatizer"])
        except (OSError, ValueError):
            raise UserError(
                f"--ner {ner or repr(ner)}: not installed; run `python -m spacy download {ner}`, or use --ner rules"
            ) from None
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
        "DATE": [
            [month, day, comma, year], [day, month, year], [month, year], [month, day], [day, month], [month], [year],
            [{"TEXT": {"REGEX": r"^\d{2,3}0s$"}}],
        ],
        "NUMBER": [[{"TEXT": {"REGEX": r"^\d+([.,]\d+)*$"}}]],
        "TITLE": sorted(name for name in map(bare, titles) if name[:1].isupper() and name.lower() not in STOP_WORDS),
    }
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    ruler = nlp.add_pipe("entity_ruler")
    for label, some in patterns.items():
        ruler.add_patterns([{"label": label, "pattern": pattern} for pattern in some])
    return nlp


def bare(title: str) -> str:
    """The title as it stands in running text: "Mercury (planet)" without what tells it from its namesakes."""
    return re.sub(r"\s*\([^()]*\)$", "", title).strip()


def common_words(texts) -> set[str]:
    """Words that `texts` write small in a tenth of their occurrences or more: hardly names, even with a capital."""
    total, small = Counter(), Counter()
    for text in texts:
        words = re.findall(r"[^\W\d_]+", text)
        total.update(word.lower() for word in words)
        small.update(word for word in words if word.islower())
    return {word for word, count in small.items() if 10 * count >= total[word]}


def spans(doc, common: set[str]) -> list[tuple[int, int, str]]:
    """(start, end, label) of the entities worth masking in a spaCy doc.

    Trimmed of a lower-case article, quotes and a final 's. Left out: a span that masking would not find again (no word
    edge), and one that would mask ordinary words: stop words, a single word of `common`, names with neither a capital
    nor a digit.
    """
    found, text = [], doc.text  # spaCy builds it anew at each access
    for entity in doc.ents:
        core = TRIM.fullmatch(entity.text)
        start, end = entity.start_char + core.start(1), entity.start_char + core.end(1)
        plain = core[1].islower() and not any(c.isdigit() for c in core[1])
        ordinary = core[1].lower() in common or all(word in STOP_WORDS for word in core[1].lower().split())
        fits = 0 < len(core[1]) <= 80 and not plain and not ordinary
        if fits and found_again(text, start, end):
            found.append((start, end, entity.label_))
    return found


def found_again(text: str, start: int, end: int) -> bool:
    """Whether masking finds this span: a word edge of the raw text may be none in NFKC, where Ulm\u2122 is UlmTM."""
    first = max(0, start - 8)
    return (start - first, end - first) in occurrences(text[first : end + 8], text[start:end])


def find_entities(passages: list[Passage], ner: str, cache: Path) -> None:
    """Set the entities of every passage, once: a later call on the same text reads them from the folder `cache`.

    Of a large corpus they are found by all cores, and written in shards: a run that was stopped goes on with those that
    are there. Raises UserError if the pipeline is missing or finds nothing at all.
    """
    settings = (ENTITIES_FORMAT, ner, spacy.__version__, spacy.util.get_package_version(ner))
    texts = (text for passage in passages for text in (passage.title, passage.text))
    folder = Path(cache) / f"entities-{digest(settings, texts)}"
    shards = [(start, folder / f"{start:09}.json") for start in range(0, len(passages), SHARD)]
    finder = None
    for start, file in shards:
        shard = passages[start : start + SHARD]
        if must_write(file):
            finder = finder or Finder(passages, ner, left=sum(not file.exists() for _, file in shards) * SHARD)
            found = finder.entities(start, len(shard))
            if any(found) or len(shards) > 1:
                replace_text(file, json.dumps(found))
        else:
            found = json.loads(file.read_text())
        for passage, spans_of_it in zip(shard, found, strict=True):
            passage.entities = [tuple(span) for span in spans_of_it]
    if not any(passage.entities for passage in passages):
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"--ner {ner}: found no entity in the corpus, so there is nothing to mask; try another pipeline or text"
        )


class Finder:
    """The entities worth masking of many passages, by `workers` processes that return nothing but these."""

    def __init__(self, passages: list[Passage], ner: str, left: int):
        self.passages, self.nlp = passages, pipeline(ner, {passage.title for passage in passages})
        self.common = common_words(passage.text for passage in passages) | {"mask", "target"}
        longest = max((len(passage.text) for passage in passages), default=0)
        self.nlp.max_length = max(self.nlp.max_length, longest + 1)  # a line may be a whole book
        self.workers = len(os.sched_getaffinity(0)) if len(passages) > SHARD else 1
        self.began, self.bar = time.perf_counter(), tqdm(desc=f"entities ({ner})", total=min(left, len(passages)))

    def part(self, start: int) -> list[list[Span]]:
        texts = [passage.text for passage in self.passages[start : start + PART]]
        return [[(s, e) for s, e, _ in spans(doc, self.common)] for doc in self.nlp.pipe(texts, batch_size=64)]

    def entities(self, start: int, count: int) -> list[list[Span]]:
        """The entities of `count` passages from `start` on."""
        found, parts = [], range(start, start + count, PART)
        if self.workers == 1:
            for part in map(self.part, parts):
                found += part
                self.tell(len(part))
            return found
        # Forked, so that passages and pipeline are there without being sent.
        how = {"mp_context": multiprocessing.get_context("fork"), "initializer": _hold, "initargs": (self,)}
        try:
            with ProcessPoolExecutor(self.workers, **how) as pool:
                for part in pool.map(_part, parts):
                    found += part
                    self.tell(len(part))
        except BrokenProcessPool:
            raise UserError("a process that looked for entities was killed; is the memory full?") from None
        return found

    def tell(self, count: int) -> None:
        """Progress; after the first part of the whole, how long it will take."""
        self.bar.update(count)
        if self.bar.n == count and self.bar.total > SHARD:
            rate = self.workers * count / (time.perf_counter() - self.began)
            minutes = self.bar.total / rate / 60
            tqdm.write(f"about {rate:.0f} passages a second in {self.workers} processes: {minutes:.0f} minutes")


def _hold(finder: Finder) -> None:
    """In a worker: keep what it inherits."""
    global HELD
    HELD = finder


def _part(start: int) -> list[list[Span]]:
    return HELD.part(start)


def measure_ner(file: str, ner: str) -> str:
    """Precision and recall of exact spans, labels aside, on lines of {"text", "entities": [[start, end, label]]}.

    Without titles as a gazetteer; dates and numbers are not counted, as such files label names only.
    """
    try:
        rows = [row for row, _ in read_rows(Path(file))]
        texts = [str(row["text"]) for row in rows]
        names = [{(start, end) for start, end, _ in row["entities"]} for row in rows]
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'--measure-ner {file}: no lines of {{"text", "entities"}} ({first_line(error)})') from None
    if not rows:
        raise UserError(f"--measure-ner {file}: holds no text")
    common, right, found, gold = common_words(texts), 0, 0, 0
    for theirs, doc in zip(names, pipeline(ner).pipe(texts), strict=True):
        mine = {(start, end) for start, end, label in spans(doc, common) if label not in QUANTITIES}
        right, found, gold = right + len(mine & theirs), found + len(mine), gold + len(theirs)
    precision, recall = right / max(found, 1), right / max(gold, 1)
    counts = f"{found} found, {gold} labelled"
    return f"{ner}: {len(texts)} texts, precision {precision:.3f}, recall {recall:.3f} ({counts})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = 'lines of {"text", "entities": [[start, end, label]]}'
    parser.add_argument("--measure-ner", metavar="FILE", required=True, help=lines)
    parser.add_argument("--ner", default="rules", help="'rules', or an installed spaCy pipeline")
    arguments = parser.parse_args()
    print(measure_ner(arguments.measure_ner, arguments.ner))


if __name__ == "__main__":
    run_script(main)
