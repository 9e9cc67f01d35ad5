"""A run: its processes, its folder with a lock, its steps, its logs, and how it goes on after a stop.

    run = Run(config)          joins the processes; refuses a folder that holds another run
    run.open(...)              makes the folder and locks it
    run.evaluate("before")     once, also over several starts
    run.resume()               brings everything to where the last checkpoint has it
    for step in run.steps():   ends early after SIGTERM or Ctrl-C
        run.draw, run.guard, run.lap, run.log, run.show, run.save_if_due
    run.finish()
"""

import json
import shutil
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from engine import checkpoints, explain, parallel
from engine.errors import UserError
from engine.files import replace_text
from engine.parallel import first_error, gather
from engine.report import json_line, sample_rows, sample_text, step_metrics, table


class Run:
    """One run of memtrain.py. All processes call all of it; process 0 alone writes. It raises UserError."""

    def __init__(self, config):
        if config.explain:  # one step, in a folder that is deleted afterwards
            self.scratch = checkpoints.scratch(Path(config.out))
            config = replace(config, out=self.scratch.name, eval_documents=0, steps=1)
        self.config, self.out, self.settings = config, Path(config.out), asdict(config)
        if Path(config.model).is_dir():
            # runs/X/checkpoint leads elsewhere when X goes on
            self.settings["model"] = str(Path(config.model).resolve())
        self.resuming = checkpoints.unfinished(self.out, self.settings, config.resume)
        if config.g1 < 2 or (config.g2 < 2 and config.recalls):
            raise UserError("--g1 and --g2 must be at least 2: an advantage compares the samples of a group")
        self.rank, self.processes, self.device = parallel.start()
        if config.explain and self.processes > 1:
            raise UserError("--explain: shows the step of one process; leave torchrun out")
        if config.documents < self.processes:
            raise UserError(
                f"--documents {config.documents}: each of the {self.processes} processes needs at least one"
            )
        self.last = checkpoints.newest(self.out) if self.resuming else None
        evaluated = self.resuming and (self.out / "eval.json").exists()
        if len(set(gather((self.resuming, self.last, evaluated)))) > 1:
            raise UserError(
                f"--out {self.out}: the processes don't see the same folder; give a path that all machines share"
            )
        self.places = range(self.rank, config.documents, self.processes)  # of this process's documents in a step
        self.state = {"step": 0, "processes": self.processes, "seconds": 0.0, "bad_steps": 0}
        self.signals: list[int] = []
        self.stopping = False
        self.builder = ThreadPoolExecutor(1)  # builds the documents of the next step while this one is sampled
        self.built: dict[int, Future] = {}
        torch.manual_seed(config.seed + 1_000_003 * self.rank)  # every process draws its own samples

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text)

    # ---- before the first step

    def open(self, policy, tokenizer, optimizer, budget) -> None:
        """Make the folder, lock it until this process ends, and keep what checkpoints save."""
        self.policy, self.tokenizer, self.optimizer, self.budget = policy, tokenizer, optimizer, budget
        self.say(f"{self.config.task} on {self.processes} x {self.device}")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoints.lock(self.out)
            if checkpoints.unfinished(self.out, self.settings, self.config.resume) != self.resuming:
                raise UserError(f"--out {self.out}: another run came and went meanwhile; run the same command again")
            if not self.config.explain:
                self.check_disk()
            checkpoints.write_config(self.out, self.settings)

    def check_disk(self) -> None:
        """UserError where the disk has no room for a checkpoint; a line where it hasn't for all of them at once."""
        needed = checkpoints.size(self.policy, self.optimizer)
        free = shutil.disk_usage(self.out).free
        most = (self.config.keep + 1) * needed  # a new one is written before the oldest goes
        held = sum(file.stat().st_size for file in (self.out / "checkpoints").rglob("*") if file.is_file())
        figures = f"a checkpoint takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if free < needed:
            raise UserError(f"--out {self.out}: {figures}; free some space, or name a folder on another disk")
        if free < most - held:
            lower = "free some, or give a smaller --keep" if self.config.keep > 1 else "free some"
            print(f"--out {self.out}: {figures}, {most / 1e9:.1f} are needed with --keep {self.config.keep}; {lower}")

    def evaluate(self, when: str, measure) -> None:
        """Rows of `measure(when)` into eval.json, and the table of all rows to the terminal."""
        file = self.out / "eval.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        if not self.config.eval_documents or self.stopped or any(row["when"] == when for row in rows):
            return
        rows = [row for row in rows if row["when"] == "before"] + measure(when)
        if self.rank == 0:
            print(table(rows))
            replace_text(file, json.dumps(rows, indent=1))
        gather(None)  # the others read the file next time, and wait until it is there

    def resume(self) -> None:
        """Go on from the last checkpoint, and cut the logs to what they held then."""
        self.state["rollout_tokens"] = self.budget.tokens
        if self.last:
            self.state |= checkpoints.load(self.last, self.policy, self.optimizer, self.rank, self.processes)
            self.budget.tokens = min(self.budget.tokens, self.state["rollout_tokens"])
            self.say(f"going on after step {self.state['step']}")
        if self.rank == 0:
            if self.last:  # a kill may have come between its writing and this
                checkpoints.point(self.out, self.last, self.config.keep)
            checkpoints.rewind(self.out, self.state)

    # ---- a step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left; it ends after the step in which a signal came."""
        self.signals = checkpoints.catch_signals()
        first, last = self.state["step"], self.config.steps
        self.bar = tqdm(range(first, last), desc="memtrain", disable=self.rank > 0, initial=first, total=last)
        for step in self.bar:
            self.seconds, self.lap_began = {}, time.perf_counter()
            self.began = self.lap_began
            self.random_state, self.updates_before = checkpoints.random_state(), self.optimizer.updates
            yield step
            if self.stopped:
                break
        checkpoints.release_signals()

    def draw(self, source, step: int) -> list:
        """This process's documents of a step. Those of the next step are then built meanwhile."""
        documents = self.built.pop(step).result() if step in self.built else self.build(source, step)
        if step + 1 < self.config.steps:
            self.built[step + 1] = self.builder.submit(self.build, source, step + 1)
        return documents

    def build(self, source, step: int) -> list:
        documents = [source.document(step * self.config.documents + place) for place in self.places]
        for place, document in zip(self.places, documents, strict=True):
            document.place = place
        return documents

    @contextmanager
    def guard(self):
        """Every process runs the block; where one of them fails, all save what was learned before this step, and end.

        The block must not wait for other processes. A UserError of another process is raised here, too.
        """
        error = None
        try:
            yield
        except Exception as caught:  # text, retriever, server or memory gave out, or a bug
            error = caught
        line = error if error is None or isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory, and saving needs some
            torch.cuda.empty_cache()
        lost = first_error(line)  # any kind can be raised again here, but not every kind sent to the others
        if lost is None:
            return
        done = self.state["step"]
        if done:
            self.say(f"step {done + 1} failed: {lost}; saving what was learned before it")
            moved = self.optimizer.updates > self.updates_before
            if moved and not (self.out / "checkpoints" / f"step-{done:06d}").exists():
                self.say(f"this holds the first updates of step {done + 1}, too")
            self.save(self.random_state)
        raise error or lost

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.lap_began = now - self.lap_began, now

    def log(self, step: int, rows: dict[str, list], stats: dict[str, float], more: dict) -> None:
        """A line of metrics.jsonl, of the samples (`rows`) and updates (`stats`) of all processes."""
        parts, all_stats = zip(*gather((rows, stats)), strict=True)
        if self.rank:
            return
        rows = {name: [value for part in parts for value in part[name]] for name in rows}
        sums = {name: sum(part.get(name, 0) for part in all_stats) for name in set().union(*all_stats)}
        metrics = {"step": step + 1} | step_metrics(rows, sums, self.seconds)
        metrics |= {name: stats[name] for name in ("grad_norm", "updates", "bad_updates")} | more
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json_line(metrics))
        shown = {"e2e": metrics["end_to_end"], "recall": metrics["recall"], "entropy": metrics["entropy"]}
        self.bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None})

    def show(self, step: int, trajectories: list, targets: list, recalls: list, rewards: list, own: list) -> None:
        """Every so many steps, the first document's trajectories into samples.jsonl, one of them to the terminal."""
        if self.rank == 0 and step % self.config.sample_every == 0:
            tqdm.write(f"step {step + 1}: {sample_text(trajectories[0], recalls[0], rewards[0])}")
            first = slice(self.config.g1)
            sample = sample_rows(trajectories[first], targets[first], recalls[first], rewards[first], own[first])
            with (self.out / "samples.jsonl").open("a") as file:
                file.write(json_line({"step": step + 1} | sample))

    def save_if_due(self, step: int, bad_updates: int) -> None:
        """A checkpoint every so many steps, at the end, and before a stop. UserError after too many bad steps."""
        signals, budgets = zip(*gather((bool(self.signals), self.budget.tokens)), strict=True)
        self.state["step"], self.state["rollout_tokens"] = step + 1, min(budgets)
        self.state["seconds"] += time.perf_counter() - self.began
        self.state["bad_steps"] = self.state["bad_steps"] + 1 if bad_updates else 0
        self.stopping = any(signals)
        broken = self.state["bad_steps"] >= self.config.max_bad_steps
        if broken or self.stopping or (step + 1) % self.config.save_every == 0 or step + 1 == self.config.steps:
            self.save(checkpoints.random_state())
        if broken:
            raise UserError(
                f"the gradient was not finite in {self.state['bad_steps']} steps in a row, up to step {step + 1}; "
                f"{self.out}/checkpoint has the weights from before: look at the corpus, or lower --lr"
            )

    def save(self, random_state: dict[str, torch.Tensor]) -> None:
        """Write the checkpoint of the state's step; `random_state` is this process's at its end."""
        states = gather(random_state)
        ended = self.state["step"] == self.config.steps  # nothing takes the optimizer on from here
        optimizer = {} if ended else self.optimizer.tensors()  # sharded, all processes bring their part
        try:
            if self.rank == 0:
                self.write(states, optimizer)
        finally:
            gather(None)  # torchrun kills process 0 seconds after another one ends

    def write(self, states: list[dict[str, torch.Tensor]], optimizer: dict[str, torch.Tensor]) -> None:
        tensors = {f"optimizer/{name}": t for name, t in optimizer.items()}
        tensors |= {f"random/{n}/{name}": tensor for n, part in enumerate(states) for name, tensor in part.items()}
        card = model_card(self.config, self.state["step"])
        checkpoints.save(self.out, self.state, self.policy, self.tokenizer, card, self.config.keep, tensors)

    # ---- after the last step

    def explain(self, sampled: tuple, groups: list, turns: list, store, loss, learn) -> None:
        """Print the step from inside, delete the folder, and end."""
        self.bar.close()
        explain.print_rollout(self.tokenizer, self.config.g1, groups, *sampled)
        explain.print_update(self.tokenizer, self.config, groups, turns, store, loss, learn)
        self.scratch.cleanup()
        parallel.stop()

    @property
    def stopped(self) -> bool:
        """Whether a signal has ended the run before its last step."""
        return self.stopping and self.state["step"] < self.config.steps

    def finish(self) -> None:
        """Mark the run as finished, or say how it goes on."""
        if self.stopped:
            command = checkpoints.command(self.processes)
            self.say(f"stopped after step {self.state['step']}; go on with: {command}")
        else:
            if self.rank == 0:
                (self.out / "finished").touch()
            minutes = f"{self.state['seconds'] / 60:.1f} minutes on {self.processes} x {self.device}"
            self.say(f"{self.config.steps} steps in {minutes}; checkpoint in {self.out / 'checkpoint'}")
        parallel.stop()


def model_card(config, step: int) -> str:
    return (
        f"---\nlibrary_name: transformers\ntags: [memtrain, grpo]\n---\n# A MemTrain checkpoint\n\n"
        f"`{config.model}` after {step} steps of {config.task} (arXiv 2606.03197) on `{config.corpus_name}`: it reads "
        f"texts in chunks of {config.chunk_tokens} tokens and keeps up to {config.memory_tokens} tokens of memory.\n"
        "Made to be trained further on a task. The settings are in `config.json` of the run's folder.\n"
    )
