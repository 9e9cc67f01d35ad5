"""The fast twin of rollout.generate: the same completions, by Hugging Face's `generate`, in less time and memory.

    generate          prompts to completions, in batches of a token budget that shrinks after running out of memory
    generate_batch    one batch: prompts computed first, then written together, ended rows left out
    prefill           prompts computed in batches of similar length, each once, and laid side by side in one cache
    Draw              takes each token from its distribution; exponential_race does on a GPU
    Stop              ends a row

Temperature is 1, without top-p, top-k or penalties, so that the log-probs of training are those of the sampler.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from math import ceil

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from engine.chat import begins_in_thought
from engine.errors import UserError
from engine.models import end_ids
from fast.attention import PromptLayer, SharedPrompts, can_share_prompts, enable_packing, takes_shared_prompts
from fast.packing import by_length, by_prompt
from rollout import Budget, Turn, finished_turn, left_padded, pad_id
from text.thoughts import listener


@lru_cache(maxsize=4)
def closing_tokens(tokenizer, words: int) -> torch.Tensor:
    """Which of the vocabulary's words hold the end of a box or a tag -> (words,) bool. After these `done` is asked."""
    special = set(tokenizer.all_special_ids)  # some look like <|this|>, and come in every padded row
    closing = {i for token, i in tokenizer.get_vocab().items() if "}" in token or ">" in token}
    table = torch.zeros(words, dtype=torch.bool)
    table[[i for i in closing - special if i < words]] = True
    return table


def exponential_race(scores):
    """What is highest, in each row of scores (rows, vocabulary), with the probabilities of the softmax -> same shape.

    Of independent exponential times of rates p the first is i's with probability p_i. On a GPU noise for each word is
    cheaper than a running sum. Words far below 1e-7 come too seldom, as in torch.multinomial: float32 times end there.
    """
    return scores.softmax(-1).div_(torch.empty_like(scores).exponential_())


class Draw(LogitsProcessor):
    """Draws one token a row from its scores (rows, vocabulary), for an argmax to find.

    torch.multinomial takes a random number for every word of the vocabulary, one after the other on a CPU. This takes
    one a row. Sums in float64, since tokens of 1e-7 count too. A greedy Draw leaves all to the argmax.
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
    """Ends each row where `done` first holds for what it said: nobody reads what a model says after its answer.

    `lengths` (rows,) are the new tokens up to there or up to an end token, 0 where neither came; behind them generate
    only pads. Once no more than `few` rows go on, all are ended, and generate_batch goes on with those few. `closing`
    is that of closing_tokens: a look into a table is nothing beside thousands of comparisons a row.
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

    `done` is asked after tokens that hold } or > only. Running out of memory twice halves `budget`. UserError where a
    single prompt doesn't fit.
    """
    turns: list = [None] * len(prompts)
    batches = cut_batches(model, prompts, range(len(prompts)), new_tokens, budget.tokens)
    failures = 0  # of the first batch
    while batches:
        some, found = [prompts[i] for i in batches[0]], None
        try:
            found = generate_batch(model, tokenizer, some, new_tokens, done, greedy, budget.tokens // 8)
        except torch.OutOfMemoryError:
            failures += 1  # and no more here: while an exception is handled, it keeps alive all that its frames hold
        if found is not None:
            for i, turn in zip(batches.pop(0), found, strict=True):
                turns[i] = turn
            failures = 0
            continue
        torch.cuda.empty_cache()  # the first time that may be enough: there was room, but in pieces
        if failures == 2:
            shrink(budget, some, held_tokens(model, some, new_tokens))
            waiting = [i for i, turn in enumerate(turns) if turn is None]
            batches = cut_batches(model, prompts, waiting, new_tokens, budget.tokens)
            failures = 0
    return turns


def cut_batches(model, prompts: list[list[int]], waiting, new_tokens: int, max_tokens: int) -> list[list[int]]:
    """The positions `waiting`, of prompts, in batches that fill at most `max_tokens` tokens of the cache."""
    share = can_share_prompts(model)
    sizes = [len(prompts[i]) + new_tokens for i in waiting]  # of the cache
    if share and takes_shared_prompts(model):
        for group in by_prompt([prompts[i] for i in waiting]):
            for n in group:  # the rows of a prompt divide its tokens
                sizes[n] = ceil((sizes[n] - new_tokens) / len(group)) + new_tokens
    fill = 0.5 if share else 0.875  # prompts that are computed apart needn't be of similar length to write
    batches = [[waiting[n] for n in places] for places in by_length(sizes, max_tokens, fill)]
    fitting = []
    while batches:
        batch = batches.pop(0)
        if len(batch) > 1 and held_tokens(model, [prompts[i] for i in batch], new_tokens) > max_tokens:
            batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]  # its groups are of different sizes
        else:
            fitting.append(batch)
    return fitting


def holds_prompts_once(model, groups: list[list[int]]) -> bool:
    """Whether a batch of these groups, of by_prompt, holds each prompt once.

    Not where one prompt has far more rows than another: the largest group sets the work of all.
    """
    able = can_share_prompts(model) and takes_shared_prompts(model)
    return able and len(groups) * max(map(len, groups)) <= 2 * sum(map(len, groups))


def held_tokens(model, prompts: list[list[int]], new_tokens: int) -> int:
    """Tokens of the cache that a batch of these prompts fills, padding included."""
    groups = by_prompt(prompts)
    copies = len(groups) if holds_prompts_once(model, groups) else len(prompts)
    return copies * max(map(len, prompts)) + len(prompts) * new_tokens


def shrink(budget: Budget, prompts: list[list[int]], held: int) -> None:
    """Halve the budget after a batch of these prompts, `held` tokens, ran out of memory. UserError for a single one."""
    if len(prompts) == 1:
        raise UserError(
            f"out of memory for a single prompt of {len(prompts[0])} tokens: make --chunk-tokens smaller, leave out "
            "--controls full, or see docs/performance.md on what can be held in CPU memory"
        )
    budget.tokens = min(budget.tokens, held) // 2  # the batch may have been far smaller than the budget
    print(f"out of memory in rollout: going on with --rollout-tokens {budget.tokens}", flush=True)


def generate_batch(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, done: Callable[[str], bool] | None, greedy: bool,
    prefill_tokens: int,
) -> list[Turn]:
    """One batch: Hugging Face's generate, called anew with the rows that go on once half of them have ended.

    Prompts are computed first, in batches of `prefill_tokens`. Where a model fails can_share_prompts, generate computes
    them, and ended rows stay in to the end.
    """
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    hear = listener(tokenizer, ends, begins_in_thought(tokenizer))
    ids, mask = left_padded(prompts, pad, model.device)  # (rows, width)
    width = ids.shape[1]
    cache, shared, closing = None, None, None
    if done:
        closing = closing_tokens(tokenizer, model.get_output_embeddings().weight.shape[0]).to(ids.device)
    if can_share_prompts(model):
        enable_packing(model)  # for prompts, too, its attention is the better one on cards without flash attention
        cache, shared = prefill(model, prompts, prefill_tokens, new_tokens)
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad, max_length=width + new_tokens)
    turns: list = [None] * len(prompts)
    going = list(range(len(prompts)))  # the prompt of each row
    # generate takes from the model folder's config all that `config` leaves open: penalties, forbidden words.
    own, model.generation_config = model.generation_config, config
    try:
        while going:
            for layer in cache.layers if cache is not None else []:
                layer.room = config.max_length - ids.shape[1] + 1  # so that it is allocated once
            few = len(going) // 2 if cache is not None and len(going) > 8 else 0
            stop = Stop(done, hear, closing, ends, len(going), width, few, ids.device)
            with shared.used_by(model) if shared else nullcontext():
                ids = model.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config,
                    logits_processor=[Draw(greedy)], stopping_criteria=[stop],
                )
            new = ids[:, width:].tolist()
            rows = []  # that go on
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
    """All but the last token of each prompt, computed once each. `model` must pass can_share_prompts.

    Computed in batches of at most `max_tokens` tokens, or of one prompt -> cache, attention or None. A prompt lies at
    the right end of its row. With an attention, prompts are set aside: once each, or for every row where groups differ
    much in size.
    """
    cache, width = DynamicCache(config=model.config), max(map(len, prompts)) - 1
    cache.layers = [PromptLayer() for _ in cache.layers]
    if not width:
        return cache, None
    groups = by_prompt(prompts)
    lengths = [len(prompts[group[0]]) - 1 for group in groups]
    copied = len(groups) < len(prompts) and not holds_prompts_once(model, groups)
    alone = copied or len(groups) == len(prompts)  # each row has a prompt of its own in the cache
    # For one row a prompt SharedPrompts is faster than torch's attention on a CPU, but would widen bfloat16 each time.
    aside = takes_shared_prompts(model) and not (alone and model.dtype != torch.float32)
    for layer in cache.layers:
        layer.room = 0 if aside else new_tokens
    for places in by_length(lengths, max_tokens):
        places = [n for n in places if lengths[n]]  # a prompt of one token leaves nothing to compute
        if not places:
            continue
        # Padded on the right, where causal attention never looks: no mask is needed, so fast kernels stay in use.
        rows = [torch.tensor(prompts[groups[n][0]][:-1]) for n in places]
        ids = pad_sequence(rows, batch_first=True).to(model.device)  # (batch, longest)
        part = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=ids, past_key_values=part, use_cache=True)
        for layer, computed in zip(cache.layers, part.layers, strict=True):
            if not layer.is_initialized:
                layer.make_room(computed.keys, computed.values, len(groups), width)
            for row, n in enumerate(places):
                layer.keys[n, :, width - lengths[n] :] = computed.keys[row, :, : lengths[n]]
                layer.values[n, :, width - lengths[n] :] = computed.values[row, :, : lengths[n]]
            computed.keys = computed.values = None  # or a prompt that is a batch of its own would be held twice
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
