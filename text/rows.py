"""The records of a .json, .jsonl or .parquet file, one by one, each with the place where it stands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError

BLANK = b" \t\r\n\xef\xbb\xbf"  # the last three bytes are a mark that some programs begin a file with
HALF = re.compile(rb"\\u[dD]")  # maybe of a surrogate pair, which JSON can spell and no tokenizer takes


def read_rows(file: Path, errors: str = "strict") -> Iterator[tuple[dict, str]]:
    """(record, "FILE: line 3") of a .jsonl file, "record 3" of a .json list, "row 3" of a .parquet file.

    A first character "[" makes a list, whatever the file is called. `errors` is bytes.decode's, for bytes that are not
    UTF-8. Half a surrogate pair becomes "?". Raises UserError with the file and the place.
    """
    if file.suffix == ".parquet":
        from text.formats import parquet_rows  # here, as it is slow to import

        yield from parquet_rows(file)
        return
    for row, where in _json_rows(file, errors):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        yield row, where


def _json_rows(file: Path, errors: str) -> Iterator[tuple[dict, str]]:
    try:
        lines = file.open("rb")  # in bytes only "\n" ends a line: JSON allows U+2028 inside a text
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    with lines:
        first = next(filter(None, (line.strip(BLANK) for line in lines)), b"")
        lines.seek(0)
        if first[:1] == b"[":
            for number, record in enumerate(_parsed(lines.read(), f"{file}:", errors), 1):
                yield record, f"{file}: record {number}"
            return
        for number, line in enumerate(lines, 1):
            if line.strip(BLANK):
                yield _parsed(line, f"{file}: line {number}", errors), f"{file}: line {number}"


def _parsed(text: bytes, where: str, errors: str):
    """The JSON value of `text`, which stands at `where`."""
    try:
        value = json.loads(text.removeprefix(b"\xef\xbb\xbf").decode(errors=errors))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if HALF.search(text):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value
