"""tasks/evaluate.py, and --task longqa as commands: real files, real tokenizers, controls."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import Scripted, command, random_qwen, shared
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.evaluate
from engine.config import Config
from engine.errors import UserError
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, Sampler, Trajectory, Turn, encode_prompt, fill
from tasks.evaluate import control_memory, documents_by_length, evaluate_questions
from tasks.longqa import LongDocument, LongQA, measured
from tasks.questions import load_questions

ROOT = Path(__file__).parents[2]
SMALL = ["--documents", 2, "--g1", 2]


@pytest.mark.slow
def test_long_text_task_trains_and_is_evaluated(tmp_path):
    """Two steps of task training on the tiny questions: no recall, rows for each control, a model to go on from."""
    run = ["--task", "longqa", *SMALL, "--steps", 2, "--chunks", 2, "--memory_tokens", 12, "--answer_tokens", 12]
    run += ["--eval_documents", 2]
    done = command(*run, "--g1", 8, "--lr", 0.02, "--fast", "True", "--out", tmp_path / "run")  # gets worse at once
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["recall"] is None and 0 <= m["end_to_end"] <= 1 for m in metrics)
    rows = json.loads((tmp_path / "run/eval.json").read_text())
    assert {(r["when"], r["chunks"], r["memory"]) for r in rows} == {
        (w, c, m) for w in ("before", "after") for c in (1, 2, 4, 8, 16) for m in ("kept", "empty")
    }
    controls = ["--controls", "empty", "full", "oracle", "--lengths", 4, "--eval_documents", 8]
    models = ["--model", tmp_path / "run/checkpoint", "--against", ROOT / "tiny/model"]
    done = command(*models, *controls, "--out", tmp_path / "rows.json", script="eval")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    memories = ["kept", "empty", "full", "oracle"]
    assert [row["memory"] for row in rows] == memories * 2
    for row in rows:
        assert row["n"] == len(row["scores"]) == 8 and np.mean(row["scores"]) == row["accuracy"] <= row["f1"] + 1e-9
    told = re.findall(r"^\S+model - \S+checkpoint, longqa, (\w+), 4: (\S+) \[", done.stdout, re.MULTILINE)
    means = [np.subtract(other["scores"], one["scores"]).mean() for one, other in zip(rows[:4], rows[4:], strict=True)]
    assert told == [(memory, f"{mean:+.3f}") for memory, mean in zip(memories, means, strict=True)] and any(means)


@pytest.mark.slow
def test_real_questions_at_a_real_tokenizers_lengths(tmp_path):
    """HotpotQA records with Qwen's tokenizer, 512-token chunks, a random model: one step, text from the real pool."""
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen3-4b-instruct-2507"))
    questions = ["--questions", shared("qa/hotpotqa_train_100.json")]
    questions += ["--eval_questions", shared("qa/hotpotqa_dev_distractor_200.jsonl")]
    text = ["--corpus", shared("wiki/hotpot_pool.jsonl"), "--max_passages", 1000, "--chunk_tokens", 512, "--chunks", 3]
    small = [*SMALL, "--steps", 1, "--memory_tokens", 16, "--answer_tokens", 8, "--eval_documents", 0]
    model = random_qwen(tmp_path / "model", tokenizer)
    done = command("--task", "longqa", "--model", model, *questions, *text, *small, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (sample,) = map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
    sizes = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in sample["document"]]
    assert len(sizes) in (2, 3) and max(sizes) <= 512 < sum(sizes)


class Made:
    """Question i of four at a length: Q0? has the answer A0, the gold paragraph "gold", "0", and so on."""

    questions = {"test": list(range(4))}

    def lengths(self, asked, split):
        return asked

    def document(self, i, split, length):
        gold = (("gold", str(i)),)
        return LongDocument(i, f"q{i}", f"Q{i}?", [f"A{i}"], ["text "] * length, [[]] * length, gold=gold)


def test_rows_say_what_the_answers_were(monkeypatch):
    """Known answers of the agent and in each control: scores, means and order, once by hand."""
    searches = []

    def agent(sample, documents, config, progress):
        """Right at two chunks where the number is even, always right at four; asked with a search left."""
        searches.append(config.searches)
        return [
            Trajectory(d, prediction=f"A{d.index if len(d.chunks) == 4 or d.index % 2 == 0 else 99}")
            for d in documents
        ]

    def sample(prompts, new_tokens, done):
        """From the gold the answer, from the text a sentence with it, from nothing no answer."""
        assert new_tokens == 9
        said = []
        for prompt in prompts:
            i = prompt.split("<problem>\nQ")[1][0]
            memory = prompt.split("<memory>\n")[1].split("\n</memory>")[0]
            answers = {f"gold\n{i}": f"\\boxed{{A{i}}}", EMPTY_MEMORY: "I can't know"}
            said.append(answers.get(memory) or {"text": f"\\boxed{{the A{i} it is}}"}[memory[:4]])
        return [Turn([1], [2], True, text) for text in said]

    monkeypatch.setattr(tasks.evaluate, "full_text", lambda document, *_: "".join(document.chunks))
    sample, controls = Scripted(sample), ("empty", "full", "oracle")
    config = Config(task="longqa", eval_documents=3, answer_tokens=9)
    rows = evaluate_questions(sample, agent, Made(), config, "now", [2, 4], controls)
    assert [(row["chunks"], row["memory"]) for row in rows] == [
        (length, memory) for length in (2, 4) for memory in ("kept", "empty", "full", "oracle")
    ]
    assert all((row["when"], row["task"], row["n"]) == ("now", "longqa", 3) for row in rows)
    for row, (scores, f1, substring) in zip(rows, [
        ([1.0, 0.0, 1.0], 2 / 3, 2 / 3), ([0.0] * 3, 0, 0), ([0.0] * 3, 0.5, 1), ([1.0] * 3, 1, 1),
        ([1.0] * 3, 1, 1), ([0.0] * 3, 0, 0), ([0.0] * 3, 0.5, 1), ([1.0] * 3, 1, 1),
    ], strict=True):
        assert row["scores"] == scores and row["accuracy"] == pytest.approx(sum(scores) / 3)
        assert (row["f1"], row["substring"]) == (pytest.approx(f1), pytest.approx(substring))
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    said = {row["chunks"]: [one["prediction"] for one in row["said"]] for row in rows if row["memory"] == "kept"}
    assert said == {2: ["A0", "A99", "A2"], 4: ["A0", "A1", "A2"]} and sum("said" in row for row in rows) == 2

    config = Config(task="searchqa", eval_documents=2)
    rows = evaluate_questions(None, agent, Made(), config, "now", [2])
    assert searches == [6, 6, 0] and [row["scores"] for row in rows] == [[1.0, 0.0]] * 2 and "f1" not in rows[0]


def test_an_oracle_needs_gold_paragraphs():
    """A question that comes without is named."""
    source = Made()
    source.document = lambda i, split, length: LongDocument(i, f"q{i}", "Q?", ["A"], ["text"], [[]])
    config = Config(task="longqa", eval_documents=2)
    with pytest.raises(UserError, match="--controls oracle: question q0 has no gold paragraphs"):
        evaluate_questions(None, None, source, config, "now", [1], controls=("oracle",))


def test_an_evaluation_asks_each_question_once_and_the_same_at_every_length(capsys):
    """A question that can't reach some length is skipped at all lengths; a length that too many can't reach is skipped
    itself."""

    class Source:
        questions = {"test": list(range(30))}

        def document(self, i, split, length):
            if length == 1 and i % 2 or length == 2 and i == 3:
                raise UserError("too long")
            return i, length

    config = Config(eval_documents=64)
    built = documents_by_length(Source(), config, [1, 2, 8], True)
    assert built == {length: [(i, length) for i in range(30) if i != 3] for length in (2, 8)}
    assert "at 1 chunks is skipped, 10 of 20" in capsys.readouterr().out
    config.eval_documents = 5
    assert [i for i, _ in documents_by_length(Source(), config, [2, 8], True)[8]] == [0, 1, 2, 4, 5]
    assert documents_by_length(Source(), config, [1], False) == {} and capsys.readouterr().out == ""


def test_controls_show_what_they_say():
    """The oracle sees the gold paragraphs, the full text as much of its beginning as the window allows."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model")
    sample, config = Sampler(None, model, tokenizer, None), Config()
    pool = measured([(f"Town {i}", f"It lies at {i}.") for i in range(900)], tokenizer)
    questions = {"test": load_questions(ROOT / "tiny/questions.jsonl")}
    document = LongQA(questions, pool, tokenizer, seed=0, chunk_tokens=64, chunks=4).document(0, "test")
    memory = {control: control_memory(control, document, sample, config) for control in ("empty", "full", "oracle")}
    gold = memory["oracle"].split("\n\n")
    assert memory["empty"] == EMPTY_MEMORY and gold == [f"{title}\n{text}" for title, text in document.gold] != []
    assert all(text in "".join(document.chunks) for _, text in document.gold)
    assert memory["full"] == "".join(document.chunks)
    model.config.max_position_embeddings = 100
    short = control_memory("full", document, sample, config)
    assert 20 < len(short) < len(memory["full"]) and memory["full"].startswith(short)
    prompt = encode_prompt(tokenizer, fill(ANSWER_PROMPT, problem=document.question, memory=short))
    assert 90 < len(prompt) + config.answer_tokens <= 100
