"""engine/run.py and engine/checkpoints.py under faults: errors, kills, signals, full disks, bad gradients, two at once.

Resumed runs are compared with one that was never stopped: the same weights to the bit, the same metrics but for times.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import command, wait
from safetensors.torch import load_file

import memtrain
from engine import checkpoints, checks, models, parallel
from engine.checkpoints import newest
from engine.errors import UserError, run_script
from engine.metrics import row
from engine.run import lock
from fast import packing

ROOT = Path(__file__).parents[2]
SMALL = ["--documents", 2, "--g1", 4, "--g2", 2, "--chunks", 2, "--chunk_tokens", 32, "--memory_tokens", 16]
SMALL += ["--eval_documents", 0, "--save_every", 1, "--keep", 9, "--fast", "True"]  # the sampler is not the subject
STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for all runs, so that they share the entities that the first has found in the corpus."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def out(runs, tmp_path):
    return runs / tmp_path.name


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint/model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """Weights and every line of both logs, times aside."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (first, second)]
    assert [{k: v for k, v in row.items() if "second" not in k} for row in lines[0]] == [
        {k: v for k, v in row.items() if "second" not in k} for row in lines[1]
    ]
    assert (first / "samples.jsonl").read_text() == (second / "samples.jsonl").read_text()


def as_if_killed(out: Path, step: int) -> None:
    """The folder as a kill in the step after `step` leaves it: no younger checkpoints, and logs that go on."""
    for folder in (out / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (out / "finished").unlink(missing_ok=True)
    (out / "checkpoint").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": ')


PLAIN = ["--fast", "False"]
OFFLOADED = ["--offload_optimizer", "True", "--offload_reference", "True"]
TASKS = {
    "memtrain": [*PLAIN, "--kl", "1e-3", "--update_batch", 1, "--lr_schedule", "constant"],
    "bfloat16": [*PLAIN, "--dtype", "bfloat16", "--kl", "1e-3", *OFFLOADED],
    "longqa": ["--task", "longqa", "--chunk_tokens", 64, "--memory_tokens", 40],
    "searchqa": ["--task", "searchqa", "--searches", 2, "--objectives", 1, "--g1", 16],
    "fast": ["--kl", "1e-3", "--update_batch", 1],
}


@pytest.mark.parametrize(
    "task", [t if t in ("memtrain", "fast") else pytest.param(t, marks=pytest.mark.slow) for t in TASKS]
)
def test_a_resumed_run_equals_one_never_stopped(task, out, tmp_path):
    """In every task and by both twins, with a reference, several updates and float32 masters."""
    arguments = [*SMALL, *TASKS[task], "--steps", 3]
    done = command(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    shutil.copytree(out, whole, symlinks=True)
    as_if_killed(out, 1)
    torch.manual_seed(123)  # what this process drew in between must not matter
    done = command(*arguments, "--out", out)
    assert done.returncode == 0 and "resuming after step 1" in done.stdout, done.stderr
    assert_same_run(whole, out)
    first = load_file(whole / "checkpoints/step-000001/model.safetensors")  # and there was something to learn since
    assert any(not torch.equal(first[name], tensor) for name, tensor in weights(out).items())


def test_what_the_terminal_shows(tmp_path, monkeypatch):
    """A line for each step, what rose since the first one (of a resumed run, too), and no bar for work of a second."""
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "run"
    arguments = [*SMALL, "--eval_documents", 2, "--steps", 3, "--sample_every", 2, "--out", out]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert not re.findall("Loading|Writing|entities", done.stderr)
    told = done.stdout.splitlines()
    (place,) = (n for n, line in enumerate(told) if line.startswith("step 1: "))
    assert told[0].startswith("before: end_to_end ") and place == 2 and max(map(len, told[:-1])) <= 80
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in told if line.startswith("step ")]
    for n, (line, now) in enumerate(zip(steps, metrics, strict=True), 1):
        found = re.fullmatch(rf"step {n}: end_to_end (\S+) \((\S+)\), recall .*, entropy \S+, \d+ min", line)
        assert float(found[1]) == pytest.approx(now["end_to_end"], abs=0.006)
        assert float(found[2]) == pytest.approx(now["end_to_end"] - metrics[0]["end_to_end"], abs=0.006)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    shown = [told[place + 1], told[place + 4]]  # after steps 1 and 3
    for line, sample in zip(shown, samples, strict=True):
        assert line.startswith(f"  y = {sample['answers'][0]}, answered ")
    as_if_killed(out, 1)
    (out / "eval.json").write_text(json.dumps([row("before", "recall", 2, "kept", {0: 1.0})]))
    again = command(*arguments).stdout.splitlines()
    assert [line.split(", entropy")[0] for line in again if line.startswith("step ")] == [
        line.split(", entropy")[0] for line in steps[1:]
    ]


def start(arguments: list, deadly: str | None = None, ranks: int = 1) -> list:
    """memtrain.py in fresh processes; its last argument is the folder, and FOLDER.log gets what it prints."""
    return helpers.start(helpers.run, arguments, log_of(arguments[-1]), deadly, ranks=ranks)


def log_of(out: Path) -> Path:
    return out.with_name(out.name + ".log")


@pytest.fixture(scope="module")
def whole(runs):
    """A run that was never stopped."""
    out = runs / "never_stopped"
    assert wait(start([*SMALL, "--steps", STEPS, "--out", out])) == [0]
    return out


def killed_and_resumed(out: Path, deadly: str) -> bool:
    """Whether the kill came before the run's end; afterwards one more start finishes the run."""
    arguments = [*SMALL, "--steps", STEPS, "--out", out]
    killed = wait(start(arguments, deadly)) == [-signal.SIGKILL]
    if not (out / "finished").exists():
        last = newest(out)
        assert wait(start(arguments)) == [0]
        told = log_of(out).read_text()  # what was there was used, and the rest was not
        if last:
            assert f"resuming after step {int(last.name.removeprefix('step-'))}\n" in told
        else:
            assert "resuming" not in told
    assert Path(os.readlink(out / "checkpoint")).name == newest(out).name == f"step-{STEPS:06d}"
    return killed


@pytest.mark.parametrize("deadly", ["save_file:2", f"point:{STEPS}"])
def test_killed_while_writing(whole, out, deadly):
    """Inside a checkpoint, and between the last one and the link to it: what is half-written is never picked up."""
    assert killed_and_resumed(out, deadly)
    assert_same_run(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("deadly", ["save_file:1", "flush:5", "flush:30", "point:2", "engine.run.replace_text:1"])
def test_killed_elsewhere_while_writing(whole, out, deadly):
    """More of these moments, the first file of the run among them."""
    assert killed_and_resumed(out, deadly)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole, runs):
    """SIGKILL at any call of any function, twenty times; the resumed run ends with the same weights."""
    assert wait(start([*SMALL, "--steps", STEPS, "--out", runs / "counted"], "anything:0")) == [0]
    calls, rng = int(re.search(r"(\d+) calls", log_of(runs / "counted").read_text())[1]), random.Random(0)
    for n in range(20):
        out = runs / f"random_{n}"
        assert killed_and_resumed(out, f"anything:{rng.randrange(calls // 50, calls * 49 // 50)}")
        assert_same_run(whole, out)


@pytest.mark.parametrize("name", ["TERM", pytest.param("INT", marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_and_the_run_resumes(out, whole, name):
    """SIGTERM or Ctrl-C: exit code 0, a checkpoint of the step that was under way, and how to resume; then as if never
    stopped."""
    arguments = [*SMALL, "--save_every", 100, "--steps", STEPS, "--out", out]
    assert wait(start(arguments, f"memtrain.draw_targets:2:{name}")) == [0]  # in the middle of the second step
    told = log_of(out).read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 and not (out / "finished").exists()
    assert "stopped after step 2; run the same command again to resume" in told
    assert newest(out).name == "step-000002" and Path(os.readlink(out / "checkpoint")).name == "step-000002"
    assert wait(start(arguments)) == [0]
    assert_same_run(whole, out)


def give_out(arguments: list, log: Path) -> None:
    """helpers.run, where the second of two processes meets a user's error in its second step."""
    real, calls = memtrain.recall, []

    def recall(*more, **named):
        calls.append(1)
        if len(calls) == 2:
            raise UserError("the text gave out; bring more")
        return real(*more, **named)

    if os.environ["RANK"] == "1":
        memtrain.recall = recall
        sys.stderr = log.with_suffix(".second").open("w", buffering=1)
    helpers.run(arguments, log)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fast", "longqa", "searchqa"])
def test_two_processes_stop_together_and_resume(out, tmp_path, task):
    """After a signal to one of them both stop after the same step; an error of one ends both. Each resumes with its own
    random numbers."""
    arguments = [*SMALL, *TASKS[task], "--steps", 3, "--out"]
    assert wait(start([*arguments, tmp_path / "whole"], ranks=2)) == [0, 0]
    arguments[-1:] = ["--save_every", 100, "--out", out]
    assert wait(start(arguments, "memtrain.draw_targets:1:TERM", ranks=2)) == [0, 0]
    assert newest(out).name == "step-000001" and "stopped after step 1" in log_of(out).read_text()
    first, second = wait(helpers.start(give_out, arguments, log_of(out), ranks=2))
    assert first and second == 2
    last = log_of(out).with_suffix(".second").read_text().splitlines()[-1]
    assert last == "error: the text gave out; bring more (process 1)" and newest(out).name == "step-000001"
    assert wait(start(arguments, ranks=2)) == [0, 0]
    assert "resuming after step 1" in log_of(out).read_text()
    assert_same_run(tmp_path / "whole", out)


def test_the_folder_of_another_run_is_refused(out):
    """Differing settings are named; a finished run and a run that is going on are refused too."""
    arguments = [*SMALL, "--steps", 1, "--out", out]
    assert command(*arguments).returncode == 0
    other = ["--seed", 7, "--g1", 3]
    for extra in ([], other):
        done = command(*arguments, *extra)
        assert done.returncode == 2 and "is finished; choose another or delete it" in done.stderr
    (out / "finished").unlink()
    done = command(*arguments, *other)
    assert done.returncode == 2 and "--seed 0" in done.stderr and "--g1 4" in done.stderr
    held = lock(out)
    done = command(*arguments)
    assert done.returncode == 2 and "another run is writing" in done.stderr
    held.close()
    assert command(*arguments).returncode == 0


def test_a_start_that_failed_leaves_the_folder_free(out):
    """The settings of a start whose model, corpus or disk was wrong are no run: corrected ones may have the folder."""
    for wrong in (["--model", out / "nowhere"], ["--seed", 7, "--corpus", out / "nothing.jsonl"]):
        done = command(*SMALL, "--steps", 1, *wrong, "--out", out)
        assert done.returncode == 2 and str(wrong[-1]) in done.stderr
        assert sorted(path.name for path in out.iterdir()) == [".lock", "config.json"]
    done = command(*SMALL, "--steps", 1, "--out", out)
    assert done.returncode == 0 and "resuming" not in done.stdout, done.stderr


def test_a_full_disk_leaves_the_older_checkpoint(out, monkeypatch):
    """One line, exit code 2, nothing half-written; with space again the run goes on."""
    real, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    arguments = [*SMALL, "--steps", 3, "--out", out]
    done = command(*arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "No space left" in last and "step-000001" in last
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert Path(os.readlink(out / "checkpoint")).name == "step-000001"
    assert command(*arguments).returncode == 0 and len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_disk_without_room_for_a_checkpoint_is_told_at_the_start(out, monkeypatch):
    """Before a step is made; with a little more than one takes, the run goes on."""
    needed = sum(t.numel() * 4 for t in load_file(ROOT / "tiny/model/model.safetensors").values()) * 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed * 0.9))
    done = command(*SMALL, "--steps", 1, "--out", out)
    assert done.returncode == 2 and "a checkpoint takes 0.0 GB" in done.stderr and "free some space" in done.stderr
    assert not (out / "metrics.jsonl").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed * 1.1))
    assert command(*SMALL, "--steps", 1, "--out", out).returncode == 0


ERRORS = {  # a function of the loop, the step in which it fails, the last step saved, exit code, words
    "a bug": ("assign_advantages", RuntimeError, 3, 2, 1, "Traceback"),
    "a mistake": ("recall", UserError, 3, 2, 2, "error: it gave out"),
    "memory": ("batch_loss", torch.OutOfMemoryError, 3, 2, 2, "error: out of GPU memory (it gave out)"),
    "no checkpoint yet": ("update_batches", KeyError, 2, 0, 1, "Traceback"),
}


@pytest.mark.parametrize("place, kind, step, saved, code, words", ERRORS.values(), ids=ERRORS)
def test_an_error_ends_the_run_and_the_same_command_resumes_it(
    whole, out, monkeypatch, place, kind, step, saved, code, words
):
    """Anywhere in a step: a user's mistake is a line, a bug keeps its traceback. What the last checkpoint holds is
    kept, the rest is done again, and the run ends as one that never stopped."""
    arguments = [*SMALL, "--save_every", 2, "--steps", STEPS, "--out", out]
    real, documents, begun = getattr(memtrain, place), memtrain.draw_documents, [0]

    def counted(source, config, n):
        begun[0] = n + 1
        return documents(source, config, n)

    monkeypatch.setattr(memtrain, "draw_documents", counted)

    def failing(*more, **named):
        if begun[0] == step:
            raise kind("it gave out")
        return real(*more, **named)

    monkeypatch.setattr(memtrain, place, failing)
    done = command(*arguments)
    assert done.returncode == code and words in done.stderr and "it gave out" in done.stderr
    assert code == 1 or ("Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: "))
    assert not (out / "finished").exists()
    assert (newest(out).name == f"step-{saved:06d}") if saved else not newest(out)
    monkeypatch.undo()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {saved}\n" in done.stdout if saved else "resuming" not in done.stdout
    assert_same_run(whole, out)


def test_an_evaluation_that_failed_is_made_again(out, monkeypatch):
    """All steps are saved by then; the same command makes the last evaluation alone, and the first one only once."""
    asked = []

    def measured(sample, agent, source, config, when):
        asked.append(when)
        if asked == ["before", "after"]:
            raise UserError("the retriever gave out")
        return [row(when, "recall", 2, "kept", {0: 1.0, 1: 0.0})]

    monkeypatch.setattr(memtrain, "evaluate", measured)
    arguments = [*SMALL, "--eval_documents", 2, "--steps", 1, "--out", out]
    done = command(*arguments)
    assert done.returncode == 2 and "the retriever gave out" in done.stderr and newest(out).name == "step-000001"
    assert command(*arguments).returncode == 0 and (out / "finished").exists()
    assert asked == ["before", "after", "after"]
    assert [row["when"] for row in json.loads((out / "eval.json").read_text())] == ["before", "after"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_disk_that_is_full_elsewhere_is_a_line(capsys):
    """A log that can't be written ends as one line and exit code 2; another error of the system keeps its traceback."""

    def fail(number):
        raise OSError(number, "the system's words", "metrics.jsonl")

    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: fail(errno.ENOSPC))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the disk is full") and "metrics.jsonl" in line and "free some space" in line
    with pytest.raises(OSError, match="the system's words"):
        run_script(lambda: fail(errno.EIO))


def test_only_the_last_checkpoints_are_kept(out):
    """The one of the last step without the optimizer's state, as nothing goes on from there."""
    assert command(*SMALL, "--steps", 3, "--keep", 2, "--out", out).returncode == 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    held = [load_file(out / f"checkpoints/step-00000{n}/training.safetensors").keys() for n in (2, 3)]
    assert [any(name.startswith("optimizer/") for name in names) for names in held] == [True, False]


def test_a_run_resumes_with_an_offloaded_optimizer(whole, out):
    """A run that goes on with its optimizer in CPU memory keeps what it has learned, as one that never stopped."""
    shutil.copytree(whole, out, symlinks=True)
    as_if_killed(out, 2)
    (out / "checkpoints/deleted-step-000000").mkdir()  # as a kill while it was being deleted leaves it
    assert wait(start([*SMALL, "--steps", STEPS, "--offload_optimizer", "True", "--out", out])) == [0]
    assert "resuming after step 2" in log_of(out).read_text()
    assert not list((out / "checkpoints").glob("deleted-*"))
    a, b = weights(whole), weights(out)
    base = load_file(ROOT / "tiny/model/model.safetensors")
    moved = max((a[name] - base[name].float()).abs().max() for name in a)
    assert all((a[name] - b[name]).abs().max() < moved / 100 for name in a)


def test_a_resumed_run_remembers_what_memory_allowed(whole, out):
    """After running out of memory it goes on with the smaller batches, whatever the flag says."""
    shutil.copytree(whole, out, symlinks=True)
    as_if_killed(out, 2)
    file = out / "checkpoints/step-000002/training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rollout_tokens": 700}))
    assert wait(start([*SMALL, "--steps", STEPS, "--rollout_tokens", 9000, "--out", out])) == [0]
    assert json.loads((newest(out) / "training.json").read_text())["rollout_tokens"] == 700


def test_what_cannot_be_trained_is_refused(out, monkeypatch, capsys):
    """Logits that training would get wrong, more processes than documents or GPUs, a full GPU: one line each and exit
    code 2."""
    assert wait(start([*SMALL, "--documents", 1, "--out", out], ranks=2)) == [2, 2] and not out.exists()
    assert "--documents 1: each of 2 processes needs at least one" in log_of(out).read_text()
    real = checks.logits_of
    monkeypatch.setattr(checks, "logits_of", lambda *more: 2 * real(*more))
    done = command(*SMALL, "--out", out)
    assert done.returncode == 2 and "Qwen3ForCausalLM scales or caps its logits" in done.stderr
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="more processes than the 2 GPUs"):
        parallel.start()

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(SystemExit, match="2"):
        run_script(full)
    assert "--train-tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_gradients_are_left_out_and_stop_the_run(out, monkeypatch):
    """One is skipped and counted; three in a row stop the run, and the checkpoint holds the weights from before them.
    The sixth is bad from the forward pass on."""
    loss_of, forward, documents, step = memtrain.batch_loss, packing.token_logprobs, memtrain.draw_documents, [0]
    bad = {2, 5, 6, 7}

    def poisoned_forward(*arguments, **named):
        logprobs, entropy, mask = forward(*arguments, **named)
        return (logprobs * float("nan") if step[0] == 6 else logprobs), entropy, mask

    def poisoned(*arguments, **named):
        loss, stats = loss_of(*arguments, **named)
        return (loss * float("nan") if step[0] in bad else loss), stats

    def counted(source, config, n):
        step[0] = n + 1
        return documents(source, config, n)

    monkeypatch.setattr(memtrain, "batch_loss", poisoned)
    monkeypatch.setattr(packing, "token_logprobs", poisoned_forward)
    monkeypatch.setattr(memtrain, "draw_documents", counted)
    done = command(*SMALL, "--steps", 9, "--out", out, "--documents", 4, "--save_every", 4)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "not finite in 3 steps in a row" in last, done.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["bad_updates"] for m in metrics] == [0, 1, 0, 0, 1, 1, 1]
    assert [m["updates"] for m in metrics] == [1, 0, 1, 1, 0, 0, 0]
    assert newest(out).name == "step-000007"
    before, after = load_file(out / "checkpoints/step-000004/model.safetensors"), weights(out)
    assert all(torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in after)
    bad.add(8)
    done = command(*SMALL, "--steps", 9, "--out", out, "--documents", 4, "--save_every", 4)
    assert done.returncode == 2 and "up to step 8" in done.stderr  # resumed, it stops at the next one


@pytest.mark.slow
def test_a_run_keeps_the_day_on_which_it_began(out, monkeypatch):
    """Templates that name the day then give a resumed run the same prompts; another --date is another run."""
    told = []

    def load_policy(config, device, load=models.load_policy):
        policy, tokenizer = load(config, device)
        told.append(tokenizer.day)
        return policy, tokenizer

    monkeypatch.setattr(models, "load_policy", load_policy)
    for today, more in ((date(2026, 1, 31), []), (date(2026, 2, 1), []), (date(2026, 2, 2), ["--date", "2026-01-31"])):
        monkeypatch.setattr("engine.run.date", SimpleNamespace(today=lambda today=today: today))
        done = command(*SMALL, "--steps", 2, "--out", out, *more)
        assert done.returncode == 0, done.stderr
        as_if_killed(out, 1)
    assert told == ["2026-01-31"] * 3
    done = command(*SMALL, "--steps", 2, "--out", out, "--date", "2026-02-02")
    assert done.returncode == 2 and "another run, with --date 2026-01-31" in done.stderr
    done = command(*SMALL, "--out", out / "new", "--date", "today")
    assert done.returncode == 2 and done.stderr.strip() == "error: --date today: must be a date such as 2026-07-31"
