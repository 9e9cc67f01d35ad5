"""GRPO for memory agents, as pure tensor functions: rewards and token ids in, one loss out.

A *conversation* is one turn of the agent: a prompt and the completion that was sampled for it. MemTrain (arXiv
2606.03197, section 3.4) turns the rewards of a group of conversations into advantages,

    A_i = R_i - mean(R)                                                                                  (Eq. 3)

and maximises, with r_t = pi(token_t) / pi_old(token_t), the policy now over the policy that sampled,

    J = mean over documents, mean over a document's conversations c, mean over c's tokens t of
        min(r_t A_c, clip(r_t, 1 - eps_low, 1 + eps_high) A_c) - beta KL_t(pi || pi_ref)                 (Eq. 4)

Each function below is one piece of that, in the order in which a training step calls them:

    group_advantages       Eq. 3, and which groups carry no signal at all
    conversation_weights   the two outer means of Eq. 4, over what is kept
    micro_batches          which conversations share a forward pass
    completion_logprobs    log pi(token_t): for the policy, and without gradient for pi_old and pi_ref
    grpo_loss              Eq. 4 itself

Dropout must be off: the ratio compares two passes through one network, and dropout would make them two networks. Keep
the model in eval(), or its dropout probabilities at 0 where gradient checkpointing (which Hugging Face switches off
in eval()) is wanted.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from attention import packed_mask
from batching import by_length, by_prompt

# Lambda / G2, the smallest real difference of two rewards, is about 0.06; float32 rounding of equal sums about 1e-7.
EQUAL_REWARDS = 1e-6


def group_advantages(rewards: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Score rewards (groups, size) against their own group -> advantages (groups, size), degenerate (groups,) bool.

    "mean": R - mean(R), Eq. 3, as Dr. GRPO (arXiv 2503.20783). "group_norm": (R - mean(R)) / (std(R) + 1e-4), GRPO as
    DeepSeekMath wrote it (arXiv 2402.03300), which names no estimator: the sample std (over size - 1) is TRL's choice.
    Degenerate: all rewards of the group are equal; its advantages are exactly 0. ValueError for another mode.
    Example, mode "mean": [[1, 0, 0, 1], [1, 1, 1, 1]] -> [[.5, -.5, -.5, .5], [0, 0, 0, 0]], [False, True].
    """
    if mode not in ("mean", "group_norm"):
        raise ValueError(f"advantage mode {mode!r} is neither 'mean' nor 'group_norm'")
    degenerate = rewards.amax(1) - rewards.amin(1) <= EQUAL_REWARDS  # (groups,)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (groups, size)
    if mode == "group_norm":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)  # (groups, size)
    # Rounding leaves about 1e-8 in a group of equal rewards, which the small divisor above blows up into a gradient;
    # a group of one has no std, and NaN.
    return advantages.masked_fill(degenerate[:, None], 0.0), degenerate


def conversation_weights(documents, kept) -> Tensor:
    """The outer means of Eq. 4, as 1 / (kept documents * kept conversations of its document) for each conversation.

    documents (conversations,): positions 0, 1, ... of their documents, never texts, since two documents may read the
    same. kept (conversations,) bool: False for a dropped group; it weighs 0 and dilutes neither mean.
    The weights (conversations,) float32 sum to 1, or to 0 where nothing is kept.
    Example: documents [0, 0, 0, 1, 2], kept [1, 1, 0, 1, 0] -> [1/4, 1/4, 0, 1/2, 0].
    """
    documents = torch.as_tensor(documents, dtype=torch.long)  # (conversations,)
    kept = torch.as_tensor(kept, dtype=torch.bool)  # (conversations,)
    kept_of = torch.zeros(len(documents) and int(documents.max()) + 1, dtype=torch.long)  # (documents,)
    kept_of.index_add_(0, documents, kept.long())
    return kept / (kept_of.count_nonzero() * kept_of[documents]).clamp(min=1)  # (conversations,)


def micro_batches(turns, max_tokens: int, share_prompts: bool = False) -> list[list[int]]:
    """Cut turns into batches of similar length: lists of positions in `turns`, each at most max_tokens *with padding*.

    With share_prompts, turns of one prompt come together, as the one row that completion_logprobs makes of them; rows
    of one completion are kept apart from those of several, since they need no attention mask. Longest first, so that a
    run which doesn't fit in memory fails at its first batch. A row longer than the budget stands alone. Which turns
    share a batch changes nothing but speed: the losses of the batches add up.
    """
    rows: list[list[int]] = []
    for same in by_prompt([turn.prompt_ids for turn in turns]) if share_prompts else [[i] for i in range(len(turns))]:
        used = max_tokens + 1
        for i in same:  # As many completions behind one copy of the prompt as the budget takes.
            if used + len(turns[i].completion_ids) > max_tokens:
                rows.append([])
                used = len(turns[i].prompt_ids)
            rows[-1].append(i)
            used += len(turns[i].completion_ids)
    batches = []
    for part in ([row for row in rows if len(row) > 1], [row for row in rows if len(row) == 1]):
        sizes = [row_tokens([turns[i] for i in row]) for row in part]
        batches += [[i for n in batch for i in part[n]] for batch in by_length(sizes, max_tokens)]
    return batches


def row_tokens(turns) -> int:
    """Tokens of one row: a prompt and the completions behind it."""
    return len(turns[0].prompt_ids) + sum(len(turn.completion_ids) for turn in turns)


def batch_tokens(turns, share_prompts: bool = False) -> tuple[int, int]:
    """(tokens, tokens with padding) that completion_logprobs computes for one batch of turns."""
    rows = by_prompt([turn.prompt_ids for turn in turns]) if share_prompts else [[i] for i in range(len(turns))]
    sizes = [row_tokens([turns[i] for i in row]) for row in rows]
    return sum(sizes), len(sizes) * max(sizes)


def completion_logprobs(
    model, turns, *, share_prompts: bool = False, temperature: float = 1.0, head_tokens: int = 1024,
    with_entropy: bool = False,
):  # fmt: skip
    """Log-prob of every completion token under the model -> logprobs, entropy, mask, each (turns, longest completion).

    turns have prompt_ids and completion_ids, lists of ints; a completion that ended by itself holds its EOS, so that
    stopping is trained. logprobs are float32, of the distribution that was sampled: log softmax(logits / temperature).
    entropy is of the same distributions, without gradient, or None unless asked for. Both are 0 where mask is False.
    With share_prompts, turns of one prompt are one row: the prompt once, all its completions behind it, each blind to
    the others. The model is the bare causal LM, not a DDP wrapper: under several processes the caller sums gradients.
    At most head_tokens positions have logits at any one time. ValueError for an empty prompt.
    """
    if not all(turn.prompt_ids for turn in turns):
        raise ValueError("a turn has an empty prompt: nothing predicts the first token of its completion")
    rows = by_prompt([turn.prompt_ids for turn in turns]) if share_prompts else [[i] for i in range(len(turns))]

    # Segment 0 is the prompt, 1, 2, ... are its completions, -1 is padding; positions go on from the prompt's in each.
    # Masks come from lengths, never from token values: where pad and EOS are one token, values would untrain the EOS.
    ids, segments, positions, source = [], [], [], [[] for _ in turns]
    for row, members in enumerate(rows):
        prompt = turns[members[0]].prompt_ids
        ids.append(list(prompt))
        segments.append([0] * len(prompt))
        positions.append(list(range(len(prompt))))
        for n, i in enumerate(members, start=1):
            length, start = len(turns[i].completion_ids), len(ids[row])
            # The state that predicts a completion's first token is the prompt's last; its own states predict the rest.
            source[i] = [(row, p) for p in [len(prompt) - 1, *range(start, start + length - 1)][:length]]
            ids[row] += turns[i].completion_ids
            segments[row] += [n] * length
            positions[row] += range(len(prompt), len(prompt) + length)

    def padded(lists, value):  # (rows, longest)
        return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value).to(model.device)

    ids = padded(ids, 0)  # (rows, longest)
    if len(rows) == len(turns):
        # Padding is on the right, where causal attention never looks: no attention mask is needed, so fast kernels stay
        # in use, and positions count 0, 1, 2, ... by default as they did while sampling.
        layout = {}
    else:
        # The prompts' last positions are the first that predict a completion's token; before them all is causal.
        mask = packed_mask(padded(segments, -1), min(len(turn.prompt_ids) for turn in turns) - 1)
        layout = {"attention_mask": mask, "position_ids": padded(positions, 0)}
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **layout).last_hidden_state  # (rows, longest, width)

    row, position = torch.tensor([at for places in source for at in places], dtype=torch.long).reshape(-1, 2).T
    hidden = hidden[row.to(ids.device), position.to(ids.device)]  # (tokens, width), turn by turn
    targets = torch.tensor([t for turn in turns for t in turn.completion_ids], dtype=torch.long, device=ids.device)
    completion = torch.tensor([[len(turn.completion_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    mask = torch.arange(int(completion.max()), device=ids.device) < completion  # (turns, longest completion)

    # The head is the widest matrix of the network: 16k tokens by a vocabulary of 151k is 10 GB of float32 logits. So it
    # sees a few positions at a time, and backward recomputes their logits instead of keeping them. One chunk is kept:
    # recomputing it would not lower the peak.
    chunks = list(zip(hidden.split(head_tokens), targets.split(head_tokens)))
    head = partial(_head, model, temperature=temperature, with_entropy=with_entropy)
    if len(chunks) > 1:
        head = partial(checkpoint, head, use_reentrant=False)
    logprobs, entropies = zip(*(head(*chunk) for chunk in chunks))  # tuples of (head_tokens,)

    def unflatten(columns):  # Turn by turn, as `source` was listed.
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, torch.cat(columns))

    return unflatten(logprobs), unflatten(entropies) if with_entropy else None, mask


def _logits(model, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    logits = head(hidden.to(head.weight.dtype))  # some decoders end in float32
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def logits_agree(model) -> bool:
    """Whether the logits that completion_logprobs takes are the model's own.

    Some architectures scale or cap theirs behind lm_head; passing over it would give plausible, wrong log-probs.
    """
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    own = model(input_ids=ids).logits.float()  # (1, 4, vocabulary)
    if not own.isfinite().all():
        return True  # sampling tells it
    ours = _logits(model, model.get_decoder()(input_ids=ids).last_hidden_state).float()
    return torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * own.abs().max().item())


def _head(model, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool):
    """Hidden states (tokens, width), the token that follows each (tokens,) -> log-probs, entropy or None (tokens,)."""
    logits = _logits(model, hidden)  # (tokens, vocabulary)
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    all_logprobs = torch.log_softmax(scaled, dim=-1)  # (tokens, vocabulary)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)  # (tokens,)
    if not with_entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(1)  # (tokens,)


def grpo_loss(
    logprobs: Tensor,  # (turns, longest), with gradient
    old_logprobs: Tensor | None,  # (turns, longest), when sampled; None: the policy has not moved since
    reference_logprobs: Tensor | None,  # (turns, longest), of the frozen reference; None: no KL
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
        old_logprobs = logprobs.detach()  # r is 1, its gradient is not 0.
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
            "tokens": tokens.sum(),
            "clipped": (clipped & trained).sum(),
            "kl": kl.sum(),
            "approx_kl": (ratio - 1 - log_ratio).sum(),
        }
        if entropy is not None:
            stats["entropy"] = entropy.masked_fill(~trained, 0.0).sum()
    return loss, {name: value.detach() for name, value in stats.items()}
