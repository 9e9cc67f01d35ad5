"""fast/attention.py: what a cache holds, and prompts held once, against torch's attention over copies."""

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine import config
from engine.config import Config, check
from engine.errors import UserError
from fast.attention import (
    PACKED,
    PromptLayer,
    SharedPrompts,
    attend,
    attend_on_gpu,
    can_share_prompts,
    enable_packing,
    flash_runs,
    packed_mask,
    packed_sdpa,
    packs,
)


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def kernel():
    """torch's memory-efficient kernel on a CPU, by its rules -> the arguments of every call."""
    calls = []

    def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        calls.append((query, key, value, attn_bias))
        rows, heads, queries, _ = query.shape
        assert query.dtype == key.dtype == value.dtype and key.shape[:2] == value.shape[:2] == (rows, heads)
        assert compute_log_sumexp and not dropout_p and not is_causal
        scores = scale * query.float() @ key.float().mT
        if attn_bias is not None:
            assert attn_bias.dtype == query.dtype and attn_bias.shape == scores.shape and attn_bias.stride(3) == 1
            assert all(stride * attn_bias.element_size() % 16 == 0 for stride in attn_bias.stride()[:3])
            scores = scores + attn_bias.float()
            assert (1.4427 * scores).isfinite().all()  # it counts in powers of two
        sums = torch.full((rows, heads, -(-queries // 32) * 32), torch.nan)  # what is beyond the queries is anything
        sums[..., :queries] = scores.logsumexp(-1)
        found = (scores.softmax(-1) @ value.float()).to(query.dtype), sums, torch.tensor(0), torch.tensor(0)
        meta = [None if x is None else x.to("meta") for x in (query, key, value, attn_bias)]
        own = torch.ops.aten._scaled_dot_product_efficient_attention(*meta, compute_log_sumexp, scale=scale)
        assert [(x.shape, x.dtype) for x in own[:2]] == [(x.shape, x.dtype) for x in found[:2]]  # torch's own shapes
        return found

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_efficient_attention", efficient, "CPU")
    yield calls
    library._destroy()


def tiny_qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
        )
    )


def test_a_roomy_layer_holds_what_a_plain_one_holds():
    """Over random appends, selections of rows and crops, with little room, so that it often has to grow."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        plain, roomy, rows, seen = DynamicLayer(), PromptLayer(), 3, []
        roomy.room = rng.randrange(1, 6)
        for _ in range(25):
            kind, held = rng.random(), plain.get_seq_length()
            if kind < 0.7 or not held:
                new = torch.randn(2, rows, 2, rng.choice((1, 1, 1, 5)), 4)
                given = plain.update(new[0], new[1]), roomy.update(new[0], new[1])
                assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
                seen.append((given[0][0].clone(), given[1][0]))
            elif kind < 0.85:
                chosen = torch.randint(rows, (rng.randrange(1, 5),))
                rows = len(chosen)
                plain.batch_select_indices(chosen)
                roomy.batch_select_indices(chosen)
            else:
                plain.crop(-1)
                roomy.crop(-1)
                seen = []  # the next append may write where these end
            if 0.7 <= kind < 0.85 and held:
                assert roomy.buffers is None  # the rows that were left out are out of memory
            assert plain.get_seq_length() == roomy.get_seq_length()
            assert not plain.get_seq_length() or torch.equal(plain.values, roomy.values)
        assert all(torch.equal(a, b) for a, b in seen)  # what was handed out stays as it was


@pytest.mark.parametrize(
    "heads, groups, dtype", [(4, 4, "float32"), (6, 2, "float32"), (3, 1, "float32"), (4, 2, "bfloat16")]
)
def test_attention_over_shared_prompts_equals_attention_over_copies(heads, groups, dtype):
    """Random prompts with left padding, random rows of each in random order, against torch's attention over copies.

    In bfloat16 only the result is rounded: against float32 it is off by half a unit in the last of its 8 bits.
    """
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    for _ in range(20):
        prompts, tokens, size = *torch.randint(1, 6, (2,)).tolist(), 8
        prompt_of = torch.cat([torch.arange(prompts), torch.randint(prompts, (7,))])  # each has a row at least
        prompt_of = prompt_of[torch.randperm(len(prompt_of))]  # (rows,)
        mask = torch.arange(tokens) >= torch.randint(0, tokens + 1, (prompts, 1))  # some are padding alone
        layer = PromptLayer()
        held = layer.update(*torch.randn(2, prompts, groups, tokens, size).to(dtype))
        layer.set_prompts_aside()
        shared = SharedPrompts(SimpleNamespace(layers=[layer]), prompt_of, mask)
        written = torch.randn(2, len(prompt_of), groups, 3, size).to(dtype)
        for n in range(3):  # a token a time
            own = layer.update(*written[..., n : n + 1, :])
            query = 3 * torch.randn(len(prompt_of), heads, 1, size).to(dtype)
            got, _ = shared(SimpleNamespace(layer_idx=0), query, *own, None, scaling=0.3)
            keys, values = (
                torch.cat([h[prompt_of], w[..., : n + 1, :]], 2).repeat_interleave(heads // groups, 1).float()
                for h, w in zip(held, written, strict=True)
            )
            seen = torch.cat([mask[prompt_of], torch.ones(len(prompt_of), n + 1, dtype=torch.bool)], 1)[:, None, None]
            wanted = scaled_dot_product_attention(query.float(), keys, values, seen, scale=0.3).transpose(1, 2)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), wanted, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8)
            assert layer.get_seq_length() == tokens + n + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 21])
def test_the_kernel_of_a_gpu_gives_what_the_cpu_computes(dtype, tokens, kernel):
    """The mix of both parts, after rows have been left out, too; and the cache's keys and values go in as they lie."""
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    prompt_of = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    mask = torch.arange(tokens) >= torch.tensor([[0], [tokens // 2], [tokens - 1], [tokens]])  # the last: padding alone
    held, written = torch.randn(2, 4, 2, tokens, 8).to(dtype), torch.randn(2, 7, 2, 3, 8).to(dtype)
    query, module = torch.randn(7, 6, 1, 8).to(dtype), SimpleNamespace(layer_idx=0)
    found = []
    for on_gpu in (False, True):
        layer = PromptLayer()
        layer.update(*held)
        layer.set_prompts_aside()
        cache = DynamicCache()
        cache.layers = [layer]
        shared = SharedPrompts(cache, prompt_of, mask.as_subclass(OnGpu) if on_gpu else mask)
        assert shared.attend is (attend_on_gpu if on_gpu else attend)
        own = layer.update(*written)
        whole, _ = shared(module, query, *own, None, scaling=0.3)
        assert not on_gpu or kernel[0][1] is layer.prompt_keys and kernel[0][2] is layer.prompt_values
        shared.keep(rows := torch.tensor([1, 3, 4, 6]))
        some, _ = shared(module, query[rows], layer.keys, layer.values, None, scaling=0.3)
        found.append((whole, some))
    assert len(kernel) == 4 and found[1][0].dtype == dtype  # a call for prompts and one for the rows' own, each time
    rounding = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu.as_subclass(torch.Tensor), cpu, atol=rounding, rtol=rounding)


FLASH = [  # on a GPU, dtype, compute capability
    (True, "bfloat16", (8, 0), True), (True, "float16", (8, 9), True), (True, "bfloat16", (9, 0), True),
    (True, "bfloat16", (12, 0), True), (True, "float16", (7, 5), False), (True, "float16", (7, 0), False),
    (True, "float32", (7, 5), False), (True, "float32", (9, 0), False), (True, "float64", (10, 0), False),
    (False, "float32", None, True), (False, "bfloat16", None, True),
]


@pytest.mark.parametrize("on_gpu, dtype, capability, flash", FLASH)
@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4)])
def test_keys_are_repeated_where_flash_attention_cannot_run(
    on_gpu, dtype, capability, flash, heads, groups, monkeypatch
):
    """Grouped heads reach torch's attention only on cards and in types that have flash attention; the result stays."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 8, 16).to(getattr(torch, dtype)) for n in (heads, groups, groups)]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    wanted = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]] * 2)
    packed, _ = packed_sdpa(module, *inputs, packed_mask(segments, 2), scaling=0.3)
    seen = []

    def seeing(query, key, value, **more):
        seen.append((query.shape[1], key.shape[1], value.shape[1], more.get("enable_gqa", False)))
        return scaled_dot_product_attention(query, key, value, **more)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seeing)
    given = [x.as_subclass(OnGpu) for x in inputs] if on_gpu else inputs
    assert flash_runs(given[0]) == flash
    got, _ = packed_sdpa(module, *given, None, scaling=0.3)
    assert seen == [(heads, groups, groups, heads > groups) if flash else (heads, heads, heads, False)]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted)
    again, _ = packed_sdpa(module, *given, packed_mask(segments, 2), scaling=0.3)  # its causal part
    assert seen[1] == seen[0] and len(seen) == 3
    torch.testing.assert_close(again.as_subclass(torch.Tensor), packed)


def test_rows_can_be_left_out_while_they_write():
    """After `keep` the rows that go on, and their prompts alone, attend as they would have done before."""
    torch.manual_seed(0)
    for _ in range(20):
        prompts, tokens, size = *torch.randint(1, 6, (2,)).tolist(), 8
        prompt_of = torch.randint(prompts, (9,))
        mask = torch.arange(tokens) >= torch.randint(0, tokens, (prompts, 1))
        layer = PromptLayer()
        layer.update(*torch.randn(2, prompts, 2, tokens, size))
        layer.set_prompts_aside()
        cache = DynamicCache()
        cache.layers = [layer]
        shared = SharedPrompts(cache, prompt_of, mask)
        own = layer.update(*torch.randn(2, 9, 2, 1, size))
        query = torch.randn(9, 4, 1, size)
        before, _ = shared(SimpleNamespace(layer_idx=0), query, *own, None, scaling=0.3)
        rows = torch.randperm(9)[: int(torch.randint(1, 9, ()))].sort().values
        shared.keep(rows)
        after, _ = shared(SimpleNamespace(layer_idx=0), query[rows], layer.keys, layer.values, None, scaling=0.3)
        torch.testing.assert_close(after, before[rows])
        assert len(layer.prompt_keys) == len(set(prompt_of[rows].tolist()))


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
def test_sdpa_of_a_mask_for_the_last_queries_alone(heads, groups):
    """Equals sdpa with the whole mask, written out by loops, in values and gradients; other masks go through."""
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 2, -1]])
    whole = torch.tensor(
        [
            [[to <= at and segments[r, to] in (0, segments[r, at]) for to in range(8)] for at in range(8)]
            for r in range(2)
        ]
    )
    inputs = [torch.randn(2, n, 8, 16, requires_grad=True) for n in (heads, groups, groups)]
    weights = torch.randn(2, 8, heads, 16)
    results = []
    for mask in (packed_mask(segments, 2), whole[:, None]):
        out, _ = packed_sdpa(module, *inputs, mask, scaling=0.3)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    assert packed_mask(segments, 2).shape == (2, 1, 6, 8)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    # One row for all queries, as encoders have.
    everywhere = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])[:, None, None]
    got, _ = packed_sdpa(module, *inputs, everywhere, scaling=0.3)
    keys, values = (x.repeat_interleave(heads // groups, 1) for x in inputs[1:])
    wanted = scaled_dot_product_attention(inputs[0], keys, values, everywhere, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, wanted)


def test_versions_that_were_not_tested_are_refused(monkeypatch):
    """Any patch of a tested version passes; an older, a later and an unfinished one are refused with a way out."""
    for version in ("5.23.0", "5.23.9", "5.24.1"):
        monkeypatch.setattr(config, "installed", version)
        check(Config(fast=True))
    for version in ("5.22.1", "5.25.0", "6.0.0", "5.2.3", "5.25.0.dev0"):
        monkeypatch.setattr(config, "installed", version)
        check(Config())
        with pytest.raises(UserError, match=f"{version} is installed; install one of these, or leave --fast out"):
            check(Config(fast=True))


def test_the_usual_attention_comes_back():
    """Also after an error: training and the next batch attend as the model was loaded to, and the cache is let go."""
    model = tiny_qwen3()
    before = model.config._attn_implementation
    shared = SharedPrompts(None, torch.tensor([0]), torch.ones(1, 1))
    with pytest.raises(KeyError), shared.used_by(model):
        assert model.config._attn_implementation != before
        raise KeyError
    assert model.config._attn_implementation == before == "sdpa"
    alive = weakref.ref(shared)
    del shared
    assert alive() is None  # and with it its cache


def test_packing_is_switched_on_for_one_model_alone():
    """The other models of the process keep transformers' own sdpa, and a model that can't pack keeps its attention."""
    one, other = tiny_qwen3(), tiny_qwen3()
    assert not packs(one) and enable_packing(one) and enable_packing(one) and packs(one)
    assert not packs(other) and other.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS[PACKED] is packed_sdpa
    other.set_attn_implementation("eager")  # would add a boolean mask to its scores
    falcon = FalconForCausalLM(  # calls torch's attention by itself
        FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    )
    window = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"],
        )
    )
    doge = DogeForCausalLM(  # makes a mask of its own from one that must be whole
        DogeConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2))  # has no cache
    assert can_share_prompts(doge) and not can_share_prompts(gpt)
    for model, its_own in ((other, "eager"), (falcon, "sdpa"), (window, "sdpa"), (doge, "sdpa"), (gpt, "eager")):
        assert not enable_packing(model) and not packs(model)
        assert model.config._attn_implementation == its_own


def test_a_packing_model_is_saved_like_any_other(tmp_path):
    """Its folder names no attention that other programs lack."""
    model = tiny_qwen3()
    enable_packing(model)
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()
