"""Checkpoints that a kill can't spoil, and what a run needs to go on from one as if it had never stopped.

`runs/NAME/checkpoints/step-000100/` is a model folder that AutoModelForCausalLM and AutoTokenizer load, with three
files more: README.md, `training.safetensors` (optimizer and random states) and `training.json` (where the run was). It
is written under another name, flushed and renamed, so it is there whole or not at all. `runs/NAME/checkpoint` points to
the newest.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import lora
from engine.config import flag
from engine.errors import UserError
from engine.files import flush, replace_text

# They change memory, speed and rounding, and so the draws, but not the method.
ROOM = {
    "rollout_tokens", "train_tokens", "gradient_checkpointing", "offload_optimizer", "offload_reference",
    "shard_optimizer", "plain",
}
# All that may differ when a run goes on.
FREE = {"out", "resume", "save_every", "sample_every", "keep", "max_bad_steps", "explain"} | ROOM
LOGS = ("metrics.jsonl", "samples.jsonl")


def unfinished(out: Path, config: dict, resume: str) -> bool:
    """Whether `out` holds a run of this very `config` to go on with. Raises UserError where it holds something else."""
    if not out.exists() or out.is_dir() and not any(map(belongs_to_a_run, out.iterdir())):
        above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            why = "can't" if above.is_dir() else "is a file, so it can't"
            raise UserError(f"--out {out}: {above} {why} be written to; name another folder")
        return False  # nothing, or killed in its first moment
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    held = f"--out {out}: the folder holds another run"
    advice = "choose another or delete it"
    try:
        saved = dict(json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{held} or other files; {advice}") from None
    if (out / "finished").exists():
        raise UserError(f"--out {out}: the run in this folder is finished; {advice}")
    if saved.keys() != config.keys():  # of another program, or of another version of this one
        raise UserError(f"{held} or other files; {advice}")
    differing = sorted(name for name in config.keys() - FREE if saved[name] != config[name])
    if differing:
        flags = ", ".join(
            f"without {flag(name)}" if saved[name] is None else f"with {flag(name)} {saved[name]}"
            for name in differing[:5]
        )
        more = " ..." if differing[5:] else ""
        raise UserError(f"{held}, {flags}{more}; {advice}, or give its settings to go on with it")
    if resume == "never":
        raise UserError(f"{held}; {advice}, or go on with it by --resume auto")
    return True


def scratch(out: Path) -> TemporaryDirectory:
    """A folder beside `out` that is deleted when this process ends. Raises UserError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(dir=out.parent, prefix=".explained-")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: {error.filename}; name another folder") from None


def belongs_to_a_run(path: Path) -> bool:
    """Whether a path in a run's folder is neither a lock nor half-written."""
    return not path.name.startswith(".") and path.suffix != ".new"


def write_config(out: Path, config: dict) -> None:
    """Write config.json; where the run goes on with other settings of ROOM, name them."""
    file = out / "config.json"
    saved = json.loads(file.read_text()) if file.exists() else config
    if other := [flag(name) for name in sorted(ROOM) if saved[name] != config[name]]:
        print(
            f"--out {out}: going on with another {', '.join(other)}, so rounding and samples will not be those of a "
            "run that never stopped"
        )
    replace_text(file, json.dumps(config, indent=1))


def newest(out: Path) -> Path | None:
    """The last checkpoint that was written whole."""
    return max((out / "checkpoints").glob("step-*"), default=None, key=lambda folder: folder.name)


def lock(out: Path):
    """Keeps `out` for this run as long as what is returned lives. Raises UserError where another run has it."""
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing to this folder now; choose another") from None
    return file  # the system lets go of it when this process ends, however it ends


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


def command(processes: int) -> str:
    """The command line that started this run, as far as a process can know it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    start = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(local)]
    return shlex.join(start + sys.argv) + (" on every machine, as before" if local < processes else "")


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process that sampling draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def size(model, optimizer) -> int:
    """Bytes of a checkpoint: trained weights, moments, and float32 masters where the weights are not their own."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in optimizer.weights)
    return weights + parameters * (12 if optimizer.separate else 8)


def save(out: Path, state: dict, model, tokenizer, card: str, keep: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint of `state`'s step, point `out`/checkpoint to it, and delete all but the last `keep`.

    Raises UserError, leaving the older ones as they were, where it can't be written.
    """
    folder = out / "checkpoints" / f"step-{state['step']:06d}"
    fresh = folder.with_name("writing")
    if folder.exists():  # whole, and of this very step
        return point(out, folder, keep)
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card)
        lengths = {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, fresh / "training.safetensors")
        (fresh / "training.json").write_text(json.dumps(state | {"lengths": lengths}, indent=1))
        for path in [*fresh.rglob("*"), fresh, *(out / name for name in lengths)]:
            flush(path)
        fresh.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        older = newest(out)
        advice = f"{older} is whole: free some space and run the same command again" if older else "free some space"
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {folder.parent} ({error}); {advice}"
        ) from error
    point(out, folder, keep)


def point(out: Path, folder: Path, keep: int) -> None:
    """Have `out`/checkpoint lead to `folder`, the newest, and delete all but the last `keep`."""
    link = out / "checkpoint.new"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(out))
    link.replace(out / "checkpoint")
    for old in sorted((out / "checkpoints").glob("step-*"))[:-keep]:
        old.rename(old.with_name(f"deleted-{old.name}"))  # a kill then leaves half of it under no name that counts
    for gone in (out / "checkpoints").glob("deleted-*"):
        shutil.rmtree(gone, ignore_errors=True)


def load(folder: Path, model, optimizer, rank: int, processes: int) -> dict:
    """Bring model, optimizer and this process' random state to where `folder` has them -> its training.json."""
    state = json.loads((folder / "training.json").read_text())
    # Into the tensors that are there: fresh ones may be aligned otherwise, and some kernels then round otherwise.
    if (folder / lora.CONFIG).exists():
        lora.load_weights(model, folder)
    else:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict())
    tensors = load_file(folder / "training.safetensors")
    optimizer.load({name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")})
    if state.pop("processes") == processes:
        torch.set_rng_state(tensors[f"random/{rank}/cpu"])
        if torch.cuda.is_available() and f"random/{rank}/cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/{rank}/cuda"])
    else:
        torch.manual_seed(torch.initial_seed() + 7919 * state["step"])  # the first step's numbers are spent
        if rank == 0:
            print("going on with another number of processes: samples will not be those of a run that never stopped")
    return state


def rewind(out: Path, state: dict) -> None:
    """Cut the logs to what they held at the checkpoint: what came after it is done again."""
    for name in LOGS:
        if (out / name).exists():
            os.truncate(out / name, state.get("lengths", {}).get(name, 0))
