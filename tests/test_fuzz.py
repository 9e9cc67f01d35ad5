"""Random input to what reads text that others wrote: no exception but the user's error, and its promises hold.

With -m slow over 10,000 cases: 2,500 for each of three readers of text, and 3,000 replies of a server. Else 500 of
each, the same ones at each run.
"""

import json
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="needs `pip install hypothesis`")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from engine.errors import UserError  # noqa: E402
from masking import mask  # noqa: E402
from rewards import answer_reward, boxed, exact_match, recall_reward  # noqa: E402
from rollout import READ_PROMPT, Sampler, encode_prompt, fill  # noqa: E402
from tasks.evaluate import f1_score, substring_match  # noqa: E402
from tasks.questions import load_questions, load_search  # noqa: E402
from tasks.retrieval import Http, read_passages  # noqa: E402
from tasks.search import SEARCH  # noqa: E402
from text.chunking import cut_chunks  # noqa: E402
from text.corpus import load_passages, split_paragraphs  # noqa: E402
from text.matching import MASK, occurrences  # noqa: E402

ROOT = Path(__file__).parents[1]
# Pieces that mean something to some reader, among any characters, halves of surrogate pairs included.
PIECES = [
    "\\boxed{", "{", "}", "<search>", "</search>", "<memory>", "</memory>", "[MASK]", "[TARGET]", "<|im_start|>",
    "<eos>", "</s>", "1,000", "-1.5", "the ", "\n\n", "\r", "\0", "\ufeff", "\u202e", "שלום", "👩‍👩‍👧", "e\u0301", "ﬁ",
    "İ", "ß", "'s",
]
any_text = st.lists(st.sampled_from(PIECES) | st.text(max_size=6) | st.characters(), max_size=12).map("".join)


def fuzz(cases: int, *strategies):
    """Calls the function below it with so many random inputs."""
    how = settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    return lambda check: how(given(*strategies)(check))()


def few_or_many(few: int, many: int):
    """A test of few cases, and a slow one of many."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


@few_or_many(500, 2500)
def test_answers(cases):
    """Scores stay in 0..1, an empty prediction scores nothing, and what a box holds was in the text."""

    @fuzz(cases, any_text, any_text)
    def check(prediction, gold):
        inside = boxed(prediction)
        assert inside is None or f"\\boxed{{{inside}}}" in prediction
        for answer in (inside, prediction, "", None):
            scores = [score(answer, [gold]) for score in (exact_match, f1_score, substring_match)]
            scores.append(answer_reward(answer, [[gold]]))
            assert all(0 <= float(score) <= 1 for score in scores) and (answer or not any(scores))
        assert recall_reward(prediction, gold) in (0, 1)
        found = SEARCH.search(prediction)
        assert bool(found) == ("</search>" in prediction.partition("<search>")[2])
        assert not found or "</search>" not in found[1]


@few_or_many(500, 2500)
def test_masking(cases):
    """Spans are in order and inside, and after masking no occurrence is left."""

    @fuzz(cases, any_text, any_text)
    def check(passage, entity):
        spans = occurrences(passage, entity)
        assert all(0 <= a < b <= len(passage) for a, b in spans) and spans == sorted(spans)
        # text.corpus leaves out entities without a letter or digit at both ends: "0!" in "0!0!" is whole only once.
        if spans and not occurrences(MASK, entity) and entity[:1].isalnum() and entity[-1:].isalnum():
            assert not occurrences(mask(passage, entity), entity)
        assert "".join("".join(split_paragraphs(passage, 3)).split()) == "".join(passage.split())


@few_or_many(500, 2500)
def test_prompts(cases, tokenizer):
    """Text in a slot opens no turn and closes no slot, and a chunk is never longer than asked."""
    cut = Sampler(None, None, tokenizer, None).cut

    @fuzz(cases, st.text(max_size=40) | any_text)
    def check(content):
        if any(0xD800 <= ord(c) < 0xE000 for c in content):  # no tokenizer takes half a character; files can't hold any
            return
        prompt = fill(READ_PROMPT, problem="p", memory=content, section=content)
        assert prompt.count("<memory>") == prompt.count("</memory>") == prompt.count("</section>") == 1
        ids = encode_prompt(tokenizer, prompt)
        assert tokenizer.eos_token_id not in ids and tokenizer.pad_token_id not in ids
        chunks = cut_chunks(content, [], tokenizer, 32)
        assert "".join(chunks) == content

        def tokens(text):
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        assert all(tokens(chunk) <= 32 for chunk in chunks) and tokens(cut(content, 5)) <= 10


row = any_text.map(lambda t: json.dumps({"title": t[:5], "text": t}).encode())


def test_files(tmp_path):
    """Any bytes under any suffix: passages with text, or a user's error."""

    @fuzz(200, st.lists(st.binary(max_size=30) | row, max_size=4), st.sampled_from(["jsonl", "json", "txt", "parquet"]))
    def check(lines, suffix):
        file = tmp_path / f"corpus.{suffix}"
        file.write_bytes(b"\n".join(lines))
        try:
            passages = load_passages(str(file))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert passages and all(p.text.strip() and isinstance(p.title, str) for p in passages)


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_odd_but_legal_passages(tmp_path, suffix, capsys):
    """A line of 5 MB, NUL, wrong UTF-8, right-to-left text, emoji and bare numbers: taken, or left out and counted."""
    texts = ["word " * 1_000_000, "a\0b Ada Lovelace", "שלום עולם", "👩‍👩‍👧 🎉", "1 2 3 1999", ""]
    for n, content in enumerate(texts):
        body = json.dumps({"title": f"t{n}", "text": content}, ensure_ascii=False) if suffix == "jsonl" else content
        (tmp_path / f"{n}.{suffix}").write_text(body)
    (tmp_path / f"x.{suffix}").write_bytes(b'{"title": "x", "text": "caf\xe9"}' if suffix == "jsonl" else b"caf\xe9")
    passages = load_passages(str(tmp_path))
    assert [p.text.strip() for p in passages] == [t.strip() for t in texts[:-1]]
    assert "1 not UTF-8" in capsys.readouterr().err


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
def encoded(value) -> bytes:
    return json.dumps(value).encode()


# Records of each layout, with one field as it should be and now and then as anything else.
named = any_text.filter(str.strip)
titled = st.lists(st.tuples(named, st.lists(named, min_size=1, max_size=2)), min_size=1, max_size=2)
paragraph = st.fixed_dictionaries({"title": named, "paragraph_text": named, "is_supporting": st.booleans() | anything})
asked = {"question": named, "answer": named | st.lists(named, max_size=2)}
LAYOUTS = [
    titled.map(lambda own: {"context": own, "supporting_facts": [[own[0][0], 0]]}),
    st.lists(paragraph, min_size=1, max_size=2).map(lambda own: {"paragraphs": own}),
    st.fixed_dictionaries({"input": named, "answers": st.lists(named, min_size=1), "context": named}),
    st.fixed_dictionaries({"title": any_text, "text": any_text}), st.fixed_dictionaries({"contents": any_text}),
]


@st.composite
def records(draw) -> bytes:
    """A JSON record of some layout; in a third of them one field is spoilt."""
    record = draw(st.sampled_from(LAYOUTS).flatmap(lambda own: own)) | draw(st.fixed_dictionaries(asked))
    if draw(st.integers(0, 2)) == 0:
        record[draw(st.sampled_from(sorted(record)))] = draw(anything)
    return encoded(record)


def test_files_of_records(tmp_path):
    """Any records: questions with answers, passages with text, or a user's error that names the file."""
    file, taken = tmp_path / "records.jsonl", []

    @fuzz(200, st.lists(records() | anything.map(encoded), min_size=1, max_size=2))
    def check(lines):
        file.write_bytes(b"\n".join(lines))
        for read in (load_questions, load_search, read_passages):
            try:
                found = read(file)
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
            else:
                assert len(found) == len(lines)
                taken.append(read)

    assert set(taken) == {load_questions, load_search, read_passages}


@st.composite
def replies(draw) -> bytes:
    """What Search-R1's server answers to one query; in half of them something is spoilt."""
    hit = {"document": {"contents": draw(any_text)}, "score": 1.0}
    reply = {"result": [[hit] * draw(st.integers(0, 3))]}
    spoilt = draw(st.sampled_from([None, None, None, reply, hit, hit["document"], "bytes"]))
    if spoilt == "bytes":
        return encoded(reply)[draw(st.integers(0, 40)) :]
    if spoilt is not None:
        spoilt[draw(st.sampled_from(sorted(spoilt)))] = draw(anything)
    return encoded(reply)


@few_or_many(500, 3000)
def test_replies(cases):
    """Whatever a server answers: a list of passages that a tokenizer takes, or a user's error that names the server."""
    retriever, taken = Http("http://127.0.0.1:9/retrieve"), []

    @fuzz(cases, st.binary(max_size=60) | anything.map(encoded) | replies())
    def check(body):
        retriever._post = lambda asked: body
        try:
            (found,) = retriever.search(["who?"], 2)
        except UserError as error:
            assert "http://127.0.0.1:9/retrieve" in str(error) and "\n" not in str(error)
        else:
            assert len(found) <= 2 and all(passage.keys() == {"title", "text"} for passage in found)
            taken.extend(f"{passage['title']} {passage['text']}".encode() for passage in found)  # no half characters

    assert len(taken) > cases / 20
