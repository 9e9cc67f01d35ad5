"""recipes/: argument files that hold what the paper says, and the tables of a reproduction."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import Config, parse
from recipes import tables

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.args"))
# Paper 4.1 to 4.3. A search turn is notes and an action in one, so its two budgets add up to the paper's 1k.
PAPER = {
    "qwen": dict(
        task="memtrain", chunk_tokens=5120, memory_tokens=1024, answer_tokens=1024, chunks=8, passages=150, related=29,
        g1=8, g2=8, recall_weight=0.5, documents=32, steps=300, lr=1e-6, kl=1e-3,
    ),
    "long": dict(
        task="longqa", steps=500, documents=32, update_batch=8, lr=1e-6, chunk_tokens=5120, memory_tokens=1024,
    ),
    "sear": dict(
        task="searchqa", steps=200, documents=32, update_batch=8, lr=5e-7, searches=6, objectives=2, result_tokens=1024,
    ),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_can_be_read_and_hold_the_papers_numbers(recipe, monkeypatch):
    """No recipe has an unknown argument; those for 80 GB are the paper's; a task starts where its MemTrain ends."""
    monkeypatch.setattr(sys, "argv", ["memtrain.py", "--config", str(recipe)])
    config = parse(Config)
    assert config.out.removeprefix("runs/") == recipe.stem.rsplit("-", 1)[0] and config.advantage == "mean"
    if recipe.stem.endswith("80gb"):
        wanted = PAPER[recipe.stem[:4]]
        assert {name: getattr(config, name) for name in wanted} == wanted
    if config.task == "searchqa":
        assert config.memory_tokens + config.answer_tokens <= 1024
    if config.task != "memtrain":
        stage, _, size = recipe.stem.partition("-")
        assert config.model == f"runs/{size.rsplit('-', 1)[0]}/checkpoint"
        assert ROOT / f"recipes/{size}.args" in RECIPES


@pytest.fixture
def measured(tmp_path):
    """A reproduction's folder of two seeds with made-up scores, and the scores."""
    rng, made = np.random.default_rng(0), {}
    names = ["base", "memtrain", "task-16", "task-32", "memtrain-task", "end_to_end-task", "decoupled-task"]
    search = ["base", "memtrain", "search", "memtrain-search"]
    for seed in (0, 1):
        for number, name in enumerate([*(f"longqa-{name}" for name in names), *(f"search-{name}" for name in search)]):
            rows = []
            for chunks in (4, 16) if name.startswith("longqa") else (2,):
                for memory in ("kept", "empty"):
                    scores = (rng.random(20 + seed) < number / 12).astype(float).tolist()
                    rows.append({"chunks": chunks, "memory": memory, "scores": scores})
                    made.setdefault((name, chunks, memory), []).extend(scores)
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            (tmp_path / str(seed) / f"{name}.json").write_text(json.dumps(rows))
        for run, steps in (("memtrain", 10), ("task", 32), ("memtrain-task", 16)):
            (tmp_path / str(seed) / run).mkdir()
            line = json.dumps({"seconds_rollout": 4.0, "seconds_update": 2.0, "reward": 9.0}) + "\n"
            (tmp_path / str(seed) / run / "metrics.jsonl").write_text(line * steps)
    return tmp_path, made


def test_tables_say_what_was_measured(measured, monkeypatch, capsys):
    """Means, minutes and differences counted here by hand; README changes between its two marks only."""
    folder, made = measured
    (folder / "README.md").write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(folder), str(folder / "README.md")])
    tables.main()
    readme = (folder / "README.md").read_text()
    assert readme.startswith("above\n") and readme.endswith("below\n") and "old" not in readme
    first, third = (readme.index(f"**{name}**") for name in ("Table 1", "Figure 3"))
    for title, start, file in (("+ MemTrain", first, "longqa-memtrain"), ("decoupled", third, "longqa-decoupled-task")):
        line = readme[readme.index(f"| {title} |", start) :].splitlines()[0]
        four, sixteen = (np.mean(made[file, chunks, "kept"]) for chunks in (4, 16))
        shown = [cell.split()[0] for cell in line.split("|")[2:-1]]
        assert shown == [f"{n:.2f}" for n in (four, sixteen, (four + sixteen) / 2)]
    rows = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("|")}
    assert f"{np.mean(made['longqa-base', 16, 'empty']):.2f}" in rows["base, empty memory"].split("|")[3]
    results = json.loads((folder / "results.json").read_text())
    first = results["differences"][0]
    both = [[np.mean(made[name, n, "kept"]) for n in (4, 16)] for name in ("longqa-memtrain-task", "longqa-task-16")]
    wanted = np.mean(both[0]) - np.mean(both[1])
    assert abs(first["mean"] - wanted) < 1e-12 and first["low"] < wanted < first["high"] and first["n"] == 41
    assert np.average(first["by_seed"], weights=[20, 21]) == pytest.approx(wanted)
    assert results["minutes"]["task RL"][0][0] == pytest.approx(16 * 6 / 60)
    assert results["minutes"]["MemTrain, then task RL"][1][0] == pytest.approx((10 + 16) * 6 / 60)
    assert results["differences"][-1]["minus"] == "task RL of 32 steps, 3.2 minutes"  # the first with at least 2.6
    capsys.readouterr()


def test_tables_pair_questions_and_wait_for_all_seeds(measured, monkeypatch, capsys):
    """One better by the same for every question: the interval is a point; a table that lacks a seed is left out."""
    folder, _ = measured
    for seed in (0, 1):
        rows = json.loads((folder / f"{seed}/longqa-task-16.json").read_text())
        rows = [row | {"scores": [score + 0.25 for score in row["scores"]]} for row in rows]
        (folder / f"{seed}/longqa-memtrain-task.json").write_text(json.dumps(rows))
    (folder / "1/search-memtrain.json").unlink()
    (folder / "0/longqa-decoupled-task.json").unlink()
    monkeypatch.setattr(sys, "argv", ["tables.py", str(folder)])
    tables.main()
    first = json.loads((folder / "results.json").read_text())["differences"][0]
    assert first["mean"] == first["low"] == first["high"] == 0.25
    printed = capsys.readouterr().out
    (folder / "1/longqa-base.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        tables.main()
    assert "lacks results of Table 1" in capsys.readouterr().err
    assert "Table 1" in printed and "Figure 4" in printed and "Table 2" not in printed and "Figure 3" not in printed


SHIM = """#!{python}
# Stands in for python: notes what it is asked for, and leaves behind what the script looks for.
import os, sys, time
from pathlib import Path

arguments = sys.argv[1:]
if "--out" in arguments:  # how many are at work at once
    at_work = Path("{log}.{{}}".format(os.getpid()))
    at_work.touch()
    time.sleep(0.02)
    with open("{log}-at-once", "a") as file:
        print(len(list(at_work.parent.glob("log.*"))), os.environ["OMP_NUM_THREADS"], file=file)
    at_work.unlink()
if arguments[0] != "-":
    with open("{log}", "a") as file:
        print(*arguments, file=file)
    if "{stops_at}" in " ".join(arguments):
        sys.exit({code})
    if "--out" in arguments:
        out = Path(arguments[arguments.index("--out") + 1])
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
        (out if out.suffix else out / "finished").touch()
"""


@pytest.mark.parametrize(
    "stops_at, code",
    [
        ("1/memtrain --eval", 0), ("1/longqa-task-48.part", 2),
        pytest.param("1/memtrain-task --eval", 9, marks=pytest.mark.slow),
    ],
)
def test_a_reproduction_goes_on_where_it_stopped(tmp_path, stops_at, code):
    """Stopped in the middle, by Ctrl-C with exit code 0, and called again.

    Nothing is trained from what is not finished, and only what was stopped is done twice.
    """
    log, shim = tmp_path / "log", tmp_path / "bin/python"
    shim.parent.mkdir()
    for at in (stops_at, "never"):
        shim.write_text(SHIM.format(python=sys.executable, log=log, stops_at=at, code=code))
        shim.chmod(0o755)
        path = {"PATH": f"{shim.parent}:/usr/bin:/bin"}
        done = subprocess.run([ROOT / "recipes/reproduce-tiny.sh", tmp_path / "out"], env=path, capture_output=True)
        assert (done.returncode == 0) == (at == "never"), done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    assert calls[-1][0] == "recipes/tables.py"
    calls = [call for call in calls if call[0] != "recipes/tables.py"]
    outs = [call[call.index("--out") + 1] for call in calls]
    assert len(outs) - len(set(outs)) == 1 and sum(stops_at.split()[0] in out for out in outs) > 1
    trained = set()
    for call, out in zip(calls, outs, strict=True):
        model = call[call.index("--model") + 1] if "--model" in call else "tiny/model"
        assert model == "tiny/model" or model.split("/checkpoint")[0] in trained
        trained |= {out} if call[0] == "memtrain.py" else set()
    at_once = [line.split() for line in (tmp_path / "log-at-once").read_text().splitlines()]
    assert (max(int(number) for number, _ in at_once) > 1) == (len(os.sched_getaffinity(0)) > 1)
    assert {threads for _, threads in at_once} == {"1"}
    assert len(trained) == 3 * 9 and sum("longqa-task-" in out for out in set(outs)) == 3 * 3
