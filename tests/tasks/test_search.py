"""tasks/search.py: its questions, and --task searchqa as a command, with a server and with one that dies."""

import json
from pathlib import Path

import pytest
from helpers import command, random_qwen
from search_server import reply, search_r1, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import memtrain
from engine.config import Config
from engine.errors import UserError
from engine.models import load_model
from eval import load_task
from rollout import Turn, encode_prompt, fill
from tasks.retrieval import Http, open_retriever
from tasks.search import SEARCH_PROMPT, SearchQA, objectives

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
    assert all(d.chunks == d.recall_candidates == [] for d in documents)
    assert source.longest_question == "a0?; b0?"


class Half(memtrain.Sampler):
    """The run's own sampler, but every other first turn is a search; keeps the prompts."""

    prompts: list[str]

    def __call__(self, prompts, new_tokens, done=None):
        turns = super().__call__(prompts, new_tokens, done)
        Half.prompts += prompts
        for n, turn in enumerate(turns):
            if n % 2 and "Searches left: 6" in prompts[n]:
                turn.text = "note <search>Weimar</search>"
        return turns


def test_search_task_over_http(tmp_path, monkeypatch):
    """Two training steps of a random model against a server that speaks Search-R1's protocol.

    The model samples, a script makes every other first turn a search, and the server's passages stand in the prompts
    that follow.
    """
    Half.prompts = []
    monkeypatch.setattr(memtrain, "Sampler", Half)
    model = random_qwen(tmp_path / "model", AutoTokenizer.from_pretrained(ROOT / "tiny/model"))
    with serving(search_r1(open_retriever("bm25", ROOT / "tiny/passages.jsonl"))) as url:
        small = ["--documents", 2, "--g1", 2, "--steps", 2, "--eval_documents", 2]
        run = ["--task", "searchqa", "--model", model, "--retriever", url, *small, "--out", tmp_path / "run"]
        done = command(*run)
    assert done.returncode == 0, done.stderr
    shown = [text.split("<result>")[1] for text in Half.prompts if "Searches left: 5" in text]
    assert len(shown) >= 4 and all("Weimar" in text for text in shown)
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert [r["memory"] for r in rows] == ["kept", "empty"] * 2 and rows[0]["task"] == "searchqa"
    # The control: two questions, before and after.
    assert sum("Searches left: 0" in text for text in Half.prompts) >= 2 * 2
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


class Searching(memtrain.Sampler):
    """Nothing but searches; keeps the prompts."""

    prompts: list[str]

    def __call__(self, prompts, new_tokens, done=None):
        Searching.prompts += prompts
        words = "note <search>Ulm</search>"
        ids = self.tokenizer(words)["input_ids"]
        return [Turn(encode_prompt(self.tokenizer, prompt), ids, True, words) for prompt in prompts]


def test_a_server_that_dies_ends_the_run_and_the_same_command_resumes(tmp_path, monkeypatch):
    """One line that names the server, and exit code 2; what the last checkpoint holds is a model, and is gone on from.

    The server answers the two searches of the first step, and one of the second, as behind a proxy that has lost it.
    """
    Searching.prompts, asked, alive = [], [], [True, True, True]

    def answer(request, path):
        asked.append(request["queries"])
        if len(asked) > len(alive):
            return 503, ""
        return 200, reply(*[['"T"\nUlm']] * len(request["queries"]))

    monkeypatch.setattr(memtrain, "Sampler", Searching)
    monkeypatch.setattr(Http.__init__, "__defaults__", (30, 4, 0.01))  # pauses of milliseconds, not of seconds
    with serving(answer) as url:
        small = ["--documents", 1, "--g1", 2, "--searches", 2, "--steps", 3, "--eval_documents", 0, "--save_every", 1]
        run = ["--task", "searchqa", "--retriever", url, *small, "--out", tmp_path / "run"]
        done = command(*run)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and f"{url}/retrieve answered 503" in last
        assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
        assert asked == [["Ulm"] * 2] * (3 + 4) and len(Searching.prompts) == 2 * (3 + 2)  # died in step 2, four tries
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
        alive += [True] * 99
        done = command(*run)
    assert done.returncode == 0 and "resuming after step 1" in done.stdout, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]


def test_a_turn_must_fit_the_window():
    """The longest question, full notes, a full query and result, and what is then written: just fits, or is refused."""
    config = Config(task="searchqa")
    model, tokenizer = load_model(config.model, "cpu")
    source, _ = load_task(config, model, tokenizer)
    longest = max((q for items in source.questions.values() for q, _ in items), key=len)
    full = {"memory": 64, "query": 64, "result": 192}
    slots = {name: " ".join(["Ulm"] * tokens) for name, tokens in full.items()}
    assert all(len(tokenizer(slots[name])["input_ids"]) == tokens for name, tokens in full.items())
    prompt = fill(SEARCH_PROMPT, problem=longest, left=6, **slots)
    needed = len(encode_prompt(tokenizer, prompt)) + config.memory_tokens + config.answer_tokens
    model.config.max_position_embeddings = needed + 2  # joined texts may take fewer tokens than each by itself
    assert load_task(config, model, tokenizer)[0].longest_question == longest
    model.config.max_position_embeddings = needed - 3
    with pytest.raises(UserError, match=f"--result-tokens 192, .* need a window of .* has {needed - 3}; make them sma"):
        load_task(config, model, tokenizer)
