"""masking.py: corpora, entities, masking, chunks, recall targets."""

import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import spacy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from masking import (
    MASK, TARGET, Corpus, Document, Passage, UserError, akin, cut_chunks, draw_recall, find_entities, fold, is_heldout,
    load_passages, mask, mask_spans, name_words, occurrences, pipeline, spans, split_paragraphs,
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
        ("Paris, PARIS; Parisian", "Paris", "[MASK], [MASK]; Parisian"),
        ("the U.S. army, U.S.A.", "U.S.", "the [MASK] army, U.S.A."),
        ("in 1879, 1879.5 and 11,879 or 1,879; 5th", "1879", "in [MASK], 1879.5 and 11,879 or 1,879; 5th"),
        ("New York, New\u00a0York, Newyork", "New York", "[MASK], [MASK], Newyork"),
        ("Beyonce\u0301 and Beyonce", "Beyonce", "Beyonce\u0301 and [MASK]"),
        ("O\u2019Brien and O'Brien", "O'Brien", "[MASK] and [MASK]"),
        ("a \u00bd b", "1", "a [MASK] b"),  # NFKC writes one half with a 1; the character goes as a whole
        ("Ada_Lovelace Ada", "Ada", "Ada_Lovelace [MASK]"),
        ("The Mask wears a [MASK]", "Mask", "The [MASK] wears a [MASK]"),
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


def test_folding_is_unicodes_and_keeps_track():
    """The folded text is the whole text's NFKC and case folding; what lies between two origins folds by itself to its part."""
    rng = random.Random(1)
    alphabet = "aZ5 \u00e9\u2019\u2013e\u0301\u0327\ufb01\u00bd\u2163\u00df\u2460\uff21\uff19\u2026\u00a0\u1100\u1161\u11a8\uac00\u0130\u03a3\u03c2\u017f\u0344\u09c7\u09be\u0e33\ufdfa\u200d"
    for _ in range(5000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 9)))
        folded, origin = fold(text)
        whole = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        assert folded == whole.replace("\u2019", "'").replace("\u2013", "-"), ascii(text)
        origin = list(origin)
        assert len(origin) == len(folded) + 1 and origin == sorted(origin) and origin[-1] == len(text)
        for start in set(origin[:-1]):
            end = min(o for o in origin if o > start)
            assert fold(text[start:end])[0] == "".join(c for c, o in zip(folded, origin, strict=False) if o == start)


def test_kin():
    """Parts, initials and shared long words make two names akin; letters and short words in common do not."""
    for one, other in [
        ("Ada", "Ada Lovelace"), ("Lord Lovelace", "Ada Lovelace"), ("United States of America", "U.S.A."),
        ("UN", "United Nations"), ("1843", "10 May 1843"),
    ]:  # fmt: skip
        assert akin(one, other) and akin(other, one)
    for one, other in [("Ada", "Adam"), ("1843", "1844"), ("United Nations", "UK"), ("Bank of Ohio", "City of Rome")]:
        assert not akin(one, other) and not akin(other, one)


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


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", None, ["missing.jsonl", "no such file"]),
        ("no/such/folder", None, ["no such file or folder"]),
        ("bytes.jsonl", b'{"text": "a"}\n\xff\xfe\n', ["bytes.jsonl: line 2"]),
        ("bad.json", b'[{"text": "a"},', ["bad.json"]),
        ("bad.parquet", b"not parquet", ["bad.parquet"]),
        ("bytes.txt", b"\xff\xfe\xfa", ["bytes.txt"]),
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
    assert "2 empty passages and 2 that hold" in capsys.readouterr().err
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {n} of a book." for n in range(5)))
    passages = load_passages(str(tmp_path / "book.txt"), passage_words=10)
    assert [p.text.count("Paragraph") for p in passages] == [2, 2, 1] and len({p.title for p in passages}) == 3


def test_real_articles_become_passages():
    """Whole Wikipedia articles: no word is lost, and only a long paragraph makes a long passage."""
    file = SHARED / "wiki/articles.jsonl"
    if not file.exists():
        pytest.skip("needs the shared data, which is not here")
    passages, words = load_passages(str(file), passage_words=200), Counter()
    for p in passages:
        words[p.title] += len(p.text.split())
    assert words == {row["title"]: len(row["text"].split()) for row in map(json.loads, file.open())}
    for p in passages:
        assert len(p.text.split()) <= 225 or max(len(line.split()) for line in p.text.split("\n")) > 175
    assert 100 < np.median([len(p.text.split()) for p in passages]) <= 200


def test_a_heading_is_never_a_passage_of_its_own():
    """A short line stays with the long paragraph after it, though together they are over the size."""
    long = " ".join(["word"] * 79)
    assert split_paragraphs(f"History\n{long}\n\nLater years\n{long}", 80) == [f"History\n{long}", f"Later years\n{long}"]


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


@pytest.mark.parametrize(
    "text, entities",
    [
        ("The president of France met Ada Lovelace's mother.", ["France", "Ada Lovelace"]),
        ("However, he lived in New York City until 10 May 1843.", ["New York City", "10 May 1843"]),
        ("It cost 1,234.5 dollars in the 1990s, on March 3, 1998.", ["1,234.5", "1990s", "March 3, 1998"]),
        ("The University of Oxford and the Battle of the Somme.", ["University of Oxford", "Battle of the Somme"]),
        ("Ludwig van Beethoven knew J. K. Rowling and the U.S. Army.", ["Ludwig van Beethoven", "J. K. Rowling", "U.S. Army"]),
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
    """Any spaCy pipeline that sets entities: here a ruler loaded from a folder. The article and 's go; so do small letters, stop words
    and what masking would not find again."""
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "X", "pattern": p} for p in ("the Blue Danube's", "a river", "It", "10")])
    nlp.to_disk(tmp_path / "pipeline")
    passages = [Passage("x", "He saw the Blue Danube's water, a river in Ulm. It is 10km off.")]  # spaCy's tokens are 10 and km
    find_entities(passages, str(tmp_path / "pipeline"), tmp_path / "cache")
    assert [passages[0].text[s:e] for s, e in passages[0].entities] == ["Blue Danube"]


def test_text_without_entities_is_refused(tmp_path):
    """The error says so, and no cache is left behind."""
    with pytest.raises(UserError, match="no entity"):
        find_entities([Passage("a", "nothing here is a name")], "rules", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_rules_on_labelled_text():
    """Exact spans on 3,000 WikiNEuRal sentences, by the command that README quotes."""
    file = SHARED / "ner/wikineural_3000.jsonl"
    if not file.exists():
        pytest.skip("needs the shared data, which is not here")
    command = [sys.executable, ROOT / "masking.py", "--measure-ner", file, "--ner", "rules"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    precision, recall = map(float, re.search(r"precision (0\.\d+), recall (0\.\d+)", done.stdout).groups())
    assert precision > 0.8 and recall > 0.8


# ---- chunks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE of 400 tokens: several tokens a word, and up to 18 an emoji."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([line for text in (random.__doc__, re.__doc__) for line in text.split("\n")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("name", [*TOKENIZERS, "bpe"])
def test_only_what_is_longer_than_a_chunk_is_cut(name, bpe):
    """Random texts, half of them with hardly a space. What a cut splits (a word, an entity) is longer than a chunk; masks
    and characters (accents, flags, joined emoji, line ends) are never split."""
    if name != "bpe" and not SHARED.exists():
        pytest.skip("needs the shared tokenizers, which are not here")
    tokenizer = bpe if name == "bpe" else AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    rng = random.Random(1)
    family, flags, thumb = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"
    words = ["Ada", "the", MASK, "1,843", "na\u00efve", "\u5317\u4eac\u5927\u5b66", "e\u0301a\u0308", "end.", "\u201cYes!\u201d", "\ufdfa"]
    words += [family, flags, thumb, "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0301x"]

    def size(part):
        return len(tokenizer(part, add_special_tokens=False)["input_ids"])

    for _ in range(40):
        gaps = rng.choice([[" ", " ", " ", "  ", "\n\n", "\r\n", ". "], [""] * 30 + [" ", "\r\n"]])
        pieces = [(rng.choice(words), rng.choice(gaps)) for _ in range(rng.randint(0, 120))]
        starts = [0, *np.cumsum([len(word) + len(gap) for word, gap in pieces]).tolist()]
        keep, n = [], 0
        while n + 3 < len(pieces):  # entities of one to three words
            last = n + rng.randint(0, 2)
            keep.append((starts[n], starts[last] + len(pieces[last][0])))
            n = last + rng.randint(1, 6)
        text, limit = "".join(word + gap for word, gap in pieces), rng.choice([16, 33, 64, 200])
        chunks = cut_chunks(text, keep, tokenizer, limit)
        assert "".join(chunks) == text and all(chunks) and all(size(chunk) <= limit for chunk in chunks)
        assert sum(chunk.count(MASK) for chunk in chunks) == text.count(MASK)
        cuts = np.cumsum([len(chunk) for chunk in chunks])[:-1].tolist()
        for start, end in keep:  # give or take the tokens that a cut's edges cost
            assert size(text[start:end]) > limit - 4 or not any(start < cut < end for cut in cuts), text[start:end]
        inside = {place for start, end in keep for place in range(start + 1, end)}
        clean = [0, *(m.end() for m in re.finditer("\\s(?=[^\\s\u0301])", text) if m.end() not in inside), len(text)]
        for cut in set(cuts) - set(clean):
            start, end = max(c for c in clean if c < cut), min(c for c in clean if c > cut)
            assert size(text[start:end]) > limit - 4, text[start:end]
        for cut in cuts if limit > 16 else []:  # a family is 18 bytes, and no longer fits
            assert unicodedata.category(text[cut])[0] != "M" and "\u200d" not in text[cut - 1 : cut + 1]
            assert text[cut - 1 : cut + 1] not in ("\r\n", flags[:2], flags[2:], thumb)


def test_chunks_end_with_paragraphs_and_sentences_and_are_filled(bpe):
    """In the last half of a chunk a sentence's end wins over a word's, a paragraph's over both; else chunks are full."""
    sentence = "The quick brown fox jumps over a lazy dog. "
    size = len(bpe(sentence)["input_ids"])
    assert set(cut_chunks(sentence * 40, [], bpe, 5 * size // 2)) == {sentence * 2}
    assert set(cut_chunks((sentence * 3 + "\n\n") * 10, [], bpe, 5 * size)) == {sentence * 3 + "\n\n"}
    assert all(len(bpe(chunk)["input_ids"]) > 55 for chunk in cut_chunks("word " * 500, [], bpe, 64)[:-1])


def test_an_entity_longer_than_a_chunk_is_cut_between_words(bpe):
    """It must be cut somewhere; the masks in it must not."""
    text = "alpha beta [MASK] gamma delta " * 20
    chunks = cut_chunks(text, [(0, len(text))], bpe, 24)
    assert "".join(chunks) == text and sum(c.count(MASK) for c in chunks) == 20 and all(c.endswith(" ") for c in chunks)


def test_a_long_document_is_cut_fast():
    """40,000 tokens of real text within two seconds on one core."""
    if not SHARED.exists():
        pytest.skip("needs the shared data, which is not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / TOKENIZERS[0])
    text = "\n\n".join(json.loads(line)["text"] for line in (SHARED / "wiki/passages.jsonl").open())[:180000]
    start = time.perf_counter()
    chunks = cut_chunks(text, [], tokenizer, 5120)
    assert time.perf_counter() - start < 2 and len(chunks) >= 7


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


def made_up(n_titles=40):
    """Passages about made-up people, three versions of each, every entity marked; a friend's name links two titles."""
    names, passages = [f"Person{n}x Surname{n}y" for n in range(n_titles)], []
    for n, name in enumerate(names):
        for v in range(3):
            friend = names[(n + 5 * v + 1) % n_titles]
            text = f"{name} lived in Town{n % 9}z. It was {1800 + n} then. In version {v + 500} {name}'s friend is {friend}."
            passages.append(Passage(name, text, [m.span() for m in re.finditer(MADE_UP, text)]))
    return passages


MADE_UP = r"Person\w+ Surname\w+|Town\dz|\b1\d\d\d|\b50\d\b"


def test_recall_lists_every_allowed_entity_of_each_chunk(bpe):
    """At several lengths: the chunks asked for, within their limit, and exactly the entities that a scan of the chunk finds,
    less y's kin and, in train, held-out titles."""
    corpus = Corpus(made_up(), bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=2)
    assert 2 <= len(corpus.heldout) <= 16
    answers = set()
    for i, split, length in [(i, s, c) for i in range(40) for s in ("train", "heldout") for c in (None, 1, 3, 8)]:
        document = corpus.document(i, split, length)
        answers |= set(document.answers) if split == "train" else set()
        assert len(document.chunks) == (length or 4) == len(document.recall)
        assert MASK in "".join(document.chunks) and document.answers[0] not in "".join(document.chunks)
        for chunk, names in zip(document.chunks, document.recall, strict=True):
            assert len(bpe(chunk)["input_ids"]) <= 160
            scanned = set(re.findall(MADE_UP, chunk)) - (corpus.heldout if split == "train" else set())
            assert sorted(names) == sorted(name for name in scanned if not akin(name, document.answers[0]))
    assert not answers & corpus.heldout and any("Surname" in answer for answer in answers)


def test_the_pivot_is_whole_and_related_passages_are_preferred(bpe):
    """The pivot stands unbroken but for its masks, no other version of it does, and its friends' passages turn up."""
    near = {}
    for related in (0, 2):
        corpus, near[related] = Corpus(made_up(), bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=related), 0
        for i in range(60):
            document = corpus.document(i)
            there = {p.text: p.title for p in corpus.passages if mask(p.text, document.answers[0]) in "".join(document.chunks)}
            (pivot,) = [text for text, title in there.items() if title == document.title]
            names = set(re.findall(r"Surname\d+y", pivot))
            near[related] += sum(bool(names & set(re.findall(r"Surname\d+y", text))) for text in there if text != pivot)
    assert near[2] > 3 * near[0]


def test_a_document_is_the_same_at_every_length_but_for_its_length(bpe):
    """The draws do not depend on the number of chunks: the same pivot and answer, so lengths can be compared."""
    corpus = Corpus(made_up(), bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=2)
    for i in range(20):
        seen = {(d.title, *d.answers) for d in (corpus.document(i, "heldout", chunks) for chunks in (2, 4, 8))}
        assert len(seen) == 1


def test_by_number_of_passages_and_at_most_so_many_chunks(bpe):
    """N passages; cut to max_chunks without losing the pivot, wherever it stands, and its entities still in their chunks."""
    passages, places = made_up(), []
    whole = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=12, n_related=3)
    short = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=12, n_related=3, max_chunks=5)
    for i in range(40):
        document, cut = whole.document(i), short.document(i)
        text = "".join(document.chunks)
        assert text.count("\n\n") == 11 and len(document.chunks) > 5 == len(cut.chunks) and cut.redraws == 0
        assert all(name in chunk for chunk, names in zip(cut.chunks, cut.recall, strict=True) for name in names)
        versions = [mask(p.text, cut.answers[0]) for p in passages if p.title == cut.title]
        assert any(version in "".join(cut.chunks) for version in versions)
        places.append(max(text.find(version) for version in versions) / len(text))
        assert len(whole.document(i, chunks=7).chunks) == 7
    assert min(places) < 0.15 and max(places) > 0.75 and 0.3 < np.mean(places) < 0.6


def test_the_held_out_share():
    """About the share asked for, by the title alone."""
    assert 1850 < sum(is_heldout(f"title {n}", 0.2) for n in range(10000)) < 2150
    assert not any(is_heldout(f"title {n}", 0.0) for n in range(100)) and all(is_heldout(f"title {n}", 1.0) for n in range(100))


def test_leaks_are_counted(bpe):
    """Half of the entities leak: with keep_leaky as many documents are as are counted, without none is and every redraw is one."""
    passages = []
    for n in range(20):
        text = f"Ada{n} Lovelace met Lovelace in Rome{n}x."
        passages.append(Passage(f"T{n}", text, [m.span() for m in re.finditer(rf"Ada{n} Lovelace|Rome{n}x", text)]))
    for keep in (False, True):
        corpus = Corpus(passages, bpe, seed=0, chunk_tokens=32, n_passages=3, keep_leaky=keep)
        documents = [corpus.document(i) for i in range(60)]
        leaky = [d for d in documents if "Lovelace" in d.answers[0]]
        assert 15 < sum(d.leaks for d in documents) < 45
        assert all(d.leaks == (d in leaky) and d.redraws == 0 for d in documents) if keep else not leaky
        assert keep or all(d.redraws == d.leaks for d in documents)


def test_too_little_to_build_from(bpe):
    """No entity, nothing held out, a chunk of no use, a pivot longer than its document: each says so."""
    passages = made_up(6)
    with pytest.raises(UserError, match="no passage with an entity"):
        Corpus([Passage("a", "b"), Passage("c", "d")], bpe, seed=0, chunk_tokens=64, n_passages=1)
    with pytest.raises(UserError, match="'heldout'"):
        Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=2, heldout=0).document(0, "heldout")
    with pytest.raises(UserError, match="--chunk-tokens 3"):
        Corpus(passages, bpe, seed=0, chunk_tokens=3, n_passages=2)
    with pytest.raises(UserError, match="could not be built"):
        Corpus(passages, bpe, seed=0, chunk_tokens=16, n_chunks=1).document(0)


def test_recall_keeps_away_from_the_mask(bpe):
    """What overlaps or abuts a mask, is a part of y or shares a word with it, is not asked for."""
    text = "Oxford lies in Kent. University of Oxford, Oxford/Rome, Oxford/Ulm, Bath. Lord Oxford Bath met Ann."
    found = [m.span() for m in re.finditer(r"University of Oxford|Oxford/Rome|(?<=Oxford)/Ulm|Oxford|Kent|Bath|Ann", text)]
    corpus = Corpus([Passage("Oxford", text, found)], bpe, seed=0, chunk_tokens=128, n_passages=1, heldout=0, keep_leaky=True)
    recalled = {d.answers[0]: {name for names in d.recall for name in names} for d in map(corpus.document, range(60))}
    assert recalled["Oxford"] == {"Kent", "Bath", "Ann"}
    assert "Oxford" not in recalled["University of Oxford"] and "/Ulm" in recalled["University of Oxford"]


def test_a_recall_section_by_hand():
    """Every form of the entity is gone, masks stay, an entity called Mask does not eat one; k is uniform, l < k."""
    chunks = ["Ada met [MASK], ADA's friend. The Mask.", "No names.", "Bob and \uff22\uff4f\uff42 in [MASK].", "Eve."]
    document = Document(0, "t", "q", ["y"], chunks, [["Ada", "Mask"], [], ["Bob"], ["Eve"]])
    rng = np.random.default_rng(0)
    draws = [draw_recall(document, rng) for _ in range(400)]
    assert {(d.memory_step, d.chunk) for d in draws} == {(2, 1), (3, 1), (4, 1), (4, 3)}
    assert {d.entity: d.section for d in draws} == {
        "Ada": "[TARGET] met [MASK], [TARGET]'s friend. The Mask.", "Mask": "Ada met [MASK], ADA's friend. The [TARGET].",
        "Bob": "[TARGET] and [TARGET] in [MASK].",
    }  # fmt: skip
    steps = Counter(d.memory_step for d in draws)
    assert all(90 < steps[k] < 180 for k in (2, 3, 4))
    assert draw_recall(Document(0, "t", "q", ["y"], ["a"], [["Ada"]]), rng) is None


def test_too_few_passages(tiny_passages, tokenizer):
    """More passages or chunks than there is text for is the user's mistake, and said so."""
    with pytest.raises(UserError, match="--passages 50"):
        Corpus(tiny_passages[:40], tokenizer, seed=0, chunk_tokens=64, n_passages=50)
    with pytest.raises(UserError, match="too few"):
        Corpus(tiny_passages[:60], tokenizer, seed=0, chunk_tokens=64, n_chunks=90).document(0)
