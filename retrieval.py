"""Passages for a query, from three retrievers that answer alike; knows nothing of agents.

    retriever = open_retriever("bm25", "passages.jsonl")                            # words, in memory
    retriever = open_retriever("dense", "passages.jsonl", model="intfloat/e5-base-v2")    # any encoder of the hub
    retriever = open_retriever("http://127.0.0.1:8000/retrieve")                    # a server of Search-R1's protocol
    retriever.search(["who wrote Emma?"], 3)    # -> [[{"title", "text", "score"}, ... best first], ... one a query]

BM25 and Dense are indices over texts, which answer with positions; Local puts the passages to the positions; Http asks
a server, and this one is such a server:

    python retrieval.py serve --corpus passages.jsonl [--retriever dense --model NAME] [--port 8000]
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from array import array
from collections import Counter
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import UserError, run

WORD = re.compile(r"\w+")


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k greatest of `scores` (n,), greatest first; equal scores by position."""
    some = np.arange(len(scores))
    if 0 < k < len(scores):  # all that tie with the k-th stay in, or equal scores would come in no fixed order
        some = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return some[np.argsort(-scores[some], kind="stable")][:k]


# ---- by words ----------------------------------------------------------------------------------------


class BM25:
    """Okapi BM25 (Robertson and Zaragoza, 2009) with Lucene's idf, log(1 + (N - df + 0.5) / (df + 0.5)), never negative.

    A posting is (passage, weight): the whole score of one term in one passage is computed when the index is
    built, so a search only adds up the postings of its terms. Postings of term t lie at starts[t]:starts[t + 1].
    """

    def __init__(self, texts, k1: float = 1.5, b: float = 0.75):
        self.terms = {}  # term -> id
        term_ids, counts, distinct, lengths = array("i"), array("i"), array("i"), array("i")
        for text in tqdm(texts, desc="BM25 index", unit=" passages", delay=5, mininterval=1):
            words = Counter(WORD.findall(text.lower()))
            lengths.append(words.total())
            distinct.append(len(words))
            term_ids.extend([self.terms.setdefault(term, len(self.terms)) for term in words])
            counts.extend(words.values())
        term_ids, counts, distinct, lengths = (np.asarray(a, np.int32) for a in (term_ids, counts, distinct, lengths))
        self.size = len(lengths)
        frequency = np.bincount(term_ids, minlength=len(self.terms))  # (terms,): in how many passages
        idf = np.log1p((self.size - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.sum() / max(self.size, 1), 1e-9))
        by_term = np.argsort(term_ids, kind="stable")  # stable: within a term, passages stay in order
        self.postings = np.repeat(np.arange(self.size, dtype=np.int32), distinct)[by_term]
        self.weights = np.empty(len(by_term), np.float32)
        for start in range(0, len(by_term), 1 << 22):  # in blocks: float64 for all postings at once is gigabytes
            block = slice(start, start + (1 << 22))
            count = counts[by_term[block]]
            self.weights[block] = idf[term_ids[by_term[block]]] * count * (k1 + 1) / (count + norm[self.postings[block]])
        self.starts = np.concatenate([[0], np.cumsum(frequency)])

    def search(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        """For each query its k best passages, [(index, score), ...], best first; equal scores by index.

        A passage that shares no word with the query is never returned, so there may be fewer than k. A word counts as
        often as the query has it.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = np.zeros(self.size, np.float32)
        for word, count in Counter(WORD.findall(query.lower())).items():
            if (term := self.terms.get(word)) is not None:
                span = slice(self.starts[term], self.starts[term + 1])
                scores[self.postings[span]] += count * self.weights[span]  # a passage stands once in a term's postings
        found = np.flatnonzero(scores)
        found = found[best(scores[found], k)]
        return [(int(passage), float(scores[passage])) for passage in found]

    def save(self, file: str | Path) -> None:
        """Write the index as one .npz without pickles; it has its name only once it is whole."""
        file, terms = Path(file), np.frombuffer("\n".join(self.terms).encode(), np.uint8)  # no newline in a \w+
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        with fresh.open("wb") as out:  # given a name, savez would append .npz to it
            np.savez(out, size=self.size, terms=terms, starts=self.starts, postings=self.postings, weights=self.weights)
        fresh.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> "BM25":
        """The index that `save` wrote. Raises UserError if there is none, or if it is damaged."""
        index = cls([])
        try:
            with np.load(file, allow_pickle=False) as saved:
                index.size, words = int(saved["size"]), saved["terms"].tobytes().decode()
                index.starts, index.postings, index.weights = saved["starts"], saved["postings"], saved["weights"]
        except Exception as error:  # the file, the zip in it, the arrays in that: each fails in its own ways
            raise UserError(f"{file}: not a BM25 index ({error}); remove it, and it will be built again") from None
        index.terms = {term: n for n, term in enumerate(words.split("\n") if words else [])}
        return index


# ---- by meaning --------------------------------------------------------------------------------------


class Dense:
    """Cosine similarity of embeddings: the mean of an encoder's last hidden states over the attention mask (as E5 pools).

    `model` is a folder or hub name for AutoModel. `prefixes` puts "query: " and "passage: " before the texts, which
    E5 models need; None: if the model's name says e5. The matrix, (texts, width) of `dtype`, is made once, under a name
    made of model and texts in the folder `index`, and read from disk as searches need it. Raises UserError.
    """

    def __init__(self, texts: list[str], model: str, index: str | Path, prefixes: bool | None = None, dtype="float16"):
        import torch  # here, as whoever searches by words or over HTTP should not wait for them
        from transformers import AutoModel, AutoTokenizer

        e5 = re.search(r"(?<![a-z0-9])e5(?![a-z0-9])", Path(model).name.lower())
        self.prefixes = bool(e5) if prefixes is None else prefixes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, dtype=torch.float32).to(self.device).eval()
        except Exception as error:  # the name, the network, the files: all the user's to mend
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"encoder {model}: not one that AutoModel can load ({why})") from None
        self.longest = min(512, self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        shape = (len(texts), self.model.config.hidden_size)
        # a model folder may be trained further under the same name: its files' sizes and times are part of the name
        stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(model).glob("*")) if f.is_file()]
        file = Path(index) / f"dense-{digest((model, stamp, self.prefixes, dtype, self.longest), texts)}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            try:
                matrix = np.lib.format.open_memmap(fresh, "w+", dtype, shape)
                self._encode("passage: ", texts, matrix, progress=f"embeddings ({Path(model).name})")
                matrix.flush()
                fresh.replace(file)
            finally:
                fresh.unlink(missing_ok=True)
        self.matrix = np.load(file, mmap_mode="r")

    def _encode(self, prefix: str, texts: list[str], out: np.ndarray, progress: str | None = None, batch: int = 64) -> None:
        """Write the unit vector of texts[n] to out[n]; texts of similar length share a batch, for little padding."""
        import torch

        order = np.argsort([-len(text) for text in texts], kind="stable")  # longest first: short memory shows at once
        for start in tqdm(range(0, len(order), batch), desc=progress, disable=progress is None):
            some = order[start : start + batch]
            lines = [(prefix if self.prefixes else "") + texts[n] for n in some]
            lines = [whole(line) for line in lines]
            tokens = self.tokenizer(lines, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            tokens = tokens.to(self.device)
            with torch.inference_mode():
                hidden = self.model(**tokens).last_hidden_state  # (batch, tokens, width)
                mask = tokens["attention_mask"].unsqueeze(-1)  # (batch, tokens, 1)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # (batch, width)
                out[some] = torch.nn.functional.normalize(mean).cpu().numpy()

    def search(self, queries: list[str], k: int, block: int = 1 << 16) -> list[list[tuple[int, float]]]:
        """For each query its k nearest texts, [(index, cosine), ...], best first; equal scores by index.

        Every text is compared, `block` rows at a time, so that the matrix may be larger than memory.
        """
        vectors = np.empty((len(queries), self.matrix.shape[1]), np.float32)
        self._encode("query: ", queries, vectors)
        rows, scores = [[] for _ in queries], [[] for _ in queries]
        for start in range(0, len(self.matrix), block):
            for n, row in enumerate(vectors @ self.matrix[start : start + block].astype(np.float32).T):  # (queries, block)
                near = best(row, k)
                rows[n].extend((start + near).tolist())
                scores[n].extend(row[near].tolist())
        return [[(rows[n][i], scores[n][i]) for i in best(np.array(scores[n]), k)] for n in range(len(queries))]


# ---- passages ----------------------------------------------------------------------------------------


def contents(passage: dict) -> str:
    """What is indexed and what goes over the wire: the title in quotes on a line of its own, then the text (Search-R1)."""
    return '"{}"\n{}'.format(passage["title"].replace("\n", " "), passage["text"])


def split_contents(joined: str) -> dict:
    """{"title", "text"} of what `contents` made. A single line without quotes is a text without a title."""
    title, newline, text = joined.partition("\n")
    quoted = len(title) > 1 and title[0] == title[-1] == '"'
    if not newline and not quoted:
        return {"title": "", "text": joined}
    return {"title": title[1:-1] if quoted else title, "text": text}


def whole(text: str) -> str:
    """`text` with "?" for each half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def read_passages(file: str | Path) -> list[dict]:
    """The passages of a .jsonl, a line {"title", "text"} each, or {"contents"} as Search-R1's corpora have it.

    Raises UserError with the line's number.
    """
    passages = []
    try:
        with Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    row = split_contents(row["contents"]) if "contents" in row else row
                    passages.append({"title": whole(row.get("title", "")), "text": whole(row["text"])})
    except OSError as error:
        raise UserError(f"--corpus {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--corpus {file}: line {number} is not JSON ({error})") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(f'--corpus {file}: line {number} is not {{"title": "...", "text": "..."}}') from None
    if not passages:
        raise UserError(f"--corpus {file}: holds no passage")
    return passages


def digest(settings: tuple, texts) -> str:
    """A name for what is made of these texts with these settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:24]


class Local:
    """The passages of an index: position n of `index` is passages[n], a dict {"title", "text"}."""

    def __init__(self, index: BM25 | Dense, passages: list[dict]):
        self.index, self.passages = index, passages

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text", "score"}, best first."""
        return [[self.passages[n] | {"score": score} for n, score in found] for found in self.index.search(queries, k)]


BM25_FORMAT = 1  # raise when BM25 counts words or writes its file differently: it is part of the file's name


def open_retriever(
    retriever: str, corpus: str | Path | None = None, model: str | None = None, index: str | Path = "runs/index",
    prefixes: bool | None = None,
) -> "Local | Http":  # fmt: skip
    """`bm25` or `dense` over the .jsonl `corpus`, or the URL of a server. Indices are kept in the folder `index`.

    `model` and `prefixes` are Dense's. Raises UserError.
    """
    if "://" in retriever:
        return Http(retriever)
    if retriever not in ("bm25", "dense"):
        raise UserError(f"--retriever {retriever}: neither bm25 nor dense, nor the http://... of a server")
    if not corpus or (retriever == "dense" and not model):
        raise UserError(f"--retriever {retriever} needs --corpus FILE.jsonl" + " and an encoder (--model NAME; in memtrain.py and eval.py --encoder NAME)" * (retriever == "dense"))
    passages = read_passages(corpus)
    try:
        if retriever == "dense":
            return Local(Dense([contents(passage) for passage in passages], model, index, prefixes), passages)
        file = Path(index) / f"bm25-{digest((BM25_FORMAT,), map(contents, passages))}.npz"
        if file.exists():
            return Local(BM25.load(file), passages)
        bm25 = BM25(map(contents, passages))
        bm25.save(file)
        return Local(bm25, passages)
    except OSError as error:
        raise UserError(f"--index {index}: {error.strerror or error}; name a folder that can be written") from None


# ---- over HTTP ---------------------------------------------------------------------------------------
MAX_BODY, MAX_QUERIES, MAX_TOPK = 1 << 20, 1024, 100  # what one request may hold: bytes, queries, passages a query


class Http:
    """A server that speaks Search-R1's protocol (MEM1's too; search_r1/search/retrieval_server.py there).

    `timeout` in seconds for each wait on the socket. A server that is away, too slow or answers 5xx is asked `tries`
    times, after pauses of `pause`, 2 `pause`, 4 `pause`, ... seconds.
    """

    def __init__(self, url: str, timeout: float = 30, tries: int = 4, pause: float = 0.5):
        try:
            parts = urllib.parse.urlsplit(url)
            known = re.fullmatch(r"https?://[!-~]+", url) and parts.hostname and parts.port != 0
        except ValueError:  # an impossible port or address
            known = False
        if not known:
            raise UserError(f"--retriever {url}: not a URL like http://127.0.0.1:8000/retrieve")
        self.url = url if parts.path.strip("/") else urllib.parse.urlunsplit(parts._replace(path="/retrieve"))
        self.timeout, self.tries, self.pause = timeout, tries, pause
        # a proxy set in the environment would look for 127.0.0.1 on its own machine
        loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        self.opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * loopback)

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text", "score"}, best first. Raises UserError."""
        found = []
        for start in range(0, len(queries), 64):  # servers refuse bodies that are too large
            some = list(queries[start : start + 64])
            body = json.dumps({"queries": some, "topk": k, "return_scores": True})  # its server breaks without the scores
            found += self._parse(self._post(body.encode()), len(some), k)
        return found

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.tries):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                try:
                    with self.opener.open(request, timeout=self.timeout) as reply:
                        return reply.read()
                except urllib.error.HTTPError as error:
                    with error:
                        why = f"answered {error.code}: {error.read(500).decode(errors='replace').strip() or error.reason}"
                    if error.code < 500:
                        raise UserError(f"{self.url} {why}") from None
            except (OSError, HTTPException, UnicodeError) as error:  # refused, reset, timed out, cut short, no such host
                why = f"could not be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
        raise UserError(
            f"{self.url} {why} ({self.tries} tries); see that the server runs there and is well, or start one with "
            "`python retrieval.py serve --corpus FILE.jsonl`"
        )

    def _parse(self, reply: bytes, n: int, k: int) -> list[list[dict]]:
        found = []
        try:
            result = json.loads(reply)["result"]
            if not isinstance(result, list) or len(result) != n:
                raise ValueError(f"result is no list of {n}, one for each query")
            for hits in result:
                if not isinstance(hits, list) or len(hits) > k:
                    raise ValueError(f"the result of a query is no list of at most {k}")
                found.append([split_contents(whole(hit["document"]["contents"])) | {"score": hit["score"]} for hit in hits])
                if not all(math.isfinite(passage["score"]) for passage in found[-1]):
                    raise ValueError("a score is not finite")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{self.url} does not answer as a Search-R1 server should: {why}; is this its URL?") from None
        return found


def read_request(body: bytes) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores) of a request, with Search-R1's defaults: 3 passages, no scores. Raises ValueError."""
    try:
        request = json.loads(body)
        queries, k, scores = request.get("queries"), request.get("topk"), request.get("return_scores", False)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'the body must be JSON, {{"queries": [...], "topk": 3, "return_scores": true}}: {error}') from None
    if not isinstance(queries, list) or len(queries) > MAX_QUERIES or not all(isinstance(query, str) for query in queries):
        raise ValueError(f"queries must be a list of at most {MAX_QUERIES} strings")
    k = 3 if k is None else k
    if type(k) is not int or not 1 <= k <= MAX_TOPK:  # a bool is an int too
        raise ValueError(f"topk must be a whole number from 1 to {MAX_TOPK}")
    if not isinstance(scores, bool):
        raise ValueError("return_scores must be true or false")
    return queries, k, scores


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for each wait on the socket

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/retrieve":
            return self.refuse(404, "no such path; POST to /retrieve")
        if not re.fullmatch(r"[0-9]{1,15}", length):
            return self.refuse(400 if length else 411, "the request needs a Content-Length")
        if int(length) > MAX_BODY:
            return self.refuse(413, f"the body has {length} bytes, at most {MAX_BODY} are read; send fewer queries at once")
        try:
            queries, k, scores = read_request(self.rfile.read(int(length)))
        except ValueError as error:
            return self.refuse(400, str(error))
        try:
            with self.server.searching:
                found = self.server.retriever.search(queries, k)
        except Exception:
            traceback.print_exc()
            return self.refuse(500, "the search failed; the server's log says why")
        if scores:
            result = [[{"document": {"contents": contents(hit)}, "score": hit["score"]} for hit in hits] for hits in found]
        else:
            result = [[{"contents": contents(hit)} for hit in hits] for hits in found]
        self.answer(200, {"result": result})

    def do_GET(self) -> None:
        self.refuse(405 if self.path == "/retrieve" else 404, "only POST to /retrieve is answered")

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "POST")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status: int, reason: str) -> None:
        """Answer {"error": reason}, then read what the client still sends: closing on it would destroy the answer."""
        self.answer(status, {"error": reason})
        self.connection.settimeout(1)
        end = time.monotonic() + self.timeout
        while self.connection.recv(1 << 16) and time.monotonic() < end:
            pass

    def log_message(self, *_) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A thread for each connection, but one search at a time: fast tokenizers break when threads share them, and on a
    large corpus each search holds a score for every passage."""

    request_queue_size, daemon_threads = 1024, True

    def __init__(self, host: str, port: int):
        self.retriever, self.searching = None, threading.Lock()
        super().__init__((host, port), Handler, bind_and_activate=False)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hangs up is no error
            super().handle_error(request, client_address)


def serve(a: argparse.Namespace) -> None:
    """Answer POST /retrieve until SIGINT or SIGTERM. Raises UserError for a bad corpus or a port that is taken."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with Server(a.host, a.port) as server:
        try:
            server.server_bind()  # before the corpus is read: a taken port should not cost minutes
            server.retriever = open_retriever(a.retriever, a.corpus, a.model, a.index, a.prefixes)
            server.server_activate()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--host {a.host} --port {a.port}: {why}; stop what runs there, or name another port") from None
        host, port = server.server_address[:2]
        print(f"serving {len(server.retriever.passages)} passages at http://{host}:{port}/retrieve", flush=True)
        try:
            server.serve_forever()
        finally:
            server.searching.acquire(timeout=10)  # a thread inside torch while Python shuts down would abort it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("serve", help="answer Search-R1's protocol over a corpus")
    command.add_argument("--corpus", required=True, metavar="FILE.jsonl", help='lines of {"title", "text"} or {"contents"}')
    command.add_argument("--retriever", default="bm25", choices=["bm25", "dense"])
    command.add_argument("--model", help="dense: folder or hub name of an encoder, such as intfloat/e5-base-v2")
    prefixes = 'dense: put "query: " and "passage: " before the texts (default: if the name says e5)'
    command.add_argument("--prefixes", action=argparse.BooleanOptionalAction, help=prefixes)
    command.add_argument("--index", default="runs/index", help="folder that keeps the indices (%(default)s)")
    command.add_argument("--host", default="127.0.0.1", help="%(default)s: this machine only; there is no password")
    command.add_argument("--port", type=int, default=8000, help="%(default)s; 0 for any that is free")
    serve(parser.parse_args())


if __name__ == "__main__":
    run(main)
