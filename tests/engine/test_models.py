"""engine/models.py: logits by the head alone, dropout off, and models that can't be trained or sampled from."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import VOCABULARY, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    Starcoder2Config,
)

from engine.checks import check_logits, check_sampler, probe_prompts
from engine.config import Config
from engine.errors import UserError
from engine.models import load_model, load_policy, logits_of, window_of
from memtrain import twins
from rollout import Budget, Sampler

ROOT = Path(__file__).parents[2]

OWN = [  # what a model does to its logits behind the head
    (LlamaConfig, {}), (Qwen3Config, {"tie_word_embeddings": True}), (CohereConfig, {"logit_scale": 0.25}),
    (GraniteConfig, {"logits_scaling": 8.0}), (Gemma2Config, {"final_logit_softcapping": 2.0}),
    (RecurrentGemmaConfig, {"logits_soft_cap": 0.5, "num_hidden_layers": 3}),
    (FalconH1Config, {"lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
]


@pytest.mark.parametrize("config, settings", OWN, ids=lambda own: getattr(own, "model_type", None) or str(own))
def test_the_head_alone_gives_the_models_own_logits(config, settings):
    """Scaled by a factor or a divisor, capped, or as the head has them; and that is what check_logits lets pass."""
    model, ids = tiny_model(config, **settings), torch.arange(20)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(logits_of(model, hidden), own, atol=1e-5, rtol=1e-5)
        head = model.get_output_embeddings()(hidden)
    changes = bool(settings) and "tie_word_embeddings" not in settings
    assert torch.allclose(head, own, atol=1e-5) != changes  # where logits_of does something, it is needed
    check_logits(model, "X")


@pytest.mark.parametrize("change", [lambda logits: 1.1 * logits, torch.tanh, lambda logits: logits - logits[..., :1]])
def test_a_head_that_does_something_unknown_is_refused(change):
    """Logits that are scaled, capped or shifted behind the head by settings of the model's own: a line that says so."""
    model = tiny_model()
    forward = model.forward

    def changed(*more, **named):
        found = forward(*more, **named)
        found.logits = change(found.logits)
        return found

    model.forward = changed
    with pytest.raises(UserError, match="--model X: Qwen3ForCausalLM scales or caps its logits .* add it to logits_of"):
        check_logits(model, "X")


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            **SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, activation_dropout=0.5
        ),
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
        ),
        Starcoder2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, residual_dropout=0.5, embedding_dropout=0.5
        ),
        FalconConfig(**SMALL, hidden_dropout=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_stays_off_in_train_mode(config, tmp_path):
    """Checkpointing of activations needs train mode; the passes of a step must all be of one network."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "tiny/model").save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "cpu")
    ids = torch.arange(20)[None]
    quiet = model(input_ids=ids).logits
    assert torch.equal(model.train()(input_ids=ids).logits, quiet)


def test_weights_that_give_no_distribution_are_refused(tmp_path):
    """Greedy sampling would write nonsense without a word, and training would stop hours later."""
    model, tokenizer = load_model(str(ROOT / "tiny/model"), "cpu")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its logits are not finite; check its weights, or try another --dtype"):
        load_model(str(tmp_path), "cpu")


# ---- the sampler and the trainer: families of transformers ----------------------------------------------

SHAPE = {  # of every family; a config takes what it knows
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim_model": 32, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_hidden_layers": 2, "n_layer": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "init_std": 0.3, "state_size": 4,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "n_positions": 128, "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}
CONV = {"layer_types": ["conv", "full_attention"]}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
TOP = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "index_n_heads": 2,
    "index_head_dim": 16, "moe_intermediate_size": 16,
}


def family(kind: str, seed: int = 0, **more):
    """A tiny model of a family; no bias, norm or convolution is at its special first value."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    plain = AutoConfig.for_model(kind)
    shape = {name: value for name, value in SHAPE.items() if hasattr(plain, name)}
    torch.manual_seed(seed)
    config = type(plain)(**shape | {"vocab_size": len(tokenizer)} | more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or "conv" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model, tokenizer


def sampler_of(model, tokenizer, fast: bool):
    generate, _, token_logprobs = twins(Config(fast=fast), model)
    return Sampler(generate, model, tokenizer, Budget(10_000)), token_logprobs


RIGHT = [
    ("llama", {}), ("gpt2", {}), ("bloom", {}), ("openai-gpt", {}), ("mixtral", {}), ("mamba", {}), ("lfm2", CONV),
    ("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 5}), ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.25}), ("doge", {"keep_window_size": 6}), ("deepseek_v32", TOP | {"index_topk": 64}),
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind, more", RIGHT, ids=[kind for kind, _ in RIGHT])
def test_a_sampler_that_is_its_trainer_passes(kind, more, fast):
    """Full attention, windows, bias by position, experts, states, no cache, masks of their own: not one is refused, and
    no random number is drawn."""
    model, tokenizer = family(kind, **more)
    before = torch.get_rng_state()
    check_sampler(*sampler_of(model, tokenizer, fast), "X")
    check_logits(model, "X")
    assert torch.equal(torch.get_rng_state(), before) and "generate" not in vars(model)


def test_a_sampler_without_the_models_generate_is_left_alone():
    """A server's log-probs aren't known here."""
    model, tokenizer = family("llama")
    check_sampler(Sampler(lambda *more: [], model, tokenizer, Budget(1)), None, "X")


WRONG = [  # a family, and the layers that the line names
    ("rwkv", {}, "RwkvSelfAttention"), ("lfm2", CONV | {"conv_bias": True, "seed": 3}, "Lfm2ShortConv"),
    ("minimax", LINEAR_FIRST, "MiniMaxAttention, MiniMaxLightningAttention"),
    (
        "recurrent_gemma", {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32},
        "RecurrentGemmaRecurrentBlock",
    ),
    ("bart", {}, "BartAttention"), ("marian", {}, "MarianAttention"), ("whisper", {}, "WhisperAttention"),
    ("deepseek_v32", TOP | {"index_topk": 4}, "DeepseekV32Attention"),
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind, more, layers", WRONG, ids=[kind for kind, *_ in WRONG])
def test_a_sampler_that_is_not_its_trainer_is_refused(kind, more, layers, fast):
    """The line names the model's type and its layers, whether padding, the cache, or both make the difference."""
    model, tokenizer = family(kind, **more)
    wanted = f"--model X: {kind} can't be sampled from: in a padded batch its layers {layers} give log-probs that"
    with pytest.raises(UserError, match=wanted):
        check_sampler(*sampler_of(model, tokenizer, fast), "X")


@pytest.mark.parametrize("off, refused", [(0.005, False), (0.02, True), (torch.nan, True)])
@pytest.mark.parametrize("where", ["sampled from", "trained"])
def test_either_side_may_be_the_one_that_is_off(off, refused, where):
    """One log-prob of one row that is off by this much in the batch alone."""
    model, tokenizer = family("qwen3")
    sample, plain = sampler_of(model, tokenizer, False)
    forward = model.forward

    def in_batches(*more, **named):
        found = forward(*more, **named)
        found.logits[0, -1, 7] += off if len(found.logits) > 1 else 0.0
        return found

    def off_in_batches(model, turns):
        logprobs, *more = plain(model, turns)
        logprobs[-1, 2] += off
        return logprobs, *more

    if where == "sampled from":
        model.forward = in_batches
    token_logprobs = off_in_batches if where == "trained" else plain
    if refused:
        with pytest.raises(UserError, match=f"X: qwen3 can't be {where}: in a padded batch its layers Qwen3Attention"):
            check_sampler(sample, token_logprobs, "X")
    else:
        check_sampler(sample, token_logprobs, "X")


@pytest.mark.parametrize("kind, passes", [("llama", True), ("mixtral", True), ("mamba2", True), ("bart", False)])
def test_bfloat16_has_a_bound_of_its_own(kind, passes):
    """Rounding passes, experts that change included; positions that padding moves don't."""
    more = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {}
    model, tokenizer = family(kind, **more)
    sample, token_logprobs = sampler_of(model.to(torch.bfloat16), tokenizer, False)
    if passes:
        check_sampler(sample, token_logprobs, "X")
    else:
        with pytest.raises(UserError, match=r"rounding: at most 0.2\)"):
            check_sampler(sample, token_logprobs, "X")


def test_the_probe_is_of_ordinary_tokens():
    """3, 12 and two pairs of 13, the same again; no special token, and none that only the tokenizer has."""
    model, tokenizer = load_model(str(ROOT / "tiny/model"), "cpu")
    prompts = probe_prompts(model, tokenizer)
    assert [len(prompt) for prompt in prompts] == [3, 12, 13, 13, 13, 13] and prompts == probe_prompts(model, tokenizer)
    assert prompts[2] == prompts[3] != prompts[4] == prompts[5]
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(i) for i in range(40)]})
    model.resize_token_embeddings(60)
    used = {i for prompt in probe_prompts(model, tokenizer) for i in prompt}
    assert used and used <= set(range(40, 60))


@pytest.mark.parametrize(
    "kind, more, window",
    [
        ("llama4_text", {"attention_chunk_size": 64}, 64), ("llama4_text", {"attention_chunk_size": 999}, 128),
        ("deepseek_v32", TOP | {"index_topk": 32}, 32), ("mistral", {"sliding_window": 16}, 128), ("llama", {}, 128),
    ],
)
def test_a_conversation_must_stay_where_padding_changes_nothing(kind, more, window):
    """Within a chunk, and what an indexer shows whole. Sliding windows are right at any length."""
    assert window_of(SimpleNamespace(config=AutoConfig.for_model(kind, max_position_embeddings=128, **more))) == window


def saved(folder: Path, kind: str, **more) -> str:
    model, tokenizer = family(kind, **more)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ONE_LINE = [
    ("llama4_text", {}, {}, "Llama4ForCausalLM can't be trained here, get_decoder() returns no decoder"),
    ("modernbert-decoder", {}, {}, "ModernBertDecoderForCausalLM can't be trained here, get_decoder() returns no"),
    ("bert", {}, {}, "BertLMHeadModel scales or caps its logits"),
    (
        "openai-gpt", {}, {"gradient_checkpointing": True},
        "--gradient-checkpointing: OpenAIGPTLMHeadModel doesn't support it; leave it out",
    ),
    ("mamba", {}, {"gradient_checkpointing": True}, None), ("openai-gpt", {}, {}, None), ("llama", {}, {}, None),
    ("mixtral", {"output_router_logits": True}, {}, None), ("qwen3_moe", {"output_router_logits": True}, {}, None),
    ("jamba", {"attn_layer_period": 9, "attn_layer_offset": 8}, {}, "JambaForCausalLM can't compute a row of two"),
]


@pytest.mark.parametrize("kind, more, flags, line", ONE_LINE)
def test_what_a_model_lacks_is_one_line(kind, more, flags, line, tmp_path):
    """Or else it is loaded, and passes; what a fine-tune has left on is off."""
    config = Config(model=saved(tmp_path, kind, **more), **flags)
    if line:
        with pytest.raises(UserError, match=re.escape(line)) as error:
            check_logits(load_policy(config, "cpu")[0], config.model)
        assert "\n" not in str(error.value)
    else:
        model, tokenizer = load_policy(config, "cpu")
        assert not getattr(model.config, "output_router_logits", False)
        check_sampler(*sampler_of(model, tokenizer, False), "X")
