"""masking.py: corpora, entities, masking, chunks, recall targets."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from masking import (
    MASK, TARGET, Corpus, Passage, UserError, cut_chunks, draw_recall, find_entities, load_passages, mask, mask_spans,
    name_words, occurrences, pipeline, split_paragraphs,
)  # fmt: skip
from rewards import normalize

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
TOKENIZERS = ["qwen3-4b-instruct-2507", "qwen2.5-instruct", "smollm2-instruct"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    if not SHARED.exists():
        pytest.skip("needs the shared data, which is not here")
    passages = load_passages(str(SHARED / "wiki/passages.jsonl"))
    find_entities(passages, "rules", tmp_path_factory.mktemp("entities"))
    return passages


# ---- what counts as an occurrence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, entity, masked",
    [
        ("Ada's son, ada, and Adam.", "Ada", "[MASK]'s son, [MASK], and Adam."),
        ("Ada\u2019s", "Ada", "[MASK]\u2019s"),
        ("5 of 5.2, 1,5 and 15; 5, 5.", "5", "[MASK] of 5.2, 1,5 and 15; [MASK], [MASK]."),
        ("the U.S. and C++ but not C+", "U.S.", "the [MASK] and C++ but not C+"),
        ("the U.S. and C++ but not C+", "C++", "the U.S. and [MASK] but not C+"),
        ("Ada  Lovelace, Ada\nLovelace", "Ada Lovelace", "[MASK], [MASK]"),
        ("Cafe\u0301 Noir and CAF\u00c9 NOIR", "Caf\u00e9 Noir", "[MASK] and [MASK]"),
        ("\ufb01nland or \uff26inland", "Finland", "[MASK] or [MASK]"),
        ("\uff11\uff18\uff17\uff19 and 1879", "1879", "[MASK] and [MASK]"),
        ("Stra\u00dfe, STRASSE", "Stra\u00dfe", "[MASK], [MASK]"),
        ("nothing", "Ada", "nothing"),
    ],
)
def test_mask(text, entity, masked):
    """Every form goes, whatever its case, Unicode form and white space; whole words only; 5 is not in 5.2."""
    assert mask(text, entity) == masked


def test_occurrences_against_a_brute_force_scan():
    """Random ASCII strings: the same spans as trying every position by hand."""
    rng = random.Random(0)

    def word(c):
        return c.isalnum() or c == "_"

    def slow(text, entity):
        spans, n, low = [], 0, text.lower()
        while n < len(text):
            end = n + len(entity)
            fits = low[n:end] == entity.lower()
            fits = fits and not (n and word(text[n - 1])) and not (end < len(text) and word(text[end]))
            if fits and entity[0].isdigit():
                fits = not (n > 1 and text[n - 1] in ".," and text[n - 2].isdigit())
            if fits and entity[-1].isdigit():
                fits = not (end + 1 < len(text) and text[end] in ".," and text[end + 1].isdigit())
            if fits:
                spans.append((n, end))
                n = end
            else:
                n += 1
        return spans

    found = 0
    for _ in range(4000):
        text = "".join(rng.choice("aAb1.,'+ ") for _ in range(rng.randrange(25)))
        entity = rng.choice(["a", "1", "ab", "1.1", "b+", "a'b", "a1"])
        assert occurrences(text, entity) == slow(text, entity), (text, entity)
        found += bool(slow(text, entity))
    assert found > 500


def test_spans_move_with_the_mask():
    """Spans that survive still cover the same text; those that the mask touches are gone; token places are right."""
    rng = random.Random(1)
    words = ["Ada", "Byron", "met", "Ulm", "1879", "in"]
    for _ in range(300):
        parts = rng.choices(words, k=12)
        text = " ".join(parts)
        starts = [len(" ".join(parts[:n])) + bool(n) for n in range(12)]
        spans = [(s, s + len(w)) for s, w in zip(starts, parts) if w in ("Ada", "Ulm", "1879")]
        masked, moved, places = mask_spans(text, spans, "Ada", MASK)
        assert masked == " ".join(MASK if w == "Ada" else w for w in parts)
        assert [masked[s:e] for s, e in moved] == [w for w in parts if w in ("Ulm", "1879")]
        assert [masked[s:e] for s, e in places] == [MASK] * parts.count("Ada")


def test_name_words():
    """The words that would give a name away: capitalised, four letters or more."""
    assert name_words("Ada King of Lovelace") == ["King", "Lovelace"] and name_words("1879") == []


# ---- corpora -------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_passages(tmp_path):
    """jsonl, json, parquet, a folder of them and txt; literal masks and empty texts are left out."""
    rows = [{"title": f"T{n}", "text": f"Text number {n}."} for n in range(5)]
    rows += [{"title": "bad", "text": "has a [MASK]"}, {"title": "bad", "text": "a [TARGET]"}, {"title": "none", "text": " "}]
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
    text = "The physicist Albert Einstein's house in Ulm, built on 14 March 1879, had 1,200 books. It was Queen of Sheba's. A Cell is small."
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
    monkeypatch.setattr("masking.pipeline", lambda *a: pytest.fail("ran again"))
    again = fresh("Ulm lies on the Danube since 854.")
    find_entities(again, "rules", tmp_path)
    assert again[0].entities == first[0].entities != []
    with pytest.raises(pytest.fail.Exception):
        find_entities(fresh("Ulm lies elsewhere."), "rules", tmp_path)


# ---- chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOKENIZERS, "tiny"])
def test_chunks_join_to_the_text_and_keep_to_their_limit(name, tokenizer):
    """Random mixtures of scripts, masks and entities: joined they are the text, none is too long, no span is cut."""
    if name != "tiny":
        if not SHARED.exists():
            pytest.skip("needs the shared tokenizers, which are not here")
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    rng = random.Random(name)
    words = ["Ada", "Lovelace", "met", MASK, "\u4e2d\u6587\u5b57", "na\u00efve", "e\u0301t\u00e9", "\U0001f469\u200d\U0001f52c", "1,234.5", "\u0645\u0631\u062d\u0628\u0627", "supercalifragilistic", ".", "\n\n"]  # fmt: skip
    for _ in range(40):
        parts = rng.choices(words, k=rng.randrange(1, 200))
        text, keep = "", []
        for part in parts:
            text += rng.choice(["", " "])
            if part in (MASK, "Lovelace", "1,234.5"):
                keep.append((len(text), len(text) + len(part)))
            text += part
        limit = rng.randrange(24, 80)
        chunks = cut_chunks(text, keep, tokenizer, limit)
        assert "".join(chunks) == text and all(chunks)
        assert all(len(tokenizer(c, add_special_tokens=False)["input_ids"]) <= limit for c in chunks)
        cuts = np.cumsum([len(c) for c in chunks])[:-1].tolist()
        assert not any(s < cut < e for cut in cuts for s, e in keep)
        assert not any(unicodedata.combining(text[cut]) or "\u200d" in text[cut - 1 : cut + 1] for cut in cuts)


def test_chunks_prefer_the_ends_of_sentences(tokenizer):
    """Plain sentences are not cut in the middle."""
    text = "Paris lies in France. The language of Paris is French. " * 12
    chunks = cut_chunks(text, [], tokenizer, 40)
    assert len(chunks) > 2 and all(c.rstrip().endswith(".") for c in chunks)


# ---- documents -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_passages(tmp_path_factory):
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))
    find_entities(passages, "rules", tmp_path_factory.mktemp("entities"))
    return passages


def still_there(text: str, answer: str) -> bool:
    """An independent scan for `answer`: split into words and compare runs of them."""
    def words(t):
        t = unicodedata.normalize("NFKC", t).casefold()
        return "".join(c if c.isalnum() or c in "_" else " " for c in t).split()

    haystack, needle = words(text), words(answer)
    return any(haystack[n : n + len(needle)] == needle for n in range(len(haystack))) if needle else False


def check(document, corpus, tokenizer, limit):
    text = "".join(document.chunks)
    (answer,) = document.answers
    assert MASK in text and normalize(answer)
    if not any(c.isdigit() for c in answer):  # 5 may stand in 5.2
        assert not still_there(text, answer), (answer, text)
    for word in name_words(answer):
        assert not still_there(text, word)
    assert all(len(tokenizer(c, add_special_tokens=False)["input_ids"]) <= limit for c in document.chunks)
    for chunk, entities in zip(document.chunks, document.recall, strict=True):
        assert all(occurrences(chunk, e) and MASK not in e and normalize(e) != normalize(answer) for e in entities)
    return text


def test_95_percent_of_real_documents_can_be_built_and_y_is_nowhere_left(wiki):
    """500 documents of real Wikipedia passages with rules."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / TOKENIZERS[0])
    corpus = Corpus(wiki, tokenizer, seed=0, chunk_tokens=512, n_chunks=4, n_related=3)
    built = 0
    for i in range(500):
        try:
            document = corpus.document(i)
        except UserError:
            continue
        assert len(document.chunks) == 4
        check(document, corpus, tokenizer, 512)
        built += 1
    assert built >= 475


def test_tiny_documents_at_every_length(tiny_passages, tokenizer):
    """Exactly the asked number of chunks, from half to eight times the trained length."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    for chunks in (2, 4, 8, 16, 32):
        for i in range(5):
            document = corpus.document(i, "heldout", chunks=chunks)
            assert len(document.chunks) == chunks
            check(document, corpus, tokenizer, 64)


def test_a_document_of_n_passages_holds_the_pivot_its_relatives_and_the_rest(tiny_passages, tokenizer):
    """N passages, all different, one of the pivot's versions, the related ones among them."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_passages=12, n_related=3)
    for i in range(20):
        document = corpus.document(i)
        parts = "".join(document.chunks).split("\n\n")
        assert len(parts) == 12
        sources = []
        for part in parts:
            sources.append({p.title for p in tiny_passages if mask(p.text, document.answers[0]) == part})
        assert all(sources) and sum(document.title in titles for titles in sources) == 1


def test_held_out_titles_are_never_masked_in_training(tiny_passages, tokenizer):
    """In train a held-out title is no pivot, no answer and no recall target; in heldout every pivot is one."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    held = {normalize(t) for t in corpus.heldout}
    assert 0.1 < len(held) / len(corpus.same_title) < 0.3
    for i in range(150):
        document = corpus.document(i)
        targets = {normalize(e) for entities in document.recall for e in entities}
        assert normalize(document.title) not in held and not held & {normalize(document.answers[0]), *targets}
        assert normalize(corpus.document(i, "heldout").title) in held


def test_documents_are_a_pure_function_of_seed_split_and_index(tiny_passages, tokenizer, tmp_path):
    """The same in any order and in another process with other string hashes; another seed gives others."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from masking import *; from pathlib import Path\n"
        "from transformers import AutoTokenizer; root = Path(sys.argv[1])\n"
        "p = load_passages(str(root / 'tiny/passages.jsonl')); find_entities(p, 'rules', Path(sys.argv[2]))\n"
        "c = Corpus(p, AutoTokenizer.from_pretrained(root / 'tiny/model'), seed=3, chunk_tokens=64, n_chunks=4, n_related=2)\n"
        "print(json.dumps([c.document(i).__dict__ for i in (5, 2, 9)]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    other = json.loads(run.stdout.splitlines()[-1])
    corpus = Corpus(tiny_passages, tokenizer, seed=3, chunk_tokens=64, n_chunks=4, n_related=2)
    assert [corpus.document(i).__dict__ for i in range(10)][2] == other[1]
    assert [corpus.document(i).__dict__ for i in (9, 5)] == [other[2], other[0]]
    assert Corpus(tiny_passages, tokenizer, seed=4, chunk_tokens=64, n_chunks=4, n_related=2).document(5).chunks != other[0]["chunks"]


def test_recall_draws(tiny_passages, tokenizer):
    """l is earlier than k, k is a memory, the target is gone from the section, every pair turns up, and none is invented."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    rng, pairs = np.random.default_rng(0), set()
    for i in range(60):
        document = corpus.document(i)
        for _ in range(10):
            draw = draw_recall(document, rng)
            pairs.add((draw.memory_step, draw.chunk))
            assert draw.entity in document.recall[draw.chunk - 1]
            assert TARGET in draw.section and not occurrences(draw.section, draw.entity)
            assert draw.section.replace(TARGET, "").count(MASK) == document.chunks[draw.chunk - 1].count(MASK)
    assert pairs == {(k, l) for k in (2, 3, 4) for l in range(1, k)}
    document.recall = [[], [], [], ["Ulm"]]  # only the last chunk has one: no later memory could hold it
    assert draw_recall(document, rng) is None


def test_leaky_documents_are_dropped_unless_kept(tokenizer):
    """A part of y's name elsewhere: drawn again and counted, or kept on demand."""
    texts = ["Ada Lovelace wrote notes in 1843.", "Lovelace is a town.", "Rome is old."]
    passages = [Passage(f"p{n}", t, [(0, 12)] if n == 0 else []) for n, t in enumerate(texts)]
    passages += [Passage(f"q{n}", f"The year {n + 100} passed.", [(9, 12)]) for n in range(20)]
    settings = dict(seed=0, chunk_tokens=64, n_passages=23, heldout=0.5)
    strict = Corpus(passages, tokenizer, **settings)
    strict.pivots["train"] = [0]
    with pytest.raises(UserError):
        strict.document(0)
    loose = Corpus(passages, tokenizer, **settings, keep_leaky=True)
    loose.pivots["train"] = [0]
    assert loose.document(0).answers == ["Ada Lovelace"]


def test_too_few_passages(tiny_passages, tokenizer):
    """More passages or chunks than there is text for is the user's mistake, and said so."""
    with pytest.raises(UserError, match="--passages 50"):
        Corpus(tiny_passages[:40], tokenizer, seed=0, chunk_tokens=64, n_passages=50)
    with pytest.raises(UserError, match="too few"):
        Corpus(tiny_passages[:60], tokenizer, seed=0, chunk_tokens=64, n_chunks=90).document(0)
