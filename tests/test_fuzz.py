"""Random input to what reads text that others wrote: no exception but the user's error, and its promises hold.

With -m slow over 10,000 cases: 2,500 for each of three readers of text, and 3,000 requests. Else 500 of each, the same
ones at each run.
"""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="needs `pip install hypothesis`")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from engine.errors import UserError  # noqa: E402
from masking import mask  # noqa: E402
from rewards import boxed, exact_match, f1_score, objective_scores, recall_reward, substring_match  # noqa: E402
from rollout import READ_PROMPT, cut_text, encode_prompt, fill  # noqa: E402
from tasks.retrieval import open_retriever  # noqa: E402
from tasks.retrieval_server import MAX_TOPK, Server, read_request  # noqa: E402
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
            scores.append(objective_scores(answer, [[gold]]))
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

        assert all(tokens(chunk) <= 32 for chunk in chunks) and tokens(cut_text(tokenizer, content, 5)) <= 10


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


@pytest.fixture(scope="module")
def url():
    server = Server("127.0.0.1", 0)
    server.server_bind()
    server.retriever = open_retriever("bm25", ROOT / "tiny/passages_all.jsonl")
    server.server_activate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    server.shutdown()


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
with_queries = st.fixed_dictionaries(
    {"queries": st.lists(any_text, max_size=3) | anything},
    optional={"topk": st.integers(-1, 60) | anything, "return_scores": anything},
)


def encoded(value) -> bytes:
    return json.dumps(value).encode()


request = st.binary(max_size=60) | anything.map(encoded) | with_queries.map(encoded)


@few_or_many(450, 2800)
def test_requests(cases):
    """A request is read, or refused with a reason."""

    @fuzz(cases, request)
    def check(body):
        try:
            queries, k, scores = read_request(body)
        except ValueError as error:
            assert str(error)
        else:
            assert all(isinstance(query, str) for query in queries) and 1 <= k <= MAX_TOPK and isinstance(scores, bool)


@few_or_many(50, 200)
def test_the_server_answers_every_request(cases, url):
    """200 with as many results as queries, or 400 with a reason; never 500."""

    @fuzz(cases, request)
    def check(body):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, body), timeout=20) as answer:
                assert len(json.loads(answer.read())["result"]) == len(json.loads(body)["queries"])
        except urllib.error.HTTPError as error:
            with error:
                assert error.code == 400 and json.loads(error.read())["error"]
