"""checkpoints.py and memtrain.py under faults: kills, signals, full disks, bad gradients, two runs in one folder.

Resumed runs are compared with one that was never stopped: the same weights to the bit, the same metrics but for times.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import checkpoints
import memtrain
import parallel
import sampling
from checkpoints import newest
from command import command
from errors import UserError, run
from masters import MasterAdamW

ROOT = Path(__file__).parents[1]
SMALL = ["--documents", 2, "--g1", 4, "--g2", 2, "--chunks", 2, "--memory_tokens", 40, "--eval_documents", 0, "--save_every", 1, "--keep", 9]
STEPS = 4


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
    """The folder as a kill in the step after `step` leaves it: younger checkpoints are not there yet, the logs go on."""
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
    "longqa": ["--task", "longqa"],
    "searchqa": ["--task", "searchqa", "--searches", 2],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_equals_one_never_stopped(task, tmp_path):
    """In every task, with a reference, several updates and float32 masters."""
    out, arguments = tmp_path / "run", [*SMALL, *TASKS[task], "--steps", 3]
    done = command(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    shutil.copytree(out, whole, symlinks=True)
    as_if_killed(out, 1)
    torch.manual_seed(123)  # what this process drew in between must not matter
    done = command(*arguments, "--out", out)
    assert done.returncode == 0 and "going on after step 1" in done.stdout, done.stderr
    assert_same_run(whole, out)
    if task != "searchqa":  # it answers nothing at this size, so there is no advantage to learn from
        first = load_file(whole / "checkpoints/step-000001/model.safetensors")
        assert any(not torch.equal(first[name], tensor) for name, tensor in weights(out).items())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["memtrain", "longqa", "searchqa"])
def test_two_processes_resume(tmp_path, task):
    """Each goes on with its own random numbers."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "memtrain.py"]
    out = tmp_path / "run"
    run = [*map(str, [*launch, *SMALL, *TASKS[task], "--steps", 2, "--out", out])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(run, check=True, capture_output=True, env=environment, timeout=200)
    shutil.copytree(out, tmp_path / "whole", symlinks=True)
    as_if_killed(out, 1)
    done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment, timeout=200)
    assert "going on after step 1" in done.stdout
    assert_same_run(tmp_path / "whole", out)


def child(arguments: list[str], deadly: str | None) -> None:
    """memtrain.py in a fresh process; "function:n" kills it at the n-th call of that function of checkpoints.py, "...:TERM" asks it to end."""
    if deadly:
        name, n, *gently = deadly.split(":")
        real, calls = getattr(checkpoints, name), [0]

        def counted(*more):
            calls[0] += 1
            if calls[0] == int(n):
                os.kill(os.getpid(), signal.SIGTERM if gently else signal.SIGKILL)
            return real(*more)

        setattr(checkpoints, name, counted)
    torch.set_num_threads(1)
    sys.argv = ["memtrain.py", *map(str, arguments)]
    out = Path(arguments[-1])
    sys.stdout = sys.stderr = open(out.with_name(out.name + ".log"), "w")
    memtrain.main()
    sys.stdout.flush()


@pytest.fixture(scope="module")
def start():
    """Starts `child` from a server process that has all imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memtrain"])

    def begin(arguments, deadly=None):
        process = context.Process(target=child, args=(arguments, deadly))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that was never stopped, and the seconds it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    for _ in range(2):  # the first warms up the server and the disk
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        process = start([*SMALL, "--steps", STEPS, "--out", out])
        process.join()
        assert process.exitcode == 0
    return out, time.perf_counter() - began


def killed_and_resumed(start, out: Path, deadly: str | None, seconds: float | None) -> bool:
    """Whether the kill came before the run's end; afterwards one more start finishes the run."""
    arguments = [*SMALL, "--steps", STEPS, "--out", out]
    process = start(arguments, deadly)
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join(120)
    killed = process.exitcode == -signal.SIGKILL
    if not (out / "finished").exists():
        last = newest(out)
        process = start(arguments)
        process.join(120)
        assert process.exitcode == 0
        told = out.with_name(out.name + ".log").read_text()  # what was there was used, and the rest was not
        assert (f"going on after step {int(last.name.removeprefix('step-'))}\n" in told) if last else ("going on" not in told)
    assert Path(os.readlink(out / "checkpoint")).name == newest(out).name == f"step-{STEPS:06d}"
    return killed


@pytest.mark.parametrize("deadly", ["save_file:3", f"point:{STEPS}"])
def test_killed_while_writing(start, whole, tmp_path, deadly):
    """Inside a checkpoint, and between the last one and the link to it: what is half-written is never picked up."""
    assert killed_and_resumed(start, tmp_path / "run", deadly, None)
    assert_same_run(whole[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("deadly", ["save_file:1", "flush:5", "flush:30", "point:2", "replace_text:1"])
def test_killed_elsewhere_while_writing(start, whole, tmp_path, deadly):
    """More of these moments, the first file of the run among them."""
    assert killed_and_resumed(start, tmp_path / "run", deadly, None)
    assert_same_run(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(start, whole, tmp_path):
    """SIGKILL wherever the run happens to be, twenty times; the resumed one ends with the same weights."""
    rng, killed = random.Random(0), 0
    for n in range(20):
        killed += killed_and_resumed(start, tmp_path / str(n), None, rng.uniform(0.1, 1.0) * whole[1])
        assert_same_run(whole[0], tmp_path / str(n))
    assert killed >= 17


def test_sigterm_finishes_the_step_and_resumes(start, tmp_path, whole):
    """Exit code 0, a checkpoint of the step that was under way, and the command to go on with; then as if never stopped."""
    out = tmp_path / "run"
    arguments = [*SMALL, "--steps", STEPS, "--out", out]
    process = start(arguments, "random_state:4:TERM")  # at a step's start or end, not in the last
    process.join(120)
    told = out.with_name("run.log").read_text()
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    assert process.exitcode == 0 and 0 < steps < STEPS and not (out / "finished").exists()
    assert f"stopped after step {steps}; go on with: python memtrain.py --documents 2" in told and newest(out).name == f"step-{steps:06d}"
    process = start(arguments)
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(whole[0], out)


def test_the_folder_of_another_run_is_refused(tmp_path):
    """Differing settings are named; a finished run, --resume never and a run that is going on are refused too."""
    out = tmp_path / "run"
    arguments = [*SMALL, "--steps", 1, "--out", out]
    assert command(*arguments).returncode == 0
    for extra, words in ((["--seed", 7, "--g1", 3], ["--seed 0", "--g1 4"]), ([], ["finished"]), (["--resume", "never"], ["--resume auto"])):
        done = command(*arguments, *extra)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    (out / "finished").unlink()
    lock = checkpoints.lock(out)
    done = command(*arguments)
    assert done.returncode == 2 and "another run is writing" in done.stderr
    lock.close()
    assert command(*arguments).returncode == 0


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    """One line, exit code 2, nothing half-written; with space again the run goes on."""
    out, real, calls = tmp_path / "run", checkpoints.save_file, []

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
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000001"] == [Path(os.readlink(out / "checkpoint")).name]
    assert command(*arguments).returncode == 0 and len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_only_the_last_checkpoints_are_kept(tmp_path):
    assert command(*SMALL, "--steps", 4, "--keep", 2, "--out", tmp_path / "run").returncode == 0
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_what_a_change_of_room_leaves_as_it_was(tmp_path):
    """A run that goes on with its optimizer in CPU memory keeps what it has learned, as one that never stopped."""
    out, arguments = tmp_path / "run", [*SMALL, "--steps", 3]
    assert command(*arguments, "--out", out).returncode == 0
    whole = tmp_path / "whole"
    shutil.copytree(out, whole, symlinks=True)
    as_if_killed(out, 2)
    (out / "checkpoints/deleted-step-000000").mkdir()  # as a kill while it was being deleted leaves it
    done = command(*arguments, "--out", out, "--offload_optimizer", "True")
    assert done.returncode == 0 and "going on after step 2" in done.stdout, done.stderr
    assert not list((out / "checkpoints").glob("deleted-*"))
    a, b = weights(whole), weights(out)
    base = load_file(ROOT / "tiny/model/model.safetensors")
    moved = max((a[name] - base[name].float()).abs().max() for name in a)
    assert all((a[name] - b[name]).abs().max() < moved / 100 for name in a)


def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch, capsys):
    """Logits that training would get wrong, more processes than GPUs, a GPU that is full: one line each and exit code 2."""
    monkeypatch.setattr(memtrain, "logits_agree", lambda model: False)
    done = command(*SMALL, "--out", tmp_path / "run")
    assert done.returncode == 2 and "Qwen3ForCausalLM scales or caps its logits" in done.stderr
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="more processes than the 2 GPUs"):
        parallel.start()

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(SystemExit, match="2"):
        run(full)
    assert "--train-tokens" in capsys.readouterr().err


def test_bad_gradients_are_left_out_and_stop_the_run(tmp_path, monkeypatch):
    """One is skipped and counted; three in a row stop the run, and the checkpoint holds the weights from before them.
    The fifth is bad from the forward pass on."""
    real, forward, step = memtrain.grpo_loss, memtrain.completion_logprobs, [0]
    bad = {2, 4, 5, 6}

    def poisoned_forward(*arguments, **named):
        logprobs, entropy, mask = forward(*arguments, **named)
        return (logprobs * float("nan"), entropy * float("nan"), mask) if step[0] == 5 else (logprobs, entropy, mask)

    def poisoned(*arguments):
        loss, stats = real(*arguments)
        return (loss * float("nan") if step[0] in bad else loss), stats

    def counted(*arguments):
        step[0] += 1
        return update(*arguments)

    update = memtrain.update
    monkeypatch.setattr(memtrain, "grpo_loss", poisoned)
    monkeypatch.setattr(memtrain, "completion_logprobs", poisoned_forward)
    monkeypatch.setattr(memtrain, "update", counted)
    out = tmp_path / "run"
    done = command(*SMALL, "--steps", 9, "--out", out, "--documents", 4)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "not finite in 3 steps in a row" in last, done.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["bad_updates"] for m in metrics] == [0, 1, 0, 1, 1, 1] and [m["updates"] for m in metrics] == [1, 0, 1, 0, 0, 0]
    before, after = load_file(out / "checkpoints/step-000003/model.safetensors"), weights(out)
    assert all(torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in after)


def test_out_of_memory_halves_the_batch(monkeypatch, capsys):
    """The same completions, in smaller batches, and a line that says so; a single prompt that doesn't fit is an error."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16, num_attention_heads=2,
                         num_key_value_heads=2, eos_token_id=1, pad_token_id=0, initializer_range=0.3)  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    real, sizes, room = model.generate, [], 4

    def generate(input_ids, **more):
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **more)

    class Special:
        pad_token_id, eos_token_id = 0, 1

    prompts = [[2 + n, 3, 4] for n in range(16)]
    expected = sampling.generate(model, Special, prompts, 5, sampling.Limits(), greedy=True)
    monkeypatch.setattr(model, "generate", generate)
    limits = sampling.Limits(rollout_tokens=1000)
    assert sampling.generate(model, Special, prompts, 5, limits, greedy=True) == expected
    assert max(sizes) == 16 and sizes[-1] <= 4 and limits.rollout_tokens < 1000
    assert f"--rollout-tokens {limits.rollout_tokens}" in capsys.readouterr().out
    room = 0
    with pytest.raises(UserError, match="memory"):
        sampling.generate(model, Special, prompts, 5, sampling.Limits(), greedy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_round_trip(dtype):
    """A fresh optimizer with the saved tensors takes the very steps that the old one would have taken."""

    def policy():
        torch.manual_seed(0)
        return torch.nn.Linear(5, 3).to(dtype)

    def step(model, optimizer, n):
        model(torch.full((2, 5), 0.1 * n, dtype=dtype)).float().square().sum().backward()
        optimizer.step(1e-2, 1.0)

    first = policy()
    optimizer = MasterAdamW(first, 1e-2)
    for n in range(3):
        step(first, optimizer, n)
    second = policy()
    second.load_state_dict(first.state_dict())
    fresh = MasterAdamW(second, 1e-2)
    fresh.load({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    for n in range(3, 6):
        step(first, optimizer, n)
        step(second, fresh, n)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, fresh.masters, strict=True))
