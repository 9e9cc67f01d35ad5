"""text/corpus.py: passages from files of every format, and what is kept about each."""

import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from helpers import records, shared

from engine import files
from engine.errors import UserError
from text import corpus
from text.articles import without_references
from text.corpus import Passage, kept_by_passage, load_passages, split_paragraphs


def test_every_format_gives_the_same_passages(tmp_path):
    """jsonl, json, parquet, a folder of them and txt; literal masks and empty texts are left out."""
    rows = [{"title": f"T{n}", "text": f"Text number {n}."} for n in range(5)]
    rows += [{"title": "bad", "text": text} for text in ("has a [MASK]", "a [TARGET]", " ")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    expected = [(f"T{n}", f"Text number {n}.") for n in range(5)]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert [(p.title, p.text) for p in load_passages(str(tmp_path / name))] == expected, name
    assert [(p.title, p.text) for p in load_passages(str(tmp_path))] == expected * 3
    assert len(load_passages(str(tmp_path), max_passages=7)) == 7
    (tmp_path / "b.txt").write_text("First line.\n\nSecond line.\n")
    for name, code in (("b.txt", "utf-8"), ("B.TXT", "utf-8"), ("b.txt", "utf-16"), ("b.txt", "utf-8-sig")):
        (tmp_path / name).write_bytes("First line.\r\n\r\nSecond line.\r\n".encode(code))
        (passage,) = load_passages(str(tmp_path / name))
        assert (passage.title, passage.text) == (name[0], "First line.\nSecond line."), (name, code)


@pytest.mark.parametrize("bad", ['{"title": "B", "te', "[1, 2]", "plain"])
def test_a_malformed_line_is_named(tmp_path, bad):
    """The error tells the file and the number of the first bad line."""
    file = tmp_path / "x.jsonl"
    file.write_text('{"title": "A", "text": "Fine."}\n' * 3 + bad + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl: line 4 "):
        load_passages(str(file))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", None, ["missing.jsonl", "no such file"]),
        ("no/such/folder", None, ["no such file or folder"]),
        ("bytes.jsonl", b'{"text": "a"}\n\xff\xfe\n', ["bytes.jsonl: line 2"]),
        ("bad.json", b'[{"text": "a"},', ["bad.json"]),
        ("bad.parquet", b"not parquet", ["bad.parquet"]),
        ("empty.jsonl", b"", ["empty.jsonl", "no usable passage"]),
        ("field.jsonl", b'{"body": "a"}\n', ["field.jsonl", "'text'", "body"]),
        ("number.jsonl", b'{"text": 7}\n', ["number.jsonl", "int"]),
        ("a.csv", b"text\na\n", ["a.csv", ".parquet"]),
    ],
)
def test_a_corpus_that_cannot_be_read(tmp_path, capfd, name, content, words):
    """One line with the file and what is wrong with it, and nothing else on the terminal."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_passages(str(tmp_path / name))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message and capfd.readouterr().err == "", message


def test_a_hub_data_set_is_streamed(monkeypatch):
    """By its name and configuration; whatever goes wrong there is one line."""
    rows, asked = [{"title": "T", "text": "Body."}, {"title": None, "text": "More."}], []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or iter(rows))
    assert load_passages("owner/name", config="en") == [Passage("T", "Body."), Passage("More.", "More.")]
    assert asked == [(("owner/name", "en"), {"split": "train", "streaming": True})]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {}["no such\nconfiguration"])
    with pytest.raises(UserError, match="^--corpus owner/name: no local file, and can't be loaded from the hub: .*$"):
        load_passages("owner/name")


def test_other_fields_and_missing_titles(tmp_path, capsys, monkeypatch):
    """A text field of any name; without a title a passage goes by its first words; stderr says what is left out."""
    file = tmp_path / "a.jsonl"
    rows = [{"title": "N", "body": "Body."}, {"title": None, "body": "More."}, {"body": "Last."}, {"title": "Empty"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    titled = [Passage("N", "Body."), Passage("More.", "More."), Passage("Last.", "Last.")]
    assert load_passages(str(file), text_field="body") == titled and "1 empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="a.jsonl: line 1: no field 'heading', its fields are body, title; set --text"):
        load_passages(str(file), text_field="heading")
    texts = ["Good.", " \n", None, "A [MASK].", "A [target]."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [p.text for p in load_passages(str(file))] == ["Good."]
    assert "2 empty, 2 with a literal [MASK] or [TARGET]" in capsys.readouterr().err
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {n} of a book." for n in range(5)))
    monkeypatch.setattr(corpus, "PASSAGE_WORDS", 10)
    monkeypatch.setattr(corpus, "LEAST_WORDS", 1)
    passages = load_passages(str(tmp_path / "book.txt"))
    assert [p.text.count("Paragraph") for p in passages] == [2, 2, 1] and len({p.title for p in passages}) == 3


def test_real_articles_become_passages():
    """Whole articles: no word is lost before the references, and only a long paragraph makes a long passage."""
    left_out, words, expected = Counter(), Counter(), {}
    passages = load_passages(str(shared("wiki/articles.jsonl")), left_out=left_out)
    for p in passages:
        words[p.title] += len(p.text.split())
    for row in records("wiki/articles.jsonl"):
        ends = "See also|References|Notes|Sources|Bibliography|Further reading|External links"
        text = re.split(rf"\nSection::::(?:{ends})\.(?=\n|$)", row["text"])[0]
        expected[row["title"]] = len(text.split())
    apart = expected.keys() - words.keys()
    assert len(apart) == left_out["of a page that tells namesakes apart"] == 4
    lost = [expected[title] - words[title] for title in words if words[title] != expected[title]]
    assert all(0 < n < 15 for n in lost) and len(lost) == left_out["under 15 words"]
    for p in passages:
        assert len(p.text.split()) <= 225 or max(len(line.split()) for line in p.text.split("\n")) > 175
    assert 100 < np.median([len(p.text.split()) for p in passages]) <= 200


def test_a_heading_is_never_a_passage_of_its_own():
    """A short line stays with the long paragraph after it, though together they are over the size."""
    long = " ".join(["word"] * 79)
    pieces = split_paragraphs(f"History\n{long}\n\nLater years\n{long}", 80)
    assert pieces == [f"History\n{long}", f"Later years\n{long}"]


def test_long_articles_are_split_at_paragraph_ends_only():
    """Property: pieces hold the paragraphs in order, none is cut, and only a single paragraph exceeds the size."""
    rng = random.Random(0)
    for _ in range(100):
        paragraphs = [" ".join(["w"] * rng.randrange(1, 60)) + f" {n}" for n in range(rng.randrange(1, 12))]
        pieces = split_paragraphs("\n\n".join(paragraphs), 80)
        assert [p for piece in pieces for p in piece.split("\n")] == paragraphs
        assert all(len(piece.split()) <= 80 or "\n" not in piece for piece in pieces)


LONG = "Ulm is a city on the Danube in the south of Germany, and has the tallest church of all."


@pytest.mark.parametrize(
    "heading, ends",
    [
        ("See also", True), ("== References ==", True), ("## Bibliography", True), ("FURTHER READING ", True),
        ("Notes and references", True), ("7. External links", True), ("Sources, notes", True), ("Citations:", True),
        ("Section::::Works cited.", True), ("See also: Neu-Ulm", False), ("References in popular culture", False),
        ("Sources of the Danube", False), ("Notes", True), ("Notable people", False), ("Footnotes", True),
        ("His notes", False), ("External links are few.", False), ("Seen also", False), ("Resources", False),
    ],
)
def test_an_article_ends_where_its_text_ends(heading, ends):
    """At a line that is such a heading, and no other; on a text's first line it is its title."""
    kept = f"{LONG}\nIt is old."
    assert without_references(f"{LONG}\n\nIt is old.\n\n{heading}\n\nMore.") == (
        kept if ends else f"{kept}\n{heading.strip()}\nMore."
    )
    assert without_references(f"\n{heading}\n{LONG}") == f"{heading.strip()}\n{LONG}"


@pytest.mark.parametrize(
    "title, text, listed",
    [
        ("Ulm", "Ulm may refer to:\n\nUlm, a city", True), ("Ulm", "Ulm\nUlm can also refer to:\nA town", True),
        ("Ulm", "Ulm is a city.\nUlm might refer to several places:\nA town", True),
        ("Ulm (disambiguation)", LONG, True),
        ("A", "a may\u00a0refer to the following people: ", True), ("A", "A, a or AA could commonly refer to:", True),
        ("Ulm", "Ulm may refer to a city.", False), ("Ulm", f"{LONG} The name may refer to: elms.", False),
        ("Ulm", f"{LONG}\n{LONG}\n{LONG}\nUlm may refer to:", False), ("Refer", "He had to refer to:", False),
        ("Disambiguation", LONG, False), ("Ulm", "It refers to:", False),
    ],
)
def test_a_page_that_tells_namesakes_apart_is_left_out(tmp_path, title, text, listed):
    """It is a list of names, and no text; other uses of its words stay."""
    file, left_out = tmp_path / "a.jsonl", Counter()
    file.write_text("".join(json.dumps({"title": t, "text": x}) + "\n" for t, x in [(title, text), ("T", LONG)]))
    assert [p.title for p in load_passages(str(file), left_out=left_out)] == ([] if listed else [title]) + ["T"]
    assert left_out.total() == listed


def test_short_pieces_are_left_out_of_longer_texts_only(tmp_path, capsys):
    """Where an article was split or ended early; a short text that is whole is somebody's own passage."""
    file, left_out = tmp_path / "a.jsonl", Counter()
    long = " ".join(["word"] * 198) + "."
    texts = ["A village.", "A village.\n\nReferences\n\nVillages", f"{long}\nThe end came soon.", f"{LONG}\nNotes\nOne"]
    texts.append("乌尔姆是德国的一座城市。\nReferences\nOne")  # no word of it is short
    file.write_text("".join(json.dumps({"title": "T", "text": text}) + "\n" for text in texts))
    found = [p.text for p in load_passages(str(file), left_out=left_out)]
    assert found == ["A village.", long, LONG, "乌尔姆是德国的一座城市。"] and left_out["under 15 words"] == 2
    assert "2 under 15 words" in capsys.readouterr().err


def test_a_heading_goes_with_its_section():
    """Short lines that no full stop ends, at a piece's end; a sentence, in quotes too, and a long line stay."""
    body, more = " ".join(["w"] * 60) + ".", " ".join(["v"] * 60) + "."
    assert split_paragraphs(f"{body}\nHistory\nEarly years\n{more}", 80) == [body, f"History\nEarly years\n{more}"]
    for last in ('He said "Ulm."', "Is it Ulm?", "这是乌尔姆。", " ".join(["long"] * 11)):
        assert split_paragraphs(f"{body}\n{last}\n{more}", 80) == [f"{body}\n{last}", more]
    assert split_paragraphs(f"{body}\nGallery", 80) == [f"{body}\nGallery"]  # nothing follows that it could go to


def test_the_name_of_a_title():
    """As it stands in running text: without what tells it from its namesakes."""
    titles = {"Cell (biology)": "Cell", "Ulm": "Ulm", "(What) a Day": "(What) a Day", "A (b) (c)": "A (b)"}
    assert {title: Passage(title, "").name for title in titles} == titles


# ---- what is kept ----------------------------------------------------------------------------------------

NUMBERS = [[n] for n in range(23)]


@pytest.fixture
def passages(monkeypatch):
    """Twenty-three passages, of which a shard holds ten and a block two, on a machine of two cores."""
    monkeypatch.setattr(corpus, "SHARD", 10)
    monkeypatch.setattr(corpus, "BLOCK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    return [Passage(f"T{n}", f"Text {n}") for n in range(23)]


def numbers(texts: list[str], log: Path, stop: int = -1) -> list[list[int]]:
    """[n] for passage n. Writes to `log` which passages it saw; is killed by the system when it sees passage `stop`."""
    found = [int(text.split()[1]) for text in texts]
    if stop in found:
        os.kill(os.getpid(), signal.SIGKILL)
    with log.open("a") as file:
        file.write("".join(f"{n} " for n in found))
    return [[n] for n in found]


def test_without_a_list_of_cores(passages, tmp_path, monkeypatch):
    """macOS has no os.sched_getaffinity."""
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert kept(passages, tmp_path, partial(numbers, log=tmp_path / "log")) == NUMBERS


def kept(passages, folder, find, settings=("a", 1)) -> list:
    return list(kept_by_passage("numbers", passages, settings, folder, lambda: find))


def seen(log: Path) -> list[int]:
    """The passages that were looked at since this was asked last."""
    found = sorted(map(int, log.read_text().split())) if log.exists() else []
    log.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("few", [1, 100])
def test_what_was_found_is_kept(passages, tmp_path, monkeypatch, few):
    """By one process or two. The second time nothing is found again; for other texts, titles and settings it is."""
    monkeypatch.setattr(corpus, "FEW", few)
    folder, log = tmp_path / "cache", tmp_path / "log"
    find = partial(numbers, log=log)
    assert kept(passages, folder, find) == NUMBERS and seen(log) == list(range(23))
    assert kept(passages, folder, find) == NUMBERS and seen(log) == []
    (shards,) = folder.iterdir()
    assert shards.name.startswith("numbers-")
    assert sorted(file.name for file in shards.iterdir()) == [f"{start:09}.json" for start in (0, 10, 20)]
    other_text, other_title = Passage("T22", "Text 23"), Passage("T", "Text 22")
    for others, settings in [
        ([*passages[:-1], other_text], ("a", 1)), ([*passages[:-1], other_title], ("a", 1)), (passages, ("a", 2)),
    ]:
        kept(others, folder, find, settings)
        assert len(seen(log)) == 23


@pytest.mark.parametrize("missing, again", [((1, 2), range(10, 23)), ((0, 2), [*range(10), 20, 21, 22])])
def test_only_shards_that_are_missing_are_made_again(passages, tmp_path, missing, again):
    """Behind the others, as after a stop, or between them."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    find = partial(numbers, log=log)
    kept(passages, folder, find)
    seen(log)
    for shard in missing:
        next(folder.rglob(f"{10 * shard:09}.json")).unlink()
    assert kept(passages, folder, find) == NUMBERS and seen(log) == list(again)


def test_a_process_that_is_killed_is_a_line_and_what_was_done_is_kept(passages, tmp_path, monkeypatch):
    """As the system does where memory is short: an error, and not a wait for ever; the same call resumes."""
    monkeypatch.setattr(corpus, "FEW", 1)
    folder, log = tmp_path / "cache", tmp_path / "log"
    with pytest.raises(UserError, match="numbers: a process was killed; is the memory full"):
        kept(passages, folder, partial(numbers, log=log, stop=15))
    seen(log)
    assert kept(passages, folder, partial(numbers, log=log)) == NUMBERS and seen(log) == list(range(10, 23))


def test_other_processes_wait_for_the_files_and_not_in_a_collective(passages, tmp_path, monkeypatch):
    """A process of another rank reads what the first writes, when it is there, and finds nothing itself."""
    kept(passages, tmp_path / "first", partial(numbers, log=tmp_path / "log"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    waits = []

    def sleep(seconds):
        """While it waits for the third time the files come, each whole at once as replace_text writes them."""
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copytree(tmp_path / "first", tmp_path / "copy")
            (tmp_path / "copy").rename(tmp_path / "shared")

    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=sleep))
    assert kept(passages, tmp_path / "shared", None) == NUMBERS and waits == [0.5] * 3
