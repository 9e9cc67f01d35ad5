"""GRPO for memory agents: rewards in, one loss out (paper 3.4).

A turn is one prompt and the completion that was sampled for it; the paper calls it a conversation. A sample is a
trajectory (several turns) or a recall answer (one turn). The rewards R of a group of samples become advantages,

    A_i = R_i - mean(R)                 or, by default,     A_i = (R_i - mean(R)) / (std(R) + 1e-4)      (Eq. 3)

and every token of a sample gets the sample's advantage. With r_t = pi(token_t) / pi_old(token_t), the ratio of the
policy to the policy that sampled, training maximises

    J = mean over documents, mean over a document's turns c, mean over c's tokens t of
        [ min(r_t A_c, clip(r_t, 1 - eps_low, 1 + eps_high) A_c) - beta KL_t(pi || pi_ref) ]             (Eq. 4)

over the turns that are kept: those of groups whose rewards differ.

    assign_advantages   Eq. 3 -> the kept turns
    update_batches      the turns of each optimizer step
    set_weights         the two outer means of Eq. 4
    micro_batches       turns cut into batches that fit in memory
    token_logprobs      log pi(token_t); fixed_logprobs: the same without gradient, for pi_old and pi_ref
    batch_loss          a micro-batch's share of the loss
    grpo_loss           Eq. 4 itself

With one update per step pi_old is pi: r_t equals 1, but its gradient is not zero. Dropout must be off, or pi and pi_old
would be different networks.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from engine import parallel
from engine.models import logits_of
from rollout import Trajectory, Turn

# Rounding differences between equal sums are far below this, real differences far above.
EQUAL_REWARDS = 1e-6
HEAD_TOKENS = 1024  # positions whose logits are in memory at the same time


# ---- Eq. 3 ---------------------------------------------------------------------------------------------


def assign_advantages(trajectories: list[Trajectory], config, shuffle=None) -> list[Turn]:
    """Set place and advantage of every turn (Eq. 3) -> the turns of the groups whose rewards differ.

    A group is the G1 trajectories of a document, which are consecutive, with R^E; or the G2 recall answers of a
    trajectory, with R^I. `shuffle`, a random generator, is for a control that permutes the rewards within each group:
    any change under it is drift, not learning.
    """
    groups = []  # (place of the document, the turns of each sample, the reward of each sample)
    for start in range(0, len(trajectories), config.g1):
        group = trajectories[start : start + config.g1]
        groups.append((group[0].document.place, [t.turns for t in group], [t.reward for t in group]))
    for t in trajectories:
        if t.recalls:
            groups.append((t.document.place, [[turn] for turn in t.recalls], t.recall_rewards))
    kept = []
    for place, samples, rewards in groups:
        if shuffle:
            rewards = shuffle.permutation(rewards).tolist()
        advantages = group_advantages(rewards, config.advantage)
        for turns, advantage in zip(samples, advantages, strict=True):
            for turn in turns:
                turn.place, turn.advantage = place, advantage
        if any(advantages):
            kept += [turn for turns in samples for turn in turns]
    return kept


def group_advantages(rewards: list[float], mode: str) -> list[float]:
    """Compare the rewards of a group (Eq. 3) -> advantages, all 0 if the rewards are equal.

    "mean": R - mean(R), as in Dr. GRPO (arXiv 2503.20783), which also drops Eq. 4's mean over tokens. "group_norm":
    (R - mean(R)) / (std(R) + 1e-4), GRPO as in DeepSeekMath (arXiv 2402.03300), with the sample std, as in TRL.
    Raises ValueError for another mode.
    Example, mode "mean": [1, 0, 0, 1] -> [.5, -.5, -.5, .5], and [1, 1, 1, 1] -> [0, 0, 0, 0].
    """
    if mode not in ("mean", "group_norm"):
        raise ValueError(f"advantage mode {mode!r} is neither 'mean' nor 'group_norm'")
    R = torch.tensor(rewards, dtype=torch.float64)  # (samples,)
    if R.max() - R.min() <= EQUAL_REWARDS:  # the small divisor below would turn rounding errors into a gradient
        return [0.0] * len(rewards)
    advantages = R - R.mean()  # (samples,)
    if mode == "group_norm":
        advantages = advantages / (R.std() + 1e-4)
    return advantages.tolist()


# ---- the outer means of Eq. 4 --------------------------------------------------------------------------


def set_weights(turns: list[Turn]) -> int:
    """Set turn.weight for this process's turns of an update -> number of documents with a turn, over all processes.

    The weights of all processes sum to 1, those of one process to its share of these documents.
    """
    places = [turn.place for turn in turns]
    n_kept = len(set(places))
    n_kept_everywhere = sum(parallel.gather(n_kept))
    if n_kept_everywhere:
        weights = turn_weights(places) * n_kept / n_kept_everywhere  # (turns,)
        for turn, weight in zip(turns, weights.tolist(), strict=True):
            turn.weight = weight
    return n_kept_everywhere


def turn_weights(places: list[int]) -> Tensor:
    """For each turn, 1 / (documents * turns of its document) -> (turns,) float32, sum 1.

    `places` are the turns' documents, by their place in the step. Example: [0, 0, 1] -> [1/4, 1/4, 1/2].
    """
    places = torch.tensor(places, dtype=torch.long)  # (turns,)
    counts = places.bincount()  # (highest place + 1,): turns of each document, 0 for one without any
    return 1 / (counts.count_nonzero() * counts[places])  # (turns,)


# ---- batches and log-probs -----------------------------------------------------------------------------------------


def update_batches(turns: list[Turn], config) -> list[list[Turn]]:
    """The turns of each optimizer step: those of `--update-batch` documents (default: of all). A list may be empty."""
    size = config.update_batch or config.documents
    starts = range(0, config.documents, size)
    return [[turn for turn in turns if start <= turn.place < start + size] for start in starts]


def micro_batches(turns: list[Turn], max_tokens: int) -> list[list[Turn]]:
    """Split turns into batches of at most max_tokens *with padding*, longest first; a longer turn is its own batch.

    A batch also ends where more than an eighth of it would be padding. The batches' losses add up to the total loss.
    """
    batches: list[list[Turn]] = []
    tokens = 0  # of the last batch, without padding
    for turn in sorted(turns, key=turn_tokens, reverse=True):
        # The first turn of a batch is its longest, so it sets the width of every row.
        padded = (len(batches[-1]) + 1) * turn_tokens(batches[-1][0]) if batches else 0
        if batches and padded <= max_tokens and tokens + turn_tokens(turn) >= 0.875 * padded:
            batches[-1].append(turn)
            tokens += turn_tokens(turn)
        else:
            batches.append([turn])
            tokens = turn_tokens(turn)
    return batches


def turn_tokens(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.completion_ids)


def token_logprobs(model, turns: list[Turn], with_entropy: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of every completion token -> (logprobs, entropy or None, mask), each (turns, longest completion).

    Logprobs and entropy, in nats, are of the sampling distribution, in float32, and 0 where mask is False; entropy has
    no gradient. A sampled EOS counts like any token, so stopping is trained. Raises ValueError for an empty prompt.
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
    positions = (starts + offsets).clamp(max=ids.shape[1] - 1)  # (turns, longest); those past a row's end are masked
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (turns, width, hidden size)
    turn_numbers = torch.arange(len(turns), device=ids.device)[:, None]  # (turns, 1)
    before = hidden[turn_numbers, positions - 1][mask]  # (tokens, hidden size): the state before a token predicts it
    targets = ids.gather(1, positions)[mask]  # (tokens,), turn by turn
    logprobs, entropy = head_logprobs(model, before, targets, with_entropy)  # (tokens,)
    return by_turn(logprobs, mask), by_turn(entropy, mask) if with_entropy else None, mask


def head_logprobs(model, hidden: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-probs of `targets` (tokens,) after the states `hidden` (tokens, hidden size), entropies (tokens,) or None).

    Logits are the largest tensor: for 16k tokens and a vocabulary of 151k, 10 GB in float32. So they are computed for
    HEAD_TOKENS positions at a time, and again in backward.
    """
    make = slice_logprobs if len(hidden) <= HEAD_TOKENS else partial(checkpoint, slice_logprobs, use_reentrant=False)
    slices = zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
    parts = [make(model, states, tokens, with_entropy) for states, tokens in slices]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def slice_logprobs(model, hidden: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """head_logprobs for one slice."""
    all_logprobs = logits_of(model, hidden).float().log_softmax(-1)  # (tokens, vocabulary)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)  # (tokens,)
    if not with_entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(1)  # (tokens,)


def by_turn(column: Tensor, mask: Tensor) -> Tensor:
    """Values (tokens,), turn after turn, as (turns, longest); 0 where mask is False."""
    return torch.zeros(mask.shape, dtype=column.dtype, device=mask.device).masked_scatter(mask, column)


@torch.no_grad()
def fixed_logprobs(
    model, turns: list[Turn], config, micro_batches: Callable = micro_batches, token_logprobs: Callable = token_logprobs
) -> Iterator[tuple[Turn, Tensor]]:
    """Yields (turn, log-probs (completion,) of its tokens), without gradient: for pi_old and pi_ref."""
    for batch in micro_batches(turns, config.train_tokens):
        logprobs, _, _ = token_logprobs(model, batch)  # (turns, longest)
        for turn, row in zip(batch, logprobs, strict=True):
            yield turn, row[: len(turn.completion_ids)]


# ---- Eq. 4 ---------------------------------------------------------------------------------------------


def batch_loss(
    policy, batch: list[Turn], config, token_logprobs: Callable = token_logprobs
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of Eq. 4 -> (loss, stats), as in grpo_loss."""
    logprobs, entropy, mask = token_logprobs(policy, batch, with_entropy=True)  # (turns, longest)
    return grpo_loss(
        logprobs,
        old_logprobs=pad_rows([turn.old_logprobs for turn in batch]),
        reference_logprobs=pad_rows([turn.reference_logprobs for turn in batch]),
        mask=mask,
        advantages=torch.tensor([turn.advantage for turn in batch], device=mask.device),
        weights=torch.tensor([turn.weight for turn in batch], device=mask.device),
        eps_low=config.eps_low, eps_high=config.eps_high, beta=config.kl, entropy=entropy,
    )


def pad_rows(rows: list[Tensor | None]) -> Tensor | None:
    """Rows (completion,) as one tensor (turns, longest); None if the rows are None (all are, or none is)."""
    return None if rows[0] is None else pad_sequence(rows, batch_first=True)


def grpo_loss(
    logprobs: Tensor,  # (turns, longest), with gradient
    old_logprobs: Tensor | None,  # (turns, longest), before the step's first update; None: the step's only update
    reference_logprobs: Tensor | None,  # (turns, longest), of the reference; None: no KL
    mask: Tensor,  # (turns, longest) bool, True on completion tokens
    advantages: Tensor,  # (turns,)
    weights: Tensor,  # (turns,), from set_weights
    eps_low: float,
    eps_high: float,
    beta: float,
    entropy: Tensor | None = None,  # (turns, longest), for stats only
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> (loss = -J of Eq. 4, stats). J is the sum over turns of weight * mean over the turn's tokens of

        min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta k3,   k3 = exp(d) - d - 1,   d = log pi_ref - log pi

    A sum, so micro-batches add up to the loss and gradient of their batch. A turn of weight 0 is ignored. k3 is the KL
    estimate of http://joschu.net/blog/kl-approx.html. stats are sums over the trained tokens: "tokens" is their number,
    "clipped" the number whose gradient the clip removed, "kl" k3, "approx_kl" k3 from pi_old to pi, "entropy" in nats.
    """
    trained = mask & (weights != 0)[:, None]  # (turns, longest)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()  # r is 1, its gradient is not 0
    A = advantages[:, None]  # (turns, 1)
    log_ratio = (logprobs - old_logprobs).masked_fill(~trained, 0.0)  # (turns, longest)
    ratio = log_ratio.exp()
    # The minimum of the two products: the clip only removes gradients that would push r further beyond its bound.
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
