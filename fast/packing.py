"""Training on fewer tokens: batches of similar length, and completions of one prompt packed behind one copy of it.

    by_length, by_prompt   which rows form a batch, and which share a prompt; sampling uses them too
    micro_batches          turns split into batches by a token budget
    token_logprobs         the fast twin of grpo.token_logprobs
    enable                 switches packing on for the models of a run

Equal prompts are found by their token ids. That is always safe: to the network they are the same, and every sample
keeps its own reward and advantage.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.parallel import rank
from fast.attention import enable_packing, packed_mask, packs
from grpo import by_turn, head_logprobs


def by_length(lengths: list[int], max_tokens: int, fill: float = 0.875) -> list[list[int]]:
    """Indices into `lengths`, in batches of at most `max_tokens` tokens with padding, longest first.

    A length over the budget is its own batch. A batch also ends where less than the share `fill` of it would be tokens.
    """
    batches: list[list[int]] = []
    used = 0  # tokens of the last batch, without padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first of a batch is its longest, so it sets the width of every row.
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and padded <= max_tokens and used + lengths[i] >= fill * padded:
            batches[-1].append(i)
            used += lengths[i]
        else:
            batches.append([i])
            used = lengths[i]
    return batches


def by_prompt(prompts: list[list[int]]) -> list[list[int]]:
    """Indices of equal prompts, grouped, in the order in which each prompt first occurs."""
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(i)
    return list(groups.values())


def rows_of(model, turns: list) -> list[list[int]]:
    """Indices of the turns that token_logprobs computes as one row: those with the same prompt if the model packs."""
    return by_prompt([turn.prompt_ids for turn in turns]) if packs(model) else [[i] for i in range(len(turns))]


def row_tokens(turns: list) -> int:
    """Tokens of one row: a prompt and the completions behind it."""
    return len(turns[0].prompt_ids) + sum(len(turn.completion_ids) for turn in turns)


def micro_batches(turns: list, max_tokens: int, model) -> list[list]:
    """Split turns into batches of similar length, of at most max_tokens *with padding*; a longer row is its own batch.

    Rows with one completion are kept apart from packed rows, since they need no attention mask. Longest first in both
    kinds, so a run that doesn't fit in memory fails early. The batches' losses add up to the total loss.
    """
    rows: list[list] = []
    for same in rows_of(model, turns):
        used = max_tokens + 1
        for turn in (turns[i] for i in same):  # as many completions behind one copy of the prompt as the budget allows
            if used + len(turn.completion_ids) > max_tokens:
                rows.append([])
                used = len(turn.prompt_ids)
            rows[-1].append(turn)
            used += len(turn.completion_ids)
    batches = []
    for part in ([row for row in rows if len(row) > 1], [row for row in rows if len(row) == 1]):
        places = by_length([row_tokens(row) for row in part], max_tokens)
        batches += [[turn for n in batch for turn in part[n]] for batch in places]
    return batches


def layout(turns: list, rows: list[list[int]]) -> tuple[list, list, list, list]:
    """(token ids, segments, positions) of each row, and for each turn the (row, index) pairs that predict its tokens.

    Segment 0 is the prompt; 1, 2, ... are its completions. In each completion positions continue from the prompt's.
    """
    ids, segments, positions, sources = [], [], [], [[] for _ in turns]
    for row, members in enumerate(rows):
        prompt = turns[members[0]].prompt_ids
        ids.append(list(prompt))
        segments.append([0] * len(prompt))
        positions.append(list(range(len(prompt))))
        for n, i in enumerate(members, start=1):
            length, start = len(turns[i].completion_ids), len(ids[row])
            # The prompt's last state predicts a completion's first token; its own states predict the others.
            sources[i] = [(row, place) for place in [len(prompt) - 1, *range(start, start + length - 1)][:length]]
            ids[row] += turns[i].completion_ids
            segments[row] += [n] * length
            positions[row] += range(len(prompt), len(prompt) + length)
    return ids, segments, positions, sources


def token_logprobs(model, turns: list, with_entropy: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """The fast twin of grpo.token_logprobs -> (logprobs, entropy or None, mask), each (turns, longest completion).

    After `enable`, turns with the same prompt are one row: the prompt once, then its completions, which can't attend to
    each other. Raises ValueError for an empty prompt.
    """
    if not all(turn.prompt_ids for turn in turns):
        raise ValueError("a turn has an empty prompt: nothing predicts the first token of its completion")
    rows = rows_of(model, turns)
    ids, segments, positions, sources = layout(turns, rows)

    def padded(lists, value):  # (rows, longest)
        return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value).to(model.device)

    ids = padded(ids, 0)  # (rows, longest)
    more = {}  # padding is on the right, where causal attention never looks: no mask, so fast kernels stay in use
    if len(rows) < len(turns):
        # The last position of a prompt is the first that predicts a completion's token; up to there all is causal.
        visible = packed_mask(padded(segments, -1), min(len(turn.prompt_ids) for turn in turns) - 1)
        more = {"attention_mask": visible, "position_ids": padded(positions, 0)}
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **more).last_hidden_state  # (rows, longest, width)

    row, place = torch.tensor([at for places in sources for at in places], dtype=torch.long).reshape(-1, 2).T
    before = hidden[row.to(ids.device), place.to(ids.device)]  # (tokens, hidden size), turn by turn
    targets = torch.tensor([t for turn in turns for t in turn.completion_ids], dtype=torch.long, device=ids.device)
    lengths = torch.tensor([[len(turn.completion_ids)] for turn in turns], device=ids.device)  # (turns, 1)
    mask = torch.arange(int(lengths.max()), device=ids.device) < lengths  # (turns, longest)
    logprobs, entropy = head_logprobs(model, before, targets, with_entropy)  # (tokens,)
    return by_turn(logprobs, mask), by_turn(entropy, mask) if with_entropy else None, mask


def enable(policy, reference=None) -> Callable:
    """Switch packing on for these models, if they can pack -> micro_batches for the policy."""
    if reference is not None:
        enable_packing(reference)
    if not enable_packing(policy) and rank() == 0:
        name = policy.config.name_or_path
        print(f"{name}: completions are not packed behind their prompts: not every layer uses full attention by sdpa")
    return partial(micro_batches, model=policy)
