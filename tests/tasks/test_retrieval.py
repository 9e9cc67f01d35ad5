"""retrieval.py: BM25 and Dense against the formulas written out; client and server against raw sockets and each other."""

import http.server
import json
import math
import os
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
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

import retrieval
from errors import UserError
from retrieval import BM25, Dense, Http, Local, contents, open_retriever, read_passages, split_contents

HERE = Path(__file__).parent.parent
DATA = HERE.parent / "shared/data"
POOL, QUESTIONS = DATA / "wiki/hotpot_pool.jsonl", DATA / "qa/hotpotqa_dev_first500_pooled_retrieval.jsonl"


def lines(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def some_passages(n: int, seed: int = 0) -> list[dict]:
    """n passages of random words, with what text has: quotes, newlines, other scripts, empty titles, equal passages."""
    rng = random.Random(seed)
    words = [*(f"w{i}" for i in range(60)), "Zürich", "日本", '"', "a\nb", "don't", "_x_", "😀"]
    passages = []
    for _ in range(n):
        title = " ".join(rng.choices(words, k=rng.randrange(4))).replace("\n", " ")
        passages.append({"title": title, "text": " ".join(rng.choices(words, k=rng.randrange(1, 30)))})
    return passages + passages[:3]


# ---- BM25 ----


def reference(texts, query, k1=1.5, b=0.75):
    docs = [re.findall(r"\w+", t.lower()) for t in texts]
    mean = sum(map(len, docs)) / len(docs)
    scores = []
    for doc in docs:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holders = sum(word in d for d in docs)
            if holders and word in doc:
                idf = math.log(1 + (len(docs) - holders + 0.5) / (holders + 0.5))
                f = doc.count(word)
                score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(doc) / mean))
        scores.append(score)
    return scores


def test_scores_and_order_equal_the_formula():
    """Random texts and queries: same scores to 1e-4, same order where scores differ, never a passage without a match."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 30))) for _ in range(60)]
    index = BM25(texts)
    for _ in range(40):
        query = " ".join(rng.choices([*words, "unknown"], k=rng.randrange(1, 8))).upper()
        expected, k = reference(texts, query), rng.randrange(1, 70)
        (found,) = index.search([query], k)
        assert len(found) == min(k, sum(s > 0 for s in expected))
        for n, score in found:
            assert abs(score - expected[n]) < 1e-4
        best = sorted((s for s in expected if s > 0), reverse=True)[:k]
        assert all(abs(score - wanted) < 1e-4 for (_, score), wanted in zip(found, best))


def test_several_queries_and_a_tie():
    """One result list a query, in order; equal scores go by position; nothing matches nothing."""
    index = BM25(["red apple", "green pear", "red apple"])
    red, none = index.search(["red", "blue"], 5)
    assert [n for n, _ in red] == [0, 2] and none == []


def test_ties_at_the_cut_come_by_position():
    """Ten equal passages around a better one: every k gives a prefix of the same order."""
    index = BM25(["red fish"] * 5 + ["red red fish"] + ["red fish"] * 5 + ["blue"])
    order = [5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    for k in range(14):
        assert [n for n, _ in index.search(["red"], k)[0]] == order[:k]


def test_other_parameters_and_texts_without_words():
    """k1 and b mean what they mean in the formula; an empty corpus, an empty text and an empty query find nothing."""
    texts = ["a b b", "b c", "a a a a d e f", ""]
    for k1, b in [(0.9, 0.4), (1.2, 0.0), (2.0, 1.0)]:
        for n, score in BM25(texts, k1, b).search(["a b"], 4)[0]:
            assert abs(score - reference(texts, "a b", k1, b)[n]) < 1e-5
    assert BM25(["", "..."]).search(["one"], 2) == [[]] == BM25([]).search(["one"], 2) and BM25(["one"]).search([""], 1) == [[]]


class PlainBM25:
    """A BM25 of dictionaries, as one writes it first: k1 1.5, b 0.75, lower-cased words, float64."""

    def __init__(self, texts):
        documents = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
        lengths = [sum(document.values()) for document in documents]
        mean, holders = sum(lengths) / len(lengths), defaultdict(list)
        for n, document in enumerate(documents):
            for word, count in document.items():
                holders[word].append((n, count * 2.5 / (count + 1.5 * (0.25 + 0.75 * lengths[n] / mean))))
        self.holders, self.size = holders, len(documents)

    def search(self, query, k):
        scores = defaultdict(float)
        for word in re.findall(r"\w+", query.lower()):
            found = self.holders.get(word, [])
            for n, weight in found:
                scores[n] += math.log(1 + (self.size - len(found) + 0.5) / (len(found) + 0.5)) * weight
        return sorted(scores, key=lambda n: (-scores[n], n))[:k]


@pytest.mark.skipif(not POOL.exists(), reason="needs ../shared/data, which is not here")
def test_recall_on_hotpotqa_is_that_of_a_plain_bm25(tmp_path):
    """500 questions over 4,937 passages: recall@10 of gold titles at least the plain BM25's and 0.85, and soon."""
    rows = [json.loads(line) for line in QUESTIONS.open()]
    retriever = open_retriever("bm25", POOL, index=tmp_path)
    start = time.monotonic()
    found = retriever.search([row["question"] for row in rows], 10)
    seconds = time.monotonic() - start
    passages = [json.loads(line) for line in POOL.open()]
    plain = PlainBM25([f"{passage['title']} {passage['text']}" for passage in passages])
    mine, theirs = [], []
    for row, hits in zip(rows, found, strict=True):
        gold = set(row["gold_titles"])
        mine.append(len(gold & {hit["title"] for hit in hits}) / len(gold))
        theirs.append(len(gold & {passages[n]["title"] for n in plain.search(row["question"], 10)}) / len(gold))
    assert np.mean(mine) >= max(np.mean(theirs), 0.85) and seconds < 20  # measured 0.877 and 0.1 seconds
    print(f"recall@10 {np.mean(mine):.4f}, plain {np.mean(theirs):.4f}, {seconds:.2f} seconds")


def test_a_saved_index_finds_the_same(tmp_path):
    """Save and load give the same scores, to the bit, for random corpora and the empty one; a second save replaces the first."""
    file = tmp_path / "folder/index.npz"
    for seed, texts in enumerate([[], ["", "?"], [contents(p) for p in some_passages(80)], ["ein", "日本 Zürich"]]):
        index = BM25(texts)
        index.save(file)
        loaded = BM25.load(file)
        queries = ["w1 w2 w2", "日本", "zÜrich ein", "", *texts[:5]]
        assert loaded.search(queries, 7) == index.search(queries, 7) and loaded.size == len(texts), seed
        assert [f.name for f in file.parent.iterdir()] == ["index.npz"]
    assert loaded.search(["日本"], 1)[0][0][0] == 1


def test_a_damaged_index_is_one_clear_error(tmp_path):
    """Missing, empty, cut short, changed inside, some other file: UserError with the file's name, never a pickle loaded."""
    file = tmp_path / "index.npz"
    with pytest.raises(UserError, match="index.npz"):
        BM25.load(file)
    BM25([contents(p) for p in some_passages(50)]).save(file)
    good = file.read_bytes()
    middle = len(good) // 2
    changed = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for bad in [b"", good[:middle], good[:-30], changed, b"{}", b"\x93NUMPY", b"\x80\x04N."]:
        file.write_bytes(bad)
        with pytest.raises(UserError, match="index.npz: not a BM25 index"):
            BM25.load(file)
    np.savez(file, size=1)
    with pytest.raises(UserError, match="remove it"):
        BM25.load(file)


# ---- passages ----


def test_local_gives_the_passages_of_the_positions():
    """search is the index's, with titles, texts and scores put to it; the passages themselves stay as they were."""
    passages = some_passages(40)
    index = BM25([contents(passage) for passage in passages])
    retriever = Local(index, passages)
    queries = ["w1 w2", "nothing", "w3"]
    for hits, pairs in zip(retriever.search(queries, 5), index.search(queries, 5), strict=True):
        assert hits == [{"title": passages[n]["title"], "text": passages[n]["text"], "score": score} for n, score in pairs]
    assert all(set(passage) == {"title", "text"} for passage in passages)


def test_contents_can_be_split_again():
    """Title and text come back from the wire's form for any title without a newline; Search-R1's other forms are read too."""
    for passage in some_passages(200, seed=1):
        assert split_contents(contents(passage)) == passage
    assert split_contents(contents({"title": "a\nb", "text": ""})) == {"title": "a b", "text": ""}
    assert split_contents("Plain title\ntext\nmore") == {"title": "Plain title", "text": "text\nmore"}
    assert split_contents("only text") == {"title": "", "text": "only text"}
    assert split_contents('"only title"') == {"title": "only title", "text": ""}


def test_reading_passages(tmp_path):
    """Titles may be missing, Search-R1's contents are taken apart; each kind of bad line is one error with its number."""
    file = lines(tmp_path / "c.jsonl", [{"title": "A", "text": "b", "id": 3}, {"text": "c"}, {"id": 1, "contents": '"D"\ne'}])
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
    """A second open reads the file and builds nothing; a changed passage is another file; a bad call is a clear error."""
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


# ---- Dense ----

WORDS = [f"w{i}" for i in range(50)]
VOCABULARY = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *WORDS])}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random two-layer BERT of width 16 for 32 tokens, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


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


@pytest.mark.parametrize("prefixes, dtype, near", [(False, "float32", 2e-6), (True, "float32", 2e-6), (None, "float16", 2e-3)])
def test_dense_is_the_cosine_of_mean_pooled_states(encoder, tmp_path, prefixes, dtype, near):
    """Texts of 1 to 60 words (the encoder takes 30), in batches and blocks: scores equal float64 by hand, best come first."""
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
    """A folder called e5-something is given prefixes unless told otherwise; other names that only hold the letters are not."""
    for name, expected in [("e5-base-v2", True), ("multilingual-e5-small", True), ("bge-base", False), ("code57", False)]:
        folder = tmp_path / name
        folder.symlink_to(encoder)
        assert Dense(["w1"], str(folder), tmp_path / "i").prefixes is expected
        assert Dense(["w1"], str(folder), tmp_path / "i", not expected).prefixes is not expected


def test_embeddings_are_made_once(encoder, tmp_path, monkeypatch):
    """A second Dense encodes no passage; other texts, prefixes or weights are another matrix; a build that fails leaves nothing."""
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
    assert made == ["passage: "] and Dense(texts, str(folder), tmp_path / "i").search(["w3"], 2) == first.search(["w3"], 2)
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
        time.sleep(wait[0] if wait else 0)
        self.send_response(status)
        self.end_headers()
        try:
            self.wfile.write(body.encode())
        except OSError:  # a client that has timed out
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def script():
    """A server to be given replies [(status, body, seconds to wait), ...]; .url is its address."""
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
    "", "nonsense", "[]", "null", "{}", '{"result": null}', '{"result": []}', '{"result": [[], []]}', '{"result": {"": []}}',
    '{"result": [null]}', '{"result": [{}]}', '{"result": [""]}', '{"result": [[{}]]}', '{"result": [[3]]}',
    '{"result": [[{"contents": "a"}]]}', '{"result": [[{"document": {"contents": "a"}}]]}',
    '{"result": [[{"document": {"contents": 3}, "score": 1}]]}', '{"result": [[{"document": {}, "score": 1}]]}',
    *('{"result": [[' + HIT.replace("1}", score + "}") + "]]}" for score in ('"1"', "NaN", "1e999", "null", "9" * 400)),
    '{"result": [[' + HIT + "," + HIT + "," + HIT + "]]}", '{"result": [[' + HIT + "]]", "[" * 100_000,
])  # fmt: skip
def test_a_malformed_answer_is_an_error(script, body):
    """Not JSON, wrong counts, missing fields, no numbers, more than asked for: UserError naming the URL, asked only once."""
    script.replies = [(200, body)]
    with pytest.raises(UserError, match=re.escape(script.url)):
        Http(script.url, pause=0).search(["one"], 2)
    assert len(script.asked) == 1


def test_trouble_of_the_server_is_tried_again(script):
    """5xx, a time-out and an answer cut short are asked again, after growing pauses; then the good answer is taken."""
    good = (200, reply([("a\nb", 1.0)]))
    script.replies = [(503, "busy"), (500, ""), (200, "late", 1.0), good]
    start = time.monotonic()
    assert Http(script.url, timeout=0.3, pause=0.1).search(["one"], 1)[0][0]["text"] == "b"
    assert len(script.asked) == 4 and 0.1 + 0.2 + 0.4 + 0.3 <= time.monotonic() - start < 10
    script.replies, script.asked[:] = [(502, "the cause")], []
    with pytest.raises(UserError, match=re.escape(script.url) + ".*502.*the cause.*3 tries"):
        Http(script.url, tries=3, pause=0).search(["one"], 1)
    assert len(script.asked) == 3


def test_a_mistake_of_the_client_is_not(script):
    """4xx fails at the first try, with the server's own reason."""
    script.replies = [(422, '{"detail": "topk is wrong"}')]
    with pytest.raises(UserError, match="422.*topk is wrong"):
        Http(script.url, pause=0).search(["one"], 1)
    assert len(script.asked) == 1


def test_many_queries_go_in_several_requests(script):
    """150 queries: requests that are small enough for any server, and the results in the queries' order."""
    queries = [f"q{n}" for n in range(150)]
    script.replies = [(200, reply(*[[(f"{q}\n", 1)] for q in queries[i : i + 64]])) for i in (0, 64, 128)]
    assert [hits[0]["title"] for hits in Http(script.url).search(queries, 1)] == queries
    assert [q for asked in script.asked for q in asked["queries"]] == queries


def test_nobody_there():
    """A closed port is a clear error after the tries; addresses that are none are refused before anything is sent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets it meanwhile
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        with pytest.raises(UserError, match=f"{url} could not be reached.*2 tries.*retrieval.py serve"):
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


# ---- the server ----


def start(*arguments):
    command = [sys.executable, str(HERE / "retrieval.py"), "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    assert ask(url, {"queries": ["w1 w2"], "topk": None}) == ask(url, {"queries": ["w1 w2"]}) == (200, {"result": [plain[:3]]})
    assert ask(url, {"queries": []}) == (200, {"result": []})


@pytest.mark.parametrize("content, why", [
    (b"", "JSON"), (b"{", "JSON"), (b"\xff", "JSON"), (b"[" * 100_000, "JSON"), ([], "JSON"), (3, "JSON"), ({}, "queries"),
    ({"queries": "one"}, "queries"), ({"queries": [1]}, "queries"), ({"queries": [["one"]]}, "queries"),
    ({"queries": None}, "queries"), ({"queries": ["a"] * 1025}, "1024"), *(({"queries": ["a"], "topk": k}, "topk")
    for k in (0, -1, 101, 10**30, "3", 3.0, True, [3], float("nan"))), ({"queries": ["a"], "return_scores": "yes"}, "return_scores"),
    ({"queries": ["a"], "return_scores": 1}, "return_scores"),
])  # fmt: skip
def test_a_bad_request_is_refused_with_its_reason(served, content, why):
    """Malformed JSON, wrong types, too many queries, topk 0 or huge: 400, and a reason in JSON that names the field."""
    status, answer = ask(served[0], content)
    assert status == 400 and why in answer["error"]


def test_a_body_that_is_too_large_is_refused(served):
    """1 MiB + 1 byte and 8 MiB get to read their 413, though the body was never taken; just under 1 MiB is served."""
    url, _ = served
    for size in ((1 << 20) + 1, 1 << 23):
        status, answer = ask(url, b" " * size)
        assert status == 413 and str(size) in answer["error"]
    small = json.dumps({"queries": ["w1"]}).encode()
    assert ask(url, small + b" " * ((1 << 20) - len(small)))[0] == 200
    with pytest.raises(UserError, match="413"):
        Http(url).search(["w" * (1 << 20)], 1)


def test_wrong_path_method_and_length(served):
    """404, 405 with Allow, 411 and 400, each in JSON; a request line that is none is refused too; then it still serves."""
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
    """200 clients ask in the same moment, while 200 more hold connections that say nothing: each gets its own right answer."""
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
def at_hand(monkeypatch):
    """(URL, Server) of a server in this process that waits 0.3 seconds for silent clients."""
    monkeypatch.setattr(retrieval.Handler, "timeout", 0.3)
    with retrieval.Server("127.0.0.1", 0) as server:
        server.server_bind()
        server.server_activate()
        passages = some_passages(10)
        server.retriever = Local(BM25([contents(passage) for passage in passages]), passages)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/retrieve", server
        server.shutdown()
        thread.join()


def test_silent_clients_are_left(at_hand):
    """A client that says nothing, or stops amid the header or the body, has its connection closed after the time-out."""
    post = b"POST /retrieve HTTP/1.1\r\nContent-Length: 9"
    for start in (b"", post[:9], post, post + b"\r\n\r\n{"):
        before = time.monotonic()
        assert b" 200 " not in raw(at_hand[0], start, close=False)
        assert 0.2 < time.monotonic() - before < 10


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
    corpus = lines(tmp_path / "c.jsonl", [{"title": f"w{n % 50}", "text": f"w{n * 7 % 50} w{n % 13}"} for n in range(500)])
    local = open_retriever("dense", corpus, encoder, tmp_path, True)
    process = start("--corpus", corpus, "--retriever", "dense", "--model", encoder, "--prefixes", "--index", tmp_path, "--port", 0)
    url = url_of(process)
    queries = [[f"w{n} w{n + 1} w{2 * n}"] * 40 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda some: Http(url).search(some, 3), queries))
        for hits, some in zip(found, queries, strict=True):
            right = [hit["score"] for hit in local.search(some[:1], 3)[0]]
            assert all(np.allclose([hit["score"] for hit in each], right, atol=1e-5) for each in hits)
        busy = [pool.submit(lambda some=some: [Http(url, tries=1).search(some, 3) for _ in range(10_000)]) for some in queries]
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
    good, bad = lines(tmp_path / "c.jsonl", some_passages(5)), lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"no": "text"}])
    port = re.search(r":(\d+)/", served[0])[1]
    cases = [
        (["--corpus", good, "--port", port], port), (["--corpus", good, "--port", 70000], "70000"),
        (["--corpus", good, "--port", 0, "--host", "no.such.host.invalid"], "no.such.host"),
        (["--corpus", tmp_path / "none.jsonl", "--port", 0], "none.jsonl"), (["--corpus", bad, "--port", 0], "line 2"),
        (["--corpus", good, "--port", 0, "--retriever", "dense"], "--model"),
    ]  # fmt: skip
    processes = [start(*arguments, "--index", tmp_path / "i") for arguments, _ in cases]
    for process, (arguments, word) in zip(processes, cases, strict=True):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err, err


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    """In a corpus and in a server's answer: what comes out can be encoded."""
    file = tmp_path / "passages.jsonl"
    file.write_text('{"title": "T \\ud83d", "text": "x \\ud83d\\ude00"}\n{"contents": "\\"U\\"\\nhalf \\udc00"}\n')
    assert read_passages(file) == [{"title": "T ?", "text": "x \N{GRINNING FACE}"}, {"title": "U", "text": "half ?"}]
    reply = b'{"result": [[{"document": {"contents": "T\\n\\ud83d"}, "score": 1.0}]]}'
    assert Http("http://127.0.0.1:1/retrieve")._parse(reply, 1, 3) == [[{"title": "T", "text": "?", "score": 1.0}]]
