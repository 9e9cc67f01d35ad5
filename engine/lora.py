"""LoRA (arXiv 2106.09685), by peft: two thin matrices beside every linear layer are trained, and nothing else.

    attach          gives a model an adapter, a fresh one or that of a checkpoint
    as_it_began     within, the model is what it was at the start: so the reference of the KL costs no memory
    merged          the adapter of a folder added to the weights
    load_weights    the adapter's weights, from a checkpoint

    python -m engine.lora runs/X/checkpoint runs/X/merged    # a whole model, for programs that know no adapters

peft is needed only where an adapter is.
"""

import json
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.errors import UserError, first_line, run_script

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
ALPHA = 32  # updates count ALPHA / rank times, so that one learning rate does for every rank
START = "start"  # the name of a frozen copy of the adapter with which a run began


def require_peft(why: str):
    try:
        import peft
    except ImportError:
        raise UserError(f"{why}: needs peft; run `pip install peft`") from None
    return peft


def base_of(name: str, given: str) -> str | None:
    """The model that the adapter in the folder `name` belongs to; None for a whole model. Raises UserError."""
    file = Path(name) / CONFIG
    if not file.is_file():
        return None
    require_peft(f"{given} {name} is an adapter")
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: names no base model ({first_line(error)})") from None
    if not base or Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{given} {name}: is an adapter of {base}, which is not there; put it back, or mend {file}")
    return base


def attach(model, rank: int, seed: int, folder: str | None) -> None:
    """Freeze the model's weights and give it an adapter: that of `folder`, or a fresh one, which changes nothing yet.

    Raises UserError where the folder's is not of this rank.
    """
    peft = require_peft(f"--lora {rank}")
    if Path(model.config.name_or_path).is_dir():  # a checkpoint must find it from anywhere
        model.name_or_path = model.config.name_or_path = str(Path(model.config.name_or_path).resolve())
    model.requires_grad_(False)
    settings = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    if folder:
        settings = peft.LoraConfig.from_pretrained(folder)
        if settings.r != rank:
            raise UserError(f"--lora {rank}: the adapter in {folder} has rank {settings.r}; give --lora {settings.r}")
        settings.inference_mode = False
    # The same on every process, though each draws samples of its own: torch.manual_seed sets the GPU's numbers, too.
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        model.add_adapter(settings)
    if folder:
        with warnings.catch_warnings():  # peft warns of a second adapter
            warnings.simplefilter("ignore")
            model.add_adapter(settings, START)
        for name in (START, "default"):
            load_weights(model, Path(folder), name)
        model.set_adapter("default")  # the other is frozen
    model.eval()


@contextmanager
def as_it_began(model):
    """Within, the model is without its adapter, or with the one that it began with."""
    if START in model.peft_config:
        model.set_adapter(START)
    else:
        model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        model.set_adapter("default")  # and its weights are trained again


def merged(model, folder: str):
    """`model` with the adapter of `folder` added to its weights."""
    peft = require_peft(f"{folder} is an adapter")
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def load_weights(model, folder: Path, name: str = "default") -> None:
    """Bring an adapter of the model to where a checkpoint has it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)


def main() -> None:
    from engine.models import load_model

    if len(sys.argv) != 3:
        print(__doc__)
        return
    source, out = sys.argv[1:]
    if base_of(source, "merge") is None:
        raise UserError(f"{source}: holds no {CONFIG}, so it is no adapter")
    if Path(out).exists():
        raise UserError(f"{out}: is there already; delete it, or name another folder")
    model, tokenizer = load_model(source, "cpu", given="merge")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: the merged model")


if __name__ == "__main__":
    run_script(main)
