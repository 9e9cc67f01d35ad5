"""masking.py: entities, documents, recall targets. Masks alone: tests/text/test_matching.py."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import spacy
from helpers import shared, small_bpe
from transformers import AutoTokenizer

import masking
from engine.config import Config
from engine.errors import UserError
from masking import (
    Corpus,
    Document,
    check_ner,
    draw_recall,
    find_entities,
    is_heldout,
    load_corpus,
    load_pipeline,
    mask,
    worth_masking,
)
from rewards import normalize
from text import corpus
from text.chunking import cut_chunks
from text.corpus import Passage, load_passages
from text.matching import MASK, TARGET, may_be_same_entity, name_words, occurrences

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    passages = load_passages(str(shared("wiki/passages.jsonl")))
    find_entities(passages, "rules", tmp_path_factory.mktemp("entities"))
    return passages


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


@pytest.fixture(scope="module")
def tiny_passages(tmp_path_factory):
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))
    find_entities(passages, "rules", tmp_path_factory.mktemp("entities"))
    return passages


# ---- entities ----------------------------------------------------------------------------------------


def test_a_missing_pipeline_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    """The install command and the way without one; a folder that holds a pipeline will do, a damaged one won't."""
    with monkeypatch.context() as patch:
        patch.setattr(spacy, "load", lambda *_, **__: pytest.fail("loaded"))
        for name in ("en_no_such", "", str(tmp_path)):
            with pytest.raises(UserError, match="not installed.*python -m spacy download.*--ner rules"):
                check_ner(name)
        check_ner("rules")
        spacy.blank("en").to_disk(tmp_path / "pipeline")
        check_ner(str(tmp_path / "pipeline"))
        with pytest.raises(UserError, match="--ner spacy: is not a spaCy pipeline"):
            check_ner("spacy")
        (tmp_path / "en_as_package").mkdir()
        for name in ("__init__.py", "meta.json"):
            (tmp_path / "en_as_package" / name).write_text("")
        patch.syspath_prepend(tmp_path)
        check_ner("en_as_package")
    with pytest.raises(UserError, match="en_no_such: not installed"):
        load_pipeline("en_no_such")
    (tmp_path / "pipeline/config.cfg").write_text("[nlp]\n")
    with pytest.raises(UserError, match="pipeline: can't be loaded"):
        load_pipeline(str(tmp_path / "pipeline"))


def test_entities_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    """Same text: no second run of the pipeline. Other text: a run of its own."""

    def fresh(text):
        return [Passage("Ulm", text)]

    first = fresh("Ulm lies on the Danube since 854.")
    find_entities(first, "rules", tmp_path)
    code = masking.code_of_finder("rules")
    monkeypatch.setattr(masking, "code_of_finder", lambda ner: code)
    monkeypatch.setattr(masking, "load_pipeline", lambda *_: pytest.fail("ran again"))
    again = fresh("Ulm lies on the Danube since 854.")
    find_entities(again, "rules", tmp_path)
    assert again[0].entities == first[0].entities == [(0, 3), (16, 22), (29, 32)]
    with pytest.raises(pytest.fail.Exception):
        find_entities(fresh("Ulm lies elsewhere."), "rules", tmp_path)


def test_an_edited_finder_finds_anew(tmp_path, monkeypatch):
    """A fork's change of what finds entities isn't answered from the cache of the code before it."""
    texts = [[Passage("Ulm", "Ulm lies on the Danube since 854.")] for _ in range(3)]
    find_entities(texts[0], "rules", tmp_path)
    monkeypatch.setattr(masking, "worth_masking", lambda doc, common: [(0, 3, "NAME")])
    find_entities(texts[1], "rules", tmp_path)
    monkeypatch.undo()
    find_entities(texts[2], "rules", tmp_path)
    assert texts[1][0].entities == [(0, 3)] and texts[2][0].entities == texts[0][0].entities != [(0, 3)]


def test_a_stopped_finding_resumes_with_the_same_entities(tmp_path, monkeypatch):
    """By one process and then by two: the same as in one go, and a finished shard isn't looked at again."""
    passages = load_passages(str(ROOT / "tiny/passages.jsonl"))[:90]
    find_entities(passages, "rules", tmp_path / "whole")
    whole, seen = [passage.entities for passage in passages], []
    monkeypatch.setattr(corpus, "SHARD", 40)
    monkeypatch.setattr(corpus, "BLOCK", 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    real, code = masking.entities_of, masking.code_of_finder("rules")
    monkeypatch.setattr(masking, "code_of_finder", lambda ner: code)

    def stops(texts, **more):
        if passages[48].text in texts:
            raise KeyboardInterrupt
        seen.extend(texts)
        return real(texts, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(masking, "entities_of", stops)
        find_entities(passages, "rules", tmp_path / "shards")
    assert len(seen) == 48 and len(list((tmp_path / "shards").rglob("*.json"))) == 1
    for passage in passages:
        passage.entities = []
    next((tmp_path / "shards").rglob("*.json")).write_text(json.dumps([[[0, 1]]] * 40))
    monkeypatch.setattr(corpus, "FEW", 1)
    find_entities(passages, "rules", tmp_path / "shards")
    assert [passage.entities for passage in passages] == [[(0, 1)]] * 40 + whole[40:]


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
    doc = load_pipeline("rules")(text)
    assert [text[start:end] for start, end, _ in worth_masking(doc, {"river", "mask", "target"})] == entities


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
    """The error says so, also when the cache knows it."""
    for _ in range(2):
        with pytest.raises(UserError, match="no entity"):
            find_entities([Passage("a", "nothing here is a name")], "rules", tmp_path / "cache")


# ---- documents and recall -----------------------------------------------------------------------------


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
    for chunk, entities in zip(document.chunks, document.recall_candidates, strict=True):
        assert all(occurrences(chunk, e) and MASK not in e and normalize(e) != normalize(answer) for e in entities)
    return text


@pytest.mark.parametrize("documents", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_95_percent_of_real_documents_can_be_built_and_y_is_nowhere_left(wiki, documents):
    """Of real Wikipedia passages with the rules' entities: four chunks within their limit, without y or its words."""
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen3-4b-instruct-2507"))
    corpus = Corpus(wiki, tokenizer, seed=0, chunk_tokens=512, n_chunks=4, n_related=3)
    built = 0
    for i in range(documents):
        try:
            document = corpus.document(i)
        except UserError:
            continue
        assert len(document.chunks) == 4
        check(document, corpus, tokenizer, 512)
        built += 1
    assert built >= 0.95 * documents


def test_tiny_documents_at_every_length(tiny_passages, tokenizer):
    """Exactly the asked number of chunks, from half to eight times the trained length."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    for chunks in (2, 4, 8, 16, 32):
        for i in range(5):
            document = corpus.document(i, "heldout", chunks=chunks)
            assert len(document.chunks) == chunks
            check(document, corpus, tokenizer, 64)


def test_a_document_of_n_passages_holds_the_pivot_its_relatives_and_the_rest(bpe):
    """N passages, all different: one of the pivot's versions, every related one, and others at random."""
    passages = []
    for n, clan, version in [(n, n // 4, version) for n in range(120) for version in range(2)]:
        text = f"Name{n}y of Clan{clan}x ate {version + 500} eggs."
        passages.append(Passage(f"T{n}", text, [(0, text.index(" "))]))
    corpus = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=40, n_related=6)
    for i in range(20):
        document = corpus.document(i)
        texts = [text.replace(MASK, document.answers[0]) for text in "".join(document.chunks).split("\n\n")]
        assert len(texts) == len(set(texts)) == 40 and set(texts) <= {passage.text for passage in passages}
        (pivot,) = [text for text in texts if document.answers[0] in text]
        assert f"Name{document.title[1:]}y" == document.answers[0]
        clan = re.search(r"Clan\d+x", pivot)[0]
        assert sum(clan in text for text in texts) == 1 + 6  # both versions of the clan's three others


def test_held_out_titles_are_never_masked_in_training(tiny_passages, tokenizer):
    """In train a held-out title is no pivot, no answer and no recall target; in heldout every pivot is one."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    held = {normalize(t) for t in corpus.heldout_titles}
    assert 0.1 < len(held) / len(corpus.same_title) < 0.3
    for i in range(150):
        document = corpus.document(i)
        targets = {normalize(e) for entities in document.recall_candidates for e in entities}
        assert normalize(document.title) not in held and not held & {normalize(document.answers[0]), *targets}
        assert normalize(corpus.document(i, "heldout").title) in held


def test_what_is_evaluated_is_never_asked_for_in_training(tiny_passages, tokenizer):
    """Held-out passages are read in training, but nothing in them is a recall target, in whichever chunk."""
    corpus, seen = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2), 0
    unseen = [p for p in tiny_passages if p.title in corpus.heldout_titles]
    for i in range(150):
        document = corpus.document(i)
        inside = [p for p in unseen if mask(p.text, document.answers[0]) in "".join(document.chunks)]
        seen += len(inside)
        asked = {name for names in document.recall_candidates for name in names}
        assert not any(still_there(p.text, name) for p in inside for name in asked)
    assert seen > 50


SPACELESS = [
    ("東京都", "東京は日本の都市である。", "東京"), ("大阪府", "大阪は西日本の都市だ。", "大阪"),
    ("京都", "京都大学は湯川秀樹を生んだ。", "湯川秀樹"), ("トヨタ", "トヨタ自動車は愛知にある。", "トヨタ"),
    ("北京", "北京是中国的首都。", "北京"), ("上海", "上海在长江口。", "上海"),
    ("Sony", "ソニーSony製品は多い。", "Sony"), ("ไทย", "เมืองไทยใหญ่", "ไทย"),
    ("서울", "서울은 크다.", "서울"), ("부산", "사람들은 부산에서 산다.", "부산"),
]


def test_documents_without_spaces(tokenizer):
    """Names that a pipeline found in text without spaces are masked everywhere, and recall asks for the others."""
    passages = []
    for title, text, name in SPACELESS:
        start = text.index(name)
        passages.append(Passage(title, text, [(start, start + len(name))]))
    corpus = Corpus(passages, tokenizer, seed=0, chunk_tokens=600, n_passages=10, heldout=0)
    answers, asked = set(), set()
    for i in range(60):
        document = corpus.document(i)
        text, (y,) = "".join(document.chunks), document.answers
        answers.add(y)
        asked |= set(chain(*document.recall_candidates))
        assert y not in text and text.count(MASK) == 1 and document.leaks == 0
    assert answers == asked == {name for *_, name in SPACELESS}


def test_names_without_case_are_worth_masking():
    """What a pipeline finds in scripts without capitals goes through, without what is invisible at its ends."""
    text = "東京都は大きい。서울은 \u200fUlm\u200b, 東京tower, small; საქართველო 先秦"
    nlp = spacy.blank("xx")
    doc = spacy.tokens.Doc(nlp.vocab, words=list(text), spaces=[False] * len(text))
    found = ("東京都", "서울", "\u200fUlm\u200b", "東京tower", "small", "საქართველო", "秦")
    starts = [text.index(name) for name in found]
    doc.ents = [spacy.tokens.Span(doc, n, n + len(name), "X") for n, name in zip(starts, found, strict=True)]
    kept = [text[start:end] for start, end, _ in worth_masking(doc, set())]
    assert kept == ["東京都", "서울", "Ulm", "東京tower", "საქართველო"]


def test_text_without_spaces_is_left_out_where_only_the_rules_look_for_names(tmp_path, capsys, tokenizer):
    """And counted, with a line; with a pipeline it stays."""
    rows = [{"title": f"T{n}", "text": f"In 1{n:03} Ada met Bob{n} in Ulm."} for n in range(30)]
    rows += [{"title": title, "text": text} for title, text, _ in SPACELESS]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    left_out = Counter()
    kept = load_passages(str(tmp_path / "c.jsonl"), left_out=left_out, spaced=True)
    assert [p.title for p in kept[30:]] == ["서울", "부산"] and len(kept) == 32 and left_out.total() == 8
    assert "8 written without spaces" in capsys.readouterr().err
    assert len(load_passages(str(tmp_path / "c.jsonl"))) == 40
    config = Config(corpus=str(tmp_path / "c.jsonl"), out=str(tmp_path / "run"), ner="rules", passages=2)
    assert len(load_corpus(config, tokenizer).passages) == 32


def test_documents_are_a_pure_function_of_seed_split_and_index(tiny_passages, tokenizer, tmp_path):
    """The same in any order and in another process with other string hashes; another seed gives others."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from masking import *\n"
        "from text.corpus import load_passages\n"
        "from transformers import AutoTokenizer; root = Path(sys.argv[1])\n"
        "p = load_passages(str(root / 'tiny/passages.jsonl')); find_entities(p, 'rules', Path(sys.argv[2]))\n"
        "tokenizer = AutoTokenizer.from_pretrained(root / 'tiny/model')\n"
        "c = Corpus(p, tokenizer, seed=3, chunk_tokens=64, n_chunks=4, n_related=2)\n"
        "print(json.dumps([c.document(i).__dict__ for i in (5, 2, 9)]))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    other = json.loads(run.stdout.splitlines()[-1])
    corpus = Corpus(tiny_passages, tokenizer, seed=3, chunk_tokens=64, n_chunks=4, n_related=2)
    assert [corpus.document(i).__dict__ for i in range(10)][2] == other[1]
    assert [corpus.document(i).__dict__ for i in (9, 5)] == [other[2], other[0]]
    another = Corpus(tiny_passages, tokenizer, seed=4, chunk_tokens=64, n_chunks=4, n_related=2)
    assert another.document(5).chunks != other[0]["chunks"]


def test_recall_draws(tiny_passages, tokenizer):
    """l is earlier than k, the target is gone from its chunk, every pair turns up, none is invented."""
    corpus = Corpus(tiny_passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=4, n_related=2)
    rng, pairs = np.random.default_rng(0), set()
    for i in range(60):
        document = corpus.document(i)
        for _ in range(10):
            draw = draw_recall(document, rng)
            pairs.add((draw.memory_turn, draw.chunk))
            assert draw.entity in document.recall_candidates[draw.chunk - 1]
            assert TARGET in draw.masked_chunk and not occurrences(draw.masked_chunk, draw.entity)
            assert draw.masked_chunk.replace(TARGET, "").count(MASK) == document.chunks[draw.chunk - 1].count(MASK)
    assert pairs == {(turn, chunk) for turn in (2, 3, 4) for chunk in range(1, turn)}
    document.recall_candidates = [[], [], [], ["Ulm"]]  # only the last chunk has one: no later memory could hold it
    assert draw_recall(document, rng) is None


def test_leaky_documents_are_dropped_unless_kept(tokenizer):
    """A part of y's name elsewhere: drawn again and counted, or kept on demand."""
    texts = ["Ada Lovelace wrote notes in 1843.", "Lovelace is a town.", "Rome is old."]
    passages = [Passage(f"p{n}", t, [(0, 12)] if n == 0 else []) for n, t in enumerate(texts)]
    passages += [Passage(f"q{n}", f"The year {n + 100} passed.", [(9, 12)]) for n in range(20)]
    settings = dict(seed=0, chunk_tokens=64, n_passages=23, heldout=0.5)
    strict = Corpus(passages, tokenizer, **settings)
    only_ada = {("train", True): [0], ("train", False): []}, {("train", True): 1, ("train", False): 0}
    strict.pivots, strict.name_counts = only_ada
    with pytest.raises(UserError, match="in 200 draws: 200 gave the answer away, in 0 .*longer chunks or --keep-leaky"):
        strict.document(0)
    loose = Corpus(passages, tokenizer, **settings, keep_leaky=True)
    loose.pivots, loose.name_counts = only_ada
    assert loose.document(0).answers == ["Ada Lovelace"]


def made_up(n_titles=40):
    """Passages about made-up people, three versions of each, every entity marked; a friend's name links two titles."""
    names, passages = [f"Person{n}x Surname{n}y" for n in range(n_titles)], []
    for n, name in enumerate(names):
        for v in range(3):
            friend = names[(n + 5 * v + 1) % n_titles]
            text = f"{name} lived in Town{n % 9}z. It was {1800 + n} then. "
            text += f"In version {v + 500} {name}'s friend is {friend}."
            passages.append(Passage(name, text, [m.span() for m in re.finditer(MADE_UP, text)]))
    return passages


MADE_UP = r"Person\w+ Surname\w+|Town\dz|\b1\d\d\d|\b50\d\b"


def test_recall_lists_every_allowed_entity_of_each_chunk(bpe):
    """At several lengths: the chunks asked for, within their limit, and exactly the entities that a scan of the chunk
    finds, less y's kin and, in train, held-out titles and what stands in a held-out passage of the document."""
    passages = made_up()
    corpus = Corpus(passages, bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=2)
    assert 2 <= len(corpus.heldout_titles) <= 16
    answers = set()
    for i, split, length in [(i, s, c) for i in range(40) for s in ("train", "heldout") for c in (None, 1, 3, 8)]:
        document = corpus.document(i, split, length)
        answers |= set(document.answers) if split == "train" else set()
        assert len(document.chunks) == (length or 4) == len(document.recall_candidates)
        assert MASK in "".join(document.chunks) and document.answers[0] not in "".join(document.chunks)
        unseen: set[str] = set()  # names that training must not ask for
        for piece in "".join(document.chunks).split("\n\n") if split == "train" else []:
            titles = {p.title for p in passages if piece in p.text.replace(document.answers[0], MASK)}
            unseen |= set(re.findall(MADE_UP, piece)) if titles <= corpus.heldout_titles else set()
        for chunk, names in zip(document.chunks, document.recall_candidates, strict=True):
            assert len(bpe(chunk)["input_ids"]) <= 160
            scanned = set(re.findall(MADE_UP, chunk)) - (corpus.heldout_titles if split == "train" else set())
            others = [name for name in scanned - unseen if not may_be_same_entity(name, document.answers[0])]
            assert sorted(names) == sorted(others)
    assert not answers & corpus.heldout_titles and any("Surname" in answer for answer in answers)


def test_the_pivot_is_whole_and_related_passages_are_preferred(bpe):
    """The pivot stands unbroken but for its masks, no other version of it does, and its friends' passages turn up."""
    near = {}
    for related in (0, 2):
        corpus, near[related] = Corpus(made_up(), bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=related), 0
        for i in range(60):
            document = corpus.document(i)
            whole = "".join(document.chunks)
            there = {p.text: p.title for p in corpus.passages if mask(p.text, document.answers[0]) in whole}
            (pivot,) = [text for text, title in there.items() if title == document.title]
            names = set(re.findall(r"Surname\d+y", pivot))
            near[related] += sum(bool(names & set(re.findall(r"Surname\d+y", text))) for text in there if text != pivot)
    assert near[2] > 3 * near[0]


def test_a_document_is_the_same_at_every_length_but_for_its_length(bpe):
    """So lengths can be compared: one pivot, one answer, and the shorter's passages in the longer in their order."""
    corpus = Corpus(made_up(), bpe, seed=3, chunk_tokens=160, n_chunks=4, n_related=2)
    for i in range(20):
        documents = [corpus.document(i, "heldout", chunks) for chunks in (2, 4, 8)]
        assert len({(d.title, *d.answers) for d in documents}) == 1
        shorter, longer = ("".join(d.chunks).split("\n\n")[:-1] for d in documents[1:])  # the last may be cut
        assert len(shorter) > 2 and [text for text in longer if text in shorter] == shorter


def test_by_number_of_passages_and_at_most_so_many_chunks(bpe):
    """N passages; cut to n_chunks without losing the pivot, wherever it stands; entities still in their chunks."""
    passages, places = made_up(), []
    whole = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=12, n_related=3)
    short = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=12, n_related=3, n_chunks=5)
    for i in range(40):
        document, cut = whole.document(i), short.document(i)
        text = "".join(document.chunks)
        assert len(set(text.split("\n\n"))) == 12 == text.count("\n\n") + 1
        assert len(document.chunks) > 5 == len(cut.chunks) and cut.redraws == 0
        for chunk, names in zip(cut.chunks, cut.recall_candidates, strict=True):
            assert all(name in chunk for name in names)
        versions = [mask(p.text, cut.answers[0]) for p in passages if p.title == cut.title]
        assert any(version in "".join(cut.chunks) for version in versions)
        places.append(max(text.find(version) for version in versions) / len(text))
        assert len(whole.document(i, chunks=7).chunks) == 7
    assert min(places) < 0.15 and max(places) > 0.75 and 0.3 < np.mean(places) < 0.6


def test_the_held_out_share():
    """About the share asked for, by the title alone."""
    assert 1850 < sum(is_heldout(f"title {n}", 0.2) for n in range(10000)) < 2150
    assert not any(is_heldout(f"title {n}", 0.0) for n in range(100))
    assert all(is_heldout(f"title {n}", 1.0) for n in range(100))


def test_leaks_are_counted(bpe):
    """With keep_leaky every leak is counted and kept; without it every leak is redrawn."""
    passages = []
    for n in range(20):
        text = f"Ada{n} Lovelace met Lovelace in Rome{n}x."
        passages.append(Passage(f"T{n}", text, [m.span() for m in re.finditer(rf"Ada{n} Lovelace|Rome{n}x", text)]))
    for keep in (False, True):
        corpus = Corpus(passages, bpe, seed=0, chunk_tokens=32, n_passages=3, keep_leaky=keep)
        documents = [corpus.document(i) for i in range(60)]
        leaky = [d for d in documents if "Lovelace" in d.answers[0]]
        assert 15 < sum(d.leaks > 0 for d in documents) < 45
        assert all(d.leaks == (d in leaky) and d.redraws == 0 for d in documents) if keep else not leaky
        assert keep or all(d.redraws == d.leaks for d in documents)


def test_y_has_several_words_as_often_as_entities_have(bpe):
    """y has several words as often as the corpus's entities do, though nine of ten such names leak."""
    passages, names = [], []
    for n in range(300):
        family = f"Family{n}x" if n % 10 == 0 else "Lovelace"  # most families come again in every document
        text = f"Ada{n} {family} met Lovelace in Rome{n}x, 1{n:03}."
        found = [m.span() for m in re.finditer(rf"Ada{n} {family}|Rome{n}x|1{n:03}", text)]
        passages.append(Passage(f"T{n}", text, found))
        names += [text[start:end] for start, end in found]
    corpus = Corpus(passages, bpe, seed=0, chunk_tokens=64, n_passages=6)
    answers = [corpus.document(i).answers[0] for i in range(150)]
    share = sum(" " in name for name in names) / len(names)
    assert abs(sum(" " in answer for answer in answers) / 150 - share) < 4 * (share * (1 - share) / 150) ** 0.5
    assert not any("Lovelace" in answer for answer in answers)


@pytest.mark.parametrize("chunk_tokens", [32, 256])
def test_a_long_document_is_cut_two_or_three_times(bpe, monkeypatch, chunk_tokens):
    """Not once for every few passages: each cut is of the whole text. And it hardly overshoots."""
    corpus, cuts = Corpus(made_up(400), bpe, seed=0, chunk_tokens=chunk_tokens, n_chunks=64, n_related=2), []

    def counted(text, keep, tokenizer, limit):
        cuts.append(cut_chunks(text, keep, tokenizer, limit))
        return cuts[-1]

    monkeypatch.setattr(masking, "cut_chunks", counted)
    documents = [corpus.document(i) for i in range(8)]
    assert len(cuts) <= 3 * sum(1 + document.redraws for document in documents)
    assert all(len(document.chunks) == 64 for document in documents) and len(cuts[-1]) <= 68


def test_recall_asks_for_a_name_that_is_gone_from_its_chunk():
    """Where a chunk has one: a name none of whose giveaway words is left. Else any, and it says so."""
    chunks = ["Ada Lovelace and Charles Babbage met. Lovelace spoke.", "Rome is old.", "Ulm is new."]
    document = Document(0, "", "", ["y"], chunks, [["Ada Lovelace", "Charles Babbage"], [], []])
    draws = [draw_recall(document, np.random.default_rng(n)) for n in range(30)]
    assert {draw.entity for draw in draws} == {"Charles Babbage"} and not any(draw.leaky for draw in draws)
    document.recall_candidates[0] = ["Ada Lovelace"]
    draws = [draw_recall(document, np.random.default_rng(n)) for n in range(5)]
    assert all(draw.leaky and draw.entity == "Ada Lovelace" and "Lovelace spoke" in draw.masked_chunk for draw in draws)


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
    names = r"University of Oxford|Oxford/Rome|(?<=Oxford)/Ulm|Oxford|Kent|Bath|Ann"
    found = [m.span() for m in re.finditer(names, text)]
    passages = [Passage("Oxford", text, found)]
    corpus = Corpus(passages, bpe, seed=0, chunk_tokens=128, n_passages=1, heldout=0, keep_leaky=True)
    recalled = {d.answers[0]: set(chain(*d.recall_candidates)) for d in map(corpus.document, range(60))}
    assert recalled["Oxford"] == {"Kent", "Bath", "Ann"}
    assert "Oxford" not in recalled["University of Oxford"] and "/Ulm" in recalled["University of Oxford"]


def test_a_masked_chunk_by_hand():
    """Every form of the entity is gone, masks stay, an entity called Mask does not eat one; k is uniform, l < k."""
    chunks = ["Ada met [MASK], ADA's friend. The Mask.", "No names.", "Bob and \uff22\uff4f\uff42 in [MASK].", "Eve."]
    document = Document(0, "t", "q", ["y"], chunks, [["Ada", "Mask"], [], ["Bob"], ["Eve"]])
    rng = np.random.default_rng(0)
    draws = [draw_recall(document, rng) for _ in range(400)]
    assert {(d.memory_turn, d.chunk) for d in draws} == {(2, 1), (3, 1), (4, 1), (4, 3)}
    assert {d.entity: d.masked_chunk for d in draws} == {
        "Ada": "[TARGET] met [MASK], [TARGET]'s friend. The Mask.",
        "Mask": "Ada met [MASK], ADA's friend. The [TARGET].",
        "Bob": "[TARGET] and [TARGET] in [MASK].",
    }
    steps = Counter(d.memory_turn for d in draws)
    assert all(90 < steps[k] < 180 for k in (2, 3, 4))
    assert draw_recall(Document(0, "t", "q", ["y"], ["a"], [["Ada"]]), rng) is None


def test_too_few_passages(tiny_passages, tokenizer):
    """More passages or chunks than there is text for is the user's mistake, and said so."""
    with pytest.raises(UserError, match="--passages 50"):
        Corpus(tiny_passages[:40], tokenizer, seed=0, chunk_tokens=64, n_passages=50)
    with pytest.raises(UserError, match="too few"):
        Corpus(tiny_passages[:60], tokenizer, seed=0, chunk_tokens=64, n_chunks=90).document(0)


def test_in_training_another_document_stands_in_for_one_that_cannot_be_built(monkeypatch):
    """One that fails must not end a run of hours. Its stand-in is no other number's, and is always the same."""
    passages = [Passage(f"Title {n}", f"Ada{n} met Bob{n} in Ulm{n}.", [(0, 4 + (n > 9))]) for n in range(200)]
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "tiny/model")
    corpus = Corpus(passages, tokenizer, seed=0, chunk_tokens=64, n_chunks=1)
    real, others = corpus._draw, [corpus.document(i).chunks for i in range(12)]

    def draw(i, split, n_chunks, attempt):
        if i == 3 and attempt < 2 or i >= 30:
            raise UserError(f"document {i}, attempt {attempt}")
        return real(i, split, n_chunks, attempt)

    monkeypatch.setattr(corpus, "_draw", draw)
    assert corpus.document(3) == corpus.document(3) and corpus.document(3).chunks not in others
    assert corpus.document(3).index == 3 and corpus.document(2).chunks == others[2]
    with pytest.raises(UserError, match="document 3, attempt 0"):
        corpus.document(3, "heldout")
    with pytest.raises(UserError, match="document 30, attempt 4"):
        corpus.document(30)
