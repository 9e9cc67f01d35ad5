"""Unlabelled text as passages, the material of the proxy tasks (paper 3.2), and a cache of what is found in them."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError, first_line
from engine.files import digest, must_write, replace_text
from text.matching import MASK, TARGET, Span, without_spaces
from text.rows import read_rows

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
PASSAGE_WORDS = 200  # of a passage, about
SHARD, BLOCK = 20_000, 1000  # passages of a file of the cache, and of a process at a time
FEW = 5  # blocks for which one process is enough


@dataclass
class Passage:
    """A paragraph or a few of one article; entities are character spans of `text`, in order, none overlapping."""

    title: str
    text: str
    entities: list[Span] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The title as it stands in running text: "Mercury (planet)" without what tells it from its namesakes."""
        return re.sub(r"\s*\([^()]*\)$", "", self.title).strip()


def load_text(config, left_out: Counter | None = None) -> list[Passage]:
    """The passages of --corpus, as the settings beside it say."""
    spaced = config.task == "memtrain" and config.ner == "rules"  # which finds no names in other scripts
    return load_passages(
        config.corpus_name, config.corpus_config, config.text_field, config.max_passages, left_out, spaced
    )


def load_passages(
    corpus: str, config: str | None = None, text_field: str = "text", max_passages: int | None = None,
    left_out: Counter | None = None, spaced: bool = False,
) -> list[Passage]:
    """Passages of a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set OWNER/NAME (streamed).

    Articles of more than PASSAGE_WORDS words are split at paragraph ends. What can't be used is told on stderr and
    counted in `left_out`; if `spaced`, so are scripts without spaces between words. A passage without a title goes by
    its .txt file's name, if that holds no other, else by its first words. Raises UserError.
    """
    passages, left_out = [], Counter() if left_out is None else left_out
    for row, where in _rows(corpus, config):
        if text_field not in row:
            fields = ", ".join(sorted(row))
            raise UserError(f"--corpus {where}: no field {text_field!r}, its fields are {fields}; set --text-field")
        text = row[text_field] or ""
        if not isinstance(text, str):
            raise UserError(f"--corpus {where}: field {text_field!r} holds {type(text).__name__}, not text")
        pieces = split_paragraphs(text, PASSAGE_WORDS)
        title = row.get("title") or (Path(where).stem if len(pieces) == 1 and where.endswith(".txt") else None)
        left_out["empty"] += not pieces
        for piece in pieces:
            if MASK.lower() in piece.lower() or TARGET.lower() in piece.lower():
                left_out[f"with a literal {MASK} or {TARGET}"] += 1
            elif "\ufffd" in piece:  # what decoding puts where bytes made no sense
                left_out["not UTF-8"] += 1
            elif spaced and without_spaces(piece):
                left_out["written without spaces (--ner rules finds no name there)"] += 1
            else:
                passages.append(Passage(str(title or piece[:40]), piece))
        if max_passages and len(passages) >= max_passages:
            break
    if left_out.total() and os.environ.get("RANK", "0") == "0":
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items() if n)
        print(f"{corpus}: passages left out: {reasons}", file=sys.stderr)
    if not passages:
        raise UserError(f"--corpus {corpus}: holds no passage")
    return passages[:max_passages]


def _rows(corpus: str, config: str | None) -> Iterator[tuple[dict, str]]:
    """(row, the place where it stands) of a corpus, one by one; each row of a file with the fields of its first."""
    path = Path(corpus)
    if not path.exists():
        if path.suffix in FORMATS or corpus.startswith((".", "/", "~")) or corpus.count("/") != 1:
            raise UserError(f"--corpus {corpus}: no such file or folder (a hub data set is called OWNER/NAME)")
        from datasets import load_dataset  # here, as it is slow to import

        try:
            yield from ((row, corpus) for row in load_dataset(corpus, config, split="train", streaming=True))
        except Exception as error:  # the network, the name, the configuration: all the user's to fix
            why = first_line(error)
            raise UserError(f"--corpus {corpus}: no local file, and not to be had from the hub: {why}") from None
        return
    files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.suffix in FORMATS)
    if not files:
        raise UserError(f"--corpus {corpus}: no {', '.join(FORMATS)} file, nor a folder that holds one")
    for file in files:
        if file.suffix == ".txt":
            yield {"text": file.read_text("utf-8", errors="replace")}, str(file)
            continue
        fields: dict = {}
        try:
            for row, where in read_rows(file, errors="replace"):
                fields = fields or dict.fromkeys(row)
                yield fields | row, where
        except UserError as error:
            raise UserError(f"--corpus {error}; fix or remove it") from None


def split_paragraphs(text: str, words: int) -> list[str]:
    """`text` in pieces of about `words` words, cut at line ends only; a heading that begins one is not alone."""
    pieces, size = [], 0
    for paragraph in filter(None, map(str.strip, text.split("\n"))):
        length = len(paragraph.split())
        if not pieces or (size + length > words and size > words // 8):
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += length
    return ["\n".join(piece) for piece in pieces]


def kept_by_passage(
    name: str, passages: list[Passage], settings: tuple, folder: Path, prepare: Callable[[], Callable]
) -> Iterator:
    """One JSON value for each passage: what find = prepare() finds, or what an earlier run has kept in `folder`.

    find(texts) is a list that depends on nothing but `settings` and the passages. It is written in shards: a run that
    was stopped resumes after the last one. Under torchrun the first process finds; the others wait for its files.
    """
    texts = chain.from_iterable((passage.title, passage.text) for passage in passages)
    shards, find = folder / f"{name}-{digest(settings, texts)}", cache(prepare)
    for start in range(0, len(passages), SHARD):
        file = shards / f"{start:09}.json"
        if must_write(file):
            shard = [passage.text for passage in passages[start : start + SHARD]]
            with tqdm(desc=name, total=len(passages), initial=start, unit=" passages") as bar:
                replace_text(file, json.dumps(_find_all(find(), shard, bar)))
        yield from json.loads(file.read_text())


def _find_all(find: Callable, texts: list[str], bar: tqdm) -> list:
    """find(texts), a block at a time; if there are many, by all cores. Raises UserError."""
    blocks, found = [texts[n : n + BLOCK] for n in range(0, len(texts), BLOCK)], []
    try:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # it starts no process before it has work
            for some in pool.map(find, blocks) if len(blocks) > FEW else map(find, blocks):
                found += some
                bar.update(len(some))
    except BrokenProcessPool:
        raise UserError(f"{bar.desc}: a process was killed; is the memory full?") from None
    return found
