"""Passages for a query: by BM25, in memory, or from a Search-R1 server (or MEM1's). Independent of agents.

    retriever = open_retriever("bm25", "passages.jsonl")
    retriever = open_retriever("http://127.0.0.1:8000/retrieve", None)
    retriever.search(["who wrote Emma?"], 3)    # -> [[{"title", "text"}, ... best first], ... one a query]
"""

import json
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from engine.errors import UserError
from text.bm25 import BM25
from text.rows import read_rows


def open_retriever(retriever: str, corpus: str | Path | None) -> "Local | Http":
    """The retriever for "bm25", over the .jsonl `corpus`, or for a Search-R1 server's URL. Raises UserError."""
    return Local(read_passages(corpus)) if retriever == "bm25" else Http(retriever)


class Local:
    """BM25 over the titles and texts of passages."""

    def __init__(self, passages: list[dict]):
        self.passages = passages
        self.index = BM25(f"{passage['title']}\n{passage['text']}" for passage in passages)

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text"}, best first."""
        return [[self.passages[n] for n, _ in found] for found in self.index.search(queries, k)]


def read_passages(file: str | Path) -> list[dict]:
    """The passages of a .jsonl file with one {"title", "text"} per line, or {"contents"} as in Search-R1's corpora.

    Raises UserError with the line number.
    """
    passages = []
    for row, where in read_rows(Path(file)):
        row = split_contents(row["contents"]) if isinstance(row.get("contents"), str) else row
        title, text = row.get("title", ""), row.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise UserError(f'{where} is not {{"title": "...", "text": "..."}}')
        passages.append({"title": title, "text": text})
    if not passages:
        raise UserError(f"{file}: contains no passage")
    return passages


def split_contents(contents: str) -> dict:
    """{"title", "text"} of '"Title"\\ntext', Search-R1's format. One line without quotes is a text without a title."""
    title, newline, text = contents.partition("\n")
    quoted = len(title) > 1 and title[0] == title[-1] == '"'
    if not newline and not quoted:
        return {"title": "", "text": contents}
    return {"title": title[1:-1] if quoted else title, "text": text}


class Http:
    """A server that speaks the protocol of Search-R1's search_r1/search/retrieval_server.py.

    It has `timeout` seconds to answer. If it can't be reached, is too slow or answers 5xx, it is asked up to `tries`
    times, with pauses of `pause`, 2 `pause`, 4 `pause`, ... seconds, or its Retry-After. Raises UserError.
    """

    def __init__(self, url: str, timeout: float = 300, tries: int = 5, pause: float = 1):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError("no address of a server")
        except ValueError:  # also urllib's own, for an impossible port or address
            why = "neither bm25 nor a URL like http://127.0.0.1:8000/retrieve"
            raise UserError(f"--retriever {url}: {why}") from None
        self.url = url if parts.path.strip("/") else parts._replace(path="/retrieve").geturl()
        self.timeout, self.tries, self.pause = timeout, tries, pause
        # A proxy set in the environment would look for 127.0.0.1 on its own machine.
        loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        self.opener = build_opener(ProxyHandler({} if loopback else None))

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """For each query at most k passages {"title", "text"}, best first."""
        # Search-R1's server fails without return_scores.
        reply = self._post(json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode())
        try:
            result = json.loads(reply)["result"]
            if len(result) != len(queries) or not all(isinstance(hits, list) for hits in result):
                raise ValueError("wrong counts")
            # Search-R1's web servers send more hits than asked for, and a hit may be the document itself.
            found = [[hit.get("document", hit)["contents"] for hit in hits[:k]] for hits in result]
            # Half a surrogate pair, which JSON can hold and tokenizers reject, becomes "?".
            return [[split_contents(text.encode("utf-8", "replace").decode()) for text in texts] for texts in found]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{self.url} does not answer {len(queries)} queries for {k} passages each as a Search-R1 server does; "
                f"its answer is {reply[:80]!r}: check the URL"
            ) from None

    def _post(self, body: bytes) -> bytes:
        request = Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.tries):
            pause = self.pause * 2**attempt
            try:
                try:
                    reply = self.opener.open(request, timeout=self.timeout)
                except HTTPError as error:
                    reply = error  # its body says why
                with reply:
                    text = reply.read()
            except (OSError, HTTPException, UnicodeError) as error:  # refused, timed out, cut short, no such host
                why = f"could not be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
            else:
                if reply.status < 300:
                    return text
                why = f"answered {reply.status}: {' '.join(text[:500].decode(errors='replace').split())}"
                if reply.status < 500:
                    raise UserError(f"{self.url} {why}")
                if reply.headers.get("Retry-After", "").isdecimal():
                    pause = min(int(reply.headers["Retry-After"]), self.timeout)
            if attempt < self.tries - 1:
                time.sleep(pause)
        raise UserError(f"{self.url} {why} ({self.tries} tries); check that the server is running there")
