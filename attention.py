"""Attention over prompts that several samples share: each prompt is computed and held once.

`rollout.generate` lets all samples of a prompt attend to it where it lies in the cache (`SharedPrompts`), instead of to
copies. `grpo.completion_logprobs` packs all completions of a prompt behind it in one row, each blind to the others
(`Packing`). A model for which that can't be done falls back to copies, to a mask, or to a row for every sample.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What these models hand to their attention is all that it is: no sinks, no soft cap, no bias by position. So ours can stand
# in for it, as the tests compare.
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]


def sdpa_or_packed(module, query, key, value, attention_mask, packing=None, **more):
    """transformers' sdpa, and what it becomes where a model is called with `packing`, a Packing, among its arguments.

    Not a switch like `used_by`: gradient checkpointing calls it again in backward, with the same arguments.
    """
    if packing is None:
        return sdpa(module, query, key, value, attention_mask, **more)
    return packing(module, query, key, value, **more)


ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_or_packed)


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


class Packing:
    """The attention of packed rows: [prompt, completion, completion, ...], each completion seeing its prompt and itself.

    One mask over a row would have every token compared with every other. Instead a prompt attends to itself, which needs
    no mask, and each completion to a copy of its prompt's keys with its own behind.
    """

    def __init__(self, prompts: list[int], completions: list[tuple[int, int, int]], device):
        """prompts: tokens of each row's prompt. completions: (row, first position, tokens) of each turn."""
        self.prompt_tokens = max(prompts)
        self.row, start, length = torch.tensor(completions, device=device).T  # (turns,) each
        n = torch.arange(int(length.max()), device=device)  # (longest completion,)
        self.real = n < length[:, None]  # (turns, longest completion)
        self.position = torch.where(self.real, start[:, None] + n, 0)  # in its row; 0 where there is only padding
        prompt = torch.arange(self.prompt_tokens, device=device) < torch.tensor(prompts, device=device)[self.row, None]
        own = (n <= n[:, None]).expand(len(prompt), -1, -1)  # (turns, from, to)
        self.mask = torch.cat([prompt[:, None].expand(-1, len(n), -1), own], 2)[:, None]  # (turns, 1, from, prompt + to)

    def __call__(self, module, query: Tensor, key: Tensor, value: Tensor, **more) -> tuple[Tensor, None]:
        """query (rows, heads, longest, size), key and value (rows, key heads, longest, size) -> (rows, longest, heads, size)."""
        prompts = [x[:, :, : self.prompt_tokens] for x in (query, key, value)]
        # In rows of shorter prompts this range reaches into completions, which are written over below.
        longest = query.shape[2]
        of_prompts, _ = sdpa(module, *prompts, None, **more)  # causal: (rows, prompt, heads, size)
        query, key, value = (x.transpose(1, 2)[self.row[:, None], self.position].transpose(1, 2) for x in (query, key, value))
        key, value = (torch.cat([of[self.row], own], 2) for of, own in zip(prompts[1:], (key, value), strict=True))
        of_completions, _ = sdpa(module, query, key, value, self.mask, **more)  # (turns, longest completion, heads, size)
        found = of_prompts.new_zeros(len(of_prompts), longest, *of_prompts.shape[2:])
        found[:, : self.prompt_tokens] = of_prompts
        row = self.row[:, None].expand_as(self.real)
        found[row[self.real], self.position[self.real]] = of_completions[self.real]
        return found, None


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


def is_plain(model) -> bool:
    """can_pack_completions, and an attention that SharedPrompts and Packing can stand in for."""
    return can_pack_completions(model) and model.config.get_text_config().model_type in PLAIN_ATTENTION
