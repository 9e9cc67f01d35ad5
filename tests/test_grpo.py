"""grpo.py against independent arithmetic: float64 loops for Eq. 3 and Eq. 4, plain full-logits passes for log-probs."""

from dataclasses import dataclass
from functools import partial
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from attention import can_pack_completions
from grpo import completion_logprobs, conversation_weights, group_advantages, grpo_loss, logits_agree, micro_batches
from settings import load_model

VOCABULARY = 61
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
EOS = 0  # Also the id that padding gets, so that a mask taken from token values fails here.


@dataclass
class Turn:
    prompt_ids: list
    completion_ids: list


def tiny_model(config_class=Qwen3Config, seed=0, **settings):
    """A random model whose weights are wide enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_turns(lengths, seed=0):
    """Turns of the given (prompt, completion) lengths; every completion of two tokens or more ends with EOS."""
    rng = np.random.default_rng(seed)
    turns = [Turn(rng.integers(0, VOCABULARY, p).tolist(), rng.integers(0, VOCABULARY, c).tolist()) for p, c in lengths]
    for turn in turns:
        turn.completion_ids[-1:] = [EOS] if len(turn.completion_ids) > 1 else turn.completion_ids
    return turns


LENGTHS = [(5, 4), (1, 7), (9, 1), (3, 12), (12, 3), (6, 6), (2, 9)]


def plain_logprobs(model, turn, temperature=1.0):
    """One unpadded sequence, all its logits, a float64 log-softmax: log-probs and entropies of the completion."""
    ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
    logits = model(input_ids=ids).logits[0].double() / temperature
    rows, first = [], len(turn.prompt_ids)
    for t, token in enumerate(turn.completion_ids):
        distribution = logits[first + t - 1] - logits[first + t - 1].logsumexp(0)
        rows.append((distribution[token], -(distribution.exp() * distribution).sum()))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def with_siblings(turns, copies, seed=5):
    """Further completions of every turn's prompt, shuffled among them: what a group of samples looks like."""
    rng = np.random.default_rng(seed)
    more = [
        Turn(list(turn.prompt_ids), rng.integers(0, VOCABULARY, rng.integers(1, 13)).tolist())
        for n, turn in enumerate(turns) for _ in range(copies if n % 3 else 0)
    ]  # every third prompt keeps its one completion
    both = [*turns, *more]
    return [both[i] for i in rng.permutation(len(both))]


def parameter_gradient(model):
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


# Eq. 3 and the groups


def test_mean_advantage_by_hand():
    """Eq. 3 subtracts each group's own mean, and divides by nothing."""
    advantages, degenerate = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.5, 1.0, 0.25, 0.25]]), "mean")
    expected = [[0.75, -0.25, -0.25, -0.25], [0.75, 0.25, -0.5, -0.5]]  # means 0.25 and 0.75
    assert advantages.tolist() == expected and degenerate.tolist() == [False, False]


@pytest.mark.parametrize("mode", ["mean", "group_norm"])
def test_advantages_equal_numpy(mode):
    """Random groups agree with numpy in float64, the sample standard deviation included."""
    rewards = np.random.default_rng(0).random((50, 8))
    advantages, degenerate = group_advantages(torch.tensor(rewards), mode)
    for row, got in zip(rewards, advantages.numpy()):
        scale = np.std(row, ddof=1) + 1e-4 if mode == "group_norm" else 1.0
        np.testing.assert_allclose(got, (row - np.mean(row)) / scale, atol=1e-12)
    assert not degenerate.any()


def test_equal_rewards_are_degenerate_whatever_their_rounding():
    """Rewards that are equal on paper but not in binary make a degenerate group, with advantages of exactly zero."""
    summed = 1.0
    for _ in range(3):
        summed += 0.3 / 7
    rewards = torch.tensor(
        [
            [0.1 + 0.2, 0.3, 0.3],
            [1 + 0.3 * (3 / 7), 1 + (0.3 / 7) * 3, summed],  # Eq. 2 with lambda 0.3, G2 7, three hits
            [0.0, 0.0, 0.0],
            [0.3, 0.3, 0.3 + 0.3 / 64],  # one hit in 64 is a difference
        ],
        dtype=torch.float64,
    )
    assert len(set(rewards[0].tolist())) > 1 and len(set(rewards[1].tolist())) > 1
    for mode in ("mean", "group_norm"):
        for dtype in (torch.float64, torch.float32):
            advantages, degenerate = group_advantages(rewards.to(dtype), mode)
            assert degenerate.tolist() == [True, True, True, False]
            assert (advantages[:3] == 0).all() and (advantages[3] != 0).all()


@pytest.mark.filterwarnings("ignore:std")
def test_group_of_one_and_unknown_mode():
    """A group of one has nothing to be compared with (no NaN); a misspelt mode raises."""
    advantages, degenerate = group_advantages(torch.tensor([[1.0], [0.0]]), "group_norm")
    assert advantages.tolist() == [[0.0], [0.0]] and degenerate.all()
    with pytest.raises(ValueError, match="group-norm"):
        group_advantages(torch.tensor([[1.0, 0.0]]), "group-norm")


def test_weights_are_the_outer_means_of_what_is_kept():
    """A document counts once however many conversations it has; dropped conversations and documents dilute nothing."""
    weights = conversation_weights([0, 0, 0, 1, 2, 2], [True, True, False, True, False, False])
    assert weights.tolist() == [0.25, 0.25, 0, 0.5, 0, 0]
    assert conversation_weights([0, 1], [False, False]).tolist() == [0, 0]
    assert conversation_weights([], []).tolist() == []


# Eq. 4


def by_hand_loss(logprobs, old, reference, lengths, advantages, documents, kept, eps_low, eps_high, beta):
    """Eq. 4 as nested loops over python floats, and the counts that stats reports."""
    per_document, stats = {}, {"tokens": 0, "clipped": 0, "kl": 0.0, "approx_kl": 0.0}
    for i, length in enumerate(lengths):
        if not kept[i]:
            continue
        total = 0.0
        for t in range(length):
            ratio, A = exp(logprobs[i][t] - old[i][t]), advantages[i]
            held = min(max(ratio, 1 - eps_low), 1 + eps_high)
            total += min(ratio * A, held * A)
            stats["clipped"] += held * A < ratio * A
            stats["approx_kl"] += ratio - 1 - log(ratio)
            if reference is not None:
                d = reference[i][t] - logprobs[i][t]
                total -= beta * (exp(d) - d - 1)
                stats["kl"] += exp(d) - d - 1
        stats["tokens"] += length
        per_document.setdefault(documents[i], []).append(total / length)
    means = [sum(values) / len(values) for values in per_document.values()]
    return -sum(means) / len(means), stats


def random_case(seed):
    """Ratios from about 0.4 to 2.5 against clips near 1, both signs of A; padding holds garbage that mustn't matter."""
    rng = np.random.default_rng(seed)
    turns, longest = 9, 6
    lengths = rng.integers(1, longest + 1, turns)
    old = -rng.random((turns, longest)) * 3
    logprobs = old + rng.normal(0, 0.4, (turns, longest))
    reference = logprobs + rng.normal(0, 0.5, (turns, longest)) if seed % 2 else None
    for i, length in enumerate(lengths):
        old[i, length:], logprobs[i, length:] = -7.0, rng.choice([0.0, 5.0, -np.inf])
    documents, kept = rng.integers(0, 4, turns), rng.random(turns) < 0.7
    kept[0] = True
    clip = {"eps_low": rng.uniform(0.05, 0.3), "eps_high": rng.uniform(0.05, 0.4), "beta": 0.3}
    return logprobs, old, reference, lengths, rng.normal(0, 1, turns), documents, kept, clip


def run_loss(logprobs, old, reference, lengths, advantages, documents, kept, clip):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths)[:, None]
    loss, stats = grpo_loss(
        logprobs, None if old is None else torch.tensor(old), None if reference is None else torch.tensor(reference),
        mask, torch.tensor(advantages), conversation_weights(documents, kept).double(), **clip,
    )
    loss.backward()
    return loss.item(), logprobs.grad.numpy(), stats


@pytest.mark.parametrize("seed", range(60))
def test_eq4_equals_nested_loops(seed):
    """Loss and stats agree with by-hand loops: both signs and both clips, lengths, KL on and off, dropped groups."""
    *case, clip = random_case(seed)
    loss, _, stats = run_loss(*case, clip)
    expected, expected_stats = by_hand_loss(*case, **clip)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected_stats, abs=1e-6)


def test_eq4_worked_on_paper():
    """A case to check by eye: each corner of the clip, three lengths, a dropped conversation and a dropped document."""
    old = np.zeros((5, 3))
    logprobs = np.log([[1.5, 0.5, 1], [0.5, 1, 1], [1.5, 1.0, 0.5], [9, 9, 9], [9, 9, 9]])  # so these are the ratios
    reference = logprobs.copy()
    reference[0] += log(2)
    case = [2, 1, 3, 3, 3], [1.0, -1.0, -1.0, 5.0, 5.0], [0, 0, 1, 1, 2], [True, True, True, False, False]
    clip = {"eps_low": 0.2, "eps_high": 0.3, "beta": 0.0}
    # Turn 0, A = +1: min(1.5, 1.3) = 1.3 clipped, min(0.5, 0.8) = 0.5              mean  0.9
    # Turn 1, A = -1: min(-0.5, -0.8) = -0.8 clipped                                 mean -0.8
    # Turn 2, A = -1: min(-1.5, -1.3) = -1.5, -1, min(-0.5, -0.8) = -0.8 clipped     mean -1.1
    # Document 0: (0.9 - 0.8) / 2 = 0.05. Document 1: -1.1. J = (0.05 - 1.1) / 2 = -0.525.
    loss, gradient, stats = run_loss(logprobs, old, None, *case, clip)
    assert loss == pytest.approx(0.525, abs=1e-12)
    assert stats["tokens"] == 6 and stats["clipped"] == 3
    # -weight / length * r A where not clipped: turn 0 weighs 1/4 over 2 tokens, turn 2 weighs 1/2 over 3.
    paper = [[0, -0.0625, 0], [0, 0, 0], [0.25, 1 / 6, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(gradient, paper, atol=1e-12)
    # KL of turn 0, d = log 2 at both tokens: k3 = 2 - log 2 - 1 = 0.306853; times beta 0.1 and weight 1/4: 0.007671.
    # Its gradient, 1 - exp(d) = -1, times 0.1 / 4 / 2: -0.0125 more at each of the two tokens, the clipped one too.
    loss, gradient, stats = run_loss(logprobs, old, reference, *case, clip | {"beta": 0.1})
    assert loss == pytest.approx(0.532671, abs=1e-6) and stats["kl"].item() == pytest.approx(2 * 0.306853, abs=1e-6)
    paper[0] = [-0.0125, -0.075, 0]
    np.testing.assert_allclose(gradient, paper, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_gradient_equals_finite_differences(seed):
    """The loss's gradient in every log-prob is the slope of the by-hand loss: the KL term has one, padding none."""
    logprobs, *case, clip = random_case(seed)
    _, gradient, _ = run_loss(logprobs, *case, clip)
    lengths, h = case[2], 1e-6
    for i, t in np.ndindex(logprobs.shape):
        if t >= lengths[i]:
            assert gradient[i, t] == 0
            continue
        up, down = logprobs.copy(), logprobs.copy()
        up[i, t] += h
        down[i, t] -= h
        slope = (by_hand_loss(up, *case, **clip)[0] - by_hand_loss(down, *case, **clip)[0]) / (2 * h)
        assert gradient[i, t] == pytest.approx(slope, abs=1e-6)


def test_without_old_logprobs_the_ratio_is_one_with_a_gradient():
    """One update per rollout: the loss is -weight * A, nothing is clipped, and the policy gradient is there."""
    loss, gradient, stats = run_loss(
        np.full((2, 3), -1.5), None, None, [3, 2], [2.0, -1.0], [0, 1], [True, True],
        {"eps_low": 0.0, "eps_high": 0.0, "beta": 0.0},
    )
    assert loss == pytest.approx(-0.5)
    np.testing.assert_allclose(gradient, [[-1 / 3] * 3, [0.25, 0.25, 0]], atol=1e-12)
    assert stats["clipped"] == 0 and stats["approx_kl"] == 0


def test_entropy_is_counted_on_trained_tokens_only():
    """The entropy in stats leaves out padding and turns of weight 0, and stays out of the loss."""
    entropy, mask = torch.tensor([[1.0, 2.0, 50.0], [4.0, 8.0, 16.0], [50.0, 50.0, 50.0]]), torch.ones(3, 3).bool()
    mask[0, 2] = False
    flat, common = torch.full((3, 3), -2.0), (mask, torch.ones(3), torch.tensor([0.5, 0.5, 0.0]), 0.2, 0.2, 0.0)
    loss, stats = grpo_loss(flat, None, None, *common, entropy)
    assert stats["entropy"] == 31 and stats["tokens"] == 5 and loss == grpo_loss(flat, None, None, *common)[0]


def test_nothing_kept_and_empty_completions_give_zero_not_nan():
    """A batch whose groups are all dropped has loss and gradient 0; a kept completion of no tokens adds 0."""
    logprobs, old, reference, lengths, advantages, documents, kept, clip = random_case(1)
    loss, gradient, stats = run_loss(logprobs, old, reference, lengths, advantages, documents, kept & False, clip)
    assert loss == 0 and (gradient == 0).all() and all(value == 0 for value in stats.values())
    one = [True]
    loss, gradient, _ = run_loss(logprobs[:1], old[:1], reference[:1], [0], advantages[:1], [0], one, clip)
    assert loss == 0 and (gradient == 0).all()


# Log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_plain_unpadded_passes(name, temperature):
    """Log-probs, entropies and gradients equal one full-logits pass per sequence; the head's chunks don't matter."""
    model, turns = tiny_model(CONFIGS[name]), random_turns(LENGTHS)
    coefficients = torch.randn(len(turns), 12, generator=torch.Generator().manual_seed(1))
    expected_loss = 0.0
    expected = [plain_logprobs(model, turn, temperature) for turn in turns]
    for row, (logprobs, _) in zip(coefficients, expected):
        expected_loss = expected_loss + (row[: len(logprobs)] * logprobs).sum()
    expected_loss.backward()
    expected_gradient = parameter_gradient(model)
    for head_tokens in (1, 5, 1000):
        logprobs, entropy, mask = completion_logprobs(
            model, turns, temperature=temperature, head_tokens=head_tokens, with_entropy=True
        )
        assert logprobs.dtype == torch.float32 and not entropy.requires_grad
        assert mask.sum(1).tolist() == [len(turn.completion_ids) for turn in turns]
        for i, (plain, plain_entropy) in enumerate(expected):
            torch.testing.assert_close(logprobs[i, : len(plain)].double(), plain, atol=2e-5, rtol=0)
            torch.testing.assert_close(entropy[i, : len(plain)].double(), plain_entropy, atol=2e-5, rtol=0)
            assert (logprobs[i, len(plain):] == 0).all() and (entropy[i, len(plain):] == 0).all()
            assert not mask[i, len(plain):].any()
        (coefficients * logprobs).sum().backward()
        gradient = parameter_gradient(model)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_logprobs_equal_rollout_logprobs(name, temperature):
    """What HF generate sampled from, left-padded in a batch, is what training scores: same tokens, 1e-4, pad = EOS."""
    model, turns = tiny_model(CONFIGS[name]), random_turns([(p, 1) for p in (3, 11, 7, 1, 5, 8)])
    width = max(len(turn.prompt_ids) for turn in turns)
    prompts = torch.tensor([[EOS] * (width - len(turn.prompt_ids)) + turn.prompt_ids for turn in turns])
    attention = torch.tensor([[0] * (width - len(turn.prompt_ids)) + [1] * len(turn.prompt_ids) for turn in turns])
    torch.manual_seed(3)
    sampled = model.generate(
        prompts, attention_mask=attention, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        max_new_tokens=12, eos_token_id=[EOS, 2, 3, 4, 5, 6], pad_token_id=EOS, output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(sampled.scores, 1).log_softmax(-1)  # (turns, new, vocabulary)
    ends = []
    for turn, row in zip(turns, sampled.sequences[:, width:].tolist()):
        end = next((t + 1 for t, token in enumerate(row) if token in (EOS, 2, 3, 4, 5, 6)), len(row))
        turn.completion_ids = row[:end]
        ends.append(end)
    assert min(ends) < max(ends)  # Some ended early, or padding after EOS would go untested.
    with torch.no_grad():
        logprobs, _, mask = completion_logprobs(model, turns, temperature=temperature, head_tokens=7)
    for i, turn in enumerate(turns):
        rollout = scores[i].gather(1, sampled.sequences[i, width:, None])[: ends[i], 0]
        torch.testing.assert_close(logprobs[i, : ends[i]], rollout, atol=1e-4, rtol=0)
    assert mask.sum(1).tolist() == ends


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), partial(MistralConfig, sliding_window=None), GemmaConfig])
def test_packed_completions_equal_unpacked_ones(config, recompute):
    """One row for a prompt and all its completions gives the log-probs and gradient of one row each, to 1e-5."""
    model, turns = tiny_model(config), with_siblings(random_turns(LENGTHS), 3)
    if recompute:
        model.activation_checkpointing_enable()
        model.train()
    coefficients = torch.randn(len(turns), 13, generator=torch.Generator().manual_seed(1))
    results, rows = [], []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for share in (False, True):
        logprobs, entropy, mask = completion_logprobs(model, turns, share_prompts=share, head_tokens=16, with_entropy=True)
        (coefficients[:, : logprobs.shape[1]] * logprobs).sum().backward()
        results.append((logprobs.detach(), entropy, mask, parameter_gradient(model)))
    hook.remove()
    (plain, plain_entropy, plain_mask, plain_gradient), (packed, entropy, mask, gradient) = results
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, plain_entropy, atol=1e-5, rtol=0)
    assert torch.equal(mask, plain_mask)
    assert (gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()
    assert len(rows) == 2 and rows[0] == len(turns) * max(len(t.prompt_ids + t.completion_ids) for t in turns)
    assert rows[1] != rows[0]  # it was packed


def test_a_packed_row_of_one_completion_token():
    """Beside an empty completion: the mask of so few queries is not taken for one of all queries."""
    model = tiny_model()
    turns = [Turn([1, 2, 3, 4, 5], [9]), Turn([1, 2, 3, 4, 5], [])]
    with torch.no_grad():
        (packed, *_), (alone, *_) = (completion_logprobs(model, part, share_prompts=True) for part in (turns, turns[:1]))
    torch.testing.assert_close(packed[:1], alone, atol=1e-5, rtol=0)


def test_one_completion_a_prompt_takes_the_plain_causal_path():
    """Without anything to share no attention mask is built, so that fast kernels stay in use."""
    model, seen = tiny_model(), []
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    turns = random_turns(LENGTHS)
    completion_logprobs(model, turns, share_prompts=True)
    completion_logprobs(model, with_siblings(turns, 1), share_prompts=True)
    assert "attention_mask" not in seen[0] and "attention_mask" in seen[1]
    assert can_pack_completions(model)
    model.config._attn_implementation = "eager"  # would add a boolean mask to its scores
    assert not can_pack_completions(model)
    small = FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    falcon = FalconForCausalLM(small)
    assert falcon.config._attn_implementation == "sdpa" and not can_pack_completions(falcon)  # calls torch's by itself


def test_eos_is_trained():
    """A rewarded completion that is nothing but its EOS makes that EOS likelier, though padding has the same id."""
    model, turns = tiny_model(), [Turn([5, 6, 7], [EOS]), Turn([8, 9], [10, 11, 12, EOS])]
    logprobs, _, mask = completion_logprobs(model, turns)
    logprobs.retain_grad()
    assert mask.tolist() == [[True, False, False, False], [True] * 4]
    loss, _ = grpo_loss(logprobs, None, None, mask, torch.ones(2), conversation_weights([0, 1], [1, 1]), 0.2, 0.2, 0.0)
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.5, 0, 0, 0], [-0.125] * 4]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        after, _, _ = completion_logprobs(model, turns)
    assert after[0, 0] > logprobs[0, 0] and after[1, 3] > logprobs[1, 3]


def test_empty_completions_and_prompts():
    """An empty completion scores nothing and spoils no neighbour; an empty prompt is an error, not a shifted mask."""
    model, turns = tiny_model(), random_turns(LENGTHS[:2])
    alone, _, _ = completion_logprobs(model, turns)
    mixed, _, mask = completion_logprobs(model, [turns[0], Turn([3, 4, 5], []), turns[1]])
    torch.testing.assert_close(mixed[[0, 2]], alone)
    assert mask.sum(1).tolist() == [4, 0, 7]
    logprobs, _, mask = completion_logprobs(model, [Turn([3], []), Turn([4], [])])
    loss, _ = grpo_loss(logprobs, None, None, mask, torch.ones(2), torch.ones(2), 0.2, 0.2, 0.0)
    assert logprobs.shape == mask.shape == (2, 0) and loss == 0
    loss.backward()
    with pytest.raises(ValueError, match="empty prompt"):
        completion_logprobs(model, [Turn([], [3, 4])])


def test_head_never_sees_more_than_its_chunk_and_keeps_no_logits():
    """Forward and backward make logits of at most head_tokens positions, only of completions, and store none."""
    model, turns, seen, stored = tiny_model(), random_turns(LENGTHS), [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))

    def remember(tensor):
        stored.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logprobs, _, _ = completion_logprobs(model, turns, head_tokens=8)
    tokens = sum(len(turn.completion_ids) for turn in turns)
    assert sum(rows for rows, _ in seen) == tokens > 8 and set(seen) <= {(8, VOCABULARY), (tokens % 8, VOCABULARY)}
    assert not any(VOCABULARY in shape[-1:] for shape in stored)
    logprobs.sum().backward()
    assert sum(rows for rows, _ in seen) == 2 * tokens and max(seen) == (8, VOCABULARY)


def test_soft_capped_logits_are_capped_and_scaled_ones_found_out():
    """Gemma's tanh on the logits is applied; models that scale or cap them by settings of their own are told apart."""
    model, turns = tiny_model(Gemma2Config, final_logit_softcapping=2.0), random_turns(LENGTHS[:2])
    logprobs, _, _ = completion_logprobs(model, turns)
    for i, turn in enumerate(turns):
        plain = plain_logprobs(model, turn)[0].float()
        torch.testing.assert_close(logprobs[i, : len(plain)], plain, atol=1e-4, rtol=0)
    assert logits_agree(model) and logits_agree(tiny_model())
    for config_class, setting in ((CohereConfig, "logit_scale"), (GraniteConfig, "logits_scaling")):
        assert not logits_agree(tiny_model(config_class, **{setting: 0.5}))


@pytest.mark.parametrize("config", [OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.5,
                                              attention_dropout=0.5, activation_dropout=0.5, word_embed_proj_dim=32),
                                    GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
                                    Starcoder2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                     num_key_value_heads=2, residual_dropout=0.5, embedding_dropout=0.5),
                                    FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5)])  # fmt: skip
def test_dropout_stays_off_in_train_mode(config, tmp_path):
    """Checkpointing of activations needs train mode; the passes of a step must all be of one network."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "tiny/model").save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "cpu")
    ids = torch.arange(20)[None]
    quiet = model(input_ids=ids).logits
    assert torch.equal(model.train()(input_ids=ids).logits, quiet)


# Micro-batches


def batch_gradient(model, turns, batches, share=False):
    """Gradient of one Eq. 4 batch (a moved policy, KL, a dropped turn), accumulated over the given micro-batches."""
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.5, 1.5, -1.0, 0.7])
    weights = conversation_weights([0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, 0])
    old_model, reference_model = tiny_model(seed=1), tiny_model(seed=2)
    total, totals = 0.0, {}
    for batch in batches:
        part = [turns[i] for i in batch]
        logprobs, entropy, mask = completion_logprobs(model, part, share_prompts=share, head_tokens=8, with_entropy=True)
        with torch.no_grad():
            drift = 0.05 * completion_logprobs(old_model, part)[0]
            reference = logprobs + 0.1 * completion_logprobs(reference_model, part)[0]
        loss, stats = grpo_loss(
            logprobs, (logprobs + drift).detach(), reference, mask, advantages[batch], weights[batch], 0.1, 0.2, 0.05,
            entropy,
        )
        loss.backward()
        total += loss.item()
        totals = {name: totals.get(name, 0) + value.item() for name, value in stats.items()}
    return total, parameter_gradient(model), totals


def test_any_micro_batch_size_gives_the_same_gradient():
    """One batch, cut in any way, adds up to the same loss, gradient (1e-5) and stats."""
    model, turns = tiny_model(), random_turns(LENGTHS)
    loss, gradient, stats = batch_gradient(model, turns, [list(range(7))])
    assert gradient.norm() > 1e-3 and 0 < stats["clipped"] < stats["tokens"] == sum(c for _, c in LENGTHS[:6])
    cuts = [[[i] for i in range(7)], [[0, 1], [2, 3], [4, 5], [6]], [[6, 2, 0], [1, 3, 4, 5]], micro_batches(turns, 30)]
    for cut in cuts:
        part_loss, part_gradient, part_stats = batch_gradient(model, turns, cut)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert (part_gradient - gradient).norm() < 1e-5 * gradient.norm()
        assert part_stats == pytest.approx(stats, rel=1e-4)


def test_gradient_checkpointing_changes_nothing():
    """In train mode (dropout 0) with activation checkpointing, the gradient is the one of eval mode."""
    model, turns = tiny_model(), random_turns(LENGTHS)
    _, gradient, _ = batch_gradient(model, turns, [list(range(7))])
    model.activation_checkpointing_enable()
    _, again, _ = batch_gradient(model.train(), turns, [list(range(7))])
    assert (again - gradient).norm() < 1e-6 * gradient.norm()


def test_micro_batches_keep_the_token_budget():
    """Every turn once; padded size within the budget, or one row alone; equal prompts together; little padding."""
    lengths = [3, 10, 4, 30, 9, 10]
    turns = [Turn([1], [2] * (length - 1)) for length in lengths]
    assert micro_batches(turns, 20) == [[3], [1, 5], [4], [2, 0]]  # 30 alone, 10 + 10, 9 is too far from 4, 4 + 3
    assert micro_batches(turns, 0) == [[3], [1], [5], [4], [2], [0]] and micro_batches([], 20) == []
    assert micro_batches(turns[1:3], 14, share_prompts=True) == [[0, 1]]  # 1 + 9 + 3 tokens in one row
    assert micro_batches(turns[1:3], 12, share_prompts=True) == [[0], [1]]
    many = with_siblings(random_turns(np.random.default_rng(0).integers(1, 200, (200, 2)).tolist()), 4)
    for share in (False, True):
        batches = micro_batches(many, 2048, share)
        padded = used = 0
        for batch in batches:
            rows = {}
            for n, i in enumerate(batch):
                rows.setdefault(tuple(many[i].prompt_ids) if share else n, []).append(many[i])
            sizes = [len(row[0].prompt_ids) + sum(len(t.completion_ids) for t in row) for row in rows.values()]
            assert max(sizes) * len(sizes) <= 2048
            assert not share or len({len(row) > 1 for row in rows.values()}) == 1
            padded, used = padded + max(sizes) * len(sizes), used + sum(sizes)
        assert sorted(sum(batches, [])) == list(range(len(many))) and padded < 1.1 * used and len(batches) < 1.5 * used / 2048


def test_packed_micro_batches_give_the_same_gradient():
    """The whole batch packed and cut equals the whole batch plain, also where a prompt's completions are split."""
    model, turns = tiny_model(), random_turns(LENGTHS)
    for n in (1, 4, 6):
        turns[n].prompt_ids = list(turns[0].prompt_ids)
    loss, gradient, _ = batch_gradient(model, turns, [list(range(7))])
    for budget in (14, 25, 1000):
        part_loss, part_gradient, _ = batch_gradient(model, turns, micro_batches(turns, budget, True), share=True)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert (part_gradient - gradient).norm() < 1e-5 * gradient.norm()
