"""tasks/search.py: its questions, and --task searchqa as a command, with a server and with one that dies."""

import json
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers import command
from helpers import random_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

import memtrain
from rollout import Turn, encode_prompt
from tasks.retrieval import Http
from tasks.search import SearchQA, objectives

ROOT = Path(__file__).parents[2]


def test_objectives():
    """Consecutive questions as one, answers in order, the remainder dropped; taken apart they are what went in."""
    items = [(f"Question {n}?", [f"a{n}", f"b{n}"]) for n in range(7)]
    assert objectives(items)[1] == ("Question 2?; Question 3?", [["a2", "b2"], ["a3", "b3"]])
    for n, groups in ((1, 7), (2, 3), (3, 2), (8, 0)):
        made = objectives(items, n)
        assert len(made) == groups
        apart = [pair for question, answers in made for pair in zip(question.split("; "), answers, strict=True)]
        assert apart == items[: groups * n]


def test_the_source_hands_out_its_questions():
    """A document is a question without a text; its length is the number of objectives; every epoch holds each once."""
    questions = [(f"a{n}?; b{n}?", [["x"], [f"y{n}"]]) for n in range(3)]
    source = SearchQA({"train": questions}, seed=0)
    documents = [source.document(n) for n in range(6)]
    assert [d.index for d in documents] == list(range(6)) and source.lengths([4, 8], "train") == [2]
    for epoch in (documents[:3], documents[3:]):
        assert sorted((d.question, d.answers) for d in epoch) == questions
    assert all(d.chunks == d.recall == [] for d in documents)


def test_search_task_over_http(tmp_path, monkeypatch):
    """Two training steps of a random model against a server of its own, started as in the docs.

    The model samples, a script makes every other first turn a search, and the server's passages stand in the prompts
    that follow.
    """
    real, prompts = memtrain.sampler, []

    def sampler(*more, **named):
        own = real(*more, **named)

        def half_of_them_search(texts, new_tokens, done=None):
            turns = own(texts, new_tokens, done)
            prompts.extend(texts)
            for n, turn in enumerate(turns):
                if n % 2 and "Searches left: 6" in texts[n]:
                    turn.text = "note <search>Weimar</search>"
            return turns

        return half_of_them_search

    monkeypatch.setattr(memtrain, "sampler", sampler)
    model = random_qwen(tmp_path / "model", AutoTokenizer.from_pretrained(ROOT / "tiny/model"))
    serve = ["-m", "tasks.retrieval_server", "--corpus", ROOT / "tiny/passages.jsonl", "--index", tmp_path / "index"]
    server = subprocess.Popen([sys.executable, *serve, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        small = ["--documents", 2, "--g1", 2, "--steps", 2, "--eval_documents", 2]
        run = ["--task", "searchqa", "--model", model, "--retriever", url, *small, "--out", tmp_path / "run"]
        done = command(*run)
    finally:
        server.send_signal(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert server.wait(timeout=20) == 0
    shown = [text.split("<result>")[1] for text in prompts if "Searches left: 5" in text]
    assert len(shown) >= 4 and all("Weimar" in text for text in shown)
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert [r["memory"] for r in rows] == ["kept", "empty"] * 2 and rows[0]["task"] == "searchqa"
    assert sum("Searches left: 0" in text for text in prompts) >= 2 * 2  # the control: two questions, before and after
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


class Dying(BaseHTTPRequestHandler):
    """Answers two searches, then every further one with 503, as a server behind a proxy that has lost it."""

    answered = 0

    def do_POST(self):
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        Dying.answered += 1
        body = {"result": [[{"document": {"contents": '"T"\nUlm'}, "score": 1.0}]] * len(queries)}
        self.send_response(200 if Dying.answered <= 2 else 503)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments):
        pass


def test_a_server_that_dies_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    """One line that names the server, exit code 2, and what was learned so far loads as a model."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dying)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    asked, words = [], "note <search>Ulm</search>"

    def sampler(generate, model, tokenizer, greedy=False):
        def always_searches(prompts, new_tokens, done=None):
            asked.extend(prompts)
            ids = tokenizer(words)["input_ids"]
            return [Turn(encode_prompt(tokenizer, prompt), ids, True, words) for prompt in prompts]

        return always_searches

    monkeypatch.setattr(memtrain, "sampler", sampler)
    monkeypatch.setattr(Http.__init__, "__defaults__", (30, 4, 0.01, 5, 9))  # pauses of milliseconds, not of seconds
    url = f"http://127.0.0.1:{server.server_port}/retrieve"
    small = ["--documents", 1, "--g1", 2, "--searches", 2, "--steps", 3, "--eval_documents", 0]
    done = command("--task", "searchqa", "--retriever", url, *small, "--out", tmp_path / "run")
    server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and url.split("/retrieve")[0] in last
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 1 and len(asked) == 2 * 3 + 2  # died in step 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
