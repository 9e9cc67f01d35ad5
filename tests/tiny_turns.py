"""Tiny random models and turns, and the log-probs of one by a whole float64 pass, for the tests of both twins."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rollout import Turn

VOCABULARY = 61
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
EOS = 0  # also the id that padding gets, so that a mask taken from token values fails here
LENGTHS = [(5, 4), (1, 7), (9, 1), (3, 12), (12, 3), (6, 6), (2, 9)]


def tiny_model(config_class=Qwen3Config, seed=0, **settings):
    """A random model whose weights are wide enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
    )
    return AutoModelForCausalLM.from_config(config_class(**shape | settings)).eval()


class Ends:
    """The little of a tokenizer that sampling looks at without `done`."""

    pad_token_id = eos_token_id = EOS


def ending_model(config_class=Qwen3Config, **settings):
    """A tiny model whose completions end often."""
    model = tiny_model(config_class, **settings)
    with torch.no_grad():  # all logits but this one are 0 in the mean
        model.lm_head.weight[EOS] *= 2.5
    return model


def turn_of(prompt_ids: list[int], completion_ids: list[int]) -> Turn:
    return Turn(prompt_ids, completion_ids, True, "")


def random_turns(lengths, seed=0):
    """Turns of the given (prompt, completion) lengths; every completion of two tokens or more ends with EOS."""
    rng = np.random.default_rng(seed)
    draw = lambda count: rng.integers(0, VOCABULARY, count).tolist()  # noqa: E731
    turns = [turn_of(draw(p), draw(c)) for p, c in lengths]
    for turn in turns:
        turn.completion_ids[-1:] = [EOS] if len(turn.completion_ids) > 1 else turn.completion_ids
    return turns


def unpadded_logprobs(model, turn):
    """One unpadded sequence, all its logits, a float64 log-softmax: log-probs and entropies of the completion."""
    ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
    logits = model(input_ids=ids).logits[0].double()
    rows, first = [], len(turn.prompt_ids)
    for t, token in enumerate(turn.completion_ids):
        distribution = logits[first + t - 1] - logits[first + t - 1].logsumexp(0)
        rows.append((distribution[token], -(distribution.exp() * distribution).sum()))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def parameter_gradient(model):
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient
