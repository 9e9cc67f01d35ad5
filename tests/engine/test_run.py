"""engine/run.py and engine/checkpoints.py under faults: kills, signals, full disks, bad gradients, two runs at once.

Resumed runs are compared with one that was never stopped: the same weights to the bit, the same metrics but for times.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import command
from helpers import wait
from safetensors.torch import load_file

import memtrain
from engine import checkpoints, packing, parallel
from engine.checkpoints import newest
from engine.config import Config
from engine.errors import UserError, run_script
from engine.models import load_model
from engine.run import Run
from rollout import encode_prompt
from tasks.sources import load_task

ROOT = Path(__file__).parents[2]
SMALL = ["--documents", 2, "--g1", 4, "--g2", 2, "--chunks", 2, "--chunk_tokens", 32, "--memory_tokens", 16]
SMALL += ["--eval_documents", 0, "--save_every", 1, "--keep", 9]
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


TASKS = {
    "memtrain": ["--kl", "1e-3", "--update_batch", 1, "--lr_schedule", "constant"],
    "bfloat16": ["--dtype", "bfloat16", "--offload_optimizer", "True", "--kl", "1e-3", "--offload_reference", "True"],
    "longqa": ["--task", "longqa", "--chunk_tokens", 64, "--memory_tokens", 40],
    "searchqa": ["--task", "searchqa", "--searches", 2, "--objectives", 1, "--g1", 6],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_equals_one_never_stopped(task, out, tmp_path):
    """In every task, with a reference, several updates and float32 masters."""
    arguments = [*SMALL, *TASKS[task], "--steps", 3]
    done = command(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    shutil.copytree(out, whole, symlinks=True)
    as_if_killed(out, 1)
    torch.manual_seed(123)  # what this process drew in between must not matter
    done = command(*arguments, "--out", out)
    assert done.returncode == 0 and "going on after step 1" in done.stdout, done.stderr
    assert_same_run(whole, out)
    first = load_file(whole / "checkpoints/step-000001/model.safetensors")  # and there was something to learn since
    assert any(not torch.equal(first[name], tensor) for name, tensor in weights(out).items())


def start(arguments: list, deadly: str | None = None, ranks: int = 1) -> list:
    """memtrain.py in fresh processes; its last argument is the folder, and FOLDER.log gets what it prints."""
    return processes.start(processes.run, arguments, log_of(arguments[-1]), deadly, ranks=ranks)


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
            assert f"going on after step {int(last.name.removeprefix('step-'))}\n" in told
        else:
            assert "going on" not in told
    assert Path(os.readlink(out / "checkpoint")).name == newest(out).name == f"step-{STEPS:06d}"
    return killed


@pytest.mark.parametrize("deadly", ["save_file:2", f"point:{STEPS}"])
def test_killed_while_writing(whole, out, deadly):
    """Inside a checkpoint, and between the last one and the link to it: what is half-written is never picked up."""
    assert killed_and_resumed(out, deadly)
    assert_same_run(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("deadly", ["save_file:1", "flush:5", "flush:30", "point:2", "replace_text:1"])
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


def test_sigterm_finishes_the_step_and_resumes(out, whole):
    """Exit code 0, a checkpoint of the step that was under way, and the command to go on with; then as if never
    stopped."""
    arguments = [*SMALL, "--steps", STEPS, "--out", out]
    assert wait(start(arguments, "random_state:3:TERM")) == [0]  # at the start of the second step
    told = log_of(out).read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 and not (out / "finished").exists()
    assert "stopped after step 2; go on with: python memtrain.py --documents 2" in told
    assert newest(out).name == "step-000002" and Path(os.readlink(out / "checkpoint")).name == "step-000002"
    assert wait(start(arguments)) == [0]
    assert_same_run(whole, out)


slow = [pytest.param(task, marks=pytest.mark.slow) for task in ("longqa", "searchqa")]


def give_out(arguments: list, log: Path) -> None:
    """processes.run, where the second of two processes meets a user's error in its second step."""
    real, calls = memtrain.recall, []

    def recall(*more, **named):
        calls.append(1)
        if len(calls) == 2 and parallel.rank() == 1:
            raise UserError("the text gave out; bring more")
        return real(*more, **named)

    memtrain.recall = recall
    processes.run(arguments, log)


@pytest.mark.parametrize("task", ["memtrain", *slow])
def test_two_processes_stop_together_and_resume(out, tmp_path, task):
    """A signal to one of them, then an error of one: both stop after the same step, with all that was learned, and each
    goes on with its own random numbers."""
    arguments = [*SMALL, *TASKS[task], "--steps", 3, "--out"]
    assert wait(start([*arguments, tmp_path / "whole"], ranks=2)) == [0, 0]
    arguments[-1:] = ["--save_every", 100, "--out", out]
    assert wait(start(arguments, "random_state:1:TERM", ranks=2)) == [0, 0]
    assert newest(out).name == "step-000001" and "stopped after step 1" in log_of(out).read_text()
    assert wait(processes.start(give_out, arguments, log_of(out), ranks=2)) == [2, 2]
    assert newest(out).name == "step-000002" and "error: the text gave out; bring more" in log_of(out).read_text()
    assert wait(start(arguments, ranks=2)) == [0, 0]
    assert "going on after step 2" in log_of(out).read_text()
    assert_same_run(tmp_path / "whole", out)


def test_the_folder_of_another_run_is_refused(out):
    """Differing settings are named; a finished run, --resume never and a run that is going on are refused too."""
    arguments = [*SMALL, "--steps", 1, "--out", out]
    assert command(*arguments).returncode == 0
    other, never = ("--seed", 7, "--g1", 3), ("--resume", "never")
    for extra in ((), other, never):
        done = command(*arguments, *extra)
        assert done.returncode == 2 and "is finished; choose another or delete it" in done.stderr
    (out / "finished").unlink()
    for extra, words in ((other, ["--seed 0", "--g1 4"]), (never, ["--resume auto"])):
        done = command(*arguments, *extra)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    lock = checkpoints.lock(out)
    done = command(*arguments)
    assert done.returncode == 2 and "another run is writing" in done.stderr
    lock.close()
    assert command(*arguments).returncode == 0


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
    """Before a step is made; where it has room for one but not for all of them, a line says so and the run goes on."""
    needed = sum(t.numel() * 4 for t in load_file(ROOT / "tiny/model/model.safetensors").values()) * 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed * 0.9))
    done = command(*SMALL, "--steps", 2, "--out", out)
    assert done.returncode == 2 and "a checkpoint takes 0.0 GB" in done.stderr and "free some space" in done.stderr
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed * 2))
    done = command(*SMALL, "--steps", 1, "--keep", 2, "--out", out)
    assert done.returncode == 0 and "are needed with --keep 2" in done.stdout


@pytest.mark.parametrize("place", ["recall", "batch_loss"])
@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_an_error_anywhere_in_a_step_loses_that_step_alone(out, tmp_path, monkeypatch, place, kind):
    """In recall or in the update, a user's or our own: the steps before are saved, and the run goes on from there."""
    arguments = [*SMALL, "--save_every", 100, "--steps", 3]
    assert command(*arguments, "--out", tmp_path / "whole").returncode == 0
    real = getattr(memtrain, place)
    targets, started = memtrain.draw_targets, []
    monkeypatch.setattr(memtrain, "draw_targets", lambda *more: started.append(1) or targets(*more))

    def failing(*more, **named):
        if len(started) == 2:
            raise kind("it gave out")
        return real(*more, **named)

    monkeypatch.setattr(memtrain, place, failing)
    done = command(*arguments, "--out", out)
    assert done.returncode == (2 if kind is UserError else 1) and "it gave out" in done.stderr
    assert newest(out).name == "step-000001"
    monkeypatch.undo()
    done = command(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on after step 1" in done.stdout
    assert_same_run(tmp_path / "whole", out)


def test_the_next_documents_are_built_while_a_step_samples(tmp_path):
    """They are those that would be drawn then, and another thread has them before they are asked for."""

    class Source:
        def __init__(self):
            self.threads = {}

        def document(self, index):
            self.threads[index] = threading.get_ident()
            return SimpleNamespace(index=index)

    run, source = Run(Config(out=str(tmp_path / "run"), documents=3, steps=3)), Source()
    first = run.draw(source, 0)
    run.built[1].result(timeout=10)
    assert sorted(source.threads) == [0, 1, 2, 3, 4, 5] and source.threads[3] != source.threads[0]
    assert [[d.index for d in documents] for documents in (first, run.draw(source, 1), run.draw(source, 2))] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8]
    ]
    assert [d.place for d in first] == [0, 1, 2] and not run.built


def test_documents_and_prompts_are_encoded_by_tokenizers_of_their_own(tmp_path):
    """Encoding switches a tokenizer's treatment of special tokens, and two threads must not meet in that."""
    config = Config()
    model, tokenizer = load_model(config.model, "cpu")
    source, _ = load_task(config, model, tokenizer, tmp_path)
    assert source.tokenizer is not tokenizer
    stop, wrong, wanted = threading.Event(), [], encode_prompt(tokenizer, "Who <eos> is it? <pad>")

    def build():
        while not stop.is_set():
            wrong.extend(n for n in range(3) if source.document(n).chunks != chunks[n])

    chunks = [source.document(n).chunks for n in range(3)]
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    try:
        assert all(encode_prompt(tokenizer, "Who <eos> is it? <pad>") == wanted for _ in range(2000))
    finally:
        stop.set()
        thread.join()
    assert not wrong


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
    told = log_of(out).read_text()
    assert "going on after step 2" in told and "going on with another --offload-optimizer" in told
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
    monkeypatch.setattr(packing, "logits_agree", lambda model: False)
    done = command(*SMALL, "--out", out)
    assert done.returncode == 2 and not out.exists() and "Qwen3ForCausalLM scales or caps its logits" in done.stderr
    assert wait(start([*SMALL, "--documents", 1, "--out", out], ranks=2)) == [2, 2] and not out.exists()
    assert "--documents 1: each of the 2 processes needs at least one" in log_of(out).read_text()
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


def test_bad_gradients_are_left_out_and_stop_the_run(out, monkeypatch):
    """One is skipped and counted; three in a row stop the run, and the checkpoint holds the weights from before them.
    The sixth is bad from the forward pass on."""
    real, forward, step = memtrain.grpo_loss, packing.token_logprobs, [0]
    bad = {2, 5, 6, 7}

    def poisoned_forward(*arguments, **named):
        logprobs, entropy, mask = forward(*arguments, **named)
        nothing = float("nan") if step[0] == 6 else 1.0
        return logprobs * nothing, entropy * nothing, mask

    def poisoned(*arguments, **named):
        loss, stats = real(*arguments, **named)
        return (loss * float("nan") if step[0] in bad else loss), stats

    def counted(*arguments, **named):
        step[0] += 1
        return update(*arguments, **named)

    update = memtrain.update
    monkeypatch.setattr(memtrain, "grpo_loss", poisoned)
    monkeypatch.setattr(packing, "token_logprobs", poisoned_forward)
    monkeypatch.setattr(memtrain, "update", counted)
    done = command(*SMALL, "--steps", 9, "--out", out, "--documents", 4, "--save_every", 4)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "not finite in 3 steps in a row" in last, done.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["bad_updates"] for m in metrics] == [0, 1, 0, 0, 1, 1, 1]
    assert [m["updates"] for m in metrics] == [1, 0, 1, 1, 0, 0, 0]
    assert newest(out).name == "step-000007"
    before, after = load_file(out / "checkpoints/step-000004/model.safetensors"), weights(out)
    assert all(torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in after)
