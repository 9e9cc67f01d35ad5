"""Checkpoints that a kill can't corrupt, and from which a run resumes as if it had never stopped.

`runs/NAME/checkpoints/step-000100/` is a model folder that AutoModelForCausalLM and AutoTokenizer load, plus
`training.safetensors` (optimizer and random states) and `training.json` (the run's progress). It is written under a
temporary name, flushed and renamed, so it is complete or absent. `runs/NAME/checkpoint` points to the newest.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.errors import UserError
from engine.files import flush
from engine.models import is_adapter

LOGS = ("metrics.jsonl", "samples.jsonl")


def newest(out: Path) -> Path | None:
    """The folder of the last complete checkpoint; None if there is none."""
    return max((out / "checkpoints").glob("step-*"), default=None, key=lambda folder: folder.name)


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process's random generators for sampling, on the CPU and its GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


# ---- writing --------------------------------------------------------------------------------------------


def save(out: Path, state: dict, model, tokenizer, keep: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint of step state["step"], point `out`/checkpoint to it, and delete all but the last `keep`.

    Raises UserError if it can't be written; older checkpoints then stay as they were.
    """
    folder = out / "checkpoints" / f"step-{state['step']:06d}"
    fresh = folder.with_name("writing")
    if folder.exists():  # complete, and of this very step
        return point(out, folder, keep)
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
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
        advice = f"{older} is intact: free some space and rerun the same command" if older else "free some space"
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {folder.parent} ({error}); {advice}"
        ) from error
    point(out, folder, keep)


def point(out: Path, folder: Path, keep: int) -> None:
    """Point `out`/checkpoint to `folder`, the newest, and delete all but the last `keep`."""
    link = out / "checkpoint.new"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(out))
    link.replace(out / "checkpoint")
    for old in sorted((out / "checkpoints").glob("step-*"))[:-keep]:
        old.rename(old.with_name(f"deleted-{old.name}"))  # so a kill can't leave half of it as step-*
    for gone in (out / "checkpoints").glob("deleted-*"):
        shutil.rmtree(gone, ignore_errors=True)


# ---- resuming -------------------------------------------------------------------------------------------


def load(folder: Path, model, optimizer, rank: int, processes: int) -> dict:
    """Load model, optimizer and this process's random state from `folder` -> the contents of its training.json."""
    state = json.loads((folder / "training.json").read_text())
    # Into the existing tensors: fresh ones may be aligned differently, and some kernels then round differently.
    if is_adapter(folder):
        from engine import lora

        lora.load_weights(model, folder)
    else:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict())
    # Not memory-mapped: an optimizer in CPU memory keeps these tensors, and would keep the file mapped.
    tensors = load_file(folder / "training.safetensors", backend="pread")
    optimizer.load({name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")})
    if state.pop("processes") == processes:
        torch.set_rng_state(tensors[f"random/{rank}/cpu"])
        if torch.cuda.is_available() and f"random/{rank}/cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/{rank}/cuda"])
    else:
        torch.manual_seed(torch.initial_seed() + 7919 * state["step"])  # or it would repeat the first step's numbers
        if rank == 0:
            print("resuming with another number of processes: samples will differ from those of an uninterrupted run")
    return state


def rewind(out: Path, state: dict) -> None:
    """Truncate the logs to their lengths at the checkpoint: later steps are done again."""
    for name in LOGS:
        if (out / name).exists():
            os.truncate(out / name, state.get("lengths", {}).get(name, 0))
