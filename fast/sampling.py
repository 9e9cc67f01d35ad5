"""The fast twin of rollout.generate: the same completions, by Hugging Face's `generate`, in less time and memory.

    generate          prompts to completions, in batches of a token budget that shrinks after running out of memory
    generate_batch    one batch: computes the prompts, then writes all rows together, dropping those that have ended
    prefill           computes each prompt once, in batches of similar length, into one cache
    Draw              draws each token from its distribution; on a GPU by exponential_race
    Stop              ends a row

Temperature is 1, without top-p, top-k or penalties, so the log-probs in training are those of the sampler.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from math import ceil

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers import __version__ as installed

from engine.chat import begins_in_thought
from engine.errors import UserError
from engine.models import end_ids
from fast.attention import PromptLayer, SharedPrompts, can_share_prompts, enable_packing, takes_shared_prompts
from fast.packing import by_length, by_prompt
from rollout import Budget, Turn, finished_turn, left_padded, pad_id
from text.thoughts import listener

CACHE = "past_key_values" if installed.startswith("5.23") else "cache"  # transformers 5.24 renamed the argument


@lru_cache(maxsize=4)
def closing_tokens(tokenizer, words: int) -> torch.Tensor:
    """Which tokens may close a box or a tag -> (vocabulary,) bool. `done` is called only after these."""
    special = set(tokenizer.all_special_ids)  # some look like <|this|>, and occur in every padded row
    closing = {i for token, i in tokenizer.get_vocab().items() if "}" in token or ">" in token}
    table = torch.zeros(words, dtype=torch.bool)
    table[[i for i in closing - special if i < words]] = True
    return table


def exponential_race(scores):
    """Values whose argmax in each row of scores (rows, vocabulary) is a draw from the softmax -> same shape.

    Among independent exponential times with rates p, the first is i's with probability p_i. On a GPU noise for every
    token is cheaper than a running sum. As in torch.multinomial, float32 makes tokens far below 1e-7 too rare.
    """
    return scores.softmax(-1).div_(torch.empty_like(scores).exponential_())


class Draw(LogitsProcessor):
    """Draws one token per row from its scores (rows, vocabulary), and marks it so that generate's argmax takes it.

    On a CPU, torch.multinomial draws a random number for every token of the vocabulary, one after the other. This draws
    one per row. It sums in float64, for tokens of probability 1e-7. A greedy Draw changes nothing.
    """

    def __init__(self, greedy: bool):
        self.greedy = greedy

    def __call__(self, ids, scores):
        if self.greedy:
            return scores
        if scores.is_cuda:
            return exponential_race(scores)
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)  # (rows, vocabulary)
        at = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]  # (rows, 1)
        above = torch.searchsorted(cumulative, at, right=True)  # (rows, 1): the first above `at`
        drawn = above.clamp(max=scores.shape[1] - 1)
        return scores.fill_(-torch.inf).scatter_(1, drawn, 0.0)  # generate's own copy, which can be large


class Stop(StoppingCriteria):
    """Ends each row once `done(its text)` is true: nothing reads what a model writes after its answer.

    `lengths` (rows,) are the new tokens up to there or up to an end token, after which generate only pads; 0 while a
    row goes on. When at most `few` rows are left, all are ended, and generate_batch continues with those few. `closing`
    is from closing_tokens: a table look-up, not thousands of comparisons per row, tells whose text must be decoded.
    """

    def __init__(self, done, hear, closing, ends: list[int], rows: int, width: int, few: int, device):
        self.done, self.hear, self.closing, self.width, self.few = done, hear, closing, width, few
        self.ends = torch.tensor(ends, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def __call__(self, ids, scores, **more):
        going = self.lengths == 0  # (rows,)
        self.lengths[going & torch.isin(ids[:, -1], self.ends)] = ids.shape[1] - self.width
        if self.done:
            closed = going & self.closing[ids[:, -1]]  # (rows,)
            for row in closed.nonzero().flatten().tolist():
                new = ids[row, self.width :]
                if self.done(self.hear(new.tolist())[0]):
                    self.lengths[row] = len(new)
        going = self.lengths == 0
        return ~going | (going.sum() <= self.few)


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, done: Callable[[str], bool] | None, greedy: bool,
    budget: Budget,
) -> list[Turn]:
    """The fast twin of rollout.generate: one completion for each prompt, in the order of `prompts`.

    `done` is called only after tokens that contain } or >. Running out of memory twice halves `budget`. Raises
    UserError if a single prompt doesn't fit.
    """
    turns: list = [None] * len(prompts)
    batches = cut_batches(model, prompts, range(len(prompts)), new_tokens, budget.tokens)
    failures = 0  # of the first batch
    while batches:
        some, found = [prompts[i] for i in batches[0]], None
        try:
            found = generate_batch(model, tokenizer, some, new_tokens, done, greedy, budget.tokens // 8)
        except torch.OutOfMemoryError:
            failures += 1  # retry outside: while an exception is handled, it keeps its frames' tensors alive
        if found is not None:
            for i, turn in zip(batches.pop(0), found, strict=True):
                turns[i] = turn
            failures = 0
            continue
        torch.cuda.empty_cache()  # may be enough the first time, if free memory was only fragmented
        if failures == 2:
            shrink(budget, some, held_tokens(model, some, new_tokens))
            waiting = [i for i, turn in enumerate(turns) if turn is None]
            batches = cut_batches(model, prompts, waiting, new_tokens, budget.tokens)
            failures = 0
    return turns


def cut_batches(model, prompts: list[list[int]], waiting, new_tokens: int, max_tokens: int) -> list[list[int]]:
    """The prompts with the indices `waiting`, in batches that take at most `max_tokens` tokens of cache."""
    share = can_share_prompts(model)
    sizes = [len(prompts[i]) + new_tokens for i in waiting]  # tokens of cache
    if share and takes_shared_prompts(model):
        for group in by_prompt([prompts[i] for i in waiting]):
            for n in group:  # a prompt's tokens are divided among its rows
                sizes[n] = ceil((sizes[n] - new_tokens) / len(group)) + new_tokens
    fill = 0.5 if share else 0.875  # if prompts are computed beforehand, rows may differ more in length
    batches = [[waiting[n] for n in places] for places in by_length(sizes, max_tokens, fill)]
    fitting = []
    while batches:
        batch = batches.pop(0)
        if len(batch) > 1 and held_tokens(model, [prompts[i] for i in batch], new_tokens) > max_tokens:
            batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]  # uneven groups hold copies of prompts
        else:
            fitting.append(batch)
    return fitting


def holds_prompts_once(model, groups: list[list[int]]) -> bool:
    """Whether a batch of these groups (from by_prompt) holds each prompt only once.

    Not if one prompt has far more rows than another: the largest group determines the work for all.
    """
    able = can_share_prompts(model) and takes_shared_prompts(model)
    return able and len(groups) * max(map(len, groups)) <= 2 * sum(map(len, groups))


def held_tokens(model, prompts: list[list[int]], new_tokens: int) -> int:
    """Tokens of cache that a batch of these prompts takes, padding included."""
    groups = by_prompt(prompts)
    copies = len(groups) if holds_prompts_once(model, groups) else len(prompts)
    return copies * max(map(len, prompts)) + len(prompts) * new_tokens


def shrink(budget: Budget, prompts: list[list[int]], held: int) -> None:
    """Halve the budget after a batch of these prompts, `held` tokens, ran out of memory. UserError for one prompt."""
    if len(prompts) == 1:
        raise UserError(
            f"out of memory for a single prompt of {len(prompts[0])} tokens: reduce --chunk-tokens, leave out "
            "--controls full, or see docs/performance.md for what can be kept in CPU memory"
        )
    budget.tokens = min(budget.tokens, held) // 2  # the batch may have been far smaller than the budget
    print(f"out of memory in rollout: continuing with --rollout-tokens {budget.tokens}", flush=True)


def generate_batch(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, done: Callable[[str], bool] | None, greedy: bool,
    prefill_tokens: int,
) -> list[Turn]:
    """One batch: Hugging Face's generate, called again with the remaining rows whenever half of them have ended.

    Prompts are computed first, in batches of `prefill_tokens`. If the model fails can_share_prompts, generate computes
    them itself, and ended rows stay in to the end.
    """
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    hear = listener(tokenizer, ends, begins_in_thought(tokenizer))
    ids, mask = left_padded(prompts, pad, model.device)  # (rows, width)
    width = ids.shape[1]
    cache, shared, closing = None, None, None
    if done:
        closing = closing_tokens(tokenizer, model.get_output_embeddings().weight.shape[0]).to(ids.device)
    if can_share_prompts(model):
        enable_packing(model)  # its attention is also better for prompts, on cards without flash attention
        cache, shared = prefill(model, prompts, prefill_tokens, new_tokens)
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad, max_length=width + new_tokens)
    turns: list = [None] * len(prompts)
    going = list(range(len(prompts)))  # the prompt of each row
    # generate would take whatever `config` leaves open from the model folder's config: penalties, forbidden words.
    own, model.generation_config = model.generation_config, config
    try:
        while going:
            for layer in cache.layers if cache is not None else []:
                layer.room = config.max_length - ids.shape[1] + 1  # so that buffers are allocated only once
            few = len(going) // 2 if cache is not None and len(going) > 8 else 0
            stop = Stop(done, hear, closing, ends, len(going), width, few, ids.device)
            with shared.used_by(model) if shared else nullcontext():
                ids = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[Draw(greedy)],
                    stopping_criteria=[stop], **{CACHE: cache},
                )
            new = ids[:, width:].tolist()
            rows = []  # those that continue
            for row, (i, length) in enumerate(zip(going, stop.lengths.tolist(), strict=True)):
                if length or len(new[row]) == new_tokens:
                    turns[i] = finished_turn(prompts[i], new[row][: length or None], length > 0, hear)
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
    return turns


def prefill(
    model, prompts: list[list[int]], max_tokens: int, new_tokens: int
) -> tuple[DynamicCache, SharedPrompts | None]:
    """Compute all but the last token of each prompt -> (cache, SharedPrompts or None). Needs can_share_prompts(model).

    Each prompt is computed once, in batches of at most `max_tokens` tokens or of one prompt, and is right-aligned in
    its row. With SharedPrompts, prompts are set aside in the cache: once each, or once per row if groups differ much
    in size.
    """
    cache, width = DynamicCache(config=model.config), max(map(len, prompts)) - 1
    cache.layers = [PromptLayer() for _ in cache.layers]
    if not width:
        return cache, None
    groups = by_prompt(prompts)
    lengths = [len(prompts[group[0]]) - 1 for group in groups]
    copied = len(groups) < len(prompts) and not holds_prompts_once(model, groups)
    alone = copied or len(groups) == len(prompts)  # each row has a prompt of its own in the cache
    # With one row per prompt SharedPrompts beats torch's attention on a CPU, but would cast bfloat16 up each time.
    aside = takes_shared_prompts(model) and not (alone and model.dtype != torch.float32)
    for layer in cache.layers:
        layer.room = 0 if aside else new_tokens
    for places in by_length(lengths, max_tokens):
        places = [n for n in places if lengths[n]]  # a prompt of one token leaves nothing to compute
        if not places:
            continue
        # Padded on the right, where causal attention never looks: no mask, so fast kernels stay in use.
        rows = [torch.tensor(prompts[groups[n][0]][:-1]) for n in places]
        ids = pad_sequence(rows, batch_first=True).to(model.device)  # (batch, longest)
        part = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=ids, use_cache=True, **{CACHE: part})
        for layer, computed in zip(cache.layers, part.layers, strict=True):
            if not layer.is_initialized:
                layer.make_room(computed.keys, computed.values, len(groups), width)
            for row, n in enumerate(places):
                layer.keys[n, :, width - lengths[n] :] = computed.keys[row, :, : lengths[n]]
                layer.values[n, :, width - lengths[n] :] = computed.values[row, :, : lengths[n]]
            computed.keys = computed.values = None  # or a prompt in a batch of its own would be held twice
    number = {i: n for n, group in enumerate(groups) for i in group}
    prompt_of = torch.tensor([number[i] for i in range(len(prompts))], device=model.device)  # (rows,)
    pads = width - torch.tensor(lengths, device=model.device)  # (prompts,)
    if copied:
        cache.batch_select_indices(prompt_of)
        pads, prompt_of = pads[prompt_of], torch.arange(len(prompts), device=model.device)
    if not aside:
        return cache, None
    for layer in cache.layers:
        layer.set_prompts_aside()
    mask = torch.arange(width, device=model.device) >= pads[:, None]  # (prompts, width)
    return cache, SharedPrompts(cache, prompt_of, mask)
