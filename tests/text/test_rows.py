"""text/rows.py: records of every format with their places, and what is wrong with the others."""

import json

import datasets
import pytest

from engine.errors import UserError
from text.rows import read_rows

ROWS = [{"text": "Ulm", "n": 1}, {"text": "line\u2028end", "n": 2}, {"text": "\N{GRINNING FACE}", "n": 3}]


def test_every_format_gives_the_same_rows_and_their_places(tmp_path):
    """Lines, a list and parquet; the first character tells a list, not the name; byte order marks and blank lines."""
    lines = "\ufeff" + "\r\n\n \t\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    whole = "\ufeff\n " + json.dumps(ROWS, indent=1)
    by_line, by_record = ["line 1", "line 4", "line 7"], ["record 1", "record 2", "record 3"]
    for name, text, places in [
        ("a.jsonl", lines, by_line), ("lines.json", lines, by_line), ("a.json", whole, by_record),
        ("list.jsonl", whole, by_record),
    ]:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8", newline="")
        assert list(read_rows(file)) == [(row, f"{file}: {place}") for row, place in zip(ROWS, places, strict=True)]
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    assert list(read_rows(file)) == [(row, f"{file}: row {n}") for n, row in enumerate(ROWS, 1)]
    file = tmp_path / "empty.jsonl"
    file.write_text("\n")
    assert list(read_rows(file)) == []


def test_a_long_parquet_file_is_read_in_order(tmp_path):
    """It is read a batch at a time; the rows are numbered through, and lists and records inside them are Python's."""
    rows = [{"n": n, "inside": {"list": [str(n)]}, "none": None} for n in range(2500)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"), batch_size=700)
    found = list(read_rows(tmp_path / "a.parquet"))
    assert found == [(row, f"{tmp_path / 'a.parquet'}: row {n}") for n, row in enumerate(rows, 1)]


def test_rows_come_one_by_one(tmp_path):
    """What is good is given before what is bad is met."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n{"n": 2}\n{oops\n')
    rows = read_rows(file)
    assert [next(rows)[0]["n"], next(rows)[0]["n"]] == [1, 2]
    with pytest.raises(UserError, match="a.jsonl: line 3 is not JSON"):
        next(rows)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", None, r"a.jsonl: can't be read \(No such file"),
        ("a.jsonl", b'{"n": 1}\n{"n": "\xff"}\n', r"a.jsonl: line 2 is not UTF-8 text \(byte 7\)"),
        ("a.json", b'[{"n": 1}, ', "a.json: is not JSON"),
        ("a.json", b"[" * 100_000, "a.json: is not JSON"),
        ("a.json", b'[{"n": 1}, 2]', "a.json: record 2 is not a JSON object"),
        ("a.jsonl", b'{"n": 1}\n\n"text"\n', "a.jsonl: line 3 is not a JSON object"),
        ("a.parquet", b"PAR1 no", "a.parquet: is not a readable .parquet file"),
        ("a.parquet", None, "a.parquet: is not a readable .parquet file"),
    ],
)
def test_a_bad_file_is_one_line_with_the_place(tmp_path, name, content, message):
    """Missing, not UTF-8, not JSON, too deep, no object, no parquet: the file, the place and what is wrong."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf_8_can_be_replaced(tmp_path):
    """With errors="replace", as bytes.decode has it."""
    (tmp_path / "a.jsonl").write_bytes(b'{"n": "Z\xfcrich"}\n')
    assert [row for row, _ in read_rows(tmp_path / "a.jsonl", errors="replace")] == [{"n": "Z\ufffdrich"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path, name):
    """In values and in names; a whole pair stays what it is, and all that comes out can be encoded."""
    record = '{"a\\uDC00": "\\ud83d \\ud83d\\ude00 \\uD83D", "b": ["\\udfff"]}'
    (tmp_path / name).write_text(f"[{record}]" if name == "a.json" else record)
    assert [row for row, _ in read_rows(tmp_path / name)] == [{"a?": "? \N{GRINNING FACE} ?", "b": ["?"]}]
