"""LoRA (arXiv 2106.09685), by peft: trains only two low-rank matrices for every linear layer except the head.

    begin, attach_saved     give a model a fresh adapter, or a saved one
    as_it_began             a context in which the model is as at the start, so the KL's reference costs no memory
    load_weights            load an adapter's weights from a checkpoint

peft is needed only for adapters.
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
ALPHA = 32  # the adapter's output is scaled by ALPHA / rank, so one learning rate suits every rank
START = "start"  # the name of a frozen copy of the adapter that a run began with


def base_of(name: str, given: str) -> str:
    """The base model of the adapter in the folder `name`; `name` itself if it isn't an adapter. Raises UserError."""
    file = Path(name) / CONFIG
    if not file.is_file():
        return name
    check_peft(f"{given} {name}: is an adapter, which")
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: names no base model ({reason_of(error)})") from None
    if not base or Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{given} {name}: is an adapter of {base}, which doesn't exist; restore it, or correct {file}")
    return base


def check_peft(what: str) -> None:
    """Raises UserError, "`what` needs peft ...", if peft is missing or too old for the installed transformers."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} needs peft; run `pip install peft`")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        raise UserError(
            f"{what} needs peft {MIN_PEFT_VERSION} or newer with transformers {transformers.__version__}; run "
            "`pip install -U peft` or, if there is no newer version yet, install an older transformers"
        ) from None


def begin(model, config) -> None:
    """Give the model the adapter to be trained: that of --model, or a fresh one, which changes no output yet.

    Raises UserError if the adapter of --model has another rank.
    """
    from peft import LoraConfig

    file = Path(config.model) / CONFIG
    if file.is_file():
        rank = json.loads(file.read_text()).get("r", 0)
        if rank != config.lora:
            raise UserError(f"--lora {config.lora}: the adapter in {file.parent} has rank {rank}; give --lora {rank}")
        return attach_saved(model, file.parent, [START, "default"])  # START stays frozen
    settings = LoraConfig(
        r=config.lora, lora_alpha=ALPHA, target_modules="all-linear", exclude_modules=unfit(model) or None,
        task_type="CAUSAL_LM",
    )
    # The same on every process, though their sampling seeds differ. torch.manual_seed also seeds the GPU.
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(config.seed)
        attach(model, settings, "default")


def unfit(model) -> list[str]:
    """Names of the linear layers that can't have an adapter."""
    names = []
    for name, layer in model.named_modules():
        if hasattr(layer, "conv1d"):  # Mamba: its kernels use the weights of these two without calling the layers
            names += [f"{name}.{part}" for part in ("out_proj", "dt_proj") if hasattr(layer, part)]
        elif isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear and not is_plain(layer):
            names.append(name)  # a router, which returns a tuple
    return names


@torch.no_grad()
def is_plain(layer: torch.nn.Linear) -> bool:
    """Whether a class derived from Linear still maps (rows, in_features) to (rows, out_features)."""
    try:
        found = layer(layer.weight.new_zeros(2, layer.in_features))
    except Exception:  # it needs another shape, or more arguments
        return False
    return isinstance(found, torch.Tensor) and found.shape == (2, layer.out_features)


def attach_saved(model, folder: Path, names: list[str]) -> None:
    """Give the model the adapter in a folder, once under each name; the last one is active.

    Raises UserError for an adapter other than LoRA, or one that doesn't fit the model.
    """
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    if settings.peft_type != "LORA":
        raise UserError(f"{folder}: is an adapter of type {settings.peft_type}; only LORA is supported")
    settings.lora_dropout, settings.inference_mode = 0.0, False  # the ratio must compare passes of one network
    for name in names:
        attach(model, settings, name)
        load_weights(model, folder, name)


def attach(model, settings, name: str) -> None:
    """Freeze all parameters of the model, and add an adapter to it."""
    model.requires_grad_(False)
    if Path(model.config.name_or_path).is_dir():  # a checkpoint must find its base from anywhere
        model.name_or_path = model.config.name_or_path = str(Path(model.config.name_or_path).resolve())
    with warnings.catch_warnings():  # peft warns about a second adapter
        warnings.simplefilter("ignore")
        model.add_adapter(settings, name)
    model.eval()


@contextmanager
def as_it_began(model):
    """A context in which the model has no adapter, or the adapter that the run began with."""
    if START in model.peft_config:
        model.set_adapter(START)
    else:
        model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        model.set_adapter("default")  # which also makes its weights trainable again


def load_weights(model, folder: Path, name: str = "default") -> None:
    """Load the weights of the model's adapter `name` from a folder. Raises UserError if they don't fit."""
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: can't be loaded ({reason_of(error)})") from None
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        raise UserError(f"{folder / WEIGHTS}: does not fit the model; {[*missing, *result.unexpected_keys][0]} differs")
