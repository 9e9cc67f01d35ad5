"""recipes/*.args: a task's file, and where a model needs other settings, the model's file after it."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.config import Config, parse
from engine.errors import UserError
from eval import Evaluation

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = dict(documents=16, rollout_tokens=262144, train_tokens=4096, lr=2e-6)
PAPER = dict(  # 4.1 to 4.3
    documents=32, rollout_tokens=400000, train_tokens=16384, lr=1e-6, gradient_checkpointing=True
)
OFFLOADED = dict(offload_optimizer=True, offload_reference=True)
# A search turn is notes and an action in one, so its two budgets add up to the paper's 1k.
TASKS = {
    "wiki-24gb": SMALL | dict(
        out="runs/qwen2.5-0.5b", model="Qwen/Qwen2.5-0.5B-Instruct", max_passages=100_000, related=5, chunks=4,
        chunk_tokens=1024, memory_tokens=256, answer_tokens=128, g2=4, steps=200, eval_documents=32,
    ),
    "wiki-80gb": PAPER | OFFLOADED | dict(
        out="runs/qwen3-4b", model="Qwen/Qwen3-4B-Instruct-2507", max_passages=500_000, passages=150, related=29,
        chunks=8, chunk_tokens=5120, memory_tokens=1024, answer_tokens=1024, g2=8, steps=300, eval_documents=32,
    ),
    "longqa-24gb": SMALL | dict(
        out="runs/longqa-qwen2.5-0.5b", model="runs/qwen2.5-0.5b/checkpoint", chunks=4, chunk_tokens=1024,
        memory_tokens=256, answer_tokens=128, steps=200, update_batch=4, eval_documents=128,
    ),
    "longqa-80gb": PAPER | OFFLOADED | dict(
        out="runs/longqa-qwen3-4b", model="runs/qwen3-4b/checkpoint", chunks=6, chunk_tokens=5120,
        memory_tokens=1024, answer_tokens=1024, steps=500, update_batch=8, eval_documents=128,
    ),
    "searchqa-24gb": SMALL | dict(
        out="runs/searchqa-qwen2.5-0.5b", model="runs/qwen2.5-0.5b/checkpoint", memory_tokens=384, answer_tokens=128,
        result_tokens=512, steps=100, update_batch=4, eval_documents=128,
    ),
    "searchqa-80gb": PAPER | OFFLOADED | dict(
        out="runs/searchqa-qwen3-4b", model="runs/qwen3-4b/checkpoint", memory_tokens=768, answer_tokens=256,
        result_tokens=1024, steps=200, lr=5e-7, update_batch=8, eval_documents=128,
    ),
}
RECOMPUTED = dict(train_tokens=8192, gradient_checkpointing=True)
MODELS = {
    "qwen2.5-1.5b": OFFLOADED | RECOMPUTED | dict(
        out="runs/qwen2.5-1.5b", model="Qwen/Qwen2.5-1.5B-Instruct", lr=1e-6
    ),
    "qwen3-4b-lora": RECOMPUTED | dict(
        out="runs/qwen3-4b-lora", model="Qwen/Qwen3-4B-Instruct-2507", lora=32, documents=8, steps=60, lr=1e-5,
        rollout_tokens=49152,
    ),
    "t4-16gb": dict(
        out="runs/t4-qwen2.5-0.5b", dtype="float32", lora=32, max_passages=20_000, chunk_tokens=512, chunks=3,
        memory_tokens=128, answer_tokens=64, documents=4, steps=100, lr=2e-5, rollout_tokens=131072, train_tokens=2048,
        eval_documents=16,
    ),
    "qwen2.5-7b-8gpus": dict(
        out="runs/qwen2.5-7b", model="Qwen/Qwen2.5-7B-Instruct", train_tokens=8192, shard_optimizer=True,
        offload_optimizer=False, offload_reference=True,
    ),
}
# The same in every recipe; what stands in none of these tables is as in Config.
COMMON = dict(
    dtype="bfloat16", g1=8, advantage="mean", kl=1e-3, lr_warmup=10, lr_schedule="constant",
    save_every=5, fast=True,
)
OF_TASK = {
    "wiki": dict(corpus="wikimedia/wikipedia", corpus_config="20231101.en", ner="en_core_web_sm", recall_weight=0.5),
    "longqa": dict(
        task="longqa", questions="hotpot_train.json", eval_questions="hotpot_dev_distractor.json",
        corpus="wiki_passages.jsonl",
    ),
    "searchqa": dict(
        task="searchqa", questions="nq_hotpot_train.jsonl", eval_questions="nq_test.jsonl",
        retriever="http://127.0.0.1:8000", objectives=2, searches=6,
    ),
}


def settings(*names: str, more: str = "") -> Config:
    files = [word for name in names for word in ("--config", str(RECIPES / f"{name}.args"))]
    return parse(Config, arguments=files + more.split())


COMBINATIONS = [(task,) for task in TASKS] + [
    (task, model) for task in TASKS for model in MODELS if ("24gb" in task) == (model != "qwen2.5-7b-8gpus")
]


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_the_settings_of_every_combination(names):
    """All settings: those of the tables above, the rest as in Config; a later file wins over an earlier one."""
    task, *model = names
    wanted = asdict(Config()) | COMMON | OF_TASK[task.split("-")[0]] | TASKS[task] | (MODELS[model[0]] if model else {})
    assert asdict(settings(*names)) == wanted


def test_every_file_is_in_the_tables():
    assert {file.stem for file in RECIPES.glob("*.args")} == TASKS.keys() | MODELS.keys()


def test_the_command_line_wins_over_all_files():
    """Wherever it stands; a file that isn't there is named."""
    given = "--model Qwen/Qwen2.5-7B-Instruct --lr 3e-6"
    config = settings("wiki-24gb", "qwen2.5-1.5b", more=given)
    assert (config.model, config.lr, config.out) == ("Qwen/Qwen2.5-7B-Instruct", 3e-6, "runs/qwen2.5-1.5b")
    first = parse(Config, arguments=["--lr", "3e-6", "--config", str(RECIPES / "wiki-24gb.args")])
    assert first.lr == 3e-6
    with pytest.raises(UserError, match="no such file"):
        settings("wiki-24gb", "qwen3-4b")


@pytest.mark.parametrize("task, size", [name.split("-") for name in TASKS if not name.startswith("wiki")])
def test_a_task_starts_where_its_memtrain_ends(task, size):
    assert settings(f"{task}-{size}").model == f"{settings(f'wiki-{size}').out}/checkpoint"


@pytest.mark.parametrize("smoke, passages", [("--smoke", "2000"), ("", "100000")])
def test_smollm2_wiki_loads_few_passages_of_the_hub_in_its_smoke_size(tmp_path, smoke, passages):
    """Its cold start's command, as a stand-in for python sees it: the last --max-passages counts."""
    for name in ("hotpot_train.json", "hotpot_dev_distractor.json", "musique_train.json", "musique_ans_dev.jsonl"):
        (tmp_path / "data/qa").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/qa" / name).touch()
    (tmp_path / "data/wiki").mkdir()
    (tmp_path / "data/wiki/passages.jsonl").touch()
    (tmp_path / "out/model").mkdir(parents=True)  # this part is done
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exec echo rules\necho "$@" >> {tmp_path}/log\nexit 3\n')
    python.chmod(0o755)
    script = [RECIPES / "smollm2-wiki.sh", "--data", tmp_path / "data", "--out", tmp_path / "out", *smoke.split()]
    command = ["bash", *script, "--corpus", "wikimedia/wikipedia"]
    done = subprocess.run(command, env={"PATH": f"{python.parent}:/usr/bin:/bin"}, capture_output=True)
    (cold,) = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 1 and cold.startswith("-m recipes.cold_start ")
    assert cold.split("--max-passages ")[-1].split()[0] == passages


def test_a_settings_file_is_read_as_a_shell_reads_it(tmp_path):
    """Comments, quotes, a byte-order mark and ~; a # within a word is none."""
    file = tmp_path / "mine.args"
    lines = "# mine", "--steps 7  # was 200", "--out 'my #2 runs/try#2'  # don't!", "--corpus ~/text.txt"
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    config = parse(Config, arguments=["--config", str(file)])
    assert (config.steps, config.out, config.corpus) == (7, "my #2 runs/try#2", str(Path.home() / "text.txt"))


def test_the_questions_of_a_run_are_those_of_its_own_task(tmp_path):
    """Read by eval.py --model: with another --task than the run's, they are left out."""
    written = {"task": "longqa", "chunk_tokens": 32, "questions": "theirs.json", "eval_questions": "more.json"}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(written))
    of_run = ["--model", str(tmp_path / "checkpoint")]
    own = parse(Evaluation, True, of_run)
    assert (own.task, own.chunk_tokens, own.questions, own.eval_questions) == ("longqa", 32, "theirs.json", "more.json")
    other = parse(Evaluation, True, [*of_run, "--task", "memtrain"])
    assert (other.task, other.chunk_tokens, other.questions) == ("memtrain", 32, Config.questions)
    assert other.eval_questions is None
