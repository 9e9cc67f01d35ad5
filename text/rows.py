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

BLANK = b" \t\r\n\xef\xbb\xbf"  # the last three bytes are the UTF-8 byte order mark
HALF = re.compile(rb"\\u[dD]")  # possibly half a surrogate pair, which JSON can hold and tokenizers reject


def read_rows(file: Path, errors: str = "strict") -> Iterator[tuple[dict, str]]:
    """Yields (record, "FILE: line 3") for a .jsonl file, "record 3" for a .json list, "row 3" for a .parquet file.

    A file that begins with "[" is a list, whatever its name. `errors` is that of bytes.decode, for bytes that are not
    UTF-8. Half a surrogate pair becomes "?". Raises UserError with the file and the place in it.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        lines = file.open("rb")  # in binary mode only "\n" ends a line: JSON strings may contain U+2028
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    with lines:
        first = next(filter(None, (line.strip(BLANK) for line in lines)), b"")
        lines.seek(0)
        if first == b"{":  # json.dump(..., indent=2)
            raise UserError(f"{file}: is one JSON object on many lines, not a list of records or one a line")
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
    except Exception as error:  # its type depends on the damage
        raise UserError(f"{file}: is not a readable .parquet file ({reason_of(error)})") from None


def _parsed(text: bytes, where: str, errors: str):
    """The JSON value of `text`; `where` is its place, for error messages."""
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
    """Yields (row, `corpus`) from a data set on the hub, streamed. Raises UserError."""
    from datasets import get_dataset_config_names, load_dataset  # here, as it is slow to import

    try:
        for row in load_dataset(corpus, config, split="train", streaming=True):
            yield row, corpus
    except Exception as error:  # the network, the name, the configuration: for the user to fix
        why = reason_of(error)
        if isinstance(error, ValueError) and "config" in why.lower():  # it is missing, or doesn't exist
            with suppress(Exception):
                names = get_dataset_config_names(corpus)
                some = ", ".join(get_close_matches(config or "en", names, 5, 0))
                why = f"set --corpus-config to one of its configurations ({len(names)} in all), such as {some}"
        raise UserError(f"--corpus {corpus}: no local file, and can't be loaded from the hub: {why}") from None
    finally:
        gc.collect()
        time.sleep(0.5)  # pyarrow still reads ahead in a thread; a process that ends too early aborts or hangs


def hub_revision(corpus: str) -> str | None:
    """The commit of a data set on the hub; None if it can't be fetched."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(corpus).sha
    except Exception:  # loading will report what is wrong
        return None
