"""recipes/: argument files that hold what the paper says, and the tables of a reproduction."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import Config, parse
from engine.errors import UserError
from recipes import begin, tables
from tasks.questions import load_questions, subject

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


LENGTHS, SEEDS = (2, 8), (0, 1, 2)


@pytest.fixture
def measured(tmp_path):
    """A reproduction's folder of three seeds with made-up scores, and the scores by (name, chunks): a list a seed."""
    rng, made, out = np.random.default_rng(0), {}, tmp_path / "runs"
    out.mkdir()
    settings = {"seeds": SEEDS, "steps": (0, 2, 4, 8, 16, 32, 64), "budget": [16], "labels": (4, 16, 64)}
    (out / "settings.json").write_text(json.dumps({name: list(map(str, own)) for name, own in settings.items()}))
    names = [f"{run}-{step}" for run in ("base", "memtrain") for step in (0, 2, 4, 8, 16, 32, 64)]
    names += [f"{run}-label-{label}" for run in ("base", "memtrain") for label in (4, 16, 64)]
    names += [f"{run}-{step}" for run in ("end_to_end", "decoupled", "shuffled_rewards") for step in (0, 16)]
    for seed in SEEDS:
        for part in ("qa", "habits", "memtrain", "base-task", "memtrain-task"):
            (out / str(seed) / part).mkdir(parents=True)
        for number, name in enumerate(names):
            rows = []
            for chunks in LENGTHS:
                scores = (rng.random(20 + seed) < (number + 1) / 30).astype(float).tolist()
                made.setdefault((name, chunks), []).append(scores)
                rows += [{"chunks": chunks, "memory": "kept", "scores": scores}]
                rows += [{"chunks": chunks, "memory": "empty", "scores": [0.0] * len(scores)}]
            (out / str(seed) / "qa" / f"{name}.json").write_text(json.dumps(rows))
        for run in ("base", "memtrain", "end_to_end", "decoupled", "shuffled_rewards"):
            recalled = {str(n): [1.0, 0.0] if n < 3 else [0.0, 0.0] for n in range(1, 16)}
            rows = [
                {"chunks": 4, "recall": dict(list(recalled.items())[:3]), "unchanged": [True, False]},
                {"chunks": 16, "recall": recalled, "unchanged": [True, seed > 0]},
            ]
            (out / str(seed) / "habits" / f"{run}.json").write_text(json.dumps(rows))
        for run, steps in (("memtrain", 10), ("base-task", 64), ("memtrain-task", 64)):
            line = json.dumps({"seconds_rollout": 4.0, "seconds_update": 2.0, "reward": 9.0}) + "\n"
            (out / str(seed) / run / "metrics.jsonl").write_text(line * steps)
    return out, made


def run_tables(monkeypatch, *folders):
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, folders)])
    tables.main()


def test_tables_say_what_was_measured(measured, monkeypatch, tmp_path):
    """Means, intervals, minutes and differences counted here by hand; the page changes between its two marks only."""
    out, made = measured
    page = tmp_path / "results-tiny.md"
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    run_tables(monkeypatch, out, tmp_path)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    first = text.split("**Labels**")[0].splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in first if line.startswith("| ")}
    steps = (0, 2, 4, 8, 16, 32, 64)
    for title, run in (("base, 8 chunks", "base"), ("MemTrain, 8 chunks", "memtrain")):
        wanted = [f"{np.mean(sum(made[f'{run}-{n}', 8], [])):.2f}" for n in steps]
        assert [cell.split()[0] for cell in rows[title]] == wanted
    results = json.loads((out / "results.json").read_text())
    found, by_seed = results["claim at 8"], []
    for seed in SEEDS:
        means = [[np.mean(made[f"{run}-{n}", 8][seed]) for n in (2, 4, 8, 16)] for run in ("base", "memtrain")]
        by_seed.append(np.mean(means[1]) - np.mean(means[0]))
    assert found["by_seed"] == pytest.approx(by_seed)
    half = 4.303 * np.std(by_seed, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert (found["seeds_high"] - found["seeds_low"]) / 2 == pytest.approx(half, rel=1e-2)
    assert found["low"] < np.average(by_seed, weights=[20, 21, 22]) < found["high"]
    assert results["minutes"]["base"] == pytest.approx([n / 10 for n in steps])
    assert results["minutes"]["MemTrain"] == pytest.approx([1 + n / 10 for n in steps])
    unchanged, means = "0.50 ± 0.00", [0.5, 1.0, 1.0]
    shown = f"{np.mean(means):.2f} ± {4.303 * np.std(means, ddof=1) / 3**0.5:.2f}"
    assert f"| base | {unchanged} | {shown} | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.00 ± 0.00 |" in text  # at 1, 2, 3-4
    # MemTrain alone takes a minute, as 8 steps of the base do; with 2 steps 1.2, and the base has 8 done by then.
    assert "MemTrain and 0 steps (1.0 minutes) minus the base's 8 (0.8), 8 chunks" in text


def test_a_difference_that_never_varies_has_no_interval(measured, monkeypatch, tmp_path):
    """Better by the same for every question: both intervals are points."""
    out, _ = measured
    for seed in SEEDS:
        rows = json.loads((out / f"{seed}/qa/base-16.json").read_text())
        rows = [row | {"scores": [score + 0.25 for score in row["scores"]]} for row in rows]
        (out / f"{seed}/qa/memtrain-16.json").write_text(json.dumps(rows))
    run_tables(monkeypatch, out, tmp_path)
    found = json.loads((out / "results.json").read_text())["MemTrain, full minus base at 16, 8 chunks"]
    assert [found[name] for name in ("mean", "low", "high", "seeds_low", "seeds_high")] == pytest.approx([0.25] * 5)


def test_tables_wait_for_all_seeds(measured, monkeypatch, tmp_path):
    """One missing file is named, and nothing is written."""
    out, _ = measured
    (out / "1/qa/decoupled-16.json").unlink()
    with pytest.raises(UserError, match="1/qa/decoupled-16.json is missing"):
        run_tables(monkeypatch, out, tmp_path)
    assert not (out / "results.json").exists()


def test_figures_are_drawn(measured, monkeypatch, tmp_path):
    """Four PNGs that can be read back, no line of them blank."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib draws the figures")
    run_tables(monkeypatch, measured[0], tmp_path)
    for name in ("curves", "labels", "ablations", "distance"):
        picture = pyplot.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200 and picture.std() > 0.05


def test_no_two_seeds_share_a_question_and_no_subject_is_learned_and_tested(tmp_path):
    """Of the tiny default's questions: shares of the test part, nested labels, subjects apart."""
    parts = begin.parts_of(begin.QUESTIONS, ["0", "1", "2"], ["4", "16"])
    tested = [parts[f"test-{seed}"] for seed in range(3)]
    assert sorted(sum(tested, [])) == sorted(parts["test"]) and len(set(parts["test"])) == len(parts["test"]) > 200
    for seed in range(3):
        assert len(parts[f"train-16-{seed}"]) == 16 and set(parts[f"train-4-{seed}"]) < set(parts[f"train-16-{seed}"])
        assert set(parts[f"train-16-{seed}"]) < set(parts["train"])
    assert parts["train-16-0"] != parts["train-16-1"]
    about = {}
    for name in ("train", "dev", "test"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f"{line}\n" for line in parts[name]))
        about[name] = {subject(question) for question in load_questions(file)}
    assert not about["train"] & about["test"] and not about["dev"] & (about["test"] | about["train"])


def test_other_settings_are_refused(tmp_path, monkeypatch):
    """A folder that was begun with other seeds says so, and keeps its questions; an interval needs 2 to 10 seeds."""
    begun = ["begin.py", str(tmp_path / "out"), "seeds=0 1", "labels=4"]
    for arguments in (begun, begun):
        monkeypatch.setattr(sys, "argv", arguments)
        begin.main()
    before = (tmp_path / "out/test-0.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", [*begun[:2], "seeds=0 1 2", "labels=4"])
    with pytest.raises(UserError, match="begun with other seeds"):
        begin.main()
    assert (tmp_path / "out/test-0.jsonl").read_text() == before
    monkeypatch.setattr(sys, "argv", ["begin.py", str(tmp_path / "a b"), "seeds=0 1", "labels=4"])
    with pytest.raises(UserError, match="white space"):
        begin.main()
    for seeds in ("0", "0 0", "0 one", " ".join(map(str, range(11)))):
        monkeypatch.setattr(sys, "argv", ["begin.py", str(tmp_path / "new"), f"seeds={seeds}", "labels=4"])
        with pytest.raises(UserError, match=f"seeds={seeds} labels=4: must be numbers"):
            begin.main()


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
if arguments[0] != "recipes/begin.py":
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
        ("1/memtrain --eval", 0), ("1/qa/base-8.part", 2),
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
        path = {"PATH": f"{shim.parent}:/usr/bin:/bin", "SEEDS": "0 1"}
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
    habits = [call for call in calls if call[0] == "recipes/habits.py"]
    assert len({(call[call.index("--out") + 1], call[call.index("--seed") + 1]) for call in habits}) == 2 * 5
    assert all(call[call.index("--out") + 1].split("/")[-3] == call[call.index("--seed") + 1] for call in habits)
    assert len(trained) == 2 * (4 + 2 + 3 + 6) and sum("/qa/base-" in out for out in set(outs)) == 2 * (1 + 6 + 3)
