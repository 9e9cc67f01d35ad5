"""GRPO for memory agents: rewards in, one loss out (paper 3.4).

A conversation is one turn of the agent: a prompt and the completion that was sampled for it. A sample is a trajectory,
of several turns, or one recall answer. The rewards R of a group of samples become advantages,

    A_i = R_i - mean(R)                 or, by default,     A_i = (R_i - mean(R)) / (std(R) + 1e-4)      (Eq. 3)

and every token of a sample gets its advantage. With r_t = pi(token_t) / pi_old(token_t), the probability under the
policy over that under the policy that sampled, training maximises

    J = mean over documents, mean over a document's conversations c, mean over c's tokens t of
        [ min(r_t A_c, clip(r_t, 1 - eps_low, 1 + eps_high) A_c) - beta KL_t(pi || pi_ref) ]             (Eq. 4)

    trajectory_groups, recall_groups   which samples are compared with each other
    assign_advantages                  Eq. 3; the turns of groups that carry no signal are left out
    token_logprobs                     log pi(token_t), for the policy, pi_old and pi_ref
    conversation_weights               the two outer means of Eq. 4, over the turns that are kept
    grpo_loss                          Eq. 4 itself

With one update per step pi_old is pi: r_t equals 1, but its gradient is not zero. Dropout must be off, or pi and pi_old
would be two networks.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollout import Trajectory, Turn

# Real differences are at least lambda / G2, in the paper 0.06. What rounding leaves of equal sums is far below this.
EQUAL_REWARDS = 1e-6


# ---- Eq. 3 ---------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Samples that are compared with each other."""

    place: int  # of their document in the step
    samples: list[list[Turn]]  # the turns of each sample
    rewards: list[float]  # of each sample
    degenerate: bool = False  # all rewards are equal: no signal


def trajectory_groups(trajectories: list[Trajectory], rewards: list[float], g1: int) -> list[Group]:
    """A group per document: its G1 trajectories, each with all its turns and R^E."""
    groups = []
    for start in range(0, len(trajectories), g1):
        members = trajectories[start : start + g1]
        samples = [trajectory.turns for trajectory in members]
        groups.append(Group(members[0].document.place, samples, rewards[start : start + g1]))
    return groups


def recall_groups(
    trajectories: list[Trajectory], recalls: list[list[Turn]], rewards: list[list[float]]
) -> list[Group]:
    """A group per trajectory that has recall answers: these, each a sample of one turn, with R^I."""
    groups = []
    for trajectory, answers, own_rewards in zip(trajectories, recalls, rewards, strict=True):
        if answers:
            groups.append(Group(trajectory.document.place, [[turn] for turn in answers], own_rewards))
    return groups


def shuffle_rewards(groups: list[Group], rng) -> None:
    """A control: deal out each group's rewards to its samples at random. What still changes is drift, not learning."""
    for group in groups:
        group.rewards = rng.permutation(group.rewards).tolist()


def assign_advantages(groups: list[Group], mode: str) -> list[Turn]:
    """Set place and advantage of every turn (Eq. 3), and group.degenerate -> the turns of the other groups."""
    kept = []
    for _, same_size in groupby(groups, key=lambda group: len(group.rewards)):  # as one tensor
        batch = list(same_size)
        rewards = torch.tensor([group.rewards for group in batch], dtype=torch.float64)  # (groups, size)
        advantages, degenerate = group_advantages(rewards, mode)  # (groups, size), (groups,)
        for group, own_advantages, equal in zip(batch, advantages.tolist(), degenerate.tolist(), strict=True):
            group.degenerate = equal
            for turns, advantage in zip(group.samples, own_advantages, strict=True):
                for turn in turns:
                    turn.place, turn.advantage = group.place, advantage
                if not equal:
                    kept += turns
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
    # The small divisor above would make a gradient of what rounding leaves in a group of equal rewards.
    return advantages.masked_fill(degenerate[:, None], 0.0), degenerate


# ---- Eq. 4 ---------------------------------------------------------------------------------------------


def conversation_weights(documents: list[int]) -> Tensor:
    """The outer means of Eq. 4: 1 / (documents * conversations of its document), for each conversation.

    `documents` are places in the step, never texts: two documents may read the same. The weights (conversations,)
    float32 sum to 1. Example: [0, 0, 1] -> [1/4, 1/4, 1/2].
    """
    places = torch.tensor(documents, dtype=torch.long)  # (conversations,)
    counts = places.bincount()  # (documents,)
    number_of_documents = counts.count_nonzero()
    return 1 / (number_of_documents * counts[places])  # (conversations,)


def token_logprobs(model, turns: list[Turn], with_entropy: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of every completion token -> logprobs, entropy or None, mask, each (turns, longest completion).

    Logprobs and entropy are of the distribution that was sampled, in float32, and 0 where mask is False; entropy has no
    gradient. An EOS that was sampled is a token like others, so stopping is trained. ValueError for an empty prompt.
    """
    if not all(turn.prompt_ids for turn in turns):
        raise ValueError("a turn has an empty prompt: nothing predicts the first token of its completion")
    # Padded on the right, where causal attention doesn't look, so no attention mask is needed.
    rows = [torch.tensor(turn.prompt_ids + turn.completion_ids) for turn in turns]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (turns, width)
    # Masks come from lengths: where pad and EOS are one token, `ids != pad` would leave the EOS untrained.
    starts = torch.tensor([[len(turn.prompt_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    lengths = torch.tensor([[len(turn.completion_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    offsets = torch.arange(int(lengths.max()), device=ids.device)  # (longest,)
    mask = offsets < lengths  # (turns, longest)
    positions = (starts + offsets).clamp(max=ids.shape[1] - 1)  # (turns, longest); those behind a row's end are masked
    logits = model(input_ids=ids, use_cache=False).logits.float()  # (turns, width, vocabulary)
    # The logits before a token predict it.
    turn_numbers = torch.arange(len(turns), device=ids.device)[:, None]  # (turns, 1)
    all_logprobs = logits[turn_numbers, positions - 1].log_softmax(-1)  # (turns, longest, vocabulary)
    targets = ids.gather(1, positions)  # (turns, longest)
    logprobs = all_logprobs.gather(-1, targets[..., None]).squeeze(-1)  # (turns, longest)
    entropy = None
    if with_entropy:
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).detach().masked_fill(~mask, 0.0)  # (turns, longest)
    return logprobs.masked_fill(~mask, 0.0), entropy, mask


def grpo_loss(
    logprobs: Tensor,  # (turns, longest), with gradient
    old_logprobs: Tensor | None,  # (turns, longest), before the step's first update; None: the step's only update
    reference_logprobs: Tensor | None,  # (turns, longest), of the reference; None: no KL
    mask: Tensor,  # (turns, longest) bool, True on completion tokens
    advantages: Tensor,  # (turns,)
    weights: Tensor,  # (turns,), from conversation_weights
    eps_low: float,
    eps_high: float,
    beta: float,
    entropy: Tensor | None = None,  # (turns, longest), only counted
) -> tuple[Tensor, dict[str, Tensor]]:
    """-J of Eq. 4 -> loss, stats: the sum over turns of weight * mean over the turn's tokens of

        min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta k3,   k3 = exp(d) - d - 1,   d = log pi_ref - log pi

    A sum, so micro-batches add up to the loss and gradient of their batch. A turn of weight 0 counts for nothing. k3 is
    the KL estimate of http://joschu.net/blog/kl-approx.html. stats are sums over the trained tokens: "tokens" counts
    them, "clipped" those whose gradient the clip took, "kl" is k3, "approx_kl" is k3 from pi_old to pi, "entropy".
    """
    trained = mask & (weights != 0)[:, None]  # (turns, longest)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()  # r is 1, its gradient is not 0
    A = advantages[:, None]  # (turns, 1)
    log_ratio = (logprobs - old_logprobs).masked_fill(~trained, 0.0)  # (turns, longest)
    ratio = log_ratio.exp()
    # The minimum of the two products: the clip only takes gradients that would push r further beyond its bound.
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
