"""grpo.py against independent arithmetic: float64 loops for Eq. 3 and Eq. 4, unpadded passes for log-probs."""

from collections import Counter
from math import exp, log

import numpy as np
import pytest
import torch
from helpers import CONFIGS, LENGTHS, parameter_gradient, random_turns, tiny_model, unpadded_logprobs
from transformers import Gemma2Config

from grpo import (
    Group,
    assign_advantages,
    conversation_weights,
    group_advantages,
    grpo_loss,
    recall_groups,
    shuffle_rewards,
    token_logprobs,
    trajectory_groups,
)
from masking import Document
from rollout import Trajectory, Turn


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


def test_shuffled_rewards_stay_in_their_group_and_come_in_every_order():
    """Six orders of three rewards, each about a sixth of 3,000 groups: 500, with a standard deviation of 20."""
    groups = [Group(n, [[], [], []], [n + 0.1, n + 0.2, n + 0.3]) for n in range(3000)]
    shuffle_rewards(groups, np.random.default_rng(0))
    orders = Counter(tuple(np.argsort(group.rewards).tolist()) for group in groups)
    assert all(sorted(group.rewards) == [n + 0.1, n + 0.2, n + 0.3] for n, group in enumerate(groups))
    assert len(orders) == 6 and all(abs(count - 500) < 100 for count in orders.values())


def test_weights_are_the_outer_means():
    """A document counts once however many conversations it has; places without any, such as 1 here, dilute nothing."""
    weights = [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9]
    assert conversation_weights([0, 0, 3, 2, 2, 2]).tolist() == pytest.approx(weights)
    assert conversation_weights([5]).tolist() == [1.0] and conversation_weights([]).tolist() == []


def some_trajectories(turns_of: list[int]) -> list[Trajectory]:
    """Two trajectories for each of the documents at places 4 and 7, with so many turns each."""
    documents = [Document(0, "", "", ["y"], [], [], place=place) for place in (4, 4, 7, 7)]
    turns = [[Turn([1], [2], True, "") for _ in range(n)] for n in turns_of]
    return [Trajectory(document, own) for document, own in zip(documents, turns, strict=True)]


def test_groups_are_a_documents_trajectories_and_a_trajectorys_recalls():
    """Every turn of a trajectory gets its advantage, every recall answer its own; groups of equal rewards drop out."""
    trajectories = some_trajectories([3, 3, 2, 2])
    recalls = [[Turn([1], [2], True, "") for _ in range(2)] if n != 1 else [] for n in range(4)]
    groups = trajectory_groups(trajectories, [1.0, 0.0, 0.5, 0.5], 2)
    groups += recall_groups(trajectories, recalls, [[1.0, 0.0], [], [0.0, 0.0], [0.0, 1.0]])
    assert [(g.place, len(g.samples)) for g in groups] == [(4, 2), (7, 2), (4, 2), (7, 2), (7, 2)]
    kept = assign_advantages(groups, "mean")
    expected = [(t, 4, 0.5) for t in trajectories[0].turns] + [(t, 4, -0.5) for t in trajectories[1].turns]
    expected += [(recalls[0][0], 4, 0.5), (recalls[0][1], 4, -0.5), (recalls[3][0], 7, -0.5), (recalls[3][1], 7, 0.5)]
    assert len(kept) == len(expected)
    assert all(a is b and (a.place, a.advantage) == (d, A) for a, (b, d, A) in zip(kept, expected, strict=True))
    assert [group.degenerate for group in groups] == [False, True, False, True, False]


@pytest.mark.parametrize("mode", ["mean", "group_norm"])
def test_groups_of_any_sizes_in_any_order_are_scored_alone(mode):
    """Random groups of mixed sizes: each turn's advantage is numpy's for its own group."""
    rng = np.random.default_rng(3)
    groups = []
    for size in rng.integers(2, 5, 30):
        trajectories = [Trajectory(Document(0, "", "", ["y"], [], []), [Turn([1], [2], True, "")]) for _ in range(size)]
        groups += trajectory_groups(trajectories, rng.choice([0.0, 0.25, 1.0], size).tolist(), int(size))
    kept = {id(turn) for turn in assign_advantages(groups, mode)}
    for group in groups:
        rewards = np.array(group.rewards)
        scale = rewards.std(ddof=1) + 1e-4 if mode == "group_norm" else 1.0
        for (turn,), reward in zip(group.samples, rewards, strict=True):
            assert (id(turn) in kept) == (np.ptp(rewards) > 0)
            expected = (reward - rewards.mean()) / scale if np.ptp(rewards) else 0.0
            assert turn.advantage == pytest.approx(expected, abs=1e-9)


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


def weights_of(documents, kept):
    """conversation_weights of the kept conversations, 0 for the others."""
    weights = torch.zeros(len(documents), dtype=torch.float64)
    weights[torch.tensor(kept)] = conversation_weights([d for d, k in zip(documents, kept, strict=True) if k]).double()
    return weights


def run_loss(logprobs, old, reference, lengths, advantages, documents, kept, clip):
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths)[:, None]
    loss, stats = grpo_loss(
        logprobs, None if old is None else torch.tensor(old), None if reference is None else torch.tensor(reference),
        mask, torch.tensor(advantages), weights_of(documents, kept), **clip,
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


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_unpadded_passes(name):
    """Log-probs, entropies and gradients equal one float64 softmax per sequence; nothing stands where mask is False."""
    model, turns = tiny_model(CONFIGS[name]), random_turns(LENGTHS)
    coefficients = torch.randn(len(turns), 12, generator=torch.Generator().manual_seed(1))
    expected = [unpadded_logprobs(model, turn) for turn in turns]
    sum((row[: len(own)] * own).sum() for row, (own, _) in zip(coefficients, expected, strict=True)).backward()
    expected_gradient = parameter_gradient(model)
    logprobs, entropy, mask = token_logprobs(model, turns, with_entropy=True)
    assert logprobs.dtype == torch.float32 and not entropy.requires_grad
    assert mask.sum(1).tolist() == [len(turn.completion_ids) for turn in turns]
    for i, (own, own_entropy) in enumerate(expected):
        torch.testing.assert_close(logprobs[i, : len(own)].double(), own, atol=2e-5, rtol=0)
        torch.testing.assert_close(entropy[i, : len(own)].double(), own_entropy, atol=2e-5, rtol=0)
        assert (logprobs[i, len(own) :] == 0).all() and (entropy[i, len(own) :] == 0).all()
        assert not mask[i, len(own) :].any()
    (coefficients * logprobs).sum().backward()
    assert (parameter_gradient(model) - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert token_logprobs(model, turns)[1] is None


def test_logprobs_of_a_bfloat16_model_are_computed_in_float32():
    """A bfloat16 softmax would be off by a hundredth: these equal the float64 softmax of the model's logits."""
    model = tiny_model().bfloat16()
    for turn in random_turns(LENGTHS):
        logprobs, entropy, _ = token_logprobs(model, [turn], with_entropy=True)
        own, own_entropy = unpadded_logprobs(model, turn)
        assert logprobs.dtype == entropy.dtype == torch.float32
        torch.testing.assert_close(logprobs[0].double(), own, atol=2e-5, rtol=0)
        torch.testing.assert_close(entropy[0].double(), own_entropy, atol=2e-5, rtol=0)


def test_capped_logits_are_the_models_own():
    """Gemma caps its logits: the lesson takes them as they come from the model."""
    model, turns = tiny_model(Gemma2Config, final_logit_softcapping=2.0), random_turns(LENGTHS[:2])
    logprobs, _, _ = token_logprobs(model, turns)
    for i, turn in enumerate(turns):
        own = unpadded_logprobs(model, turn)[0].float()
        torch.testing.assert_close(logprobs[i, : len(own)], own, atol=1e-4, rtol=0)


def test_an_empty_prompt_is_refused_and_an_empty_completion_is_nothing():
    """Nothing predicts the first token behind an empty prompt; a turn without tokens has no log-probs."""
    model = tiny_model()
    with pytest.raises(ValueError, match="empty prompt"):
        token_logprobs(model, [Turn([], [3], True, "")])
    logprobs, _, mask = token_logprobs(model, [Turn([1, 2], [], True, ""), Turn([1, 2], [3], True, "")])
    assert mask.tolist() == [[False], [True]] and logprobs[0] == 0 and logprobs[1] < 0
