"""Passages for a query, from three retrievers that answer alike; knows nothing of agents.

    retriever = open_retriever("bm25", "passages.jsonl")                                  # words, in memory
    retriever = open_retriever("dense", "passages.jsonl", encoder="intfloat/e5-base-v2")  # any encoder of the hub
    retriever = open_retriever("http://127.0.0.1:8000/retrieve")                          # a Search-R1 server
    retriever.search(["who wrote Emma?"], 3)    # -> [[{"title", "text", "score"}, ... best first], ... one a query]

BM25 and Dense are indices over texts, which answer with positions; Local puts the passages to the positions; Http asks
a server, such as retrieval_server.py.
"""

import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.errors import UserError, first_line
from engine.files import digest, must_write, whole_file
from text.bm25 import BM25, best
from text.rows import read_rows

# ---- by meaning --------------------------------------------------------------------------------------


class Dense:
    """Cosine similarity of embeddings: the mean of an encoder's last hidden states, as E5 pools.

    `encoder` is a folder or hub name for AutoModel. `prefixes` puts "query: " and "passage: " before the texts, which
    E5 models need; None: if the encoder's name says e5. The matrix, (texts, width) of `dtype`, is made once, under a
    name made of encoder and texts in the folder `index`, and read from disk as searches need it. Raises UserError.
    """

    def __init__(
        self, texts: list[str], encoder: str, index: str | Path, prefixes: bool | None = None, dtype: str = "float16"
    ):
        import torch  # here, as whoever searches by words or over HTTP should not wait for them
        from transformers import AutoModel, AutoTokenizer

        e5 = re.search(r"(?<![a-z0-9])e5(?![a-z0-9])", Path(encoder).name.lower())
        self.prefixes = bool(e5) if prefixes is None else prefixes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(encoder)
            self.model = AutoModel.from_pretrained(encoder, dtype=torch.float32).to(self.device).eval()
        except Exception as error:  # the name, the network, the files: all the user's to mend
            raise UserError(f"--encoder {encoder}: not one that AutoModel can load ({first_line(error)})") from None
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        self.longest = min(512, self.tokenizer.model_max_length, positions)
        shape = (len(texts), self.model.config.hidden_size)
        # An encoder may be trained further in its folder: its files' sizes and times are part of the matrix' name.
        files = [file for file in sorted(Path(encoder).glob("*")) if file.is_file()]
        stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        file = Path(index) / f"dense-{digest((encoder, stamp, self.prefixes, dtype, self.longest), texts)}.npy"
        if must_write(file):
            with whole_file(file) as fresh:
                matrix = np.lib.format.open_memmap(fresh, "w+", dtype, shape)
                self._encode("passage: ", texts, matrix, progress=f"embeddings ({Path(encoder).name})")
                matrix.flush()
        self.matrix = np.load(file, mmap_mode="r")

    def _encode(
        self, prefix: str, texts: list[str], out: np.ndarray, progress: str | None = None, batch: int = 64
    ) -> None:
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
            part = self.matrix[start : start + block].astype(np.float32)  # (block, width)
            for n, row in enumerate(vectors @ part.T):  # (queries, block)
                near = best(row, k)
                rows[n].extend((start + near).tolist())
                scores[n].extend(row[near].tolist())
        return [[(rows[n][i], scores[n][i]) for i in best(np.array(scores[n]), k)] for n in range(len(queries))]


# ---- passages -------------------------------------------------------------------------------------


def contents(passage: dict) -> str:
    """The text that is indexed and sent: the title in quotes on a line of its own, then the text (Search-R1)."""
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
        for row, where in read_rows(Path(file)):
            row = split_contents(row["contents"]) if "contents" in row else row
            passages.append({"title": whole(row.get("title", "")), "text": whole(row["text"])})
    except UserError as error:
        raise UserError(f"--corpus {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(f'--corpus {where} is not {{"title": "...", "text": "..."}}') from None
    if not passages:
        raise UserError(f"--corpus {file}: holds no passage")
    return passages


class Local:
    """The passages of an index: position n of `index` is passages[n], a dict {"title", "text"}."""

    def __init__(self, index: BM25 | Dense, passages: list[dict]):
        self.index, self.passages = index, passages

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text", "score"}, best first."""
        return [[self.passages[n] | {"score": score} for n, score in found] for found in self.index.search(queries, k)]


BM25_FORMAT = 1  # raise when BM25 counts words or writes its file differently: it is part of the file's name


def open_retriever(
    retriever: str, corpus: str | Path | None = None, encoder: str | None = None, index: str | Path = "runs/index",
    prefixes: bool | None = None,
) -> "Local | Http":
    """`bm25` or `dense` over the .jsonl `corpus`, or the URL of a server. Indices are kept in the folder `index`.

    `encoder` and `prefixes` are Dense's. Raises UserError.
    """
    if "://" in retriever:
        return Http(retriever)
    if retriever not in ("bm25", "dense"):
        raise UserError(f"--retriever {retriever}: neither bm25 nor dense, nor the http://... of a server")
    if not corpus or (retriever == "dense" and not encoder):
        more = " and --encoder NAME" if retriever == "dense" else ""
        raise UserError(f"--retriever {retriever} needs --corpus FILE.jsonl{more}")
    passages = read_passages(corpus)
    try:
        if retriever == "dense":
            return Local(Dense([contents(passage) for passage in passages], encoder, index, prefixes), passages)
        file = Path(index) / f"bm25-{digest((BM25_FORMAT,), map(contents, passages))}.npz"
        if not must_write(file):
            return Local(BM25.load(file), passages)
        bm25 = BM25(map(contents, passages))
        bm25.save(file)
        return Local(bm25, passages)
    except OSError as error:
        raise UserError(f"{index}, where indices are kept: {error.strerror or error}; it must be writable") from None


# ---- over HTTP ------------------------------------------------------------------------------------


A_REQUEST = 8  # queries: a request should take a server seconds, not minutes


class Http:
    """A server that speaks Search-R1's protocol (MEM1's too; search_r1/search/retrieval_server.py there).

    It has `connecting` seconds to take a connection, and `timeout` seconds for each further wait on the socket. A
    server that is away, too slow or answers 5xx is asked `tries` times, after pauses of `pause`, 2 `pause`, 4 `pause`,
    ... seconds. One that is busy (503 with Retry-After) is asked again when it says, for `patience` seconds.
    """

    def __init__(
        self, url: str, timeout: float = 300, tries: int = 4, pause: float = 0.5, connecting: float = 5,
        patience: float = 1800,
    ):
        try:
            parts = urllib.parse.urlsplit(url)
            known = re.fullmatch(r"https?://[!-~]+", url) and parts.hostname and parts.port != 0
        except ValueError:  # an impossible port or address
            known = False
        if not known:
            raise UserError(f"--retriever {url}: not a URL like http://127.0.0.1:8000/retrieve")
        self.url = url if parts.path.strip("/") else urllib.parse.urlunsplit(parts._replace(path="/retrieve"))
        self.tries, self.pause, self.patience = tries, pause, patience
        self.connecting = min(connecting, timeout)
        # a proxy set in the environment would look for 127.0.0.1 on its own machine
        loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        handlers = [urllib.request.ProxyHandler({})] if loopback else []
        self.opener = urllib.request.build_opener(*handlers, *patient_handlers(timeout))

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text", "score"}, best first. Raises UserError."""
        found = []
        for start in range(0, len(queries), A_REQUEST):
            some = list(queries[start : start + A_REQUEST])
            # Search-R1's server breaks without return_scores.
            body = json.dumps({"queries": some, "topk": k, "return_scores": True})
            found += self._parse(self._post(body.encode()), len(some), k)
        return found

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        attempt, give_up = 0, time.monotonic() + self.patience
        while attempt < self.tries:
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            attempt += 1
            try:
                try:
                    with self.opener.open(request, timeout=self.connecting) as reply:
                        return reply.read()
                except urllib.error.HTTPError as error:
                    wait = error.headers.get("Retry-After", "") if error.code == 503 else ""
                    if re.fullmatch(r"[0-9]{1,4}", wait) and time.monotonic() + int(wait) < give_up:
                        error.close()
                        time.sleep(max(int(wait), 0.05))
                        attempt = 0  # it is there, and well
                        continue
                    with error:
                        reason = error.read(500).decode(errors="replace").strip() or error.reason
                        why = f"answered {error.code}: {reason}"
                    if error.code < 500:
                        raise UserError(f"{self.url} {why}") from None
            except (OSError, HTTPException, UnicodeError) as error:  # refused, reset, timed out, cut, no such host
                why = f"could not be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
        raise UserError(
            f"{self.url} {why} ({self.tries} tries); see that the server runs there and is well, or start one with "
            "`python -m tasks.retrieval_server --corpus FILE.jsonl`"
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
                passages = [split_contents(whole(hit["document"]["contents"])) for hit in hits]
                found.append([passage | {"score": hit["score"]} for passage, hit in zip(passages, hits, strict=True)])
                if not all(math.isfinite(passage["score"]) for passage in found[-1]):
                    raise ValueError("a score is not finite")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{self.url} does not answer as a Search-R1 server should: {why}; is this its URL?"
            ) from None
        return found


def patient_handlers(timeout: float) -> list:
    """urllib's handlers of http and https, whose sockets wait for `timeout` seconds once they are connected."""

    def patient(connection):
        class Patient(connection):
            def connect(self):
                super().connect()
                self.sock.settimeout(timeout)

        return Patient

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(patient(HTTPConnection), request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(patient(HTTPSConnection), request, context=self._context)

    return [PlainHandler, SecureHandler]
