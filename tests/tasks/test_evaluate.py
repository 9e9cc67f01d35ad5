"""--task longqa and searchqa as commands, and their evaluation: real files, real tokenizers, a server that dies."""

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import eval as evaluation
from command import command
from errors import UserError
from masking import Document
from qa import LongQA, Pool, SearchQA, draw, load_questions, split_questions, subject

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
SMALL = ["--documents", 2, "--g1", 2, "--steps", 2]


@pytest.fixture(scope="module")
def random_qwen(tmp_path_factory):
    """A small random Qwen3-shaped model with the tiny tokenizer: it never searches well, but it runs."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_long_text_task_trains_and_is_evaluated(tmp_path):
    """Two steps of task training on the tiny questions: no recall, rows for each control, and a model to go on from."""
    done = command("--task", "longqa", *SMALL, "--chunks", 2, "--eval_documents", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["recall"] is None and 0 <= m["end_to_end"] <= 1 for m in metrics)
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert {(r["when"], r["chunks"], r["memory"]) for r in rows} == {
        (w, c, m) for w in ("before", "after") for c in (2, 4, 8, 16) for m in ("kept", "empty")
    }
    done = command("--model", tmp_path / "run/checkpoint", "--against", ROOT / "tiny/model", "--lengths", 4, "--controls", "empty", "full",
                   "oracle", "--eval_documents", 3, "--out", tmp_path / "rows.json", script="eval")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["memory"]) for r in rows] == ["kept", "empty", "full", "oracle"] * 2 and "+0.000 [" in done.stdout
    assert all(r["n"] == len(r["scores"]) == 3 and np.mean(r["scores"]) == r["accuracy"] <= r["f1"] + 1e-9 for r in rows)


def test_real_questions_at_a_real_tokenizers_lengths(tmp_path):
    """HotpotQA records with Qwen's tokenizer, 512-token chunks, a random model: one step, text from the real pool."""
    if not SHARED.exists():
        pytest.skip("needs the shared data, which is not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen3-4b-instruct-2507")
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = command("--task", "longqa", "--model", tmp_path / "model", "--questions", SHARED / "qa/hotpotqa_train_100.json",
                   "--eval_questions", SHARED / "qa/hotpotqa_dev_distractor_200.jsonl", "--corpus", SHARED / "wiki/hotpot_pool.jsonl",
                   "--chunk_tokens", 512, "--chunks", 3, "--memory_tokens", 16, "--answer_tokens", 8, *SMALL, "--steps", 1,
                   "--eval_documents", 0, "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr


def served(tmp_path):
    """`retrieval.py serve` over the tiny passages, and its URL."""
    process = subprocess.Popen([sys.executable, ROOT / "retrieval.py", "serve", "--corpus", ROOT / "tiny/passages.jsonl", "--port", "0",
                                "--index", tmp_path / "index"], stdout=subprocess.PIPE, text=True)  # fmt: skip
    line = process.stdout.readline()
    return process, next(word for word in line.split() if word.startswith("http://"))


def test_search_task_over_http(tmp_path, random_qwen, monkeypatch):
    """Two training steps of a random Qwen3-shaped model against `retrieval.py serve`: it samples, a script makes every
    other first turn a search, and the server's passages stand in the prompts that follow."""
    import rollout

    real, prompts = rollout.converse, []

    def half_of_them_search(model, tokenizer, texts, *more):
        turns = real(model, tokenizer, texts, *more)
        prompts.extend(texts)
        for n, turn in enumerate(turns):
            turn.text = "note <search>Weimar</search>" if n % 2 and "Searches left: 6" in texts[n] else turn.text
        return turns

    monkeypatch.setattr(rollout, "converse", half_of_them_search)
    process, url = served(tmp_path)
    try:
        done = command("--task", "searchqa", "--model", random_qwen, "--retriever", url, *SMALL, "--eval_documents", 2, "--out", tmp_path / "run")
    finally:
        process.send_signal(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert process.wait(timeout=20) == 0
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
    import rollout

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dying)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = []

    def always_searches(model, tokenizer, texts, new_tokens, limits, greedy, done=None):
        asked.extend(texts)
        ids = tokenizer("note <search>Ulm</search>")["input_ids"]
        return [rollout.Turn(rollout.encode_prompt(tokenizer, text), ids, True, "note <search>Ulm</search>") for text in texts]

    monkeypatch.setattr(rollout, "converse", always_searches)
    url = f"http://127.0.0.1:{server.server_port}/retrieve"
    arguments = ["--task", "searchqa", "--retriever", url, "--documents", 1, "--g1", 2, "--searches", 2, "--steps", 3, "--eval_documents", 0, "--out", tmp_path / "run"]
    done = command(*arguments)
    server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and url.split("/retrieve")[0] in last
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1 and len(asked) == 2 * 3 + 2  # died in step 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")


def test_sources_go_through_all_questions_and_keep_the_splits_apart():
    """Every epoch holds each question once, in another order; train and test share no subject."""
    items = list("abcdefg")
    epochs = [[draw(items, i, seed=3) for i in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(epoch) == items for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    questions = split_questions(load_questions(ROOT / "tiny/questions.jsonl"), None, subject)
    assert {subject(q) for q in questions["train"]}.isdisjoint(subject(q) for q in questions["test"])
    pool = Pool([("A town", f"It lies at {i}.") for i in range(200)], tokenizer)
    source = LongQA(questions, pool, seed=0, chunk_tokens=64, chunks=6)
    document = source.document(5, "test")
    assert document == source.document(5, "test") and document.title in {q.id for q in questions["test"]}
    assert document.title != source.document(6, "test").title and len("".join(source.document(5, "test", 12).chunks)) > len("".join(document.chunks))
    got = [chunks - len(source.document(i, "test", chunks).chunks) for i in range(8) for chunks in (3, 5, 12)]
    assert set(got) <= {0, 1} and got.count(0) > 18  # one more document can take two more chunks
    search = SearchQA({"train": [("a?; b?", [["x"], ["y"]])]}, seed=0)
    assert search.document(3).question == "a?; b?" and search.document(3).answers == [["x"], ["y"]]


def test_an_evaluation_asks_each_question_once_and_the_same_at_every_length(monkeypatch, capsys):
    """Those that can't be brought to a length are left out of all; a length that takes too many with it goes itself."""
    class Source:
        questions = {"test": list(range(30))}

        def document(self, i, split, length):
            if length == 1 and i % 2 or length == 2 and i == 3:
                raise UserError("too long")
            return i, length

    setting = evaluation.Setting(eval_documents=64)
    built = evaluation.documents_by_length(Source(), setting, [1, 2, 8], True)
    assert built == {length: [(i, length) for i in range(30) if i != 3] for length in (2, 8)}
    assert "at 1 chunks is left out, 10 of 20" in capsys.readouterr().out
    setting.eval_documents = 5
    assert [i for i, _ in evaluation.documents_by_length(Source(), setting, [2, 8], True)[8]] == [0, 1, 2, 4, 5]
    assert evaluation.documents_by_length(Source(), setting, [1], False) == {}


def test_controls_show_what_they_say(tmp_path):
    """The oracle sees the gold paragraphs, the full text as much of its beginning as the window allows."""
    tokenizer, model = AutoTokenizer.from_pretrained(ROOT / "tiny/model"), AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model")
    pool = Pool([(f"Town {i}", f"It lies at {i}.") for i in range(900)], tokenizer)
    document = LongQA({"test": load_questions(ROOT / "tiny/questions.jsonl")}, pool, seed=0, chunk_tokens=64, chunks=4).document(0, "test")
    memory = {c: evaluation.control_memory(c, document, model, tokenizer, evaluation.Setting()) for c in ("empty", "full", "oracle")}
    assert memory["empty"] == evaluation.EMPTY_MEMORY and memory["oracle"] == document.gold
    assert all(line in "".join(document.chunks) for line in document.gold.split("\n") if line.endswith("."))
    assert memory["full"] == "".join(document.chunks)
    model.config.max_position_embeddings = 100
    short = evaluation.control_memory("full", document, model, tokenizer, evaluation.Setting())
    assert 20 < len(short) < len(memory["full"]) and memory["full"].startswith(short)


def test_scores_and_bootstrap():
    """One objective is exact match, several their mean; the bootstrap agrees with the normal approximation."""
    assert evaluation.score("Ulm", Document(0, "", "", ["Ulm", "ULM!"], [], [])) == 1.0
    assert evaluation.score("Ulm; Bern", Document(0, "", "", [["Ulm"], ["Basel"]], [], [])) == 0.5
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2, 400).astype(float), rng.integers(0, 2, 400).astype(float)
    mean, low, high = evaluation.paired_bootstrap(first.tolist(), second.tolist())
    half = 1.96 * (second - first).std() / 20
    assert mean == pytest.approx((second - first).mean()) and low == pytest.approx(mean - half, abs=0.02) and high == pytest.approx(mean + half, abs=0.02)
    assert evaluation.paired_bootstrap([0, 1, 0], [0, 1, 0]) == (0, 0, 0)


def test_a_plot_is_written_or_a_clear_word_said(tmp_path):
    """With matplotlib a picture; without it one line that says what to install, before anything is evaluated."""
    rows = [{"when": "now", "task": "longqa", "memory": m, "chunks": c, "accuracy": 0.5, "low": 0.4, "high": 0.6} for m in ("kept", "empty") for c in (2, 4)]
    if evaluation.load_pyplot():
        evaluation.plot(rows, str(tmp_path / "plot.png"))
        assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    else:
        done = command("--plot", tmp_path / "plot.png", "--out", tmp_path / "rows.json", script="eval")
        assert done.returncode == 2 and "pip install matplotlib" in done.stderr
