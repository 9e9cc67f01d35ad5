"""text/chunking.py: where a text is cut, with tokenizers of several sizes and texts of many scripts."""

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import shared, small_bpe
from transformers import AutoTokenizer

from engine.errors import UserError
from text.chunking import cut_chunks
from text.matching import MASK

ROOT = Path(__file__).parents[2]
REAL = ["qwen3-4b-instruct-2507", "qwen2.5-instruct", "smollm2-instruct"]


@pytest.fixture(scope="module")
def tokenizer_of():
    """A tokenizer by name, each loaded once: a real one, the tiny model's, or `bpe`."""
    loaded = {}

    def load(name):
        if name not in loaded and name == "bpe":
            loaded[name] = small_bpe()
        if name not in loaded:
            folder = ROOT / "tiny/model" if name == "tiny" else shared(f"tokenizers/{name}")
            loaded[name] = AutoTokenizer.from_pretrained(folder)
        return loaded[name]

    return load


@pytest.fixture
def bpe(tokenizer_of):
    return tokenizer_of("bpe")


def size(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", [*REAL, "bpe", "tiny"])
def test_only_what_is_longer_than_a_chunk_is_cut(name, tokenizer_of):
    """Random texts, half of them with hardly a space.

    What a cut splits (a word, an entity) is longer than a chunk; masks and characters (accents, flags, joined emoji,
    line ends) are never split.
    """
    tokenizer = tokenizer_of(name)
    rng = random.Random(1)
    family, thumb = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd"
    flags = "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea"
    words = ["Ada", "the", MASK, "1,843", "na\u00efve", "\u5317\u4eac\u5927\u5b66", "e\u0301a\u0308", "end."]
    words += ["\u201cYes!\u201d", "\ufdfa", family, flags, thumb, "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0301x"]
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
        assert "".join(chunks) == text and all(chunks) and all(size(chunk, tokenizer) <= limit for chunk in chunks)
        assert sum(chunk.count(MASK) for chunk in chunks) == text.count(MASK)
        cuts = np.cumsum([len(chunk) for chunk in chunks])[:-1].tolist()
        for start, end in keep:  # give or take the tokens that a cut's edges cost
            is_cut = any(start < cut < end for cut in cuts)
            assert size(text[start:end], tokenizer) > limit - 4 or not is_cut, text[start:end]
        inside = {place for start, end in keep for place in range(start + 1, end)}
        # Behind a space, and on every side of a han character but before a full stop and an accent.
        han = "[\u5317\u4eac\u5927\u5b66]"
        edges = f"\\s(?=[^\\s\u0301])|(?<={han})(?=[^\\s.\u0301])|(?<=\\S)(?={han})"
        spaces = (m.end() for m in re.finditer(edges, text))
        clean = [0, *(place for place in spaces if place not in inside), len(text)]
        for cut in set(cuts) - set(clean):
            start, end = max(c for c in clean if c < cut), min(c for c in clean if c > cut)
            assert size(text[start:end], tokenizer) > limit - 4, text[start:end]
        for cut in cuts if limit > 16 else []:  # a family is 18 bytes, and no longer fits
            assert unicodedata.category(text[cut])[0] != "M" and "\u200d" not in text[cut - 1 : cut + 1]
            assert text[cut - 1 : cut + 1] not in ("\r\n", flags[:2], flags[2:], thumb)


def test_chunks_end_with_paragraphs_and_sentences_and_are_filled(bpe):
    """In the last half of a chunk a sentence's end beats a word's, a paragraph's beats both; else chunks are full."""
    sentence = "The quick brown fox jumps over a lazy dog. "
    tokens = size(sentence, bpe)
    assert set(cut_chunks(sentence * 40, [], bpe, 5 * tokens // 2)) == {sentence * 2}
    assert set(cut_chunks((sentence * 3 + "\n\n") * 10, [], bpe, 5 * tokens)) == {sentence * 3 + "\n\n"}
    assert all(size(chunk, bpe) > 55 for chunk in cut_chunks("word " * 500, [], bpe, 64)[:-1])


def test_an_entity_longer_than_a_chunk_is_cut_between_words(bpe):
    """It must be cut somewhere; the masks in it must not."""
    text = "alpha beta [MASK] gamma delta " * 20
    chunks = cut_chunks(text, [(0, len(text))], bpe, 24)
    assert "".join(chunks) == text and sum(c.count(MASK) for c in chunks) == 20 and all(c.endswith(" ") for c in chunks)


def test_a_chunk_too_small_for_a_character_is_a_clear_error(bpe):
    """Where one letter alone has more tokens than a chunk, the flag to change and the word are named."""
    with pytest.raises(UserError, match="--chunk-tokens 1: too few for '\u5317x'"):
        cut_chunks("\u5317x", [], bpe, 1)


def test_a_long_document_is_measured_about_twice(tokenizer_of):
    """As a whole and in its chunks, of which there are hundreds: the tokenizer sees at most 2.5 times its letters."""
    tokenizer, seen = tokenizer_of("tiny"), []

    def counting(text, **more):
        seen.append(len(text))
        return tokenizer(text, **more)

    lines = (ROOT / "tiny/passages.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    chunks = cut_chunks(text, [], counting, 64)
    assert len(chunks) > 300 and sum(seen) < 2.5 * len(text)


@pytest.mark.parametrize(
    "text, last, first",
    [
        ("東京は大きい。大阪も大きい。", "。", "東大"),
        ("「行くか？」彼は笑った！", "」！", "「彼"),
        ("他来了。「好」，她说。", "。", "他「"),
        ("ソニーはゲーム。ニュースも。", "。", "ソニ"),
    ],
)
def test_text_without_spaces_is_cut_between_sentences(bpe, text, last, first):
    """Where one ends in the last half of a chunk; its closing quote stays with it."""
    chunks = cut_chunks(text * 20, [], bpe, 2 * size(text, bpe))
    assert len(chunks) > 8 and "".join(chunks) == text * 20
    assert all(chunk[-1] in last and chunk[0] in first for chunk in chunks), chunks


@pytest.mark.parametrize(
    "text, never_first, never_last",
    [
        ("中華人民共和国、（略称：中国）", "、）：", "（"),
        ("ニューヨーク・サッカー", "ューッー・", ""),
        ("เมืองไทยน้ำแก้ว", "ะาำ้ื", "เแโใไ"),
        ("佐々木と「阿々」", "々」", "「"),
        ("សម្ដេចព្រះ", "្េះ", "្"),
        ("約1,500年", ",", ","),
    ],
)
def test_text_without_spaces_is_cut_between_characters(bpe, text, never_first, never_last):
    """Anywhere but before what begins no line and behind what ends none; chunks are full, entities and masks whole."""
    whole = f"{text}[MASK]東京都" * 30
    keep = [m.span() for m in re.finditer("東京都", whole)]
    chunks = cut_chunks(whole, keep, bpe, 40)
    assert "".join(chunks) == whole and sum(chunk.count("東京都") for chunk in chunks) == 30
    assert sum(chunk.count(MASK) for chunk in chunks) == 30
    assert not any(chunk[0] in never_first for chunk in chunks[1:])
    assert not any(chunk[-1] in never_last for chunk in chunks[:-1])
    assert sum(size(chunk, bpe) > 28 for chunk in chunks) > 0.8 * len(chunks)


def test_a_name_in_text_with_spaces_is_cut_last(bpe):
    """Where a space lies in the last half of a chunk, it is cut there and not inside 北京大学."""
    chunks = cut_chunks("the old 北京大学 has " * 40, [], bpe, 40)
    assert len(chunks) > 10 and all(chunk.endswith(" ") for chunk in chunks)
