"""The models of a run: loaded and checked, with an adapter where one is trained, and the reference of the KL."""

import math
import random
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.chat import check_template, end_marker
from engine.errors import UserError, first_line

# Parts of a layer that compute each token by itself.
OTHER_KINDS = re.compile("mlp|norm|feedforward|ffn|experts|moe|router|activation|embedding|connection", re.I)
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
    with one_line(f"{given} {name}: not a causal language model with its tokenizer"):
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
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from None


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


@torch.no_grad()
def check_logits(model, name: str) -> None:
    """Raises UserError for a model whose own logits `logits_of` doesn't give: training would be silently wrong."""
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    own = model(input_ids=ids).logits.float()[0]  # (4, vocabulary)
    with one_line(f"--model {name}: {type(model).__name__} can't be trained here, get_decoder() gives no decoder"):
        ours = logits_of(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise UserError(
            f"--model {name}: {type(model).__name__} scales or caps its logits in a way that engine/models.py doesn't "
            "know; add it to logits_of"
        )


# ---- the sampler and the trainer ------------------------------------------------------------------------

# What rounding may do to log-probs: in float32 to each; in bfloat16, where rare words were 0.6 off, in the mean.
# Right models stayed below 0.003 and 0.08: SmolLM2-135M's weights, and random ones of 120 and of 10 families.
ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.2}


@torch.no_grad()
def check_sampler(sample, token_logprobs, name: str) -> None:
    """Raises UserError for a model that `sample`, a rollout.Sampler, draws from another distribution than is trained.

    It writes four tokens after each of a few prompts, greedily, padded and cached as in every rollout. The log-probs of
    all words there, and token_logprobs of the batch, must be those of passes of one row without padding and cache.
    """
    model, kinds, new = sample.model, layer_kinds(sample.model), 4
    who, bound = f"--model {name}: {model.config.model_type}", ROUNDING[model.dtype]

    @cache
    def alone(*ids: int) -> torch.Tensor:  # (new, vocabulary)
        row = torch.tensor([ids], device=model.device)  # (1, tokens)
        states = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0]  # (tokens, hidden size)
        return logits_of(model, states[-1 - new : -1]).float().log_softmax(-1)

    with one_line(f"{who} can't be sampled from and trained in batches, with its layers {kinds}"):
        with written_logprobs(model, end_ids(model, sample.tokenizer)) as written:
            prompts = probe_prompts(model, sample.tokenizer)
            turns = sample.generate(model, sample.tokenizer, prompts, new, None, True, sample.budget)
        if not written:  # a sampler of another kind, such as a server
            return
        sampled = [logprobs - alone(*ids) for ids, logprobs in written]  # each (new, vocabulary)
        trained = token_logprobs(model, turns)[0].clone()  # (turns, new)
        for turn, logprobs in zip(turns, trained, strict=True):
            words = torch.tensor(turn.completion_ids, device=model.device)[:, None]  # (new, 1)
            logprobs -= alone(*turn.prompt_ids, *turn.completion_ids).gather(1, words)[:, 0]
    for what, gaps in (("sampled from", torch.stack(sampled).abs()), ("trained", trained.abs())):
        found = (gaps.max() if model.dtype == torch.float32 else gaps.mean()).item()
        if not found <= bound:  # nan is refused, too
            raise UserError(
                f"{who} can't be {what}: in a padded batch its layers {kinds} give log-probs that are {found:.2g} off "
                f"those of a row alone (rounding: at most {bound}); take another model"
            )


def probe_prompts(model, tokenizer) -> list[list[int]]:
    """Prompts of ordinary tokens, the same in every run: 3, 12, and two pairs of 13, which the fast twins share.

    So many are long that the fast twin doesn't write the short one in a batch of its own, where it needs no padding.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, *end_ids(model, tokenizer)}
    size = min(len(tokenizer), len(model.get_input_embeddings().weight))
    rng, ordinary = random.Random(0), [i for i in range(size) if i not in special]
    short, middle, long, other = (rng.choices(ordinary, k=k) for k in (3, 12, 13, 13))
    return [short, middle, long, long, other, other]


@contextmanager
def written_logprobs(model, ends: list[int]):
    """Within, model.generate writes no end -> of each row that it wrote: ids, log-probs (new, vocabulary)."""
    generate, rows = model.generate, []

    def recording(input_ids, attention_mask, generation_config, **more):
        generation_config.update(suppress_tokens=ends, output_logits=True, return_dict_in_generate=True)
        found = generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config, **more
        )
        logprobs = torch.stack(found.logits, 1).float().log_softmax(-1)  # (rows, new, vocabulary)
        pads = (attention_mask == 0).sum(1).tolist()
        rows.extend((ids[n:], own) for ids, n, own in zip(found.sequences.tolist(), pads, logprobs, strict=True))
        return found.sequences

    model.generate = recording
    try:
        yield rows
    finally:
        del model.generate


def layer_kinds(model) -> str:
    """The classes that mix a row's tokens in the model's layers; those that are no attention, where there are any."""
    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    kinds = {type(part).__name__ for layer in layers for part in layer.children()}
    kinds = {kind for kind in kinds if not hasattr(torch.nn, kind) and not OTHER_KINDS.search(kind)}
    return ", ".join(sorted({kind for kind in kinds if "Attention" not in kind} or kinds)) or type(model).__name__


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
    check_logits(model, config.model)
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
    else:
        model.to(device)
        yield
        if config.offload_reference:
            model.to("cpu")
