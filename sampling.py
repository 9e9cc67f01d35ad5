"""Sampling: many prompts, one completion each, by Hugging Face's `generate`, from the model's own distribution.

    generate          prompts to completions: cut into batches by a token budget, smaller ones after running out of memory
    generate_batch    one batch: prompts computed (`attention.prefill`), then written together, ended rows left out
    Draw              what takes each token from its distribution
    Stop              what ends a row

Temperature is 1, without top-p, top-k or penalties, so that the log-probs of training are of what was sampled.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from attention import can_share_prompts, is_plain, prefill
from batching import by_length, by_prompt
from errors import UserError


@dataclass
class Limits:
    """Token budgets of one conversation and of one batch."""

    memory_tokens: int = 1024  # a memory, when it is written and again when it is read
    answer_tokens: int = 1024  # an answer
    rollout_tokens: int = 65536  # a `generate` batch: rows x (prompt, by parts where rows share it, + new tokens)
    result_tokens: int = 1024  # what a search shows
    searches: int = 6  # of one episode


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a completion: chat models often have two."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@lru_cache(maxsize=4)
def closing_tokens(tokenizer) -> list[int]:
    """Ids of the tokens that hold the end of a box or a tag: only after these is a text looked at."""
    special = set(tokenizer.all_special_ids)  # some look like <|this|>, and come in every padded row
    return sorted(i for token, i in tokenizer.get_vocab().items() if ("}" in token or ">" in token) and i not in special)


class Draw(LogitsProcessor):
    """Leaves of each row's scores (rows, vocabulary) one token, drawn from their distribution, for an argmax to find.

    torch.multinomial takes a random number for every word of the vocabulary, one after the other on a CPU: a quarter of
    the tiny model's sampling. This takes one a row. Sums in float64, since tokens of 1e-7 count too.
    """

    finite = True  # or a tensor, False once a score was nan: asked for at the end, so that no token waits for the answer

    def __call__(self, ids, scores):
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)  # (rows, vocabulary)
        at = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]  # (rows, 1)
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[1] - 1)  # (rows, 1): the first above `at`
        self.finite = cumulative[:, -1].isfinite().all() & self.finite
        return scores.fill_(-torch.inf).scatter_(1, drawn, 0.0)  # generate's own copy, which can be large


class Stop(StoppingCriteria):
    """Ends each row where `done(text)` first holds: what a model says after its answer is not read by anyone.

    `lengths` (rows,) are the new tokens up to there or up to an end token, 0 where neither came; behind them generate
    only pads. Where no more than `few` rows go on, all are ended: `generate_batch` then goes on without the rest.
    """

    def __init__(self, done, tokenizer, ends: list[int], rows: int, width: int, few: int, device):
        self.done, self.tokenizer, self.width, self.few = done, tokenizer, width, few
        self.closing = torch.tensor(closing_tokens(tokenizer) if done else [], dtype=torch.long, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def __call__(self, ids, scores, **more):
        going = self.lengths == 0  # (rows,)
        self.lengths[going & torch.isin(ids[:, -1], self.ends)] = ids.shape[1] - self.width
        if self.done:
            closed = going & torch.isin(ids[:, -1], self.closing)  # (rows,)
            for row in closed.nonzero().flatten().tolist():
                new = ids[row, self.width :]
                if self.done(self.tokenizer.decode(new, skip_special_tokens=True)):
                    self.lengths[row] = len(new)
        going = self.lengths == 0
        return ~going | (going.sum() <= self.few)


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, limits: Limits, greedy: bool = False, done=None
) -> list[tuple[list[int], bool, int]]:
    """One completion per prompt, as (token ids, ended by itself, padding of the prompt), in the order of `prompts`.

    `done(text)`, if given, ends a completion early. Running out of memory halves limits.rollout_tokens, for good; raises
    UserError where a single prompt doesn't fit, and for logits that are not finite.
    """
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
    draw = None if greedy else Draw()
    share = can_share_prompts(model)
    once = share and is_plain(model)
    fill = 0.5 if share else 0.875  # prompts that are computed apart needn't be of similar length to write
    completions: list = [None] * len(prompts)
    while waiting := [i for i, completion in enumerate(completions) if completion is None]:
        full = False
        try:
            # What a row holds of the cache: a prompt that stands there once, its share of it.
            sizes = [len(prompts[i]) + new_tokens for i in waiting]
            for group in by_prompt([prompts[i] for i in waiting]) if once else []:
                for n in group:
                    sizes[n] = ceil(len(prompts[waiting[n]]) / len(group)) + new_tokens
            for places in by_length(sizes, limits.rollout_tokens, fill):
                batch = [waiting[n] for n in places]
                prefill_tokens = limits.rollout_tokens // 8 if share else None
                found = generate_batch(model, tokenizer, [prompts[i] for i in batch], new_tokens, prefill_tokens, config, draw, done)
                for i, completion in zip(batch, found, strict=True):
                    completions[i] = completion
        except torch.OutOfMemoryError:
            full = True
        if full:  # here and not above: while it is handled, an exception keeps alive what its frames hold
            if len(batch) == 1:
                raise UserError(f"out of memory for a single prompt of {len(prompts[batch[0]])} tokens: make --chunk-tokens smaller, "
                                "leave out --controls full, or see README on what can be held in CPU memory")  # fmt: skip
            torch.cuda.empty_cache()
            failed = len(batch) * max(sizes[n] for n in places)  # far less than the budget, maybe
            limits.rollout_tokens = min(limits.rollout_tokens, failed) // 2
            print(f"out of memory in rollout: going on with --rollout-tokens {limits.rollout_tokens}", flush=True)
    if draw and not draw.finite:
        raise UserError("--model: its logits are not finite, so nothing can be sampled; look at its weights, or try another --dtype")
    return completions


def generate_batch(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, prefill_tokens: int | None, config: GenerationConfig, draw: Draw | None, done=None
) -> list[tuple[list[int], bool, int]]:
    """One batch of `generate`: Hugging Face's generate, called anew with the rows that go on once half of them have ended.

    Prompts are computed ahead, in batches of `prefill_tokens`. None, for a model of which can_share_prompts doesn't hold:
    Hugging Face's generate computes them, and ended rows stay in to the end.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)  # (rows, width)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # left padding: the completion follows the prompt without a gap
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache, shared, padding = None, None, [width - len(prompt) for prompt in prompts]
    if prefill_tokens is not None:
        cache, shared, padding = prefill(model, prompts, prefill_tokens)
    config.max_length = width + new_tokens
    completions: list = [None] * len(prompts)
    going = list(range(len(prompts)))  # the prompt of each row
    # What `config` leaves open generate would take from the model folder's: penalties, least lengths, words not to be used.
    own, model.generation_config = model.generation_config, config
    try:
        while going:
            few = len(going) // 2 if cache is not None and len(going) > 8 else 0
            stop = Stop(done, tokenizer, config.eos_token_id, len(going), width, few, ids.device)
            with shared.used_by(model) if shared else nullcontext():
                ids = model.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config,
                    logits_processor=[draw] if draw else [], stopping_criteria=[stop],
                )  # fmt: skip
            new = ids[:, width:].tolist()
            rows = []  # that go on
            for row, (i, length) in enumerate(zip(going, stop.lengths.tolist(), strict=True)):
                if length or len(new[row]) == new_tokens:
                    completions[i] = (new[row][: length or None], length > 0, padding[i])
                else:
                    rows.append(row)
            going = [going[row] for row in rows]
            if going:
                chosen = torch.tensor(rows, device=ids.device)
                ids = ids[chosen]
                mask = torch.cat([mask[chosen], mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], 1)
                shared.keep(chosen) if shared else cache.batch_select_indices(chosen)
    finally:
        model.generation_config = own
    return completions
