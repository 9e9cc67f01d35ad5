"""The models of a run: loaded and checked, with an adapter where one is trained, and the reference of the KL."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.chat import check_template, end_marker
from engine.errors import UserError, reason_of

ADAPTER = "adapter_config.json"  # peft's: a folder with this file holds an adapter, and no whole model


# ---- loading --------------------------------------------------------------------------------------------


def load_model(name: str, device: str, dtype: str = "float32", given: str = "--model"):
    """(model in eval mode, tokenizer) of a folder or hub name, `given` by this argument. Raises UserError.

    An adapter's folder gives its base model with the adapter beside the weights, not merged into them: in bfloat16 that
    would round small changes away.
    """
    check_model(name, given)
    if is_adapter(name):
        from engine import lora

        model, tokenizer = load_model(lora.base_of(name, given), device, dtype, given)
        lora.attach_saved(model, Path(name), ["default"])
        return model.requires_grad_(False), tokenizer
    # Config, weights, tokenizer, a package that it needs: each fails in its own ways.
    why = "not a causal language model with its tokenizer"
    if not Path(name).is_dir():
        why = "hub down, no access, no such model, not a causal model"
    with one_line(f"{given} {name}: can't be loaded ({why})"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_tokenizer(tokenizer, name, given)  # before the weights, which may take minutes
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    if not end_ids(model, tokenizer):
        raise UserError(f"{given} {name}: neither its generation_config.json nor its tokenizer names an end of text")
    switch_off_dropout(model)
    for settings in (model.config, model.config.get_text_config()):
        if getattr(settings, "output_router_logits", False):  # for a loss of its own, which left padding breaks
            settings.output_router_logits = False
    model = model.to(device).eval()
    with torch.no_grad(), one_line(f"{given} {name}: {type(model).__name__} can't compute a row of two tokens"):
        logits = model(input_ids=torch.tensor([[0, 1]], device=device)).logits  # (1, 2, vocabulary)
    if not logits.isfinite().all():  # greedy sampling would write nonsense without a word
        raise UserError(f"{given} {name}: its logits are not finite; look at its weights, or try another --dtype")
    return model, tokenizer


@contextmanager
def one_line(what: str):
    """Within, an error of a model's own code is a UserError that begins with `what`."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {reason_of(error)}") from None


def is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER).is_file()


def check_model(name: str, given: str) -> None:
    """Raises UserError where `name`, given by this argument, can be no model's."""
    configs = Path(name) / "config.json", Path(name) / ADAPTER
    if Path(name).is_dir() and not any(config.is_file() for config in configs):
        raise UserError(f"{given} {name}: holds no config.json, so it is no model folder")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{given} {name}: no such folder (a model of the hub is called OWNER/NAME)")


def check_tokenizer(tokenizer, name: str, given: str) -> None:
    """Raises UserError for a tokenizer that can't encode, or whose chat template can't be rendered."""
    if not tokenizer.is_fast or not tokenizer("Ada")["input_ids"]:
        raise UserError(f"{given} {name}: its tokenizer is no fast one (tokenizer.json), or has no words")
    if tokenizer.chat_template is not None:
        check_template(tokenizer, name, given)


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a completion: chat models often have two, and their template may close with a third."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id, end_marker(tokenizer)] if i is not None})


def switch_off_dropout(model) -> None:
    """Dropout stays off in train mode, too: the ratio compares passes of one network."""
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in attribute or "jitter" in attribute):  # attention's, a router's
                setattr(holder, attribute, 0.0)


def window_of(model) -> float:
    """Tokens that a conversation with the model may have; infinite where its config names no limit."""
    settings = model.config.get_text_config()
    window = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or {}
    if window and rope.get("rope_type") in ("longrope", "dynamic"):  # beyond this a row's positions depend on its batch
        original = getattr(settings, "original_max_position_embeddings", None)
        window = rope.get("original_max_position_embeddings") or original or window
    # Llama4's chunks, and the most tokens that DeepSeek's indexer lets be seen: beyond them padding and a cache matter.
    limits = (window, getattr(settings, "attention_chunk_size", None), getattr(settings, "index_topk", None))
    return min((limit for limit in limits if limit), default=math.inf)


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits (tokens, vocabulary) of a decoder's last states (tokens, hidden size)."""
    head, settings = model.get_output_embeddings(), model.config.get_text_config()
    logits = head(hidden.to(head.weight.dtype))  # some decoders end in float32
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
    """(model to be trained, tokenizer): all of --model, or with --lora an adapter on it. Raises UserError."""
    if is_adapter(config.model) and not config.lora:
        raise UserError(
            f"--model {config.model}: is an adapter; train it further by --lora RANK, or merge it by "
            f"`python -m recipes.merge {config.model} FOLDER` and train all weights of that"
        )
    if config.lora and config.offload_reference:
        raise UserError("--offload-reference: with --lora the reference is the policy, its adapter off; leave it out")
    base = config.model
    if config.lora:
        from engine import lora

        base = lora.base_of(config.model, "--model")
    model, tokenizer = load_model(base, device, config.dtype)
    tokenizer.day = config.date  # for engine/chat.py
    if config.lora:
        lora.begin(model, config)
    if config.gradient_checkpointing:
        with one_line(f"--gradient-checkpointing: {type(model).__name__} can't; leave it out"):
            model.activation_checkpointing_enable()
    return model, tokenizer


def load_reference(config, policy, device: str):
    """The model that training started from; None if --kl is 0. With --lora this is the policy, see `as_reference`."""
    if not config.kl:
        return None
    if config.lora:
        return policy
    model, _ = load_model(config.model, "cpu" if config.offload_reference else device, config.dtype)
    return model.requires_grad_(False)


@contextmanager
def as_reference(model, config, device: str):
    """Within, the model is on the device, and a policy with an adapter is what it was at the start."""
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
                parameter.data = data  # it didn't change, so it needn't be copied back
    else:
        yield
