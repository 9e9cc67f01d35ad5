"""text/corpus.py: passages from files of every format, and their entities."""

import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import spacy
from helpers import records, shared

from engine import files
from engine.errors import UserError
from text import corpus
from text.corpus import Passage, find_entities, load_passages, measure_ner, pipeline, spans, split_paragraphs

ROOT = Path(__file__).parents[2]


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
    assert [(p.title, p.text) for p in load_passages(str(tmp_path / "b.txt"))] == [("b", "First line.\nSecond line.")]


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
        ("empty.jsonl", b"", ["empty.jsonl", "no passage"]),
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


def test_other_fields_and_missing_titles(tmp_path, capsys):
    """Fields by any name; a passage without a title goes by its first words; what is left out is counted on stderr."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"name": "N", "body": "Body."}) + "\n")
    assert load_passages(str(file), text_field="body", title_field="name") == [Passage("N", "Body.")]
    assert load_passages(str(file), text_field="body")[0].title == "Body."
    with pytest.raises(UserError, match="no field 'heading'"):
        load_passages(str(file), text_field="body", title_field="heading")
    texts = ["Good.", " \n", None, "A [MASK].", "A [target]."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [p.text for p in load_passages(str(file))] == ["Good."]
    assert "2 empty, 2 with a literal [MASK] or [TARGET]" in capsys.readouterr().err
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {n} of a book." for n in range(5)))
    passages = load_passages(str(tmp_path / "book.txt"), passage_words=10)
    assert [p.text.count("Paragraph") for p in passages] == [2, 2, 1] and len({p.title for p in passages}) == 3


def test_real_articles_become_passages():
    """Whole Wikipedia articles: no word is lost, and only a long paragraph makes a long passage."""
    passages, words = load_passages(str(shared("wiki/articles.jsonl")), passage_words=200), Counter()
    for p in passages:
        words[p.title] += len(p.text.split())
    assert words == {row["title"]: len(row["text"].split()) for row in records("wiki/articles.jsonl")}
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


# ---- entities ------------------------------------------------------------------------------------------


def test_rules_find_titles_names_years_dates_and_numbers():
    """Known cases, and what must not be found: a sentence's first word, a trailing 's, a small word's title."""
    nlp = pipeline("rules", {"Ulm", "Cell (biology)", "the", "It"})
    text = "The physicist Albert Einstein's house in Ulm, built on 14 March 1879, had 1,200 books. It was Queen of "
    text += "Sheba's. A Cell is small."
    found = {e.text for e in nlp(text).ents}
    assert found == {"Albert Einstein", "Ulm", "14 March 1879", "1,200", "Queen of Sheba", "Cell"}


def test_a_missing_pipeline_says_how_to_get_it():
    """The install command and the way without one."""
    with pytest.raises(UserError, match="python -m spacy download en_no_such.*--ner rules"):
        pipeline("en_no_such")


def test_entities_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    """Same text: no second run of the pipeline. Other text: a run of its own."""

    def fresh(text):
        return [Passage("Ulm", text)]

    first = fresh("Ulm lies on the Danube since 854.")
    find_entities(first, "rules", tmp_path)
    monkeypatch.setattr("text.corpus.pipeline", lambda *a: pytest.fail("ran again"))
    again = fresh("Ulm lies on the Danube since 854.")
    find_entities(again, "rules", tmp_path)
    assert again[0].entities == first[0].entities != []
    with pytest.raises(pytest.fail.Exception):
        find_entities(fresh("Ulm lies elsewhere."), "rules", tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_found_again_after_a_stop(tmp_path, monkeypatch, workers):
    """By one process or several: entities as of one piece, and only a shard that is not there is made again."""
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))[:90]
    find_entities(passages, "rules", tmp_path / "whole")
    whole, made = [passage.entities for passage in passages], []
    monkeypatch.setattr(corpus, "SHARD", 40)
    monkeypatch.setattr(corpus, "PART", 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(workers))
    real = corpus.Finder.entities

    def counted(self, start, count):
        made.append((start, count))
        if made == [(0, 40), (40, 40)]:
            raise KeyboardInterrupt
        return real(self, start, count)

    monkeypatch.setattr(corpus.Finder, "entities", counted)
    with pytest.raises(KeyboardInterrupt):
        find_entities(passages, "rules", tmp_path / "shards")
    find_entities(passages, "rules", tmp_path / "shards")
    assert made == [(0, 40), (40, 40), (40, 40), (80, 10)]
    assert [passage.entities for passage in passages] == whole
    find_entities(passages, "rules", tmp_path / "shards")
    assert len(made) == 4


def test_a_worker_that_is_killed_is_a_line(tmp_path, monkeypatch):
    """As the system does where memory is short: an error, and not a wait for ever."""
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))[:90]
    monkeypatch.setattr(corpus, "SHARD", 40)
    monkeypatch.setattr(corpus, "PART", 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    monkeypatch.setattr(corpus.Finder, "part", lambda self, start: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="was killed; is the memory full"):
        find_entities(passages, "rules", tmp_path)


def test_other_processes_wait_for_the_file_and_not_in_a_collective(tmp_path, monkeypatch):
    """A process of another rank reads what the first writes, when it is there, and makes nothing itself."""
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))[:20]
    find_entities(passages, "rules", tmp_path / "first")
    found = [passage.entities for passage in passages]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    waits = []

    def sleep(seconds):
        """While it waits for the third time the file comes, whole at once as whole_file writes it."""
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copytree(tmp_path / "first", tmp_path / "copy")
            (tmp_path / "copy").rename(tmp_path / "shared")

    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(corpus, "Finder", None)
    for passage in passages:
        passage.entities = []
    find_entities(passages, "rules", tmp_path / "shared")
    assert [passage.entities for passage in passages] == found and waits == [0.5] * 3


@pytest.mark.parametrize(
    "text, entities",
    [
        ("The president of France met Ada Lovelace's mother.", ["France", "Ada Lovelace"]),
        ("However, he lived in New York City until 10 May 1843.", ["New York City", "10 May 1843"]),
        ("It cost 1,234.5 dollars in the 1990s, on March 3, 1998.", ["1,234.5", "1990s", "March 3, 1998"]),
        ("The University of Oxford and the Battle of the Somme.", ["University of Oxford", "Battle of the Somme"]),
        (
            "Ludwig van Beethoven knew J. K. Rowling and the U.S. Army.",
            ["Ludwig van Beethoven", "J. K. Rowling", "U.S. Army"],
        ),
        ("World War I began in August 1914.", ["World War I", "August 1914"]),
        ("He saw the River and the Mask in US papers.", []),
        ("Dogs bark. Cats do not. In Paris they do.", ["Paris"]),
        ("\u00c9mile Zola wrote in \u00cele-de-France.", ["\u00c9mile Zola", "\u00cele-de-France"]),
    ],
)
def test_what_the_rules_leave_to_mask(text, entities):
    """Names, dates, numbers; no article, no possessive, no word that merely begins a sentence, no ordinary word."""
    doc = pipeline("rules")(text)
    assert [text[start:end] for start, end, _ in spans(doc, {"river", "mask", "target"})] == entities


def test_an_installed_pipeline_is_used(tmp_path):
    """Any spaCy pipeline that sets entities: here a ruler loaded from a folder.

    The article and 's go; so do small letters, stop words and what masking would not find again.
    """
    nlp = spacy.blank("en")
    names = ("the Blue Danube's", "a river", "It", "10", "Ulm")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "X", "pattern": name} for name in names])
    nlp.to_disk(tmp_path / "pipeline")
    # spaCy's tokens are 10 and km, Ulm and \u2122; in NFKC, by which masking goes, that is UlmTM.
    passages = [Passage("x", "He saw the Blue Danube's water, a river in Ulm\u2122. It is 10km off.")]
    find_entities(passages, str(tmp_path / "pipeline"), tmp_path / "cache")
    assert [passages[0].text[s:e] for s, e in passages[0].entities] == ["Blue Danube"]


def test_text_without_entities_is_refused(tmp_path):
    """The error says so, and no cache is left behind."""
    with pytest.raises(UserError, match="no entity"):
        find_entities([Passage("a", "nothing here is a name")], "rules", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_rules_on_labelled_text(monkeypatch, capsys):
    """Exact spans on 3,000 WikiNEuRal sentences, by the command that docs/results-real.md quotes."""
    file = str(shared("ner/wikineural_3000.jsonl"))
    monkeypatch.setattr(sys, "argv", ["python -m text.corpus", "--measure-ner", file, "--ner", "rules"])
    monkeypatch.delitem(sys.modules, "text.corpus")  # as in a new process
    runpy.run_module("text.corpus", run_name="__main__")
    said = capsys.readouterr().out
    precision, recall = map(float, re.search(r"precision (0\.\d+), recall (0\.\d+)", said).groups())
    assert precision > 0.8 and recall > 0.8


@pytest.mark.parametrize(
    "text", [None, "", "no JSON", '{"text": "Ulm"}', "[]", '["Ulm"]', '{"text": "Ulm", "entities": [[0, 3]]}']
)
def test_a_bad_label_file_is_one_line(tmp_path, text):
    """Missing, empty, not JSON, or without the fields: named, with the reason."""
    file = tmp_path / "labels.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"--measure-ner {file}: "):
        measure_ner(file, "rules")
