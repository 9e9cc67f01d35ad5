"""tasks/retrieval_server.py: asked by raw sockets, by the client and by many at once; signals and mistakes."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from retrieval_data import lines, some_passages

from engine.errors import UserError
from tasks import retrieval_server
from tasks.retrieval import Http, Local, contents, open_retriever
from text.bm25 import BM25

ROOT = Path(__file__).parents[2]


def start(*arguments):
    """A server as docs/results-real.md starts it."""
    command = [sys.executable, "-m", "tasks.retrieval_server", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def url_of(process) -> str:
    """The URL in the line that a server prints once it answers."""
    line = process.stdout.readline()
    found = re.fullmatch(r"serving \d+ passages at (http://127\.0\.0\.1:\d+/retrieve)\n", line)
    assert found, (line, process.stderr.read())
    return found[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL, the same retriever in this process) of a server over random passages, in a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    corpus = lines(folder / "c.jsonl", some_passages(120))
    process = start("--corpus", corpus, "--port", 0, "--index", folder / "i")
    try:
        yield url_of(process), open_retriever("bm25", corpus, index=folder / "own")
    finally:
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""  # after all that the tests below did to it


def ask(url, content, method="POST", **headers):
    """(status, answer) of one raw request."""
    body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or "{}")


def raw(url, request: bytes, close: bool = True) -> bytes:
    """All that the server answers to these bytes."""
    port = int(re.search(r":(\d+)/", url)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while some := connection.recv(1 << 16):
            answer += some
    return answer


def test_server_and_client_give_what_the_index_gives(served):
    """Random queries, every k, odd characters: the passages and scores of the same retriever in this process."""
    url, local = served
    rng = random.Random(2)
    passages = local.passages
    for k in (1, 3, 100):
        queries = [" ".join(rng.choices(rng.choice(passages)["text"].split() + ["?"], k=4)) for _ in range(20)]
        queries += ["", "\ud800 w1", "\0"]
        found = Http(url).search(queries, k)
        assert found == local.search(queries, k) and sum(map(len, found)) > 20
    assert len(Http(url).search(["w1"] * 1500, 2)) == 1500


def test_the_answer_is_search_r1s(served):
    """The shape to the letter, with scores and without; topk is 3 and scores are off unless asked for, as there."""
    url, local = served
    hits = local.search(["w1 w2"], 4)[0]
    texts = ['"' + hit["title"] + '"\n' + hit["text"] for hit in hits]
    scored = [{"document": {"contents": text}, "score": hit["score"]} for text, hit in zip(texts, hits, strict=True)]
    assert ask(url, {"queries": ["w1 w2"], "topk": 4, "return_scores": True}) == (200, {"result": [scored]})
    plain = [{"contents": text} for text in texts]
    assert ask(url, {"queries": ["w1 w2"], "topk": 4, "return_scores": False}) == (200, {"result": [plain]})
    for unset in ({"topk": None}, {}):
        assert ask(url, {"queries": ["w1 w2"]} | unset) == (200, {"result": [plain[:3]]})
    assert ask(url, {"queries": []}) == (200, {"result": []})


BAD_COUNTS = (0, -1, 101, 10**30, "3", 3.0, True, [3], float("nan"))


@pytest.mark.parametrize("content, why", [
    (b"", "JSON"), (b"{", "JSON"), (b"\xff", "JSON"), (b"[" * 100_000, "JSON"), ([], "JSON"), (3, "JSON"),
    ({}, "queries"), *(({"queries": queries}, "queries") for queries in ("one", [1], [["one"]], None)),
    ({"queries": ["a"] * 1025}, "1024"), *(({"queries": ["a"], "topk": k}, "topk") for k in BAD_COUNTS),
    *(({"queries": ["a"], "return_scores": scores}, "return_scores") for scores in ("yes", 1)),
])
def test_a_bad_request_is_refused_with_its_reason(served, content, why):
    """Malformed JSON, wrong types, too many queries, topk 0 or huge: 400, and a reason in JSON that names the field."""
    status, answer = ask(served[0], content)
    assert status == 400 and why in answer["error"]


def test_a_body_that_is_too_large_is_refused(served):
    """1 MiB + 1 byte and 8 MiB get to read their 413, though the body was never taken; exactly 1 MiB is served."""
    url, _ = served
    for size in ((1 << 20) + 1, 1 << 23):
        status, answer = ask(url, b" " * size)
        assert status == 413 and str(size) in answer["error"]
    small = json.dumps({"queries": ["w1"]}).encode()
    assert ask(url, small + b" " * ((1 << 20) - len(small)))[0] == 200
    with pytest.raises(UserError, match="413"):
        Http(url).search(["w" * (1 << 20)], 1)


def test_wrong_path_method_and_length(served):
    """404, 405 with Allow, 411 and 400, each in JSON; a request line that is none is refused; then it still serves."""
    url, _ = served
    for path in ("/", "/retrieve/x", "/retrieve?topk=3", "/../etc/passwd"):
        status, answer = ask(url.replace("/retrieve", path), {"queries": ["w1"]})
        assert status == 404 and "/retrieve" in answer["error"]
        assert ask(url.replace("/retrieve", path), None, "GET")[0] == 404
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
        assert ask(url, None, method)[0] == 405
    assert b"Allow: POST" in raw(url, b"GET /retrieve HTTP/1.1\r\n\r\n")
    assert b" 411 " in raw(url, b"POST /retrieve HTTP/1.1\r\n\r\n")
    assert b" 411 " in raw(url, b"POST /retrieve HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    for length in (b"-1", b"x", b"1e3", b"9" * 400):
        assert b" 400 " in raw(url, b"POST /retrieve HTTP/1.1\r\nContent-Length: " + length + b"\r\n\r\n")
    assert b" 400 " in raw(url, b"POST /retrieve HTTP/1.1\r\nContent-Length: 50\r\n\r\n{}")  # ends early
    assert b"400" in raw(url, b"\x16\x03\x01 nonsense here now\r\n\r\n")
    assert ask(url, {"queries": ["w1"]})[0] == 200


def test_two_hundred_clients_at_once(served):
    """200 clients ask in the same moment, while 200 more hold silent connections: each gets its own right answer."""
    url, local = served
    port, gate = int(re.search(r":(\d+)/", url)[1]), threading.Barrier(200)

    def client(n):
        gate.wait()
        return ask(url, {"queries": [f"w{n % 60}", f"w{n % 7}"], "topk": 5, "return_scores": True})

    idle = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(200)]
    try:
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(client, range(200)))
    finally:
        for connection in idle:
            connection.close()
    for n, (status, answer) in enumerate(answers):
        hits = local.search([f"w{n % 60}", f"w{n % 7}"], 5)
        right = [[{"document": {"contents": contents(hit)}, "score": hit["score"]} for hit in some] for some in hits]
        assert status == 200 and answer == {"result": right}


@pytest.fixture
def at_hand():
    """(URL, Server) of a server in this process."""
    with retrieval_server.Server("127.0.0.1", 0) as server:
        server.server_bind()
        server.server_activate()
        passages = some_passages(10)
        server.retriever = Local(BM25([contents(passage) for passage in passages]), passages)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/retrieve", server
        server.shutdown()
        thread.join()


def test_silent_clients_are_left(at_hand, monkeypatch):
    """A client that says nothing, or stops amid the header or the body, is hung up on after the time-out."""
    assert retrieval_server.Handler.timeout == 10
    monkeypatch.setattr(retrieval_server.Handler, "timeout", 0.3)
    post = b"POST /retrieve HTTP/1.1\r\nContent-Length: 9"
    for start in (b"", post[:9], post, post + b"\r\n\r\n{"):
        before = time.monotonic()
        assert b" 200 " not in raw(at_hand[0], start, close=False)
        assert 0.2 < time.monotonic() - before < 10


class Held:
    """Finds nothing, once `free` is set, and notes what it was asked."""

    def __init__(self):
        self.asked, self.free = [], threading.Event()

    def search(self, queries, k):
        self.asked += queries
        assert self.free.wait(30)
        return [[] for _ in queries]


def test_a_queue_that_is_too_long_is_a_503_and_eight_clients_are_served(at_hand, monkeypatch):
    """Where two may wait, six of eight at once get a 503; clients that then wait as they are told all get answers."""
    url, server = at_hand
    refused, real = [], retrieval_server.Handler.refuse

    def refuse(self, status, *more):
        refused.append(status)
        if len(refused) >= 6:
            server.retriever.free.set()
        real(self, status, *more)

    def client(n):
        return Http(url, tries=1, patience=60).search([f"{n}-{q}" for q in range(9)], 3)

    monkeypatch.setattr(retrieval_server.Handler, "refuse", refuse)
    monkeypatch.setattr(retrieval_server, "MAX_WAITING", 2)
    with ThreadPoolExecutor(8) as pool:
        server.retriever = Held()
        statuses = list(pool.map(lambda n: ask(url, {"queries": ["a"]})[0], range(8)))
        assert sorted(statuses) == [200] * 2 + [503] * 6 == [200] * 2 + refused
        server.retriever, refused[:] = Held(), []
        found = list(pool.map(client, range(8)))
    assert [len(hits) for hits in found] == [9] * 8 and set(refused) == {503} and server.waiting == 0


def test_nobody_searches_for_a_client_that_is_gone(at_hand):
    """A request whose client has hung up is dropped when its turn comes, and in the middle of many queries."""
    url, server = at_hand
    server.retriever = held = Held()
    port = int(re.search(r":(\d+)/", url)[1])
    for waiting, name in enumerate(("first", "second"), 1):
        body = json.dumps({"queries": [f"{name} {n}" for n in range(80)]}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            end = time.monotonic() + 30
            while (server.waiting < waiting or not held.asked) and time.monotonic() < end:
                time.sleep(0.01)
    held.free.set()  # the first eight queries are searched for, and both clients are gone
    assert ask(url, {"queries": ["third"]})[0] == 200
    assert held.asked == [*(f"first {n}" for n in range(8)), "third"]


def test_a_search_that_fails_is_a_500(at_hand, capfd):
    """The client gets a 500 in JSON, the log the cause, the next request its answer; searches never overlap."""
    url, server = at_hand
    whole, running = server.retriever, []

    class Failing:
        def search(self, queries, k):
            running.append(1)
            time.sleep(0.01)
            assert len(running) == 1, "two at once"
            running.clear()
            return whole.search(queries, k) if queries != ["bad"] else 1 / 0

    server.retriever = Failing()
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda q: ask(url, {"queries": [q]})[0], ["w1", "bad"] * 8))
    assert statuses == [200, 500] * 8 and "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server(tmp_path, number):
    """Exit code 0, nothing on stderr, although a client holds a connection; the client then gets one clear error."""
    process = start("--corpus", lines(tmp_path / "c.jsonl", some_passages(5)), "--port", 0, "--index", tmp_path)
    url = url_of(process)
    client = Http(url, tries=2, pause=0.01)
    assert client.search(["w1"], 1)
    with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", url)[1]))):
        process.send_signal(number)
        assert process.communicate(timeout=5)[1] == "" and process.returncode == 0
    with pytest.raises(UserError, match=f"{url} could not be reached.*2 tries"):
        client.search(["w1"], 1)


def test_a_dense_server_under_load(encoder, tmp_path):
    """Eight clients at once get what Dense gives here; a signal while it computes still ends it with exit code 0."""
    passages = [{"title": f"w{n % 50}", "text": f"w{n * 7 % 50} w{n % 13}"} for n in range(500)]
    corpus = lines(tmp_path / "c.jsonl", passages)
    local = open_retriever("dense", corpus, encoder, tmp_path, True)
    dense = ["--retriever", "dense", "--encoder", encoder, "--prefixes"]
    process = start("--corpus", corpus, *dense, "--index", tmp_path, "--port", 0)
    url = url_of(process)
    queries = [[f"w{n} w{n + 1} w{2 * n}"] * 40 for n in range(8)]

    def ask_on(some):
        while True:
            Http(url, tries=1).search(some, 3)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda some: Http(url).search(some, 3), queries))
        for hits, some in zip(found, queries, strict=True):
            right = [hit["score"] for hit in local.search(some[:1], 3)[0]]
            assert all(np.allclose([hit["score"] for hit in each], right, atol=1e-5) for each in hits)
        busy = [pool.submit(ask_on, some) for some in queries]
        time.sleep(0.3)
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0 and all(isinstance(client.exception(), UserError) for client in busy)


def test_a_killed_server_is_a_clear_error(tmp_path):
    """Killed while it is being asked again and again: the client ends in UserError, not in an empty result."""
    process = start("--corpus", lines(tmp_path / "c.jsonl", some_passages(5)), "--port", 0, "--index", tmp_path)
    client = Http(url_of(process), tries=3, pause=0.01)
    threading.Timer(0.2, process.kill).start()
    end = time.monotonic() + 20
    with pytest.raises(UserError, match="3 tries"):
        while time.monotonic() < end:
            assert len(client.search(["w1", "w2"], 2)) == 2
    process.communicate()


def test_a_users_mistake_is_one_line_and_exit_code_2(served, tmp_path):
    """A port that is taken or impossible, a corpus that is missing or bad, dense without a model: no traceback."""
    good = lines(tmp_path / "c.jsonl", some_passages(5))
    bad = lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"no": "text"}])
    port = re.search(r":(\d+)/", served[0])[1]
    cases = [
        (["--corpus", good, "--port", port], port), (["--corpus", good, "--port", 70000], "70000"),
        (["--corpus", good, "--port", 0, "--host", "no.such.host.invalid"], "no.such.host"),
        (["--corpus", tmp_path / "none.jsonl", "--port", 0], "none.jsonl"), (["--corpus", bad, "--port", 0], "line 2"),
        (["--corpus", good, "--port", 0, "--retriever", "dense"], "--encoder"),
    ]
    processes = [start(*arguments, "--index", tmp_path / "i") for arguments, _ in cases]
    for process, (arguments, word) in zip(processes, cases, strict=True):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == "" and word in err, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
