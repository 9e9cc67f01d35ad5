"""The same work in fewer tokens: batches of similar length, and one pass over a prompt that several samples share.

Sampling and training both cut their work with `by_length`. Where conversations start from one and the same prompt (the
G1 first memories of a document, the G2 answers of a recall) the prompt is computed and held once: `rollout.generate` lets
all samples attend to it (`SharedPrompts`), `grpo.completion_logprobs` packs its completions behind it. Equal prompts are
found by their token ids, which is always right: the network can't tell them apart, and every sample keeps its own reward
and advantage.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Their attention is what SharedPrompts computes: no sinks, no soft cap, no bias by position. Tested against sdpa.
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")


def by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Positions in batches of at most `max_tokens` tokens with padding, longest first; one over the budget stands alone.

    A batch also ends where padding would take more than an eighth of it, so that sizes that differ much don't meet.
    """
    batches: list[list[int]] = []
    used = 0  # tokens of the last batch without its padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first of a batch is its longest, so it sets the width of every row.
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and padded <= max_tokens and used + lengths[i] >= 0.875 * padded:
            batches[-1].append(i)
            used += lengths[i]
        else:
            batches.append([i])
            used = lengths[i]
    return batches


def by_prompt(prompts: list[list[int]]) -> list[list[int]]:
    """Positions of equal prompts together, in the order in which each prompt first comes."""
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(i)
    return list(groups.values())


class RoomyLayer(DynamicLayer):
    """A cache layer with room ahead. The plain one copies itself for every new token: 15 % of the tiny model's sampling."""

    room, buffers = 64, (None, None)

    def append(self, buffer: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A buffer that begins with `held` and then `new` (batch, heads, tokens, head size): `buffer` if it does and has room."""
        past = held.shape[-2] if held.numel() else 0
        total = past + new.shape[-2]
        # What is held lies elsewhere once rows were selected or the cache was reset.
        if buffer is None or not past or held.data_ptr() != buffer.data_ptr() or total > buffer.shape[-2]:
            buffer = new.new_empty(*new.shape[:-2], total + self.room, new.shape[-1])
            if past:
                buffer[..., :past, :] = held
        buffer[..., past:total, :] = new
        return buffer

    def update(self, key_states, value_states, *more, **named):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = key_states.shape[-2] + (self.keys.shape[-2] if self.keys.numel() else 0)
        self.buffers = self.append(self.buffers[0], self.keys, key_states), self.append(self.buffers[1], self.values, value_states)
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values


class PromptLayer(RoomyLayer):
    """A cache layer that holds each prompt once, apart from the tokens of the rows that go on from it."""

    prompt_keys = prompt_values = None  # (prompts, key heads, tokens, head size)

    def set_prompts_aside(self) -> None:
        self.prompt_keys, self.prompt_values = self.keys, self.values
        self.lazy_initialization(self.keys, self.values)  # from here on keys and values are the rows' own

    def get_seq_length(self) -> int:
        return super().get_seq_length() + (0 if self.prompt_keys is None else self.prompt_keys.shape[-2])


class SharedPrompts:
    """The attention of rows that write, a token a time, behind prompts which `cache` holds once (Hydragen, arXiv 2402.05099).

    A row's softmax over its prompt and its own tokens is a mix of one over each, by what either adds to the sum under
    the softmax. So all rows of a prompt read it in one matrix product, where copies would be read row by row.
    """

    def __init__(self, cache: DynamicCache, prompt_of: Tensor, mask: Tensor):
        """prompt_of (rows,): each row's prompt. mask (prompts, tokens): 0 where a prompt is padded."""
        self.cache = cache
        counts, order = prompt_of.bincount(), prompt_of.argsort(stable=True)  # (prompts,), (rows,)
        nth = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prompt_of[order]]  # among its prompt's
        self.place = torch.empty_like(order)  # (rows,), in `members` laid flat
        self.place[order] = prompt_of[order] * counts.max() + nth
        self.members = order.new_zeros(len(counts), int(counts.max()))  # (prompts, most rows); row 0 fills up
        self.members.view(-1)[self.place] = torch.arange(len(order), device=order.device)
        # The lowest number and not minus infinity: a prompt of padding alone then weighs nothing, instead of nan.
        self.hidden = (mask == 0)[:, None, None] * torch.finfo(torch.float32).min  # (prompts, 1, 1, tokens)

    def __call__(self, module, query, key, value, attention_mask, scaling: float, **more) -> tuple[Tensor, None]:
        """query (rows, heads, 1, size), the rows' own key and value (rows, key heads, tokens, size) -> (rows, 1, heads, size)."""
        layer, (rows, heads, _, size), groups = self.cache.layers[module.layer_idx], query.shape, key.shape[1]
        query = query.view(rows, groups, heads // groups, size)
        together = query[self.members].transpose(1, 2).flatten(2, 3)  # (prompts, key heads, most rows * heads a group, size)
        shared, shared_sum = self.attend(together, layer.prompt_keys, layer.prompt_values, scaling, self.hidden)
        own, own_sum = self.attend(query, key, value, scaling)  # (rows, key heads, heads a group, size), (..., 1)
        share = torch.sigmoid(self.by_row(shared_sum) - own_sum)
        return torch.lerp(own.float(), self.by_row(shared).float(), share).to(value.dtype).view(rows, 1, heads, size), None

    @staticmethod
    def attend(query, keys, values, scaling, hidden=0.0) -> tuple[Tensor, Tensor]:
        """The attended values, and the log of the sum under the softmax."""
        scores = (query @ keys.mT).float() * scaling + hidden
        return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1, keepdim=True)

    def by_row(self, together: Tensor) -> Tensor:  # (prompts, key heads, most rows * heads a group, n) -> (rows, key heads, heads a group, n)
        return together.unflatten(2, (self.members.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.place]

    @contextmanager
    def used_by(self, model):
        """Within, the model attends this way."""
        config = model.config.get_text_config()
        usual = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register("shared_prompts", self)
        config._attn_implementation = "shared_prompts"
        try:
            yield
        finally:
            config._attn_implementation = usual


def cache_of(model, layer: type[DynamicLayer]) -> DynamicCache:
    """An empty cache of such layers, for a model of which can_share_prompts holds."""
    cache = DynamicCache(config=model.config)
    cache.layers = [layer() for _ in cache.layers]
    return cache


def can_share_prompts(model) -> bool:
    """Whether every layer attends to everything before it, at positions that the caller gives.

    A sliding window or a recurrent state ties a token to its neighbours in the row: no copying, no packing.
    """
    layers = DynamicCache(config=model.config).layers
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    return takes_positions and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def can_pack_completions(model) -> bool:
    """can_share_prompts, and an attention that takes a boolean mask: eager would add it to the scores, flash has none."""
    return can_share_prompts(model) and model.config.get_text_config()._attn_implementation == "sdpa"


def can_set_prompts_aside(model) -> bool:
    """can_share_prompts, and an attention that SharedPrompts can stand in for."""
    config = model.config.get_text_config()
    return can_share_prompts(model) and config.model_type in PLAIN_ATTENTION and config._attn_implementation in ("sdpa", "eager")
