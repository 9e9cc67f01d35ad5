"""eval.py: held-out documents and their recall targets, greedy accuracy by length, and the settings it follows."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import command

import eval as evaluation
import rollout
from engine.config import Config
from engine.errors import UserError
from engine.models import load_model
from eval import evaluate, evaluate_masked, heldout_documents, load_sampler, load_task
from fast import sampling
from masking import Document
from rollout import Budget, Sampler, Trajectory, Turn, encode_prompt

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    config = Config(out=str(tmp_path_factory.mktemp("runs") / "run"))  # the entities that are found lie beside it
    source, agent = load_task(config, *load_model(MODEL, "cpu"))
    assert agent is rollout.read
    return source


def test_lengths_around_the_trained_one(monkeypatch):
    """Half, once, twice, four and eight times the trained length, never below one chunk; or those that are given.

    The sampler that measures is greedy, whatever the one of training is.
    """
    asked = []
    monkeypatch.setattr(evaluation, "evaluate_masked", lambda greedy, *more: asked.append((greedy, more[-1])))
    sample = Sampler(rollout.generate, None, None, Budget(5))
    for config, lengths in ((Config(chunks=4), None), (Config(chunks=1), None), (Config(), [7, 3, 7])):
        evaluate(sample, None, None, config, "now", lengths)
    assert [lengths for _, lengths in asked] == [[2, 4, 8, 16, 32], [1, 2, 4, 8], [3, 7]]
    assert all(greedy.greedy and greedy.budget is sample.budget for greedy, _ in asked) and not sample.greedy


def test_pivots_of_an_evaluation_are_held_out(corpus):
    """Every title is one of the 20 % that its hash keeps out of training."""
    documents = heldout_documents(corpus, Config(eval_documents=10), 3)
    assert [(d.index, len(d.chunks)) for d in documents] == [(i, 3) for i in range(10)]
    for document in documents:
        assert int(hashlib.sha256(document.title.encode()).hexdigest()[:8], 16) / 16**8 < 0.2


class Scripts:
    """In the places of read and recall: right answers but for some documents, and a note of each call."""

    def __init__(self, wrong_to_read: int = 0, wrong_to_recall: int = 0):
        self.wrong = wrong_to_read, wrong_to_recall
        self.calls: list[tuple] = []

    def read(self, sample, documents, config, empty_memory=False, progress=None):
        self.calls.append(("read", empty_memory, [d.index for d in documents]))
        said = ["wrong" if empty_memory or d.index < self.wrong[0] else d.answers[0] for d in documents]
        return [Trajectory(d, [], ["m"] * len(d.chunks), word) for d, word in zip(documents, said, strict=True)]

    def recall(self, sample, trajectories, config, empty_memory=False):
        self.calls.append(("recall", empty_memory, [(t.document.index, t.target.entity) for t in trajectories]))
        for t in trajectories:
            said = "wrong" if empty_memory or t.document.index < self.wrong[1] else t.target.entity
            t.recalls = [Turn([], [], True, "\\boxed{" + said + "}")]

    def put_in(self, monkeypatch):
        monkeypatch.setattr(evaluation, "recall", self.recall)


def test_recall_targets_follow_from_seed_and_document(monkeypatch):
    """The same documents get the same targets again; with another seed, and for other documents, they differ."""
    names = [f"Name{n}" for n in range(40)]

    class Made:
        def __init__(self, first: int):
            self.first = first

        def document(self, i, split, chunks):
            return Document(self.first + i, "t", "q", ["y"], [" ".join(names)] * chunks, [names] * chunks)

    def targets(first: int = 0, seed: int = 0) -> list[tuple]:
        scripts = Scripts()
        scripts.put_in(monkeypatch)
        evaluate_masked(None, scripts.read, Made(first), Config(seed=seed, eval_documents=8), "now", [3])
        kept, empty = (asked for name, _, asked in scripts.calls if name == "recall")
        assert kept == empty
        return [entity for _, entity in kept]

    whole = targets()
    assert whole == targets() and whole not in (targets(seed=1), targets(first=8)) and len(set(whole)) > 4


@pytest.mark.parametrize("fast", [False, True])
def test_an_evaluations_model_is_greedy(fast, monkeypatch):
    """Each of several samples is the argmax's text; --rollout-tokens is the budget of either sampler."""
    budgets = []
    twin = sampling if fast else rollout

    def generate(*given, sample=twin.generate):
        budgets.append(given[-1].tokens)
        return sample(*given)

    monkeypatch.setattr(twin, "generate", generate)
    seen = []
    monkeypatch.setattr(evaluation, "evaluate_masked", lambda greedy, *more: seen.append(greedy))
    evaluate(load_sampler(MODEL, Config(rollout_tokens=777, fast=fast)), None, None, Config(), "now")
    (sample,) = seen
    turns, ids = sample(["Ada Lovelace met"] * 6, 8), encode_prompt(sample.tokenizer, "Ada Lovelace met")
    with torch.no_grad():
        for _ in turns[0].completion_ids:
            ids = [*ids, int(sample.model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert len(turns[0].completion_ids) > 2 and all(turn.prompt_ids + turn.completion_ids == ids for turn in turns)
    assert budgets == [777]


def test_a_length_that_cannot_be_built_is_left_out_with_a_line(corpus, monkeypatch, capsys):
    """All of its documents go, also those that could be built; the other lengths stay whole."""
    def document(i, split, chunks, build=corpus.document):
        if chunks == 5 and i == 2:
            raise UserError("too few passages")
        return build(i, split, chunks)

    monkeypatch.setattr(corpus, "document", document)
    scripts = Scripts()
    scripts.put_in(monkeypatch)
    rows = evaluate_masked(None, scripts.read, corpus, Config(eval_documents=4), "now", [2, 5, 6])
    assert [(row["task"], row["chunks"], row["memory"], row["n"]) for row in rows] == [
        (task, chunks, memory, 4)
        for task in ("end_to_end", "recall") for chunks in (2, 6) for memory in ("kept", "empty")
    ]
    assert capsys.readouterr().out == "evaluation at 5 chunks is skipped: too few passages\n"


def test_the_controls_of_an_evaluation_have_no_memory(corpus, monkeypatch):
    """Kept and empty are measured by separate calls, on the same documents and recall targets, in rows of their own."""
    scripts = Scripts(wrong_to_read=1, wrong_to_recall=2)
    scripts.put_in(monkeypatch)
    rows = evaluate_masked(None, scripts.read, corpus, Config(eval_documents=4), "now", [3])
    assert {(row["task"], row["memory"]): row["accuracy"] for row in rows} == {
        ("end_to_end", "kept"): 0.75, ("end_to_end", "empty"): 0.0, ("recall", "kept"): 0.5, ("recall", "empty"): 0.0,
    }
    (written,) = [row for row in rows if "said" in row]  # the memory's end-to-end row: what was answered, one by one
    assert (written["task"], written["memory"]) == ("end_to_end", "kept")
    right = [said["prediction"] in said["answers"] for said in written["said"]]
    assert right == [score == 1 for score in written["scores"]] and sum(right) == 3
    kept, empty = ([call[::2] for call in scripts.calls if call[1] == control] for control in (False, True))
    assert sorted(kept) == sorted(empty) and len(kept) == 2


def test_a_config_of_another_program_holds_no_settings(tmp_path):
    """Hugging Face's own trainer writes a config.json above its checkpoints, too; a length given twice counts once."""
    shutil.copytree(ROOT / "tiny/model", tmp_path / "checkpoint-5", ignore=shutil.ignore_patterns(".*"))
    for text in ('{"dtype": "float16", "chunks": 9}', "[1]", "{"):
        (tmp_path / "config.json").write_text(text)
        done = command(
            "--model", tmp_path / "checkpoint-5", "--eval_documents", 2, "--lengths", 1, 1, "--out",
            tmp_path / "rows.json", script="eval",
        )
        assert done.returncode == 0 and "settings are" not in done.stdout, done.stderr
        assert [row["n"] for row in json.loads((tmp_path / "rows.json").read_text())] == [2, 2]


def test_each_model_has_its_own_window(tmp_path):
    """All read the same documents, so one that can't is refused by its name before it begins."""
    shutil.copytree(MODEL, tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 150}))
    done = command(
        "--model", MODEL, "--against", tmp_path / "short", "--eval_documents", 1, "--lengths", 1, "--out",
        tmp_path / "rows.json", script="eval",
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and f"{tmp_path / 'short'} has 150; make them smaller" in last, done.stderr
    assert [row["when"] for row in json.loads((tmp_path / "rows.json").read_text())] == [MODEL] * 2
