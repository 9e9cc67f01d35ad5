"""tasks/retrieval.py: passages by BM25; the client against a stand-in of a Search-R1 server."""

import json
import re
import socket
import threading
import time

import pytest
from search_server import reply, search_r1, serving

from engine.errors import UserError
from tasks.retrieval import Http, Local, open_retriever, read_passages, split_contents

PASSAGES = [
    {"title": "Zürich", "text": 'A city.\nIts lake is "long".'}, {"title": "", "text": "日本 has lakes and a city."},
    {"title": "Ulm", "text": "It lies on the Danube."},
]


# ---- in memory -------------------------------------------------------------------------------------------


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_bm25_over_a_file(tmp_path):
    """Words of titles and texts count, the best passage comes first, and nothing is written beside the corpus."""
    retriever = open_retriever("bm25", jsonl(tmp_path / "c.jsonl", PASSAGES))
    zurich, japan, ulm = PASSAGES
    found = retriever.search(["the lake of Zürich", "ZÜRICH", "rivers", "danube"], 2)
    assert found == [[zurich, ulm], [zurich], [], [ulm]]
    assert retriever.search(["city lakes"], 1) == [[japan]] and retriever.search(["city lakes"], 9) == [[japan, zurich]]
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("wrong, why", [
    ("dense", "--retriever dense: neither bm25 nor a"),
    ("bm52", "--retriever bm52: neither bm25 nor a"),
    *((url, "neither bm25 nor a URL") for url in ("", "localhost:8000", "ftp://a/b", "file:///etc/passwd")),
    *((url, "neither bm25 nor a URL") for url in ("http://", "http://:80", "http://a:99999", "http://[::1")),
])
def test_a_retriever_that_is_none(tmp_path, wrong, why):
    """Other names, and addresses that can be none, are refused before anything is read or sent."""
    with pytest.raises(UserError, match=re.escape(why)):
        open_retriever(wrong, tmp_path / "none.jsonl")


def test_reading_passages(tmp_path):
    """Titles may be missing, Search-R1's contents are taken apart; a bad line is one error with its number."""
    rows = [{"title": "A", "text": "b", "id": 3}, {"text": "c"}, {"id": 1, "contents": '"D"\ne'}, {"text": "\ud83d"}]
    file = jsonl(tmp_path / "c.jsonl", rows)
    file.write_bytes(file.read_bytes() + b"\n  \n")
    found = [tuple(passage.values()) for passage in read_passages(file)]
    assert found == [("A", "b"), ("", "c"), ("D", "e"), ("", "?")]  # half a surrogate pair is replaced
    no_text = ['{"title": "A"}', '{"text": 3}', '{"title": null, "text": "a"}', '{"contents": []}']
    for bad in ["{", "[]", "3", '"text"', *no_text, "\udcff", "[" * 9**6]:
        file.write_bytes(b'{"text": "fine"}\n\n' + bad.encode(errors="surrogateescape") + b"\n")
        with pytest.raises(UserError, match="line 3"):
            read_passages(file)
    file.write_text("\n")
    for path in (file, tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_passages(path)


@pytest.mark.parametrize("contents, title, text", [
    ('"A "B""\nc\nd', 'A "B"', "c\nd"), ("Plain title\ntext\nmore", "Plain title", "text\nmore"),
    ("only text", "", "only text"), ('"only title"', "only title", ""), ('""\ntext', "", "text"), ('"', "", '"'),
])
def test_forms_of_contents(contents, title, text):
    """A title, quoted or not, on a line of its own; one line is a text, or a quoted title."""
    assert split_contents(contents) == {"title": title, "text": text}


# ---- the client ------------------------------------------------------------------------------------------


class Script:
    """Gives the replies one by one, the last again and again, and notes what was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, request, path):
        self.asked.append(request | {"path": path})
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


GOOD = (200, reply(["T\nt"]))
FOUND = [[{"title": "T", "text": "t"}]]


def asked_of(script, path="", **how):
    """What the client makes of one query."""
    with serving(script) as url:
        return Http(url + path, **how).search(["one"], 2)


def test_a_server_gives_what_bm25_gives_here():
    """Titles and texts come back over the wire as they are."""
    local, queries = Local(PASSAGES), ["lake", "日本 city", "nothing", 'Danube "Ulm"']
    with serving(search_r1(local)) as url:
        assert open_retriever(url, None).search(queries, 2) == local.search(queries, 2)


def test_the_client_speaks_the_protocol():
    """One request of Search-R1's form for all queries, scores asked for; order is kept; a path that is given stays."""
    script = Script((200, reply(['"A "b""\nc\nd', "E\n\ud83d"], [])))
    with serving(script) as url:
        found = Http(url).search(["one", "zwei 日本"], 3)
        assert found == [[{"title": 'A "b"', "text": "c\nd"}, {"title": "E", "text": "?"}], []]
        Http(url + "/other/path").search(["one", "two"], 2)
    first, second = script.asked
    assert first == {"queries": ["one", "zwei 日本"], "topk": 3, "return_scores": True, "path": "/retrieve"}
    assert second["path"] == "/other/path"


HIT = '{"document": {"contents": "a"}, "score": 1}'


@pytest.mark.parametrize("body", [
    "", "nonsense", "[]", "null", "{}", '{"result": null}', '{"result": {"": []}}', '{"result": [null]}',
    '{"result": [{}]}', '{"result": [""]}', '{"result": [[{}]]}', '{"result": [[3]]}', '{"result": [["ab"]]}',
    '{"result": [[{"text": "a"}]]}', '{"result": [[{"document": {"contents": 3}, "score": 1}]]}',
    '{"result": [[{"document": {}, "score": 1}]]}', '{"result": [[' + HIT + "]]", "[" * 100_000,
    '{"result": []}', '{"result": [[], []]}',  # wrong counts
])
def test_a_malformed_answer_is_an_error(body):
    """Not JSON, wrong counts, missing fields: one line with the URL and how the answer begins, after one try."""
    script = Script((200, body))
    with pytest.raises(UserError, match="http://127.0.0.1:[0-9]+/retrieve does not answer") as caught:
        asked_of(script)
    assert len(script.asked) == 1 and body[:20] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("hits", [
    [{"document": {"contents": text}} for text in "abc"], [{"contents": text, "id": "1"} for text in "abc"],
    [{"document": {"contents": text}, "score": 1, "url": "x"} for text in "abcd"],
])
def test_web_servers_give_no_score_and_more_than_was_asked(hits):
    """As Search-R1's own do: the first k are taken."""
    with serving(Script((200, json.dumps({"result": [hits]})))) as url:
        assert Http(url).search(["one"], 2) == [[{"title": "", "text": "a"}, {"title": "", "text": "b"}]]


def test_trouble_is_tried_again_after_growing_pauses(monkeypatch):
    """5xx, no answer in time, a connection that is cut before or within the answer; then the good answer is taken."""
    over, pauses = threading.Event(), []
    script = Script((500, ""), (503, "busy"), "slow", None, (200, GOOD[1][:-1], {"Content-Length": "999"}), GOOD)

    def answer(request, path):
        found = script(request, path)
        return over.wait(30) and GOOD if found == "slow" else found

    monkeypatch.setattr(time, "sleep", pauses.append)
    assert asked_of(answer, timeout=1, tries=6, pause=0.1) == FOUND
    over.set()
    assert len(script.asked) == 6 and pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch):
    """The pause is what Retry-After says in seconds, at most the time-out; a date in it is not read."""
    pauses = []
    busy = [(503, "busy", {"Retry-After": when}) for when in ("7", "86400", "Wed, 21 Oct 2026 07:28:00 GMT")]
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert asked_of(Script(*busy, GOOD), timeout=60, pause=0.1) == FOUND
    assert pauses == pytest.approx([7, 60, 0.4])


def test_trouble_that_stays_is_an_error():
    """As many tries as are allowed, and one line with the address, the server's own reason and the count."""
    script = Script((502, "the\ncause"))
    with pytest.raises(UserError, match=r"http://127.0.0.1:[0-9]+/retrieve answered 502: the cause \(3 tries\); check"):
        asked_of(script, tries=3, pause=0)
    assert len(script.asked) == 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets it meanwhile
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        with pytest.raises(UserError, match=rf"{url} could not be reached: .*refused.* \(2 tries\); check"):
            Http(url, tries=2, pause=0).search(["one"], 1)
    for no_host in ("http://a..b", "http://a b"):
        with pytest.raises(UserError, match=f"{no_host}/retrieve could not be reached"):
            Http(no_host, tries=1).search(["one"], 1)


@pytest.mark.parametrize("status, body", [(404, "Not Found"), (422, '{"detail": "topk is wrong"}')])
def test_what_is_refused_is_told_at_once(status, body):
    """4xx is not tried again, and brings the server's own reason."""
    script = Script((status, body))
    with pytest.raises(UserError, match=re.escape(f"/retrieve answered {status}: {body}")):
        asked_of(script)
    assert len(script.asked) == 1


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    """With a proxy in the environment, other machines are asked through it, and 127.0.0.1 and localhost without it."""
    script = Script((200, reply([])))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(script) as url:
        monkeypatch.setenv("http_proxy", url)
        for asked in ("http://192.0.2.1/", url, url.replace("127.0.0.1", "localhost")):
            assert Http(asked, tries=1).search(["one"], 1) == [[]]
    assert [asked["path"] for asked in script.asked] == ["http://192.0.2.1/retrieve", "/retrieve", "/retrieve"]
