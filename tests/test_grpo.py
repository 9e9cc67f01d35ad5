"""grpo.py against independent arithmetic: float64 loops for Eq. 3 and Eq. 4, unpadded passes for log-probs."""

from collections import Counter
from math import exp, log

import numpy as np
import pytest
import torch
from helpers import CONFIGS, EOS, LENGTHS, parameter_gradient, random_turns, tiny_model, unpadded_logprobs
from transformers import Gemma2Config

import grpo
from engine.config import Config
from grpo import (
    assign_advantages,
    batch_loss,
    fixed_logprobs,
    group_advantages,
    grpo_loss,
    head_logprobs,
    micro_batches,
    set_weights,
    token_logprobs,
    turn_tokens,
    turn_weights,
    update_batches,
)
from masking import Document
from rollout import Trajectory, Turn

# Eq. 3 and the groups


def test_mean_advantage_by_hand():
    """Eq. 3 subtracts the group's own mean, and divides by nothing."""
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "mean") == [0.75, -0.25, -0.25, -0.25]  # mean 0.25
    assert group_advantages([1.5, 1.0, 0.25, 0.25], "mean") == [0.75, 0.25, -0.5, -0.5]  # mean 0.75


@pytest.mark.parametrize("mode", ["mean", "group_norm"])
def test_advantages_equal_numpy(mode):
    """Random groups agree with numpy in float64, the sample standard deviation included."""
    for row in np.random.default_rng(0).random((50, 8)):
        scale = np.std(row, ddof=1) + 1e-4 if mode == "group_norm" else 1.0
        np.testing.assert_allclose(group_advantages(row.tolist(), mode), (row - np.mean(row)) / scale, atol=1e-12)


def test_equal_rewards_carry_no_signal_whatever_their_rounding():
    """Rewards that are equal on paper but not in binary give advantages of exactly zero."""
    summed = 1.0
    for _ in range(3):
        summed += 0.3 / 7
    equal = [
        [0.1 + 0.2, 0.3, 0.3],
        [1 + 0.3 * (3 / 7), 1 + (0.3 / 7) * 3, summed],  # Eq. 2 with lambda 0.3, G2 7, three hits
        [0.0, 0.0, 0.0],
    ]
    assert len(set(equal[0])) > 1 and len(set(equal[1])) > 1
    for mode in ("mean", "group_norm"):
        assert [group_advantages(rewards, mode) for rewards in equal] == [[0.0] * 3] * 3
        assert all(group_advantages([0.3, 0.3, 0.3 + 0.3 / 64], mode))  # one hit in 64 is a difference


def test_group_of_one_and_unknown_mode():
    """A group of one has nothing to be compared with (no NaN); a misspelt mode raises."""
    assert group_advantages([1.0], "group_norm") == group_advantages([1.0], "mean") == [0.0]
    with pytest.raises(ValueError, match="group-norm"):
        group_advantages([1.0, 0.0], "group-norm")


def empty_turns(count: int) -> list[Turn]:
    return [Turn([1], [2], True, "") for _ in range(count)]


def turns_at(*places: int) -> list[Turn]:
    return [Turn([1], [2], True, "", place=place) for place in places]


def made(place: int, turns: int, reward: float, recalls: tuple = ()) -> Trajectory:
    """A trajectory of the document at `place`, with its reward and those of its recall answers."""
    document = Document(0, "", "", ["y"], [], [], place=place)
    answers, hits = empty_turns(len(recalls)), list(recalls)
    return Trajectory(document, empty_turns(turns), recalls=answers, recall_rewards=hits, reward=reward)


def test_groups_are_a_documents_trajectories_and_a_trajectorys_recalls():
    """Every turn of a trajectory gets its advantage, every recall answer its own; groups of equal rewards drop out."""
    first, second = made(4, 3, 1.0, (1.0, 0.0)), made(4, 3, 0.0)
    third, fourth = made(7, 2, 0.5, (0.0, 0.0)), made(7, 2, 0.5, (0.0, 1.0))
    kept = assign_advantages([first, second, third, fourth], Config(g1=2, advantage="mean"))
    expected = [(turn, 4, 0.5) for turn in first.turns] + [(turn, 4, -0.5) for turn in second.turns]
    expected += [(first.recalls[0], 4, 0.5), (first.recalls[1], 4, -0.5)]
    expected += [(fourth.recalls[0], 7, -0.5), (fourth.recalls[1], 7, 0.5)]
    assert len(kept) == len(expected)
    assert all(a is b and (a.place, a.advantage) == (d, A) for a, (b, d, A) in zip(kept, expected, strict=True))
    left_out = [*third.turns, *fourth.turns, *third.recalls]
    assert all((turn.place, turn.advantage) == (7, 0.0) for turn in left_out)


def test_group_norm_by_hand():
    """Rewards 1, 0, 0.5 and 1: mean 0.625, deviations 0.375, -0.625, -0.125, 0.375, sample variance 0.6875 / 3."""
    trajectories = [made(0, 1, reward) for reward in (1.0, 0.0, 0.5, 1.0)]
    assign_advantages(trajectories, Config(g1=4))
    std = (0.6875 / 3) ** 0.5 + 1e-4
    wanted = [0.375 / std, -0.625 / std, -0.125 / std, 0.375 / std]
    assert [t.turns[0].advantage for t in trajectories] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("mode", ["mean", "group_norm"])
def test_groups_of_any_sizes_are_scored_alone(mode):
    """Random groups of mixed sizes: each turn's advantage is numpy's for its own group."""
    rng = np.random.default_rng(3)
    for g1 in (2, 3, 4):
        trajectories = []
        for n in range(10 * g1):
            hits = rng.choice([0.0, 1.0], int(rng.integers(2, 5))).tolist() if rng.random() < 0.5 else ()
            trajectories.append(made(n // g1, 2, float(rng.choice([0.0, 0.25, 1.0])), hits))
        kept = {id(turn) for turn in assign_advantages(trajectories, Config(g1=g1, advantage=mode))}
        groups = [trajectories[n : n + g1] for n in range(0, len(trajectories), g1)]
        groups = [([t.turns for t in group], [t.reward for t in group]) for group in groups]
        groups += [([[turn] for turn in t.recalls], t.recall_rewards) for t in trajectories if t.recalls]
        for samples, rewards in groups:
            scale = np.std(rewards, ddof=1) + 1e-4 if mode == "group_norm" else 1.0
            for turns, reward in zip(samples, rewards, strict=True):
                expected = (reward - np.mean(rewards)) / scale if np.ptp(rewards) else 0.0
                assert all((id(turn) in kept) == (np.ptp(rewards) > 0) for turn in turns)
                assert [turn.advantage for turn in turns] == pytest.approx([expected] * len(turns), abs=1e-9)


def test_shuffled_rewards_stay_in_their_group_and_come_in_every_order():
    """Six orders of three rewards, each about a sixth of 3,000 groups: 500, with a standard deviation of 20.

    What is logged, the reward of a trajectory, stays the true one.
    """
    trajectories = [made(n // 3, 2, n // 3 + 0.5 * (n % 3)) for n in range(9000)]
    kept = assign_advantages(trajectories, Config(g1=3, advantage="mean"), np.random.default_rng(0))
    groups = [trajectories[n : n + 3] for n in range(0, 9000, 3)]
    orders = Counter(tuple(t.turns[0].advantage for t in group) for group in groups)
    assert all(sorted(order) == [-0.5, 0.0, 0.5] for order in orders) and len(kept) == 18000
    assert len(orders) == 6 and all(abs(count - 500) < 100 for count in orders.values())
    assert all(t.turns[0].advantage == t.turns[1].advantage for t in trajectories)
    assert [t.reward for t in trajectories] == [n // 3 + 0.5 * (n % 3) for n in range(9000)]


def test_recall_rewards_are_shuffled_too():
    """Each answer's advantage is that of a reward of its own group, in another order; equal groups stay left out."""
    trajectories = [made(n, 1, 1.0, (0.0, 0.0, 0.0, 1.0)) for n in range(400)]
    kept = assign_advantages(trajectories, Config(g1=1, advantage="mean"), np.random.default_rng(0))
    assert kept == [turn for t in trajectories for turn in t.recalls]
    winners = Counter([turn.advantage for turn in t.recalls].index(0.75) for t in trajectories)
    assert all(sorted(turn.advantage for turn in t.recalls) == [-0.25, -0.25, -0.25, 0.75] for t in trajectories)
    assert all(60 < winners[n] < 140 for n in range(4))  # 100 each, with a standard deviation of 9


# The outer means of Eq. 4


def test_weights_are_the_outer_means():
    """A document counts once however many conversations it has; places without any, such as 1 here, dilute nothing."""
    weights = [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9]
    assert turn_weights([0, 0, 3, 2, 2, 2]).tolist() == pytest.approx(weights)
    assert turn_weights([5]).tolist() == [1.0] and turn_weights([]).tolist() == []


def test_the_weights_of_all_processes_sum_to_one(monkeypatch):
    """A process with 2 of 5 documents gives its turns two fifths; without a turn anywhere there is no update."""
    turns = turns_at(0, 0, 3)
    assert set_weights(turns) == 2 and [turn.weight for turn in turns] == pytest.approx([0.25, 0.25, 0.5])
    monkeypatch.setattr(grpo.parallel, "gather", lambda mine: [mine, 3])
    assert set_weights(turns) == 5 and [turn.weight for turn in turns] == pytest.approx([0.1, 0.1, 0.2])
    assert set_weights([]) == 3  # this process joins the update, with a gradient of zero
    monkeypatch.setattr(grpo.parallel, "gather", lambda mine: [mine, 0])
    assert set_weights([]) == 0


def test_updates_are_of_so_many_documents():
    """By default one of all; a last one may be smaller, and one whose documents have no turns is empty."""
    turns = turns_at(4, 0, 1, 4, 6, 1)
    assert update_batches(turns, Config(documents=7)) == [turns]
    parts = update_batches(turns, Config(documents=7, update_batch=2))
    assert [[turn.place for turn in part] for part in parts] == [[0, 1, 1], [], [4, 4], [6]]


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
    """turn_weights of the kept conversations, 0 for the others."""
    weights = torch.zeros(len(documents), dtype=torch.float64)
    weights[torch.tensor(kept)] = turn_weights([d for d, k in zip(documents, kept, strict=True) if k]).double()
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


# Batches


@pytest.mark.parametrize("max_tokens", [1, 12, 40, 100, 10_000])
def test_batches_keep_to_their_budget_with_little_padding(max_tokens):
    """Every turn once; padded tokens within the budget but for a turn alone; at most an eighth is padding."""
    rng = np.random.default_rng(0)
    turns = random_turns([(int(p), int(c)) for p, c in rng.integers(1, 30, (60, 2))])
    batches = micro_batches(turns, max_tokens)
    assert sorted(id(turn) for batch in batches for turn in batch) == sorted(map(id, turns))
    sizes = [[turn_tokens(turn) for turn in batch] for batch in batches]
    for own in sizes:
        padded = len(own) * max(own)
        assert (padded <= max_tokens or len(own) == 1) and sum(own) >= 0.875 * padded
    assert [max(own) for own in sizes] == sorted((max(own) for own in sizes), reverse=True)
    assert len(batches) == 60 if max_tokens == 1 else len(batches) < 60
    assert micro_batches([], max_tokens) == []


@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_losses_and_gradients_of_micro_batches_add_up(kl):
    """Batches of any budget give the loss, the counts and the gradient of one batch; with a reference, too."""
    model, reference, turns = tiny_model(), tiny_model(seed=1), random_turns(LENGTHS)
    config = Config(kl=kl, train_tokens=30)
    rng = np.random.default_rng(0)
    for turn, place in zip(turns, (0, 0, 1, 2, 2, 2, 4), strict=True):
        turn.place, turn.advantage = place, float(rng.normal())
        turn.old_logprobs = unpadded_logprobs(model, turn)[0].detach().float() + 0.3 * torch.randn(
            len(turn.completion_ids), generator=torch.Generator().manual_seed(place)
        )
    if kl:
        for turn, logprobs in fixed_logprobs(reference, turns, config):
            turn.reference_logprobs = logprobs
    set_weights(turns)
    found = []
    for max_tokens in (10_000, 30, 1):
        losses, totals = 0.0, Counter()
        for batch in micro_batches(turns, max_tokens):
            loss, stats = batch_loss(model, batch, config)
            loss.backward()
            losses += loss.item()
            totals.update({name: value.item() for name, value in stats.items()})
        found.append((losses, dict(totals), parameter_gradient(model)))
    for losses, totals, gradient in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5) and totals == pytest.approx(found[0][1], rel=1e-4)
        torch.testing.assert_close(gradient, found[0][2], atol=1e-6, rtol=1e-4)
    assert found[0][1]["clipped"] > 0 and bool(found[0][1]["kl"]) == bool(kl)


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


@pytest.mark.parametrize("at_once", [1, 5, 7, 1000])
def test_logits_are_made_a_slice_at_a_time(at_once, monkeypatch):
    """HEAD_TOKENS positions at a time and of completions only; values and gradients stay those of float64 passes."""
    model, turns = tiny_model(), random_turns(LENGTHS)
    coefficients = torch.randn(len(turns), 12, generator=torch.Generator().manual_seed(1))
    expected = [unpadded_logprobs(model, turn) for turn in turns]
    sum((row[: len(own)] * own).sum() for row, (own, _) in zip(coefficients, expected, strict=True)).backward()
    expected_gradient = parameter_gradient(model)
    whole = token_logprobs(model, turns, with_entropy=True)

    rows, total = [], sum(len(turn.completion_ids) for turn in turns)
    model.lm_head.register_forward_hook(lambda head, given, logits: rows.append(logits.shape[:-1].numel()))
    monkeypatch.setattr(grpo, "HEAD_TOKENS", at_once)
    logprobs, entropy, _ = token_logprobs(model, turns, with_entropy=True)
    assert max(rows) == min(at_once, total) and sum(rows) == total == 42
    torch.testing.assert_close((logprobs, entropy), whole[:2], atol=1e-6, rtol=0)
    for row, own_entropy, (own, wanted) in zip(logprobs, entropy, expected, strict=True):
        torch.testing.assert_close(row[: len(own)].double(), own, atol=2e-5, rtol=0)
        torch.testing.assert_close(own_entropy[: len(own)].double(), wanted, atol=2e-5, rtol=0)
    rows.clear()
    (coefficients * logprobs).sum().backward()
    assert (parameter_gradient(model) - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert rows == [] if at_once == 1000 else max(rows) == at_once and sum(rows) == total  # made again, by slices


def test_slices_keep_no_logits_until_backward(monkeypatch):
    """What autograd holds between the passes is no wider than the hidden states: no row of the vocabulary."""
    model = tiny_model(vocab_size=997)
    hidden, targets = torch.randn(40, 32, requires_grad=True), torch.arange(40)
    shapes = []
    for at_once, wide in ((8, False), (64, True)):
        monkeypatch.setattr(grpo, "HEAD_TOKENS", at_once)
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            head_logprobs(model, hidden, targets, with_entropy=True)
        assert any(shape[-1:] == (997,) and shape[0] != 32 for shape in shapes) == wide


def test_fixed_logprobs_are_each_turns_own_without_gradient():
    """Whatever batch a turn is in, its row is cut to its own completion."""
    model, turns = tiny_model(), random_turns(LENGTHS)
    found = {id(turn): logprobs for turn, logprobs in fixed_logprobs(model, turns, Config(train_tokens=25))}
    assert len(micro_batches(turns, 25)) > 2 and found.keys() == set(map(id, turns))
    for turn in turns:
        assert not found[id(turn)].requires_grad and len(found[id(turn)]) == len(turn.completion_ids)
        torch.testing.assert_close(found[id(turn)].double(), unpadded_logprobs(model, turn)[0], atol=2e-5, rtol=0)


def test_an_eos_is_trained_though_padding_is_the_same_token():
    """Masks come from lengths: the sampled EOS has a log-prob with a gradient, the padding behind it has none."""
    model, turn = tiny_model(), Turn([5, 6], [9, EOS], True, "")
    logprobs, _, mask = token_logprobs(model, [turn, Turn([5, 6], [9, 8, 7, 6], False, "")])
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert logprobs[0, 1].item() == pytest.approx(unpadded_logprobs(model, turn)[0][1].item(), abs=2e-5)
    logprobs[0, 1].backward()
    assert parameter_gradient(model).norm() > 0


def test_an_empty_prompt_is_refused_and_an_empty_completion_is_nothing():
    """Nothing predicts the first token behind an empty prompt; a turn without tokens has no log-probs."""
    model = tiny_model()
    with pytest.raises(ValueError, match="empty prompt"):
        token_logprobs(model, [Turn([], [3], True, "")])
    logprobs, _, mask = token_logprobs(model, [Turn([1, 2], [], True, ""), Turn([1, 2], [3], True, "")])
    assert mask.tolist() == [[False], [True]] and logprobs[0] == 0 and logprobs[1] < 0
