"""The models of a run: the policy, with an adapter if one is trained, and the reference of the KL."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from engine.chat import check_template, end_marker
from engine.errors import UserError, reason_of
from engine.saved import run_of

ADAPTER = "adapter_config.json"  # peft's: a folder with this file holds an adapter, not a complete model
DELAY = 5  # seconds before a bar of transformers is shown


# ---- loading --------------------------------------------------------------------------------------------


def load_model(name: str, device: str, dtype: str = "float32", given: str = "--model"):
    """(model in eval mode, tokenizer) for a folder or hub name, which the argument `given` named. Raises UserError.

    An adapter's folder gives its base model with the adapter attached, not merged into the weights: in bfloat16 merging
    would round small changes away.
    """
    check_model(name, given)
    if is_adapter(name):
        from engine import lora

        model, tokenizer = load_model(lora.base_of(name, given), device, dtype, given)
        lora.attach_saved(model, Path(name), ["default"])
        return model.requires_grad_(False), tokenizer
    # Here and where it saves, no bar for work of a second; the hub's bars of downloads stay.
    logging.set_tqdm_hook(lambda bar, given, settings: bar(*given, **settings | {"delay": DELAY}))
    # Config, weights, tokenizer or a package may be missing or broken; each raises different errors.
    why = "not a causal language model with its tokenizer"
    if not Path(name).is_dir():
        why = "hub down, no access, no such model, not a causal model"
    with one_line(f"{given} {name}: can't be loaded ({why})"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_tokenizer(tokenizer, name, given)  # before the weights, which may take minutes
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    if not end_ids(model, tokenizer):
        raise UserError(f"{given} {name}: neither its generation_config.json nor its tokenizer has an end token")
    switch_off_dropout(model)
    for settings in (model.config, model.config.get_text_config()):
        if getattr(settings, "output_router_logits", False):  # for the router's own loss, which left padding breaks
            settings.output_router_logits = False
    model = model.to(device).eval()
    with torch.no_grad(), one_line(f"{given} {name}: {type(model).__name__} can't compute a row of two tokens"):
        logits = model(input_ids=torch.tensor([[0, 1]], device=device)).logits  # (1, 2, vocabulary)
    if not logits.isfinite().all():  # greedy sampling would silently write nonsense
        raise UserError(f"{given} {name}: its logits are not finite; check its weights, or try another --dtype")
    return model, tokenizer


@contextmanager
def one_line(what: str):
    """A context that turns errors in a model's own code into a UserError starting with `what`."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {reason_of(error)}") from None


def is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER).is_file()


def check_model(name: str, given: str) -> None:
    """Raises UserError if `name`, from the argument `given`, can't be a model."""
    if run_of(f"{name}/checkpoint")[0] == Path(name).absolute():
        raise UserError(f"{given} {name}: is the folder of a run; its model is {name}/checkpoint")
    if Path(name).is_file():
        raise UserError(f"{given} {name}: is a file; name a model folder (config.json, tokenizer.json, *.safetensors)")
    configs = Path(name) / "config.json", Path(name) / ADAPTER
    if Path(name).is_dir() and not any(config.is_file() for config in configs):
        raise UserError(f"{given} {name}: has no config.json, so it is not a model folder; name another")
    if Path(name).is_symlink() and not Path(name).exists():
        raise UserError(f"{given} {name}: leads to {Path(name).readlink()}, which isn't there; copy links with cp -rL")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{given} {name}: no such folder (a model on the hub is called OWNER/NAME)")


def check_tokenizer(tokenizer, name: str, given: str) -> None:
    """Raises UserError for a tokenizer that can't encode, or whose chat template can't be rendered."""
    if not tokenizer.is_fast or not tokenizer("Ada")["input_ids"]:
        raise UserError(f"{given} {name}: its tokenizer is not a fast one (tokenizer.json), or has an empty vocabulary")
    if tokenizer.chat_template is not None:
        check_template(tokenizer, name, given)


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end a completion: chat models often have two, and their template may use a third."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id, end_marker(tokenizer)] if i is not None})


def switch_off_dropout(model) -> None:
    """Set all dropout to 0, so it is off in train mode too: the ratio must compare passes of one network."""
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in attribute or "jitter" in attribute):  # attention's, a router's
                setattr(holder, attribute, 0.0)


def window_of(model) -> float:
    """Most tokens of a turn, prompt and completion, with this model; infinite if its config sets no limit."""
    settings = model.config.get_text_config()
    window = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or {}
    if window and rope.get("rope_type") in ("longrope", "dynamic"):  # beyond it, positions depend on the whole batch
        original = getattr(settings, "original_max_position_embeddings", None)
        window = rope.get("original_max_position_embeddings") or original or window
    # Llama4's attention chunks, and what DeepSeek's indexer can see: beyond these, padding and caching change results.
    limits = (window, getattr(settings, "attention_chunk_size", None), getattr(settings, "index_topk", None))
    return min((limit for limit in limits if limit), default=math.inf)


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits (tokens, vocabulary) for a decoder's last states (tokens, hidden size)."""
    head, settings = model.get_output_embeddings(), model.config.get_text_config()
    logits = head(hidden.to(head.weight.dtype))  # some decoders return float32
    scale = 1.0 / (getattr(settings, "logits_scaling", None) or 1)  # Granite
    scale *= (getattr(settings, "logit_scale", None) or 1) * (getattr(settings, "lm_head_multiplier", None) or 1)
    if scale != 1:  # ... Cohere, Falcon-H1
        logits = logits * scale
    # Gemma; RecurrentGemma
    if cap := getattr(settings, "final_logit_softcapping", None) or getattr(settings, "logits_soft_cap", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


# ---- the policy and its reference -----------------------------------------------------------------------


def load_policy(config, device: str):
    """(model to be trained, tokenizer): --model, or with --lora an adapter on it. Raises UserError."""
    if is_adapter(config.model) and not config.lora:
        raise UserError(
            f"--model {config.model}: is an adapter; train it further with --lora RANK, or merge it with "
            f"`python -m recipes.merge {config.model} FOLDER` and train the merged model"
        )
    if config.lora and config.offload_reference:
        raise UserError(
            "--offload-reference: with --lora the reference is the policy without its adapter; leave the flag out"
        )
    base = config.model
    if config.lora:
        from engine import lora

        base = lora.base_of(config.model, "--model")
    model, tokenizer = load_model(base, device, config.dtype)
    tokenizer.day = config.date  # for engine/chat.py
    if config.lora:
        lora.begin(model, config)
    if config.gradient_checkpointing:
        with one_line(f"--gradient-checkpointing: {type(model).__name__} doesn't support it; leave it out"):
            model.activation_checkpointing_enable()
    return model, tokenizer


def load_reference(config, policy, device: str):
    """The model that training started from; None if --kl is 0; the policy itself with --lora (see as_reference)."""
    if not config.kl:
        return None
    if config.lora:
        return policy
    model, _ = load_model(config.model, "cpu" if config.offload_reference else device, config.dtype)
    return model.requires_grad_(False)


@contextmanager
def as_reference(model, config, device: str):
    """A context in which the reference is on the device, and a policy with an adapter is as at the start."""
    if config.lora:
        from engine import lora

        with lora.as_it_began(model):
            yield
    elif config.offload_reference:
        held = {parameter: parameter.data for parameter in model.parameters()}  # in CPU memory
        try:
            model.to(device)
            yield
        finally:
            for parameter, data in held.items():
                parameter.data = data  # unchanged, so nothing is copied back
    else:
        yield
