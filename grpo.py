"""GRPO for memory agents: rewards in, one loss out (paper 3.4).

A *conversation* is one turn of the agent: a prompt and the completion that was sampled for it. The rewards R of a group
of samples become advantages,

    A_i = R_i - mean(R)                                                                                  (Eq. 3)

and all tokens of a sample get its advantage. Training maximises, with r_t = pi(token_t) / pi_old(token_t), the policy
now over the policy that sampled,

    J = mean over documents, mean over a document's conversations c, mean over c's tokens t of
        min(r_t A_c, clip(r_t, 1 - eps_low, 1 + eps_high) A_c) - beta KL_t(pi || pi_ref)                 (Eq. 4)

Each function is one piece of that, in the order in which a step calls them:

    trajectory_groups, recall_groups   which samples are compared with each other
    assign_advantages                  Eq. 3; groups that carry no signal drop out
    conversation_weights               the two outer means of Eq. 4, over the turns that are kept
    token_logprobs                     log pi(token_t), for the policy, pi_old and pi_ref
    grpo_loss                          Eq. 4 itself

Dropout must be off: the ratio compares two passes through one network.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollout import Trajectory, Turn

# Lambda / G2, the smallest real difference of two rewards, is about 0.06; float32 rounding of equal sums about 1e-7.
EQUAL_REWARDS = 1e-6


# ---- Eq. 3 ---------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Samples that are compared with each other. Each sample is all of its turns."""

    document: int  # its place in the step
    samples: list[list[Turn]]
    rewards: list[float]
    degenerate: bool = False  # all rewards are equal: no signal


def trajectory_groups(trajectories: list[Trajectory], rewards: list[float], g1: int) -> list[Group]:
    """The G1 trajectories of each document, with R^E. Every turn, memory or answer, shares its trajectory's reward."""
    return [
        Group(
            trajectories[start].document.place, [t.turns for t in trajectories[start : start + g1]],
            rewards[start : start + g1],
        )
        for start in range(0, len(trajectories), g1)
    ]


def recall_groups(
    trajectories: list[Trajectory], recalls: list[list[Turn]], rewards: list[list[float]]
) -> list[Group]:
    """The G2 recall answers of each trajectory that has some, with R^I."""
    return [
        Group(trajectory.document.place, [[turn] for turn in turns], own)
        for trajectory, turns, own in zip(trajectories, recalls, rewards, strict=True)
        if turns
    ]


def assign_advantages(groups: list[Group], mode: str) -> list[Turn]:
    """Give every turn its document and advantage (Eq. 3) -> the turns of the groups that carry a signal."""
    kept = []
    for _, same_size in groupby(groups, key=lambda group: len(group.rewards)):
        batch = list(same_size)
        rewards_NG = torch.tensor([group.rewards for group in batch], dtype=torch.float64)  # (groups, size)
        advantages_NG, degenerate_N = group_advantages(rewards_NG, mode)
        for group, advantages, degenerate in zip(batch, advantages_NG.tolist(), degenerate_N.tolist(), strict=True):
            group.degenerate = degenerate
            for turns, advantage in zip(group.samples, advantages, strict=True):
                for turn in turns:
                    turn.document, turn.advantage = group.document, advantage
                    kept += [] if degenerate else [turn]
    return kept


def group_advantages(rewards: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Score rewards (groups, size) against their own group -> advantages (groups, size), degenerate (groups,) bool.

    "mean": R - mean(R), Eq. 3, as Dr. GRPO (arXiv 2503.20783). "group_norm": (R - mean(R)) / (std(R) + 1e-4), GRPO as
    DeepSeekMath wrote it (arXiv 2402.03300), with the sample std, as TRL. ValueError for another mode.
    Example, mode "mean": [[1, 0, 0, 1], [1, 1, 1, 1]] -> [[.5, -.5, -.5, .5], [0, 0, 0, 0]], [False, True].
    """
    if mode not in ("mean", "group_norm"):
        raise ValueError(f"advantage mode {mode!r} is neither 'mean' nor 'group_norm'")
    degenerate = rewards.amax(1) - rewards.amin(1) <= EQUAL_REWARDS  # (groups,)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (groups, size)
    if mode == "group_norm":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)  # (groups, size)
    # Rounding leaves about 1e-8 in a group of equal rewards, and the small divisor above would make a gradient of it.
    return advantages.masked_fill(degenerate[:, None], 0.0), degenerate


# ---- Eq. 4 ---------------------------------------------------------------------------------------------


def conversation_weights(documents: list[int]) -> Tensor:
    """The outer means of Eq. 4: 1 / (documents * conversations of its document), for each conversation.

    `documents` are places in the step, never texts: two documents may read the same. The weights (conversations,)
    float32 sum to 1. Example: [0, 0, 1] -> [1/4, 1/4, 1/2].
    """
    places = torch.tensor(documents, dtype=torch.long)  # (conversations,)
    counts = places.bincount()  # (documents,)
    return 1 / (counts.count_nonzero() * counts[places])  # (conversations,)


def token_logprobs(model, turns: list[Turn], with_entropy: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of every completion token -> logprobs, entropy or None, mask, each (turns, longest completion).

    A completion that ended by itself holds its EOS, so stopping is trained. Logprobs and entropy are of the
    distribution that was sampled, in float32, and 0 where mask is False; entropy has no gradient. ValueError for an
    empty prompt.
    """
    if not all(turn.prompt_ids for turn in turns):
        raise ValueError("a turn has an empty prompt: nothing predicts the first token of its completion")
    # Masks come from lengths, never from token values: where pad and EOS are one token, values would untrain the EOS.
    rows = [torch.tensor(turn.prompt_ids + turn.completion_ids) for turn in turns]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (turns, longest): causal attention never looks right
    starts = torch.tensor([[len(turn.prompt_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    lengths = torch.tensor([[len(turn.completion_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    offsets = torch.arange(int(lengths.max()), device=ids.device)  # (longest completion,)
    mask = offsets < lengths  # (turns, longest completion)
    places = (starts + offsets).clamp(max=ids.shape[1] - 1)  # (turns, longest completion)
    logits = model(input_ids=ids, use_cache=False).logits.float()  # (turns, longest, vocabulary)
    # The state before a token predicts it.
    predictions = logits[torch.arange(len(turns), device=ids.device)[:, None], places - 1].log_softmax(-1)
    logprobs = predictions.gather(-1, ids.gather(1, places)[..., None]).squeeze(-1)  # (turns, longest completion)
    entropy = None
    if with_entropy:
        entropy = -(predictions.exp() * predictions).sum(-1).detach().masked_fill(~mask, 0.0)
    return logprobs.masked_fill(~mask, 0.0), entropy, mask


def grpo_loss(
    logprobs: Tensor,  # (turns, longest), with gradient
    old_logprobs: Tensor | None,  # (turns, longest), when sampled; None: the policy has not moved since
    reference_logprobs: Tensor | None,  # (turns, longest), of the reference; None: no KL
    mask: Tensor,  # (turns, longest) bool, True on completion tokens
    advantages: Tensor,  # (turns,)
    weights: Tensor,  # (turns,), from conversation_weights
    eps_low: float,
    eps_high: float,
    beta: float,
    entropy: Tensor | None = None,  # (turns, longest), only counted
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4 with its sign turned -> loss, stats. Each turn: weight * mean over its own tokens of the clipped objective

        min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta k3,   k3 = exp(d) - d - 1,   d = log pi_ref - log pi

    then a sum, so that micro-batches of a batch add up to its loss and gradient. Turns of weight 0 have no part in it.
    stats are detached sums over the trained tokens, to be added up and divided by stats["tokens"]: "clipped" (the clip
    took the gradient away), "kl" (k3 to the reference), "approx_kl" (k3 of the update: pi_old to pi), "entropy".
    """
    trained = mask & (weights != 0)[:, None]  # (turns, longest)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()  # r is 1, its gradient is not 0
    A = advantages[:, None]  # (turns, 1)
    log_ratio = (logprobs - old_logprobs).masked_fill(~trained, 0.0)  # (turns, longest)
    ratio = log_ratio.exp()
    # The minimum of the two *products*: for either sign of A it stops the ratio only in the direction that A asks for.
    objective = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # (turns, longest)
    kl = torch.zeros_like(log_ratio)  # (turns, longest)
    if reference_logprobs is not None:
        d = (reference_logprobs - logprobs).masked_fill(~trained, 0.0)
        kl = d.exp() - d - 1
        objective = objective - beta * kl
    tokens = trained.sum(1)  # (turns,)
    mean_objective = objective.masked_fill(~trained, 0.0).sum(1) / tokens.clamp(min=1)  # (turns,)
    loss = -(weights * mean_objective).sum()

    with torch.no_grad():
        clipped = ((A > 0) & (ratio > 1 + eps_high)) | ((A < 0) & (ratio < 1 - eps_low))  # (turns, longest)
        stats = {
            "tokens": tokens.sum(), "clipped": (clipped & trained).sum(), "kl": kl.sum(),
            "approx_kl": (ratio - 1 - log_ratio).sum(),
        }
        if entropy is not None:
            stats["entropy"] = entropy.masked_fill(~trained, 0.0).sum()
    return loss, {name: value.detach() for name, value in stats.items()}
