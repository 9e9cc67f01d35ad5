"""A stand-in for the hub: its API for one data set of one .jsonl file; all else isn't there."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Hub:
    """Data set `name` of `rows`, as `configs`: each a folder with its train.jsonl; `status` refuses all requests."""

    def __init__(self, name: str = "owner/articles", configs: tuple[str, ...] = ()):
        self.name, self.configs, self.rows, self.status, self.asked = name, configs, [], None, 0

    def files(self) -> dict[str, bytes]:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        if not self.configs:
            return {"train.jsonl": lines}
        card = "".join(f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/*\n" for c in self.configs)
        return {"README.md": f"---\nconfigs:\n{card}---\n".encode()} | {f"{c}/train.jsonl": lines for c in self.configs}

    def sha(self) -> str:
        return hashlib.sha1(repr(self.files()).encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        self.asked += 1
        files, sha = self.files(), self.sha()
        if self.status:
            return self.status, {"X-Request-Id": "Root=1-2-3", "X-Error-Message": f"reason {self.status}"}, b"{}"
        if found := re.fullmatch(rf"/datasets/{self.name}/resolve/[^/]+/(.+)", path):
            body = files.get(found[1])
            if body is not None:
                return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": sha}, body
        if path == f"/api/datasets/{self.name}" or path.startswith(f"/api/datasets/{self.name}/revision/"):
            about = {"id": self.name, "sha": sha, "siblings": [{"rfilename": file} for file in files], "tags": []}
            return 200, {}, json.dumps(about | {"private": False, "downloads": 0, "likes": 0}).encode()
        if found := re.fullmatch(rf"/api/datasets/{self.name}/(tree|paths-info)/[^/]+(?:/(.*))?", path):
            entries = [
                {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for file, body in files.items()
            ]
            entries += [{"type": "directory", "path": c, "oid": sha} for c in self.configs]
            return 200, {}, json.dumps([e for e in entries if e["path"].startswith(found[2] or "")]).encode()
        return 404, {"X-Error-Code": "EntryNotFound" if self.name in path else "RepoNotFound"}, b"{}"


@contextmanager
def serving(hub: Hub):
    """The hub's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, body = hub.answer(urlsplit(self.path).path)
            start, end = 0, len(body)
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                status, start, end = 206, int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
                headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(end - start)}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[start:end])

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
