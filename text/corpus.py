"""Unlabelled text as passages, the data of the proxy tasks (paper 3.2), and a cache of what is found in them."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError
from engine.files import check_writable, digest, must_write, replace_lines, replace_text
from text.articles import count_words, is_disambiguation, split_paragraphs, without_references
from text.matching import MASK, TARGET, Span, without_spaces
from text.rows import hub_revision, hub_rows, read_rows

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
PASSAGE_WORDS = 200  # words of a passage, roughly
LEAST_WORDS = 15  # of a piece of an article: a shorter one is a heading or the rest of a list
PASSAGES_FORMAT = 1  # raise it when load_passages changes its results: it is part of the cached file's name
SHARD, BLOCK = 20_000, 1000  # passages in a file of the cache, and those a process takes at a time
FEW = 5  # up to this many blocks, one process is enough


@dataclass
class Passage:
    """One or more paragraphs of an article; entities are character spans of `text`, in order, not overlapping."""

    title: str
    text: str
    entities: list[Span] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The title as in running text: "Mercury (planet)" without the disambiguation in parentheses."""
        return re.sub(r"\s*\([^()]*\)$", "", self.title).strip()


def load_text(config, left_out: Counter | None = None) -> list[Passage]:
    """The passages of --corpus, loaded with its other settings; `left_out` counts unusable ones. Raises UserError.

    Those of a hub data set are cached next to the entities: other processes, a resumed run and runs in the same folder
    read the same text offline, even if the data set changes. That is why the file's name has no revision.
    """
    spaced = config.task == "memtrain" and config.ner == "rules"  # which finds no names in scripts without spaces
    left_out = Counter() if left_out is None else left_out
    settings = config.corpus_name, config.corpus_config, config.text_field, config.max_passages
    if not is_of_hub(config.corpus_name):
        return load_passages(*settings, left_out, spaced)
    file = config.cache.with_name(".passages") / f"{digest((PASSAGES_FORMAT, spaced, *settings), ())}.jsonl"
    if must_write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        check_writable(file)  # streaming takes hours
        revision, passages = hub_revision(config.corpus_name), load_passages(*settings, left_out, spaced)
        about = {"corpus": config.corpus_name, "revision": revision, "left_out": left_out}
        lines = chain([about], ([passage.title, passage.text] for passage in passages))
        replace_lines(file, (json.dumps(line) + "\n" for line in lines))
        return passages
    with file.open() as lines:
        about = json.loads(next(lines))
        left_out.update(about["left_out"])
        tell(f"{config.corpus_name}: read from {file} (revision {about['revision']}); delete it to download again")
        _tell_left_out(config.corpus_name, left_out)
        return [Passage(*json.loads(line)) for line in lines]


def load_passages(
    corpus: str, config: str | None = None, text_field: str = "text", max_passages: int | None = None,
    left_out: Counter | None = None, spaced: bool = False,
) -> list[Passage]:
    """Passages of a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set OWNER/NAME (streamed).

    An article ends at its references and the like; one of more than PASSAGE_WORDS words is split between paragraphs.
    Unusable passages are reported on stderr and counted in `left_out`; if `spaced`, these include scripts without
    spaces between words. A text without a title is named after its .txt file if it is one passage, else by its first
    words. Raises UserError.
    """
    passages, left_out = [], Counter() if left_out is None else left_out
    with closing(hub_rows(corpus, config) if is_of_hub(corpus) else _file_rows(Path(corpus))) as rows:
        for row, where in rows:
            text = _text_of(row, where, text_field)
            body = without_references(text)
            pieces = split_paragraphs(body, PASSAGE_WORDS)
            file_name = Path(where).stem if where.lower().endswith(".txt") and len(pieces) == 1 else None
            title = row.get("title") or file_name
            left_out["empty"] += not pieces
            if is_disambiguation(str(title), text):
                left_out["of a page that tells namesakes apart"] += 1
                continue
            is_part = len(pieces) > 1 or count_words([body]) < count_words([text])
            for piece in pieces:
                if why := _unusable(piece, is_part, spaced):
                    left_out[why] += 1
                else:
                    passages.append(Passage(str(title or piece[:40]), piece))
            if max_passages and len(passages) >= max_passages:
                break
    _tell_left_out(corpus, left_out)
    if not passages:
        advice = "save it as UTF-8" if left_out["not UTF-8"] else "use another corpus"
        raise UserError(f"--corpus {corpus}: contains no usable passage; {advice}")
    return passages[:max_passages]


def tell(line: str) -> None:
    """Print a line on stderr, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _tell_left_out(corpus: str, left_out: Counter) -> None:
    if left_out.total():
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items() if n)
        tell(f"{corpus}: passages left out: {reasons}")


# ---- rows --------------------------------------------------------------------------------------------------


def is_of_hub(corpus: str) -> bool:
    """Whether this names a hub data set. Raises UserError if it looks like a path and no such file or folder exists."""
    path = Path(corpus)
    if not path.exists() and (path.suffix in FORMATS or corpus.startswith((".", "/", "~")) or corpus.count("/") != 1):
        raise UserError(f"--corpus {corpus}: no such file or folder (a hub data set is called OWNER/NAME)")
    return not path.exists()


def _file_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """Yields (row, its file and line or record) from a file or folder; each row has the fields of its file's first row.

    Raises UserError.
    """
    found = [path] if path.is_file() else path.rglob("*")
    # No folder called x.txt, and nothing hidden, such as the copies in .ipynb_checkpoints.
    shown = (p for p in found if not p.is_dir() and not any(part[0] == "." for part in p.relative_to(path).parts))
    files = sorted(p for p in shown if p.suffix.lower() in FORMATS)
    if not files:
        raise UserError(f"--corpus {path}: is neither a {', '.join(FORMATS)} file nor a folder that contains one")
    for file in files:
        if file.suffix.lower() == ".txt":
            try:
                content = file.read_bytes()
            except OSError as error:
                raise UserError(f"--corpus {file}: can't be read ({error.strerror}); fix or remove it") from None
            code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # Notepad's and PowerShell's
            text = content.decode(code, errors="replace").replace("\r\n", "\n").replace("\r", "\n")
            if re.match(r"\s*<(!doctype|!--|\?xml|html)", text, re.IGNORECASE):
                raise UserError(f"--corpus {file}: is HTML or XML; save it as plain text")
            yield {"text": text}, str(file)
            continue
        fields: dict = {}
        try:
            for row, where in read_rows(file, errors="replace"):
                fields = fields or dict.fromkeys(row)
                yield fields | row, where
        except UserError as error:
            raise UserError(f"--corpus {error}; fix or remove it") from None


def _text_of(row: dict, where: str, field: str) -> str:
    if field not in row:
        fields = ", ".join(sorted(row))
        wrapped = len(row) == 1 and isinstance(*row.values(), list)  # {"data": [{"text": ...}, ...]}
        advice = f"save the list in {fields!r} alone" if wrapped else "set --text-field"
        raise UserError(f"--corpus {where}: no field {field!r}, its fields are {fields}; {advice}")
    text = row[field] or ""
    if not isinstance(text, str):
        raise UserError(f"--corpus {where}: field {field!r} holds {type(text).__name__}, not text")
    return text


def _unusable(piece: str, is_part: bool, spaced: bool) -> str | None:
    """Why a piece can't be a passage, or None. A short piece can, unless it is part of a longer text."""
    if MASK.lower() in piece.lower() or TARGET.lower() in piece.lower():
        return f"with a literal {MASK} or {TARGET}"
    if "\ufffd" in piece:  # decoding's replacement for invalid bytes
        return "not UTF-8"
    if spaced and without_spaces(piece):
        return "written without spaces (--ner rules finds no name there)"
    if is_part and len(piece.split()) < LEAST_WORDS and not without_spaces(piece):
        return f"under {LEAST_WORDS} words"
    return None


# ---- what is found in passages ---------------------------------------------------------------------------------


def kept_by_passage(
    name: str, passages: list[Passage], settings: tuple, folder: Path, prepare: Callable[[], Callable]
) -> Iterator:
    """Yields one JSON value for each passage: found by find = prepare(), or cached in `folder` by an earlier run.

    find(texts) returns a list that depends only on `settings` and the passages. It is cached in shards: a stopped run
    resumes after the last one. Under torchrun process 0 finds; the others wait for its files. Raises UserError.
    """
    texts = chain.from_iterable((passage.title, passage.text) for passage in passages)
    shards, find = folder / f"{name}-{digest(settings, texts)}", cache(prepare)
    for start in range(0, len(passages), SHARD):
        file = shards / f"{start:09}.json"
        if must_write(file):
            shard = [passage.text for passage in passages[start : start + SHARD]]
            with tqdm(desc=name, total=len(passages), initial=start, unit=" passages", delay=5) as bar:
                replace_text(file, json.dumps(_find_all(find(), shard, bar)))
        yield from json.loads(file.read_text())


def _find_all(find: Callable, texts: list[str], bar: tqdm) -> list:
    """find(texts), block by block; on all cores if there are many blocks. Raises UserError."""
    blocks, found = [texts[n : n + BLOCK] for n in range(0, len(texts), BLOCK)], []
    try:
        # Linux can tell which cores this process may use; macOS only how many there are.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ProcessPoolExecutor(cores) as pool:  # it starts processes only when it has work
            for some in pool.map(find, blocks) if len(blocks) > FEW else map(find, blocks):
                found += some
                bar.update(len(some))
    except BrokenProcessPool:
        raise UserError(f"{bar.desc}: a process was killed; is the memory full?") from None
    return found
