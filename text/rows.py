"""The records of a .json, .jsonl or .parquet file or of a hub data set, one by one, each with its place."""

import gc
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

from engine.errors import UserError, reason_of

BLANK = b" \t\r\n\xef\xbb\xbf"  # the last three bytes are a mark that some programs begin a file with
HALF = re.compile(rb"\\u[dD]")  # maybe of a surrogate pair, which JSON can spell and no tokenizer takes


def read_rows(file: Path, errors: str = "strict") -> Iterator[tuple[dict, str]]:
    """(record, "FILE: line 3") of a .jsonl file, "record 3" of a .json list, "row 3" of a .parquet file.

    A first character "[" makes a list, whatever the file is called. `errors` is bytes.decode's, for bytes that are not
    UTF-8. Half a surrogate pair becomes "?". Raises UserError with the file and the place.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        lines = file.open("rb")  # in bytes only "\n" ends a line: JSON allows U+2028 inside a text
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    with lines:
        first = next(filter(None, (line.strip(BLANK) for line in lines)), b"")
        lines.seek(0)
        if first.startswith(b"["):
            kind, found = "record", enumerate(_parsed(lines.read(), f"{file}:", errors), 1)
        else:
            filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip(BLANK))
            kind, found = "line", ((n, _parsed(line, f"{file}: line {n}", errors)) for n, line in filled)
        for number, row in found:
            if not isinstance(row, dict):
                raise UserError(f"{file}: {kind} {number} is not a JSON object")
            yield row, f"{file}: {kind} {number}"


def _parquet_rows(file: Path) -> Iterator[tuple[dict, str]]:
    from pyarrow.parquet import ParquetFile  # here, as it is slow to import

    try:
        batches = (batch.to_pylist() for batch in ParquetFile(file).iter_batches(1000))
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield row, f"{file}: row {number}"
    except Exception as error:  # each kind of damage has its own
        raise UserError(f"{file}: is no readable .parquet file ({reason_of(error)})") from None


def _parsed(text: bytes, where: str, errors: str):
    """The JSON value of `text`, which stands at `where`."""
    try:
        value = json.loads(text.decode("utf-8-sig", errors))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if HALF.search(text):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def hub_rows(corpus: str, config: str | None) -> Iterator[tuple[dict, str]]:
    """(row, `corpus`) of a data set of the hub, as they come. Raises UserError."""
    from datasets import get_dataset_config_names, load_dataset  # here, as it is slow to import

    try:
        for row in load_dataset(corpus, config, split="train", streaming=True):
            yield row, corpus
    except Exception as error:  # the network, the name, the configuration: all the user's to fix
        why = reason_of(error)
        if isinstance(error, ValueError) and "config" in why.lower():  # none is given, or one that isn't there
            with suppress(Exception):
                names = get_dataset_config_names(corpus)
                some = ", ".join(get_close_matches(config or "en", names, 5, 0))
                why = f"set --corpus-config to one of its configurations ({len(names)} in all), such as {some}"
        raise UserError(f"--corpus {corpus}: no local file, and not to be had from the hub: {why}") from None
    finally:
        gc.collect()
        time.sleep(0.5)  # pyarrow still reads ahead in a thread, and a process that ends meanwhile aborts or hangs


def hub_revision(corpus: str) -> str | None:
    """The commit of a data set on the hub, if it can be had."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(corpus).sha
    except Exception:  # loading says what is wrong
        return None
