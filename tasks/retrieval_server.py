"""A server of Search-R1's protocol over a corpus: POST /retrieve {"queries", "topk", "return_scores"}.

    python -m tasks.retrieval_server --corpus passages.jsonl [--retriever dense --encoder NAME] [--port 8000]
"""

import argparse
import json
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine.errors import UserError, run_script
from tasks.retrieval import A_REQUEST, contents, open_retriever

MAX_BODY, MAX_QUERIES, MAX_TOPK = 1 << 20, 1024, 100  # in one request: bytes, queries, passages a query
MAX_WAITING, MAX_SECONDS = 512, 60  # requests that wait for a search, and how long the last of them may have to


def read_request(body: bytes) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores) of a request; by default 3 passages and no scores. Raises ValueError."""
    try:
        request = json.loads(body)
        queries, k, scores = request.get("queries"), request.get("topk"), request.get("return_scores", False)
    except (ValueError, AttributeError, RecursionError) as error:
        layout = '{"queries": [...], "topk": 3, "return_scores": true}'
        raise ValueError(f"the body must be JSON, {layout}: {error}") from None
    known = isinstance(queries, list) and all(isinstance(query, str) for query in queries)
    if not known or len(queries) > MAX_QUERIES:
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
            return self.refuse(
                413, f"the body has {length} bytes, at most {MAX_BODY} are read; send fewer queries at once"
            )
        try:
            queries, k, scores = read_request(self.rfile.read(int(length)))
        except ValueError as error:
            return self.refuse(400, str(error))
        if (wait := self.server.enter()) is not None:
            return self.refuse(503, f"{self.server.waiting} requests wait already; ask again in {wait} seconds", wait)
        seconds = None
        try:
            with self.server.searching:
                began, found = time.monotonic(), []
                for start in range(0, len(queries), A_REQUEST):
                    if self.is_gone():  # nobody waits for this any more
                        self.close_connection = True
                        return
                    found += self.server.retriever.search(queries[start : start + A_REQUEST], k)
                seconds = time.monotonic() - began
        except Exception:
            traceback.print_exc()
            return self.refuse(500, "the search failed; the server's log says why")
        finally:
            self.server.leave(seconds)
        if scores:
            result = [
                [{"document": {"contents": contents(hit)}, "score": hit["score"]} for hit in hits] for hits in found
            ]
        else:
            result = [[{"contents": contents(hit)} for hit in hits] for hits in found]
        self.answer(200, {"result": result})

    def is_gone(self) -> bool:
        """Whether the client has hung up."""
        try:
            waiting = select.poll()  # select.select knows no descriptor above 1023
            waiting.register(self.connection, select.POLLIN)
            return bool(waiting.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def do_GET(self) -> None:
        self.refuse(405 if self.path == "/retrieve" else 404, "only POST to /retrieve is answered")

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def answer(self, status: int, content: dict, wait: int | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "POST")
        if wait is not None:
            self.send_header("Retry-After", str(wait))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status: int, reason: str, wait: int | None = None) -> None:
        """Answer {"error": reason}, then read what the client still sends: closing on it would destroy the answer."""
        self.answer(status, {"error": reason}, wait)
        self.connection.settimeout(1)
        end = time.monotonic() + self.timeout
        while self.connection.recv(1 << 16) and time.monotonic() < end:
            pass

    def log_message(self, *_) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A thread for each connection, but one search at a time, and a bounded number of requests that wait for it.

    Fast tokenizers break when threads share them, and on a large corpus each search holds a score for every passage.
    """

    request_queue_size, daemon_threads = 1024, True

    def __init__(self, host: str, port: int):
        self.retriever, self.searching = None, threading.Lock()
        self.counting, self.waiting, self.mean_seconds = threading.Lock(), 0, 0.1
        super().__init__((host, port), Handler, bind_and_activate=False)

    def enter(self) -> int | None:
        """Take a place among those that wait; where there is none, the seconds after which to ask again."""
        with self.counting:
            seconds = self.waiting * self.mean_seconds
            if self.waiting >= MAX_WAITING or seconds > MAX_SECONDS:
                return min(60, max(1, math.ceil(seconds / 2)))
            self.waiting += 1

    def leave(self, seconds: float | None) -> None:
        """Give the place back, after a search of so many seconds, or None."""
        with self.counting:
            self.waiting -= 1
            if seconds is not None:
                self.mean_seconds += 0.1 * (seconds - self.mean_seconds)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hangs up is no error
            super().handle_error(request, client_address)


def serve(arguments: argparse.Namespace) -> None:
    """Answer POST /retrieve until SIGINT or SIGTERM. Raises UserError for a bad corpus or a port that is taken."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    host, port = arguments.host, arguments.port
    with Server(host, port) as server:
        try:
            server.server_bind()  # before the corpus is read: a taken port should not cost minutes
            server.retriever = open_retriever(
                arguments.retriever, arguments.corpus, arguments.encoder, arguments.index, arguments.prefixes
            )
            server.server_activate()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--host {host} --port {port}: {why}; stop what runs there, or name another port") from None
        host, port = server.server_address[:2]
        print(f"serving {len(server.retriever.passages)} passages at http://{host}:{port}/retrieve", flush=True)
        try:
            server.serve_forever()
        except SystemExit:
            os._exit(0)  # at once: a thread that is in native code while Python shuts down would abort it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layout = 'lines of {"title", "text"} or {"contents"}'
    parser.add_argument("--corpus", required=True, metavar="FILE.jsonl", help=layout)
    parser.add_argument("--retriever", default="bm25", choices=["bm25", "dense"])
    parser.add_argument("--encoder", help="dense: folder or hub name of an encoder, such as intfloat/e5-base-v2")
    prefixes = 'dense: put "query: " and "passage: " before the texts (default: if the name says e5)'
    parser.add_argument("--prefixes", action=argparse.BooleanOptionalAction, help=prefixes)
    parser.add_argument("--index", default="runs/index", help="folder that keeps the indices (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="%(default)s: this machine only; there is no password")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s; 0 for any that is free")
    serve(parser.parse_args())


if __name__ == "__main__":
    run_script(main)
