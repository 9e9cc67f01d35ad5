"""A run: its folder with a lock, its logs and checkpoints, and how it resumes. The loop itself is memtrain.py's.

`config.json` says which run a folder holds; the same command resumes it from its last checkpoint, whatever ended it.
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

try:
    import fcntl
except ImportError:
    print("error: MemTrain needs Linux or macOS; on Windows run it in WSL", file=sys.stderr)
    sys.exit(2)

from engine import checkpoints, parallel
from engine.config import flag
from engine.errors import UserError
from engine.files import replace_text
from engine.metrics import changes, sample_line, sample_rows, step_metrics, step_values, summary, table

# What may differ when a run resumes: where it writes, and what changes memory, speed and rounding but not the method.
FREE = {
    "out", "explain", "save_every", "sample_every", "keep", "rollout_tokens", "train_tokens", "gradient_checkpointing",
    "offload_optimizer", "offload_reference", "shard_optimizer", "fast",
}
MAX_BAD_STEPS = 3  # in a row, with a gradient that is not finite


class Run:
    """One run of memtrain.py. All processes call all of it; process 0 alone writes. It raises UserError."""

    def __init__(self, config, device: str):
        """Lock the folder, which must hold nothing or this very run."""
        self.config, self.out, self.device = config, Path(config.out), device
        self.rank, self.processes = parallel.rank(), parallel.count()
        if config.documents < self.processes:
            raise UserError(f"--documents {config.documents}: each of {self.processes} processes needs at least one")
        if config.eval_questions and Path(config.eval_questions).samefile(config.questions):
            raise UserError(
                f"--eval-questions {config.eval_questions}: is the file of --questions, so it would test what it has "
                "trained on; give another, or leave it out: then that file is split"
            )
        resuming = False
        if self.rank == 0:
            self.lock = lock(self.out)
            config.date = config.date or day_of(self.out) or date.today().isoformat()
            settings = asdict(config)
            if Path(config.model).is_dir():  # runs/X/checkpoint leads elsewhere when X goes on
                settings["model"] = str(Path(config.model).resolve())
            resuming = holds_run(self.out, settings)
            replace_text(self.out / "config.json", json.dumps(settings, indent=1))
        resuming, config.date = parallel.gather((resuming, config.date))[0]
        if not all(parallel.gather((self.out / "config.json").exists())):
            raise UserError(
                f"--out {self.out}: the processes don't see the same folder; give a path that all machines share"
            )
        self.last = checkpoints.newest(self.out) if resuming else None
        # What a checkpoint keeps beside tensors.
        self.state = {"step": 0, "processes": self.processes, "seconds": 0.0, "bad_steps": 0}
        self.stopped = False  # by a signal, before the last step

    # ---- before the first step

    def open(self, policy, tokenizer, optimizer, budget) -> None:
        """Keep what checkpoints save. Raises UserError where the disk has no room for one."""
        self.policy, self.tokenizer, self.optimizer, self.budget = policy, tokenizer, optimizer, budget
        copies = 3 if optimizer.masters is optimizer.weights else 4  # weights, two moments, and separate masters
        needed = 4 * copies * sum(weight.numel() for weight in optimizer.weights)  # bytes
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(
                f"--out {self.out}: a checkpoint takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some "
                "space, or name a folder on another disk"
            )

    def evaluate(self, when: str, measure) -> None:
        """Rows of `measure(when)` into eval.json, once a run; to the terminal a line before training, a table after."""
        file = self.out / "eval.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        if not self.config.eval_documents or self.stopped:
            return
        if any(row["when"] == when for row in rows):
            if self.rank == 0 and not self.last:
                print(f"{when}: evaluated earlier, as {file} says; delete it if the text has changed since")
            return
        rows = [row for row in rows if row["when"] == "before"] + measure(when)
        if self.rank == 0:
            print(table(rows) if when == "after" else f"{when}: {summary(rows)}", flush=True)
            replace_text(file, json.dumps(rows, indent=1))
        parallel.gather(None)  # the others read the file next time, and wait until it is there

    def resume(self) -> None:
        """Bring policy, optimizer, budget and random numbers to the last checkpoint, and cut the logs to it."""
        if self.last:
            self.state |= checkpoints.load(self.last, self.policy, self.optimizer, self.rank, self.processes)
            self.budget.tokens = min(self.budget.tokens, self.state["rollout_tokens"])
        if self.rank == 0:
            if self.last:
                print(f"resuming after step {self.state['step']}")
                checkpoints.point(self.out, self.last, self.config.keep)  # a kill may have come before this
            checkpoints.rewind(self.out, self.state)

    # ---- a step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left; it ends after the step in which a signal came."""
        self.signals = catch_signals()
        left = range(self.state["step"], self.config.steps)
        if left and self.rank == 0:
            print("success of each step's samples (brackets: since step 1), entropy, minutes left", flush=True)
        for step in left:
            self.seconds, self.lap_began = {}, time.perf_counter()
            yield step
            if self.stopped:
                break
        release_signals()

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.lap_began = now - self.lap_began, now

    def log(self, step: int, trajectories: list, stats: dict[str, float], more: dict) -> None:
        """A line of metrics.jsonl over all processes, and one to the terminal; now and then a document's trajectories
        into samples.jsonl, and a line of the first.

        `stats` are sums over this process's turns, `more` what is the same on every process.
        """
        parts, all_stats = zip(*parallel.gather((step_values(trajectories), stats)), strict=True)
        if self.rank:
            return
        values = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        sums = {name: sum(part.get(name, 0) for part in all_stats) for name in set().union(*all_stats)}
        metrics = {"step": step + 1} | step_metrics(values, sums, self.seconds) | more
        append(self.out / "metrics.jsonl", metrics)
        with (self.out / "metrics.jsonl").open() as log:
            first = json.loads(log.readline())
        minutes = sum(self.seconds.values()) * (self.config.steps - step - 1) / 60
        number = str(step + 1).rjust(len(str(self.config.steps)))
        print(f"step {number}: {changes(first, metrics)}, {minutes:.0f} min", flush=True)
        if step % self.config.sample_every == 0:
            print(sample_line(trajectories[0], shutil.get_terminal_size().columns), flush=True)
            append(self.out / "samples.jsonl", {"step": step + 1} | sample_rows(trajectories[: self.config.g1]))

    def save_if_due(self, step: int, bad_updates: int) -> None:
        """A checkpoint every so many steps, at the end, and before a stop. UserError after too many bad steps."""
        signals, budgets = zip(*parallel.gather((bool(self.signals), self.budget.tokens)), strict=True)
        self.state["step"], self.state["rollout_tokens"] = step + 1, min(budgets)
        self.state["seconds"] += sum(self.seconds.values())
        self.state["bad_steps"] = self.state["bad_steps"] + 1 if bad_updates else 0
        last, broken = step + 1 == self.config.steps, self.state["bad_steps"] >= MAX_BAD_STEPS
        self.stopped = any(signals) and not last
        if broken or self.stopped or last or (step + 1) % self.config.save_every == 0:
            self.save()
        if broken:
            raise UserError(
                f"the gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step {step + 1}; "
                f"{self.out}/checkpoint has the weights from before: look at the corpus, or lower --lr"
            )

    def save(self) -> None:
        """Write the checkpoint of the state's step."""
        states = parallel.gather(checkpoints.random_state())
        ended = self.state["step"] == self.config.steps  # nothing takes the optimizer on from here
        optimizer = {} if ended else self.optimizer.tensors()  # sharded, all processes bring their part
        try:
            if self.rank == 0:
                tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
                for n, part in enumerate(states):
                    tensors |= {f"random/{n}/{name}": tensor for name, tensor in part.items()}
                checkpoints.save(self.out, self.state, self.policy, self.tokenizer, self.config.keep, tensors)
        finally:
            parallel.gather(None)  # torchrun kills process 0 seconds after another one ends

    # ---- after the last step

    def finish(self) -> None:
        """Mark the run as finished, or say how to resume it."""
        if self.rank == 0 and self.stopped:
            print(f"stopped after step {self.state['step']}; run the same command again to resume")
        elif self.rank == 0:
            (self.out / "finished").touch()
            minutes = f"{self.state['seconds'] / 60:.1f} minutes on {self.processes} x {self.device}"
            print(f"{self.config.steps} steps in {minutes}; checkpoint in {self.out / 'checkpoint'}")
        parallel.stop()


# ---- the folder -----------------------------------------------------------------------------------------


def lock(out: Path):
    """Make `out`, and keep it for this process as long as what is returned lives. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; name a folder") from None
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing to this folder now; choose another") from None
    except OSError as error:
        raise UserError(f"--out {out}: can't be written to ({error.strerror}); name another folder") from None
    return file  # the system lets go of it when this process ends, however it ends


def day_of(out: Path) -> str | None:
    """The day on which the run in this folder began, if it holds one: some chat templates name it."""
    try:
        saved = json.loads((out / "config.json").read_text())
        return saved["date"] if any(map(worth_keeping, out.iterdir())) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def holds_run(out: Path, settings: dict) -> bool:
    """Whether `out` holds a run of these very settings to resume. Raises UserError where it holds something else."""
    if not any(map(worth_keeping, out.iterdir())):
        return False
    held, advice = f"--out {out}: the folder holds another run", "choose another or delete it"
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict) or saved.keys() != settings.keys():  # another program's, or another version's
        raise UserError(f"{held} or other files; {advice}")
    if (out / "finished").exists():
        raise UserError(f"--out {out}: the run in this folder is finished; {advice}")
    if differing := sorted(name for name in settings.keys() - FREE if saved[name] != settings[name]):
        flags = ", ".join(f"{flag(name)} {saved[name]}" for name in differing)
        raise UserError(f"{held}, with {flags}; {advice}, or give its settings to resume it")
    return True


def worth_keeping(path: Path) -> bool:
    """Whether a path in a run's folder is more than a lock, a half-written file or the settings of a failed start."""
    return not path.name.startswith(".") and path.suffix != ".new" and path.name != "config.json"


def append(file: Path, values: dict) -> None:
    """Add a line of JSON to a log; numbers that are not finite, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with file.open("a") as log:
        log.write(json.dumps(finite) + "\n")


# ---- signals --------------------------------------------------------------------------------------------


def catch_signals() -> list[int]:
    """A list that fills at SIGTERM or SIGINT, so that the step can be finished; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number, frame):
        asked.append(number)
        if number == signal.SIGINT:  # schedulers may send SIGTERM twice: to everybody, and once more through torchrun
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return asked


def release_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
