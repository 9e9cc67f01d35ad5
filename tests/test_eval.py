"""eval.py: held-out documents and their recall targets, greedy accuracy by length, and the settings it follows."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluation
from helpers import command
from engine import sampling
from engine.config import Config
from engine.errors import UserError
from engine.models import load_model
from eval import default_lengths, draw_target, heldout_documents, load_greedy
from masking import Document
from rollout import Trajectory, Turn, encode_prompt, limits_of
from tasks.sources import load_corpus

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(MODEL, "cpu")[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(Config(), *load_model(MODEL, "cpu"), tmp_path_factory.mktemp("entities"))


def test_lengths_around_the_trained_one():
    """Half, once, twice, four and eight times the trained length, never below one chunk."""
    assert default_lengths(4) == [2, 4, 8, 16, 32] and default_lengths(1) == [1, 2, 4, 8]


def test_pivots_of_an_evaluation_are_held_out(corpus):
    """Every title is one of the 20 % that its hash keeps out of training."""
    documents = heldout_documents(corpus, Config(eval_documents=10), 3)
    assert [(d.index, len(d.chunks)) for d in documents] == [(i, 3) for i in range(10)]
    for document in documents:
        assert int(hashlib.sha256(document.title.encode()).hexdigest()[:8], 16) / 16**8 < 0.2


def test_recall_targets_follow_from_seed_and_document():
    """The same documents get the same targets again; with another seed, and for other documents, they differ."""
    names = [f"Name{n}" for n in range(40)]

    def targets(numbers, seed: int = 0):
        made = [Document(number, "t", "q", ["y"], [" ".join(names)] * 3, [names] * 3) for number in numbers]
        return [draw_target(document, Config(seed=seed)).entity for document in made]

    first = targets(range(8))
    assert first == targets(range(8)) and first not in (targets(range(8), seed=1), targets(range(8, 16)))
    assert len(set(first)) > 4


@pytest.mark.parametrize("plain", [False, True])
def test_an_evaluations_model_is_greedy(plain, monkeypatch):
    """Each of several samples is the argmax's text; --rollout-tokens is the budget of the fast sampler."""
    budgets = []

    def generate(*given, budget, sample=sampling.generate):
        budgets.append(budget.tokens)
        return sample(*given, budget=budget)

    monkeypatch.setattr(sampling, "generate", generate)
    model, tokenizer, sample = load_greedy(MODEL, Config(rollout_tokens=777, plain=plain))
    turns, ids = sample(["Ada Lovelace met"] * 6, 8), encode_prompt(tokenizer, "Ada Lovelace met")
    with torch.no_grad():
        for _ in turns[0].completion_ids:
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert len(turns[0].completion_ids) > 2 and all(turn.prompt_ids + turn.completion_ids == ids for turn in turns)
    assert budgets == ([] if plain else [777])


def test_a_length_that_cannot_be_built_is_left_out_with_a_line(corpus, tokenizer, monkeypatch, capsys):
    """All of its documents go, also those that could be built; the other lengths stay whole."""
    def document(i, split, chunks, build=corpus.document):
        if chunks == 5 and i == 2:
            raise UserError("too few passages")
        return build(i, split, chunks)

    monkeypatch.setattr(corpus, "document", document)
    monkeypatch.setattr(evaluation, "read", lambda sample, documents, *more, **other: [
        Trajectory(d, [], ["m"] * len(d.chunks), d.answers[0]) for d in documents
    ])
    monkeypatch.setattr(evaluation, "recall", lambda sample, trajectories, *more, **other: [[]] * len(trajectories))
    rows = evaluation.evaluate(None, corpus, limits_of(Config(), tokenizer), Config(eval_documents=4), [2, 5, 6], "now")
    assert [(row["chunks"], row["memory"], row["n"]) for row in rows] == [
        (chunks, memory, 4) for chunks in (2, 6) for memory in ("kept", "empty")
    ]
    assert capsys.readouterr().out == "evaluation at 5 chunks is left out: too few passages\n"


def test_the_controls_of_an_evaluation_have_no_memory(corpus, tokenizer, monkeypatch):
    """Kept and empty are measured by separate calls, on the same documents and recall targets, in rows of their own."""
    config = Config(eval_documents=4)
    calls = []

    def read(sample, documents, limits, empty_memory=False, progress=None):
        calls.append(("read", empty_memory, [d.index for d in documents]))
        said = ["wrong" if empty_memory or d.index == 0 else d.answers[0] for d in documents]
        return [Trajectory(d, [], ["m"] * len(d.chunks), word) for d, word in zip(documents, said, strict=True)]

    def recall(sample, trajectories, targets, limits, empty_memory=False):
        asked = list(zip(trajectories, targets, strict=True))
        calls.append(("recall", empty_memory, [(t.document.index, target.entity) for t, target in asked]))
        said = ["wrong" if empty_memory or t.document.index < 2 else target.entity for t, target in asked]
        return [[Turn([], [], True, "\\boxed{" + text + "}")] for text in said]

    monkeypatch.setattr(evaluation, "read", read)
    monkeypatch.setattr(evaluation, "recall", recall)
    rows = evaluation.evaluate(None, corpus, limits_of(config, tokenizer), config, [3], "now")
    assert {(row["task"], row["memory"]): row["accuracy"] for row in rows} == {
        ("end_to_end", "kept"): 0.75, ("end_to_end", "empty"): 0.0, ("recall", "kept"): 0.5, ("recall", "empty"): 0.0,
    }
    kept, empty = ([call[::2] for call in calls if call[1] == control] for control in (False, True))
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
