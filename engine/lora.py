"""LoRA (arXiv 2106.09685), by peft: only two thin matrices beside every linear layer but the head are trained.

    begin, attach_saved     give a model an adapter, a fresh one or that of a checkpoint
    as_it_began             within, the model is what it was at the start: so the reference of the KL costs no memory
    load_weights            an adapter brought to where a checkpoint has it

peft is needed only where an adapter is.
"""

import importlib.util
import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from engine.errors import UserError, reason_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
ALPHA = 32  # updates count ALPHA / rank times, so that one learning rate does for every rank
START = "start"  # the name of a frozen copy of the adapter with which a run began


def base_of(name: str, given: str) -> str:
    """The model that the adapter in the folder `name` belongs to; `name` itself if it is none. Raises UserError."""
    file = Path(name) / CONFIG
    if not file.is_file():
        return name
    check_peft(f"{given} {name}: is an adapter, which")
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: names no base model ({reason_of(error)})") from None
    if not base or Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{given} {name}: is an adapter of {base}, which is not there; restore it, or correct {file}")
    return base


def check_peft(what: str) -> None:
    """Raises UserError, "`what` needs peft ...", where it is missing or older than the installed transformers takes."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} needs peft; run `pip install peft`")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        raise UserError(
            f"{what} needs peft {MIN_PEFT_VERSION} or newer with transformers {transformers.__version__}; run "
            "`pip install -U peft` or, where there is no newer one yet, install an older transformers"
        ) from None


def begin(model, config) -> None:
    """Give the model the adapter that is trained: that of --model, or a fresh one, which changes nothing yet.

    Raises UserError for an adapter of --model with another rank.
    """
    from peft import LoraConfig

    file = Path(config.model) / CONFIG
    if file.is_file():
        rank = json.loads(file.read_text()).get("r", 0)
        if rank != config.lora:
            raise UserError(f"--lora {config.lora}: the adapter in {file.parent} has rank {rank}; give --lora {rank}")
        return attach_saved(model, file.parent, [START, "default"])  # the first stays as it is
    settings = LoraConfig(
        r=config.lora, lora_alpha=ALPHA, target_modules="all-linear", exclude_modules=unfit(model) or None,
        task_type="CAUSAL_LM",
    )
    # The same on every process, though each draws samples of its own: torch.manual_seed sets the GPU's numbers, too.
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(config.seed)
        attach(model, settings, "default")


def unfit(model) -> list[str]:
    """Names of the linear layers that an adapter can't stand beside."""
    names = []
    for name, layer in model.named_modules():
        if hasattr(layer, "conv1d"):  # Mamba: its kernels take the weights of these two, and never call the layers
            names += [f"{name}.{part}" for part in ("out_proj", "dt_proj") if hasattr(layer, part)]
        elif isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear and not is_plain(layer):
            names.append(name)  # a router, which returns a tuple
    return names


@torch.no_grad()
def is_plain(layer: torch.nn.Linear) -> bool:
    """Whether a class derived from Linear still maps (rows, in_features) to (rows, out_features)."""
    try:
        found = layer(layer.weight.new_zeros(2, layer.in_features))
    except Exception:  # it wants another shape, or more arguments
        return False
    return isinstance(found, torch.Tensor) and found.shape == (2, layer.out_features)


def attach_saved(model, folder: Path, names: list[str]) -> None:
    """Give the model the adapter of a folder, once under each name; the last one is used.

    Raises UserError for an adapter of another kind, or one that doesn't fit the model.
    """
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    if settings.peft_type != "LORA":
        raise UserError(f"{folder}: is an adapter of the kind {settings.peft_type}, not LORA")
    settings.lora_dropout, settings.inference_mode = 0.0, False  # dropout: the ratio compares passes of one network
    for name in names:
        attach(model, settings, name)
        load_weights(model, folder, name)


def attach(model, settings, name: str) -> None:
    """Freeze all that the model has, and give it one more adapter."""
    model.requires_grad_(False)
    if Path(model.config.name_or_path).is_dir():  # a checkpoint must find its base from anywhere
        model.name_or_path = model.config.name_or_path = str(Path(model.config.name_or_path).resolve())
    with warnings.catch_warnings():  # peft warns of a second adapter
        warnings.simplefilter("ignore")
        model.add_adapter(settings, name)
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


def load_weights(model, folder: Path, name: str = "default") -> None:
    """Bring an adapter of the model to where a checkpoint has it. Raises UserError where it doesn't fit."""
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: can't be loaded ({reason_of(error)})") from None
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        raise UserError(f"{folder / WEIGHTS}: does not fit the model; {[*missing, *result.unexpected_keys][0]} differs")
