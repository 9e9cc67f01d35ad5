"""engine/models.py: logits by the head alone, dropout off, and models that can't be trained or sampled from."""

from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    Starcoder2Config,
)

from engine.errors import UserError
from engine.models import check_logits, load_model, logits_of

ROOT = Path(__file__).parents[2]

OWN = [  # what a model does to its logits behind the head
    (LlamaConfig, {}), (Qwen3Config, {"tie_word_embeddings": True}), (CohereConfig, {"logit_scale": 0.25}),
    (GraniteConfig, {"logits_scaling": 8.0}), (Gemma2Config, {"final_logit_softcapping": 2.0}),
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
    with pytest.raises(UserError, match="its logits are not finite; look at its weights, or try another --dtype"):
        load_model(str(tmp_path), "cpu")
