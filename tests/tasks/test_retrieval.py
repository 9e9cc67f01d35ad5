"""tasks/retrieval.py: Dense against cosines by hand; what is kept on disk; the client against a scripted server."""

import http.server
import json
import math
import os
import random
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from retrieval_data import VOCABULARY, WORDS, lines, some_passages
from transformers import AutoModel

from engine.errors import UserError
from tasks import retrieval
from tasks.retrieval import Dense, Http, Local, contents, open_retriever, read_passages, split_contents
from text.bm25 import BM25


# ---- passages ----


def test_local_gives_the_passages_of_the_positions():
    """search is the index's, with titles, texts and scores put to it; the passages themselves stay as they were."""
    passages = some_passages(40)
    index = BM25([contents(passage) for passage in passages])
    retriever = Local(index, passages)
    queries = ["w1 w2", "nothing", "w3"]
    for hits, pairs in zip(retriever.search(queries, 5), index.search(queries, 5), strict=True):
        wanted = [(passages[n]["title"], passages[n]["text"], score) for n, score in pairs]
        assert hits == [{"title": title, "text": text, "score": score} for title, text, score in wanted]
    assert all(set(passage) == {"title", "text"} for passage in passages)


def test_contents_can_be_split_again():
    """Title and text come back from the wire's form, for titles without a newline; Search-R1's other forms are read."""
    for passage in some_passages(200, seed=1):
        assert split_contents(contents(passage)) == passage
    assert split_contents(contents({"title": "a\nb", "text": ""})) == {"title": "a b", "text": ""}
    assert split_contents("Plain title\ntext\nmore") == {"title": "Plain title", "text": "text\nmore"}
    assert split_contents("only text") == {"title": "", "text": "only text"}
    assert split_contents('"only title"') == {"title": "only title", "text": ""}


def test_reading_passages(tmp_path):
    """Titles may be missing, Search-R1's contents are taken apart; a bad line is one error with its number."""
    rows = [{"title": "A", "text": "b", "id": 3}, {"text": "c"}, {"id": 1, "contents": '"D"\ne'}]
    file = lines(tmp_path / "c.jsonl", rows)
    file.write_bytes(file.read_bytes() + b"\n  \n")
    assert read_passages(file) == [{"title": "A", "text": "b"}, {"title": "", "text": "c"}, {"title": "D", "text": "e"}]
    no_text = ['{"title": "A"}', '{"text": 3}', '{"title": null, "text": "a"}', '{"contents": []}']
    for bad in ["{", "[]", "3", '"text"', *no_text, "\udcff", "[" * 9**6]:
        file.write_bytes(b'{"text": "fine"}\n\n' + bad.encode(errors="surrogateescape") + b"\n")
        with pytest.raises(UserError, match="line 3"):
            read_passages(file)
    file.write_text("\n")
    for path in (file, tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_passages(path)


def test_the_index_on_disk_is_used_when_texts_are_the_same(tmp_path, monkeypatch):
    """A second open reads the file and builds nothing; a changed passage is another file; a bad call is an error."""
    passages = some_passages(30)
    file = lines(tmp_path / "c.jsonl", passages)
    first = open_retriever("bm25", file, index=tmp_path / "i").search(["w1 w5"], 4)
    assert first[0] and len(list((tmp_path / "i").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(BM25, "save", lambda *_: pytest.fail("built again"))
        assert open_retriever("bm25", file, index=tmp_path / "i").search(["w1 w5"], 4) == first
    lines(file, [{"title": "new", "text": "w1"}, *passages])
    assert open_retriever("bm25", file, index=tmp_path / "i").search(["new"], 4)[0][0]["title"] == "new"
    assert len(list((tmp_path / "i").iterdir())) == 2
    assert isinstance(open_retriever("http://127.0.0.1:1"), Http)
    (tmp_path / "file").write_text("")
    for bad in [("bm52", file), ("bm25",), ("dense", file), ("bm25", file, None, tmp_path / "file")]:
        with pytest.raises(UserError):
            open_retriever(*bad)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    """In a corpus and in a server's answer: what comes out can be encoded."""
    file = tmp_path / "passages.jsonl"
    file.write_text('{"title": "T \\ud83d", "text": "x \\ud83d\\ude00"}\n{"contents": "\\"U\\"\\nhalf \\udc00"}\n')
    assert read_passages(file) == [{"title": "T ?", "text": "x \N{GRINNING FACE}"}, {"title": "U", "text": "half ?"}]
    reply = b'{"result": [[{"document": {"contents": "T\\n\\ud83d"}, "score": 1.0}]]}'
    assert Http("http://127.0.0.1:1/retrieve")._parse(reply, 1, 3) == [[{"title": "T", "text": "?", "score": 1.0}]]


# ---- Dense ----


def vectors_by_hand(folder: str, prefix: list[str], texts: list[str]) -> np.ndarray:
    """(texts, 16): each text alone, in float64, its ids looked up here: the mean over its tokens, made unit length."""
    model, vectors = AutoModel.from_pretrained(folder, dtype=torch.float64).eval(), []
    for text in texts:
        ids = [2, *[VOCABULARY.get(word, 1) for word in prefix + text.split()][:30], 3]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = sum(hidden) / len(ids)
        vectors.append(mean / math.sqrt(sum(x * x for x in mean)))
    return np.array(vectors)


@pytest.mark.parametrize(
    "prefixes, dtype, near", [(False, "float32", 2e-6), (True, "float32", 2e-6), (None, "float16", 2e-3)]
)
def test_dense_is_the_cosine_of_mean_pooled_states(encoder, tmp_path, prefixes, dtype, near):
    """Texts of 1 to 60 words (the encoder takes 30), in batches and blocks: scores equal float64 ones, best first."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices([*WORDS, "unknown"], k=rng.choice([1, 3, 10, 60]))) for _ in range(150)]
    queries = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for _ in range(7)]
    index = Dense(texts, encoder, tmp_path, prefixes, dtype)
    assert index.matrix.dtype == dtype and index.matrix.shape == (150, 16) and isinstance(index.matrix, np.memmap)
    passage, query = (["passage", ":"], ["query", ":"]) if prefixes else ([], [])  # None: the folder's name says no e5
    scores = vectors_by_hand(encoder, query, queries) @ vectors_by_hand(encoder, passage, texts).T  # (7, 150)
    assert np.ptp(scores) > 0.2  # or any order would pass
    for k, block in [(1, 64), (5, 7), (150, 40), (200, 1 << 16)]:
        for n, hits in enumerate(index.search(queries, k, block)):
            assert len({row for row, _ in hits}) == len(hits) == min(k, 150)
            assert all(abs(score - scores[n, row]) < near for row, score in hits)
            assert np.allclose([score for _, score in hits], np.sort(scores[n])[::-1][:k], atol=near)
            assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
    assert index.search([], 3) == []


def test_dense_ties_go_by_position(encoder, tmp_path):
    """Ten equal texts over several blocks: every k is a prefix of the same order. Half a surrogate pair is no crash."""
    index = Dense(["w3"] * 5 + ["w1 w2"] + ["w3"] * 5, encoder, tmp_path, False)
    for k in range(12):
        assert [row for row, _ in index.search(["w3"], k, 4)[0]] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 5][:k]
    assert len(index.search(["\ud83d", ""], 2)[0]) == 2


def test_e5_models_get_their_prefixes_by_name(encoder, tmp_path):
    """A folder called e5-something is given prefixes unless told otherwise; one that only holds the letters isn't."""
    names = {"e5-base-v2": True, "multilingual-e5-small": True, "bge-base": False, "code57": False}
    for name, expected in names.items():
        folder = tmp_path / name
        folder.symlink_to(encoder)
        assert Dense(["w1"], str(folder), tmp_path / "i").prefixes is expected
        assert Dense(["w1"], str(folder), tmp_path / "i", not expected).prefixes is not expected


def test_embeddings_are_made_once(encoder, tmp_path, monkeypatch):
    """A second Dense encodes no passage; other texts, prefixes or weights are another matrix; a failure leaves none."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(encoder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    texts, made, whole = ["w1 w2", "w3"], [], Dense._encode

    def counted(self, prefix, texts, *rest, **more):
        made.append(prefix)
        return whole(self, prefix, texts, *rest, **more)

    monkeypatch.setattr(Dense, "_encode", counted)
    first = Dense(texts, str(folder), tmp_path / "i")
    assert made == ["passage: "]
    assert Dense(texts, str(folder), tmp_path / "i").search(["w3"], 2) == first.search(["w3"], 2)
    assert made.count("passage: ") == 1
    os.utime(folder / "model.safetensors", (1, 1))  # as if it had been trained further
    for other in [(texts,), (["w1", "0 w2"],), (["w10", " w2"],), (texts, True)]:
        Dense(other[0], str(folder), tmp_path / "i", *other[1:])
    assert made.count("passage: ") == 5 == len(list((tmp_path / "i").iterdir()))
    monkeypatch.setattr(Dense, "_encode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Dense(["new"], str(folder), tmp_path / "i")
    assert len(list((tmp_path / "i").iterdir())) == 5
    with pytest.raises(UserError, match="encoder .*nowhere: not one"):
        Dense(texts, str(tmp_path / "nowhere"), tmp_path / "i")


def test_dense_over_a_corpus(encoder, tmp_path):
    """open_retriever("dense") gives passages, nearest first, with their cosines: a passage's own contents find it."""
    passages = [{"title": f"w{n}", "text": f"w{n + 1} w{n + 20}"} for n in range(20)]
    retriever = open_retriever("dense", lines(tmp_path / "c.jsonl", passages), encoder, tmp_path / "i", False)
    found = retriever.search([contents(passages[n]) for n in (4, 17)], 3)
    assert [len(hits) for hits in found] == [3, 3]
    for hits, n in zip(found, (4, 17), strict=True):
        assert {key: hits[0][key] for key in ("title", "text")} == passages[n] and abs(hits[0]["score"] - 1) < 1e-3


# ---- the client ----


class Script(http.server.BaseHTTPRequestHandler):
    """Answers the replies in server.replies one by one, the last again and again, and notes what was asked."""

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
        status, body, *wait = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if wait:
            wait[0].wait(30) if isinstance(wait[0], threading.Event) else time.sleep(wait[0])
        self.send_response(status)
        for name, value in wait[1] if len(wait) > 1 else []:
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body.encode())
        except OSError:  # a client that has timed out
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def script():
    """A server to be given replies [(status, body, seconds or event to wait for, headers), ...] at .url."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script) as server:
        server.asked, server.replies, server.url = [], [], f"http://127.0.0.1:{server.server_address[1]}"
        server.handle_error = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reply(*queries):
    """A server's answer: for each query its [(contents, score), ...]."""
    return json.dumps({"result": [[{"document": {"contents": c}, "score": s} for c, s in hits] for hits in queries]})


def test_the_client_speaks_the_protocol(script):
    """What is sent is Search-R1's request, scores asked for; what comes back is titles, texts and scores, in order."""
    script.replies = [(200, reply([('"A \\"b"\nc\nd', 2), ("E\nf", -0.5)], []))]
    found = Http(script.url).search(["one", "zwei 日本"], 3)
    assert found == [[{"title": 'A \\"b', "text": "c\nd", "score": 2}, {"title": "E", "text": "f", "score": -0.5}], []]
    assert script.asked == [{"queries": ["one", "zwei 日本"], "topk": 3, "return_scores": True, "path": "/retrieve"}]
    Http(script.url + "/other/path").search(["one", "two"], 2)
    assert script.asked[-1]["path"] == "/other/path" and Http(script.url).search([], 3) == [] and len(script.asked) == 2


HIT = '{"document": {"contents": "a"}, "score": 1}'


@pytest.mark.parametrize("body", [
    "", "nonsense", "[]", "null", "{}", '{"result": null}', '{"result": []}', '{"result": [[], []]}',
    '{"result": {"": []}}', '{"result": [null]}', '{"result": [{}]}', '{"result": [""]}', '{"result": [[{}]]}',
    '{"result": [[3]]}',
    '{"result": [[{"contents": "a"}]]}', '{"result": [[{"document": {"contents": "a"}}]]}',
    '{"result": [[{"document": {"contents": 3}, "score": 1}]]}', '{"result": [[{"document": {}, "score": 1}]]}',
    *('{"result": [[' + HIT.replace("1}", score + "}") + "]]}" for score in ('"1"', "NaN", "1e999", "null", "9" * 400)),
    '{"result": [[' + HIT + "," + HIT + "," + HIT + "]]}", '{"result": [[' + HIT + "]]", "[" * 100_000,
])
def test_a_malformed_answer_is_an_error(script, body):
    """Not JSON, wrong counts, missing fields, no numbers, more than asked for: UserError with the URL, asked once."""
    script.replies = [(200, body)]
    with pytest.raises(UserError, match=re.escape(script.url)):
        Http(script.url, pause=0).search(["one"], 2)
    assert len(script.asked) == 1


def test_trouble_of_the_server_is_tried_again(script, monkeypatch):
    """5xx, a time-out and an answer cut short are asked again, after growing pauses; then the good answer is taken."""
    good, over, pauses = reply([("a\nb", 1.0)]), threading.Event(), []
    cut = (200, good[:-1], 0, [("Content-Length", "999")])
    script.replies = [(503, "busy"), (500, ""), (200, good, over), cut, (200, good)]
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
        assert Http(script.url, timeout=2, tries=5, pause=0.1).search(["one"], 1)[0][0]["text"] == "b"
    over.set()
    assert len(script.asked) == 5 and pauses == [0, 0.1, 0.2, 0.4, 0.8]
    script.replies, script.asked[:] = [(502, "the cause")], []
    with pytest.raises(UserError, match=re.escape(script.url) + ".*502.*the cause.*3 tries"):
        Http(script.url, tries=3, pause=0).search(["one"], 1)
    assert len(script.asked) == 3


def test_4xx_is_not_retried(script):
    """4xx fails at the first try, with the server's own reason."""
    script.replies = [(422, '{"detail": "topk is wrong"}')]
    with pytest.raises(UserError, match="422.*topk is wrong"):
        Http(script.url, pause=0).search(["one"], 1)
    assert len(script.asked) == 1


def test_many_queries_go_in_several_requests(script):
    """30 queries: requests that are small enough for any server, and the results in the queries' order."""
    queries = [f"q{n}" for n in range(30)]
    script.replies = [(200, reply(*[[(f"{q}\n", 1)] for q in queries[i : i + 8]])) for i in (0, 8, 16, 24)]
    assert [hits[0]["title"] for hits in Http(script.url).search(queries, 1)] == queries
    assert [q for asked in script.asked for q in asked["queries"]] == queries


def test_a_busy_server_is_asked_again_when_it_says(script):
    """503 with Retry-After is no failed try, however often it comes; after `patience` it is an error."""
    busy = (503, "busy", 0, [("Retry-After", "0")])
    script.replies = [busy] * 9 + [(200, reply([("T\nt", 1)]))]
    client = Http(script.url, tries=2, pause=0.01)
    assert client.search(["one"], 1)[0][0]["title"] == "T" and len(script.asked) == 10
    script.replies = [(503, "busy", 0, [("Retry-After", "1")]), (200, reply([("T\nt", 1)]))]
    began = time.monotonic()
    assert client.search(["one"], 1) and time.monotonic() - began >= 1
    script.replies = [(503, "busy", 0, [("Retry-After", "9")])]
    with pytest.raises(UserError, match="503"):
        Http(script.url, tries=2, pause=0.01, patience=0.5).search(["one"], 1)


def test_a_search_may_take_longer_than_a_connection(script):
    """The wait for an answer is not the one for a connection; where that is over, it is an error."""
    script.replies = [(200, reply([("T\nt", 1)]), 0.6)]
    assert Http(script.url, timeout=5, connecting=0.2, tries=1).search(["one"], 1)[0][0]["title"] == "T"
    with pytest.raises(UserError, match="timed out"):
        Http(script.url, timeout=0.2, tries=1).search(["one"], 1)


def test_nobody_there():
    """A closed port is a clear error after the tries; addresses that are none are refused before anything is sent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets it meanwhile
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        with pytest.raises(UserError, match=f"{url} could not be reached.*2 tries.*python -m tasks.retrieval_server"):
            Http(url, tries=2, pause=0.01).search(["one"], 1)
    odd = ["http://", "http://:80", "http://a:99999", "http://[::1", "http://a b", "http://ä"]
    for bad in ["", "localhost:8000", "ftp://a/b", "file:///etc/passwd", *odd]:
        with pytest.raises(UserError, match="not a URL"):
            Http(bad)


def test_a_proxy_is_not_asked_for_this_machine(script, monkeypatch):
    """With a proxy in the environment, other machines are asked through it, and 127.0.0.1 and localhost without it."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", script.url)
    script.replies = [(200, reply([]))]
    for url in ("http://192.0.2.1/", script.url, script.url.replace("127.0.0.1", "localhost")):
        assert Http(url, tries=1).search(["one"], 1) == [[]]
    assert [asked["path"] for asked in script.asked] == ["http://192.0.2.1/retrieve", "/retrieve", "/retrieve"]
