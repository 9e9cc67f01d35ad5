"""Attention to prompts that several completions share, in sampling and in training.

`prefill` computes prompts in batches of similar length, each once, and lays them side by side, so that all rows write
together, however long their prompts are. In writing, the samples of a prompt attend to it where it lies (`SharedPrompts`),
instead of to copies; copies are made for a model that `is_plain` doesn't know, and where one prompt has far more samples than
another. A model that can't do this at all computes every row by itself. In training, `packed_sdpa` attends from completions
that are packed behind their prompt; it takes the place of transformers' "sdpa" when this file is imported.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batching import by_length, by_prompt

# What these models hand to their attention is all that it is: no sinks, no soft cap, no bias by position. So SharedPrompts
# can stand in for it, as the tests compare.
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")


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

    def make_room(self, keys: Tensor, values: Tensor, rows: int, width: int) -> None:
        """Hold `rows` rows of `width` tokens, all zero, for keys and values such as these (any, heads, any, head size)."""
        self.lazy_initialization(keys, values)
        self.buffers = tuple(like.new_zeros(rows, like.shape[1], width + self.room, like.shape[3]) for like in (keys, values))
        self.keys, self.values = (buffer[..., :width, :] for buffer in self.buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None, None  # or all rows would stay in memory until the next token

    def update(self, key_states, value_states, *more, **named):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = key_states.shape[-2] + (self.keys.shape[-2] if self.keys.numel() else 0)
        self.buffers = self.append(self.buffers[0], self.keys, key_states), self.append(self.buffers[1], self.values, value_states)
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values


class PromptLayer(RoomyLayer):
    """A cache layer that can hold each prompt once, apart from the tokens of the rows that go on from it.

    Once prompts are set aside, rows only grow or are selected; which prompts stay is for SharedPrompts to say.
    """

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
        # The lowest number and not minus infinity: a prompt of padding alone then weighs nothing, instead of nan.
        self.hidden = (mask == 0)[:, None, None] * torch.finfo(torch.float32).min  # (prompts, 1, 1, tokens)
        self.arrange(prompt_of)

    def arrange(self, prompt_of: Tensor) -> None:
        """The rows of each prompt side by side, as many for each: others fill up, and what they attend to is not looked at."""
        self.prompt_of = prompt_of
        counts, order = prompt_of.bincount(minlength=len(self.hidden)), prompt_of.argsort(stable=True)  # (prompts,), (rows,)
        nth = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prompt_of[order]]  # among its prompt's
        self.place = torch.empty_like(order)  # (rows,), in `members` laid flat
        self.place[order] = prompt_of[order] * counts.max() + nth
        self.members = order.new_zeros(len(counts), int(counts.max()))  # (prompts, most rows); row 0 fills up
        self.members.view(-1)[self.place] = torch.arange(len(order), device=order.device)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, and with their prompts."""
        prompts, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        self.cache.batch_select_indices(rows)
        if len(prompts) < len(self.hidden):
            self.hidden = self.hidden[prompts]
            for layer in self.cache.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[prompts], layer.prompt_values[prompts]
        self.arrange(prompt_of)

    def __call__(self, module, query, key, value, attention_mask, scaling: float, **more) -> tuple[Tensor, None]:
        """query (rows, heads, 1, size), the rows' own key and value (rows, key heads, tokens, size) -> (rows, 1, heads, size)."""
        layer, (rows, heads, _, size), groups = self.cache.layers[module.layer_idx], query.shape, key.shape[1]
        query = query.view(rows, groups, heads // groups, size)
        together = query[self.members].transpose(1, 2).flatten(2, 3)  # (prompts, key heads, most rows * heads a group, size)
        shared, shared_sum = self.attend(together, layer.prompt_keys, layer.prompt_values, scaling, self.hidden)
        own, own_sum = self.attend(query, key, value, scaling)  # (rows, key heads, heads a group, size), (..., 1)
        share = torch.sigmoid(self.by_row(shared_sum) - own_sum)
        return torch.lerp(own, self.by_row(shared), share).to(value.dtype).view(rows, 1, heads, size), None

    @staticmethod
    def attend(query, keys, values, scaling, hidden=0.0) -> tuple[Tensor, Tensor]:
        """The attended values, and the log of the sum under the softmax, in float32 as inside of torch's own kernels."""
        scores = (query.float() * scaling) @ keys.float().mT + hidden
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp_()  # torch's softmax and logsumexp would each take all the exponentials
        total = weights.sum(-1, keepdim=True)
        return weights @ values.float() / total, top + total.log()

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
            ALL_ATTENTION_FUNCTIONS.register("shared_prompts", None)  # or it would keep the whole cache alive


def prefill(model, prompts: list[list[int]], max_tokens: int) -> tuple[DynamicCache, SharedPrompts | None, list[int]]:
    """All but the last token of each prompt, computed once each, for a model of which can_share_prompts holds.

    Returns a cache, where each prompt lies at the right end of its row; the attention that comes with it, if any, and then
    the rows are of different prompts, set aside; and each prompt's padding in the batch that computed it, of at most
    `max_tokens` tokens or of one prompt.
    """
    groups = by_prompt(prompts)
    lengths = [len(prompts[group[0]]) - 1 for group in groups]
    cache, padding, width = DynamicCache(config=model.config), [0] * len(prompts), max(lengths)
    cache.layers = [PromptLayer() for _ in cache.layers]
    for places in by_length(lengths, max_tokens):
        places = [n for n in places if lengths[n]]  # a prompt of one token leaves nothing to compute
        if not places:
            continue
        # Padded on the right, where causal attention never looks: no mask is needed, so fast kernels stay in use.
        ids = pad_sequence([torch.tensor(prompts[groups[n][0]][:-1]) for n in places], batch_first=True).to(model.device)  # (batch, longest)
        part = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=ids, past_key_values=part, use_cache=True)
        for layer, computed in zip(cache.layers, part.layers, strict=True):
            if not layer.is_initialized:
                layer.make_room(computed.keys, computed.values, len(groups), width)
            for row, n in enumerate(places):
                layer.keys[n, :, width - lengths[n] :] = computed.keys[row, :, : lengths[n]]
                layer.values[n, :, width - lengths[n] :] = computed.values[row, :, : lengths[n]]
            computed.keys = computed.values = None  # or a prompt that is a batch of its own would be held twice
        for n in places:
            for i in groups[n]:
                padding[i] = ids.shape[1] - lengths[n]
    prompt_of = torch.empty(len(prompts), dtype=torch.long)  # (rows,)
    for n, group in enumerate(groups):
        prompt_of[group] = n
    prompt_of = prompt_of.to(model.device)
    # Groups of much the same size stay together: the largest sets the work of all.
    if width and len(groups) < len(prompts) and not (is_plain(model) and len(groups) * max(map(len, groups)) <= 2 * len(prompts)):
        cache.batch_select_indices(prompt_of)
        lengths, prompt_of = [len(prompt) - 1 for prompt in prompts], torch.arange(len(prompts), device=model.device)
    alone = len(lengths) == len(prompts)
    # For one row a prompt this is an eighth faster than torch's attention on a CPU, but would widen bfloat16 at each token.
    if not width or not is_plain(model) or (alone and model.dtype != torch.float32):
        return cache, None, padding
    for layer in cache.layers:
        layer.set_prompts_aside()
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]  # (prompts, width)
    return cache, SharedPrompts(cache, prompt_of, mask.to(model.device)), padding


def packed_mask(segments: Tensor, first: int) -> Tensor:
    """What the positions from `first` on see, (rows, 1, longest - first, longest) bool, for `packed_sdpa`.

    segments (rows, longest): 0 for a row's prompt, more than `first` tokens, 1, 2, ... for its completions, -1 for padding.
    """
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, first:, None])
    return visible.tril(first)[:, None]


def packed_sdpa(module, query, key, value, attention_mask, **more):
    """transformers' sdpa, where a mask may also be of the last queries alone: those before are causal, by a fast kernel.

    Elsewhere such a mask would be an error, so this can take the place of "sdpa" for all models.
    """
    # A mask of one row is one for all queries, as encoders have.
    first = query.shape[2] - attention_mask.shape[2] if attention_mask is not None and attention_mask.ndim == 4 else 0
    if first <= 0 or attention_mask.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    causal, _ = sdpa_attention_forward(module, *(x[:, :, :first] for x in (query, key, value)), None, **more)
    masked, _ = sdpa_attention_forward(module, query[:, :, first:], key, value, attention_mask, **more)
    return torch.cat([causal, masked], 1), None  # (rows, queries, heads, size)


ALL_ATTENTION_FUNCTIONS.register("sdpa", packed_sdpa)


def can_share_prompts(model) -> bool:
    """Whether every layer attends to everything before it, at positions that the caller gives.

    A sliding window or a recurrent state ties a token to its neighbours in the row: no copying, no packing.
    """
    layers = DynamicCache(config=model.config).layers
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    return takes_positions and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def can_pack_completions(model) -> bool:
    """can_share_prompts, and an attention by packed_sdpa: eager would add its mask to the scores, flash has none, and some
    models call torch's by themselves."""
    return can_share_prompts(model) and model._supports_attention_backend and model.config.get_text_config()._attn_implementation == "sdpa"


def is_plain(model) -> bool:
    """Whether SharedPrompts can stand in for the attention of a model of which can_share_prompts holds."""
    config = model.config.get_text_config()
    return config._attn_implementation == "sdpa" and config.model_type in PLAIN_ATTENTION
