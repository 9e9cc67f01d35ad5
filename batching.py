"""The same work in fewer tokens: batches of similar length, and one pass over a prompt that several samples share.

Sampling and training both cut their work with `by_length`. Where conversations start from one and the same prompt (the
G1 first memories of a document, the G2 answers of a recall) the prompt is computed once: `rollout.generate` copies its
cache, `grpo.completion_logprobs` packs its completions behind it. Equal prompts are found by their token ids, which is
always right: the network can't tell them apart, and every sample keeps its own reward and advantage.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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
        total = self.get_seq_length() + key_states.shape[-2]
        self.buffers = self.append(self.buffers[0], self.keys, key_states), self.append(self.buffers[1], self.values, value_states)
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values


def roomy_cache(model) -> DynamicCache:
    """An empty cache for a model of which can_share_prompts holds."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
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
