"""Attention to prompts that several completions share, in sampling and in training.

    SharedPrompts     sampling: the samples of a prompt attend to one copy of it in the cache
    attend            attention to prompts, or to a row's own tokens, for SharedPrompts; attend_on_gpu: on a GPU
    packed_sdpa       training: completions packed behind their prompt, which can't attend to each other
    causal_sdpa       its part without a mask: fast, and light on memory, on every GPU
    enable_packing    switches a model to packed_sdpa; importing this file changes nothing

A model that can't share prompts computes every row separately. can_share_prompts, takes_shared_prompts and packs tell
what a model can do.
"""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# These models pass everything their attention needs to the attention function: no sinks, soft cap or position bias.
# So SharedPrompts can replace that function; tests compare them.
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
OWN_MASKS = ("doge",)  # these derive their own mask from the one they get, which must cover all queries
PACKED = "packed_sdpa"


class PromptLayer(DynamicLayer):
    """A cache layer with spare capacity, which can hold each prompt once, apart from the tokens of the rows after it.

    transformers' layer copies itself for every new token. Once prompts are set aside, rows only grow or are selected;
    SharedPrompts decides which prompts to keep.
    """

    room = 64  # spare tokens of a new buffer; set it if the number of tokens to come is known
    buffers = None  # (keys, values) with the spare capacity; self.keys and self.values are their filled parts
    prompt_keys = prompt_values = None  # (prompts, key heads, tokens, head size)

    def make_room(self, keys: Tensor, values: Tensor, rows: int, width: int) -> None:
        """Allocate `rows` rows of `width` zeros, shaped like these keys and values (any, heads, any, head size)."""
        self.lazy_initialization(keys, values)
        shapes = [(rows, like.shape[1], width + self.room, like.shape[3]) for like in (keys, values)]
        self.buffers = tuple(like.new_zeros(shape) for like, shape in zip((keys, values), shapes, strict=True))
        self.keys, self.values = (buffer[..., :width, :] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *more, **named) -> tuple[Tensor, Tensor]:
        held, past = (self.keys, self.values), DynamicLayer.get_seq_length(self)
        total = past + key_states.shape[-2]
        if self.buffers is None or total > self.buffers[0].shape[-2]:
            self.make_room(key_states, value_states, len(key_states), total)
            if past:
                self.write(held, 0, past)
        self.write((key_states, value_states), past, total)
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values

    def write(self, states: tuple[Tensor, Tensor], start: int, end: int) -> None:
        for buffer, own in zip(self.buffers, states, strict=True):
            buffer[..., start:end, :] = own

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None  # or all rows would stay in memory until the next token

    def set_prompts_aside(self) -> None:
        self.prompt_keys, self.prompt_values = self.keys, self.values
        self.lazy_initialization(self.keys, self.values)  # from now on, keys and values are those of the rows
        self.buffers = None

    def get_seq_length(self) -> int:
        return super().get_seq_length() + (0 if self.prompt_keys is None else self.prompt_keys.shape[-2])


class SharedPrompts:
    """The attention of rows whose prompts `cache` holds only once (Hydragen, arXiv 2402.05099).

    A row's softmax over its prompt and its own tokens is a mix of two softmaxes, weighted by their sums. So all rows of
    a prompt read it in one matrix product, where copies would be read row by row.
    """

    def __init__(self, cache: DynamicCache, prompt_of: Tensor, mask: Tensor):
        """prompt_of (rows,): the index of each row's prompt. mask (prompts, tokens): 0 where a prompt is padded."""
        self.cache = cache
        self.attend, dtype = attend, torch.float32
        if mask.is_cuda:
            self.attend, dtype = attend_on_gpu, cache.layers[0].prompt_keys.dtype
        # A very low number, not minus infinity: an all-padding prompt then gets no weight instead of nan. Half of the
        # lowest, as torch's kernel multiplies it by 1.44; the kernel also needs rows that start at multiples of 16.
        hidden = (mask == 0).to(dtype) * (torch.finfo(dtype).min / 2)
        self.hidden = pad(hidden, (0, -mask.shape[1] % 16))[:, None, None]  # (prompts, 1, 1, tokens rounded up to 16s)
        self.arrange(prompt_of)

    def arrange(self, prompt_of: Tensor) -> None:
        """Group the rows by prompt; `members` is padded with row 0, which by_row drops again."""
        self.prompt_of = prompt_of
        counts = prompt_of.bincount(minlength=len(self.hidden))  # (prompts,)
        order = prompt_of.argsort(stable=True)  # (rows,)
        firsts = (counts.cumsum(0) - counts)[prompt_of[order]]  # (rows,)
        nth = torch.arange(len(order), device=order.device) - firsts  # (rows,), number among its prompt's rows
        self.place = torch.empty_like(order)  # (rows,), index into the flattened `members`
        self.place[order] = prompt_of[order] * counts.max() + nth
        self.members = order.new_zeros(len(counts), int(counts.max()))  # (prompts, most rows), padded with row 0
        self.members.view(-1)[self.place] = torch.arange(len(order), device=order.device)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows and their prompts."""
        prompts, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        self.cache.batch_select_indices(rows)
        if len(prompts) < len(self.hidden):
            self.hidden = self.hidden[prompts]
            for layer in self.cache.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[prompts], layer.prompt_values[prompts]
        self.arrange(prompt_of)

    def __call__(self, module, query, key, value, attention_mask, scaling: float, **more) -> tuple[Tensor, None]:
        """query (rows, heads, 1, size), own key and value (rows, key heads, tokens, size) -> (rows, 1, heads, size)."""
        layer, (rows, heads, _, size), groups = self.cache.layers[module.layer_idx], query.shape, key.shape[1]
        query = query.view(rows, groups, heads // groups, size)
        # (prompts, key heads, most rows * heads a group, size)
        together = query[self.members].transpose(1, 2).flatten(2, 3)
        hidden = self.hidden[..., : layer.prompt_keys.shape[2]]  # (prompts, 1, 1, tokens)
        shared, shared_sum = self.attend(together, layer.prompt_keys, layer.prompt_values, scaling, hidden)
        own, own_sum = self.attend(query, key, value, scaling)  # (rows, key heads, heads a group, size), (..., 1)
        share = torch.sigmoid(self.by_row(shared_sum) - own_sum)
        return torch.lerp(own, self.by_row(shared), share).to(value.dtype).view(rows, 1, heads, size), None

    def by_row(self, together: Tensor) -> Tensor:
        """(prompts, key heads, most rows * heads a group, n) -> (rows, key heads, heads a group, n)."""
        return together.unflatten(2, (self.members.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.place]

    @contextmanager
    def used_by(self, model):
        """A context in which the model uses this attention."""
        config = model.config.get_text_config()
        usual = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register("shared_prompts", self)
        config._attn_implementation = "shared_prompts"
        try:
            yield
        finally:
            config._attn_implementation = usual
            ALL_ATTENTION_FUNCTIONS.register("shared_prompts", None)  # or it would keep the whole cache alive


def attend(query, keys, values, scaling: float, hidden=None) -> tuple[Tensor, Tensor]:
    """(attended values, log of the softmax's sum), in float32 as in torch's own kernels.

    query (rows, heads, queries, size), keys and values (rows, heads, tokens, size), hidden (rows, 1, 1, tokens), which
    is added to the scores -> (rows, heads, queries, size), (rows, heads, queries, 1).
    """
    scores = (query.float() * scaling) @ keys.float().mT
    if hidden is not None:
        scores += hidden
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()  # once; torch's softmax and logsumexp would each compute all the exponentials
    total = weights.sum(-1, keepdim=True)
    return weights @ values.float() / total, top + total.log()


def attend_on_gpu(query, keys, values, scaling: float, hidden=None) -> tuple[Tensor, Tensor]:
    """`attend` by torch's memory-efficient kernel: no scores in memory, and keys and values stay in their dtype."""
    queries = query.shape[2]
    if hidden is not None:
        hidden = hidden.expand(-1, query.shape[1], queries, -1)  # (rows, heads, queries, tokens), without copies
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    found, log_sum, *_ = kernel(query, keys, values, hidden, compute_log_sumexp=True, scale=scaling)
    return found.float(), log_sum[..., :queries, None]  # the sums are padded to a multiple of 32 queries


def packed_mask(segments: Tensor, first: int) -> Tensor:
    """What positions from `first` on may attend to: (rows, 1, longest - first, longest) bool, for `packed_sdpa`.

    segments (rows, longest): 0 for a row's prompt, longer than `first`; 1, 2, ... for its completions; -1 for padding.
    """
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, first:, None])
    return visible.tril(first)[:, None]


def flash_runs(query) -> bool:
    """Whether torch has flash attention for this query: always on a CPU, on a GPU depending on dtype and card."""
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    return not query.is_cuda or narrow and torch.cuda.get_device_capability(query.device) >= (8, 0)


def causal_sdpa(module, query, key, value, **more):
    """transformers' sdpa without a mask. Where flash attention can't run, each query head gets its own copy of keys.

    The memory-efficient kernel doesn't support grouped heads, and the fallback kernel holds all scores at once
    (https://github.com/huggingface/transformers/issues/48633).
    """
    heads_a_group = query.shape[1] // key.shape[1]
    if heads_a_group > 1 and not flash_runs(query):
        key, value = (x.repeat_interleave(heads_a_group, 1) for x in (key, value))
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # without grouped heads
    return sdpa_attention_forward(module, query, key, value, None, **more)


def packed_sdpa(module, query, key, value, attention_mask, **more):
    """transformers' sdpa, but the mask may cover only the last queries: those before are causal.

    The causal part keeps its fast kernel, which takes no mask.
    """
    if attention_mask is None:
        return causal_sdpa(module, query, key, value, **more)
    # A mask with one row applies to all queries, as in encoders.
    first = query.shape[2] - attention_mask.shape[2] if attention_mask.ndim == 4 else 0
    if first <= 0 or attention_mask.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    causal, _ = causal_sdpa(module, *(x[:, :, :first] for x in (query, key, value)), **more)
    masked, _ = sdpa_attention_forward(module, query[:, :, first:], key, value, attention_mask, **more)
    return torch.cat([causal, masked], 1), None  # (rows, queries, heads, size)


def can_share_prompts(model) -> bool:
    """Whether in every layer a token attends to all before it, at positions that the caller gives.

    With a sliding window or a recurrent state a token depends on its neighbours in the row, so it can't be copied or
    packed. A model without a cache (OpenAI GPT) has nothing to copy.
    """
    layers = DynamicCache(config=model.config).layers
    takes = {"position_ids", "use_cache"} <= inspect.signature(model.get_decoder().forward).parameters.keys()
    return takes and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def takes_shared_prompts(model) -> bool:
    """Whether SharedPrompts can replace the model's attention. The model must pass can_share_prompts."""
    config = model.config.get_text_config()
    return config._attn_implementation in ("sdpa", PACKED) and config.model_type in PLAIN_ATTENTION


def packs(model) -> bool:
    """Whether enable_packing has switched the model to packed_sdpa."""
    return model.config.get_text_config()._attn_implementation == PACKED


def enable_packing(model) -> bool:
    """Let this model pack completions behind shared prompts in training -> whether it can.

    It needs can_share_prompts and sdpa: eager would add a boolean mask to its scores, flash attention takes none.
    """
    config = model.config.get_text_config()
    can = can_share_prompts(model) and model._supports_attention_backend and config.model_type not in OWN_MASKS
    can = can and config._attn_implementation == "sdpa"
    if can:
        ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_sdpa)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)
        config._attn_implementation = PACKED
    return can or packs(model)
