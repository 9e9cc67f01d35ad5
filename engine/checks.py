"""Whether a model can be trained here: its log-probs in training must be of the distribution it is sampled from.

Some families compute a different distribution in a padded batch or with a cache than in a plain forward pass; others
scale their logits in unusual ways. Training would be silently wrong.
"""

import random
import re
from contextlib import contextmanager
from functools import cache

import torch

from engine.errors import UserError
from engine.models import end_ids, logits_of, one_line

# Parts of a layer that compute each token separately.
OTHER_KINDS = re.compile("mlp|norm|feedforward|ffn|experts|moe|router|activation|embedding|connection", re.I)
# What rounding may do to log-probs: in float32 the largest gap; in bfloat16, where rare words were 0.6 off, the mean
# gap. Good models stayed below 0.003 and 0.08: SmolLM2-135M, and random weights of 120 and of 10 families.
ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.2}


@torch.no_grad()
def check_sampler(sample, token_logprobs, name: str) -> None:
    """Raises UserError if `sample`, a rollout.Sampler, draws from a different distribution than the one trained.

    It samples four tokens for each of a few prompts, greedily, padded and cached as in every rollout. The log-probs of
    the whole vocabulary there, and token_logprobs of the batch, must equal those of single rows without padding or
    cache, up to ROUNDING. For a sampler that doesn't call model.generate, only check_logits is done.
    """
    model, kinds, new = sample.model, layer_kinds(sample.model), 4
    check_logits(model, name)
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
        if not written:  # a sampler that doesn't call model.generate, such as a server
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
                f"those of a single row (rounding: at most {bound}); use another model"
            )


@torch.no_grad()
def check_logits(model, name: str) -> None:
    """Raises UserError if `logits_of` doesn't reproduce the model's own logits: training would be silently wrong."""
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    own = model(input_ids=ids).logits.float()[0]  # (4, vocabulary)
    with one_line(f"--model {name}: {type(model).__name__} can't be trained here, get_decoder() returns no decoder"):
        ours = logits_of(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise UserError(
            f"--model {name}: {type(model).__name__} scales or caps its logits in a way that engine/models.py doesn't "
            "handle; add it to logits_of"
        )


def probe_prompts(model, tokenizer) -> list[list[int]]:
    """Prompts of ordinary tokens, the same in every run: 3 and 12 tokens, and two pairs of 13, which fast/ shares.

    Most are long, so that fast/ doesn't put the short one into a batch of its own, where it needs no padding.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, *end_ids(model, tokenizer)}
    size = min(len(tokenizer), len(model.get_input_embeddings().weight))
    rng, ordinary = random.Random(0), [i for i in range(size) if i not in special]
    short, middle, long, other = (rng.choices(ordinary, k=k) for k in (3, 12, 13, 13))
    return [short, middle, long, long, other, other]


@contextmanager
def written_logprobs(model, ends: list[int]):
    """A context in which model.generate never ends a row -> a list of (ids, log-probs (new, vocabulary)) per row."""
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
    """Names of the classes that mix a row's tokens in the model's layers; of those that aren't attention, if any."""
    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    kinds = {type(part).__name__ for layer in layers for part in layer.children()}
    kinds = {kind for kind in kinds if not hasattr(torch.nn, kind) and not OTHER_KINDS.search(kind)}
    return ", ".join(sorted({kind for kind in kinds if "Attention" not in kind} or kinds)) or type(model).__name__
