"""A stand-in for a Search-R1 server, in a thread of the test."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(answer):
    """The address of a server, http://127.0.0.1:PORT, for the time of the block.

    answer(request, path) -> (status, body) or (status, body, headers) for the JSON of each POST; None hangs up.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds that a client may be silent

        def do_POST(self):
            found = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.path)
            if found:
                status, body, *headers = found
                self.send_response(status)
                for name, value in dict(*headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # a client that has timed out
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:  # a server that goes on polling slows all tests that follow
            server.shutdown()
            thread.join(10)


def reply(*queries: list[str]) -> str:
    """The body of an answer: for each query the contents of its passages."""
    return json.dumps({"result": [[{"document": {"contents": one}, "score": 1.0} for one in some] for some in queries]})


def search_r1(retriever):
    """An `answer` that does what Search-R1's server does, from a retriever in this process."""

    def answer(request, path):
        assert path == "/retrieve" and request["return_scores"] is True
        found = retriever.search(request["queries"], request["topk"])
        return 200, reply(*[['"{title}"\n{text}'.format(**passage) for passage in passages] for passages in found])

    return answer
