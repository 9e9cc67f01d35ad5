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
    can_share_prompts,
    enable_packing,
    packed_mask,
    packed_sdpa,
    packs,
)


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
