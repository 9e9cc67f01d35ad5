"""experiments/begin.py and reproduce-tiny.sh: the questions of each seed, and a reproduction that was stopped."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.config import Config
from engine.errors import UserError
from experiments import begin
from tasks.questions import load_questions, load_search, subject
from tasks.sources import load_questions_task
from tiny.build.demonstrations import FOCUS

ROOT = Path(__file__).parents[2]


def test_no_two_seeds_share_a_question_and_no_subject_is_learned_and_tested(tmp_path):
    """The tiny default's questions: the test part is shared out, few labels are among the many, subjects are apart."""
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


def test_the_ceiling_has_the_same_questions_and_texts(tmp_path):
    """Told to focus, a question keeps its number, its answer and its text at each length; search QA can read it."""
    parts = begin.parts_of(begin.QUESTIONS, ["0", "1"], [])
    tokenizer, sources = AutoTokenizer.from_pretrained(ROOT / "tiny/model"), []
    for name in ("test-1", "test-1-told"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f"{line}\n" for line in parts[name]))
        assert load_search(file) == [(question.question, question.answers) for question in load_questions(file)]
        config = Config(task="longqa", seed=1, eval_questions=str(file))
        sources.append(load_questions_task(config, tokenizer)[0])
    assert len(parts["test-1"]) == len(parts["test-1-told"])
    for number, chunks in ((0, 4), (1, 4), (7, 16)):
        asked, told = (source.document(number, "test", chunks) for source in sources)
        assert told == replace(asked, question=f"{asked.question} {FOCUS}") and len(told.chunks) >= chunks - 1


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
# Stands in for python: logs its arguments, and creates the files that the script looks for.
import os, sys, time
from pathlib import Path

arguments = sys.argv[1:]
if "--out" in arguments:  # log how many run at once
    at_work = Path("{log}.{{}}".format(os.getpid()))
    at_work.touch()
    time.sleep(0.02)
    with open("{log}-at-once", "a") as file:
        print(len(list(at_work.parent.glob("log.*"))), os.environ["OMP_NUM_THREADS"], file=file)
    at_work.unlink()
if arguments[1] != "experiments.begin":
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
def test_a_stopped_reproduction_resumes(tmp_path, stops_at, code):
    """Stopped in the middle (exit code 0 is Ctrl-C) and rerun, it trains nothing from an unfinished run.

    Only what was stopped is done twice. Given a folder, the tables go there, too.
    """
    log, shim = tmp_path / "log", tmp_path / "bin/python"
    shim.parent.mkdir()
    for at in (stops_at, "never"):
        shim.write_text(SHIM.format(python=sys.executable, log=log, stops_at=at, code=code))
        shim.chmod(0o755)
        path = {"PATH": f"{shim.parent}:/usr/bin:/bin", "SEEDS": "0 1 2 5"}
        done = subprocess.run([ROOT / "experiments/reproduce-tiny.sh", tmp_path / "out"], env=path, capture_output=True)
        assert (done.returncode == 0) == (at == "never"), done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    assert calls[-1] == ["-m", "experiments.tables", f"{tmp_path}/out", f"{tmp_path}/out"]
    calls = [call for call in calls if call[1] != "experiments.tables"]
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
    for name, words in (  # 32 chunks at two steps; the other rate at one length, up to the budget
        ("0/qa/base-16", "--lengths 4 16 32"), ("0/qa/base-8", "--lengths 4 16"),
        ("0/qa/memtrain-other-8", "--lengths 16"),
    ):
        (one,) = [" ".join(call) for call in calls if f"{tmp_path}/out/{name}.part" in call][-1:]
        assert f" {words} " in one or one.endswith(words)
    (other,) = [" ".join(call) for call in calls if f"{tmp_path}/out/0/base-other" in call]
    assert re.findall("--lr (\\S+)", other)[-1] == "4e-4" and re.findall("--steps (\\d+)", other)[-1] == "16"
    assert len(trained) == 4 * (2 + 2 + 2 + 1) + 3 * (2 + 2 + 2 + 2)  # the claim's; ablations, labels, search QA
    assert sum("/qa/base-" in out for out in set(outs)) == 4 * (1 + 5 + 4) + 3 * (1 + 3)
    asked = {call[call.index("--out") + 1].split(".part")[0]: " ".join(call) for call in calls}
    for seed in "0125":  # the ceiling is the base; search QA has three seeds
        ceiling = asked[f"{tmp_path}/out/{seed}/qa/ceiling"]
        assert "--model tiny/model" in ceiling and f"/test-{seed}-told.jsonl" in ceiling
        searched = asked.get(f"{tmp_path}/out/{seed}/qa/memtrain-search-16")
        assert (searched is None) == (seed == "5")
        assert seed == "5" or f"{seed}/memtrain-search/checkpoints/step-000016 " in searched
