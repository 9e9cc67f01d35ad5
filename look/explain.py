"""One training step, printed in full: what memtrain.py --explain shows. Nothing is saved but caches.

The step is the loop's, by the same functions. The loss by hand is Eq. 4 in Python's own numbers, token by token.
"""

import math
import shutil
from functools import partial
from statistics import mean, stdev
from textwrap import fill, shorten

import torch

from engine import parallel
from engine.errors import UserError
from engine.models import as_reference
from grpo import assign_advantages, batch_loss, fixed_logprobs, set_weights, update_batches
from rewards import answer_reward, recall_reward, trajectory_reward
from rollout import Sampler, Trajectory, Turn, draw_documents, draw_targets, recall

LONGEST = 1500  # characters of a text before its middle is left out
CELL = 40  # characters of a text in a table
TOKENS = 12  # rows of the table of tokens
one_line = partial(shorten, width=CELL, placeholder=" ...")


def show(title: str, text: str) -> None:
    """A heading and an indented text, in lines that the terminal holds; without its middle where it is long."""
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]}\n[... {len(text) - LONGEST} characters ...]\n{text[-half:]}"
    wrap = partial(fill, width=shutil.get_terminal_size().columns, subsequent_indent="    ")
    print(f"\n{wrap(title)}", *(wrap(line, initial_indent="    ") for line in text.splitlines()), sep="\n")


def show_table(head: list[str], rows: list[list]) -> None:
    """A table: the first column aligned left, the others right."""
    cells = [head, *([f"{cell:z.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("   ", first.ljust(widths[0]), *right, sep="  ")


def explain(
    policy, reference, optimizer, sample: Sampler, source, agent, config, lr: float, shuffle, twins: tuple
) -> None:
    """Print the first step of a run. `twins` are micro_batches and token_logprobs, the lesson's or those of fast/.

    Raises UserError for several processes.
    """
    if parallel.count() > 1:
        raise UserError("--explain: shows the step of one process; leave torchrun out")
    documents = draw_documents(source, config, step=0)
    trajectories = agent(sample, documents, config, samples=config.g1)
    draw_targets(trajectories, config, step=0)
    recall(sample, trajectories, config, samples=config.g2)
    for t in trajectories:
        t.em = answer_reward(t.prediction, t.document.answers)
        t.recall_rewards = [recall_reward(turn.text, t.target.entity) for turn in t.recalls]
        t.reward = trajectory_reward(t.em, t.recall_rewards, config.joint_weight)
    turns = assign_advantages(trajectories, config, shuffle)
    print_trajectories(sample.tokenizer, trajectories, config)
    print_update(policy, reference, optimizer, sample.tokenizer, trajectories, turns, config, lr, twins)


# ---- the rollout ------------------------------------------------------------------------------------------


def print_trajectories(tokenizer, trajectories: list[Trajectory], config) -> None:
    """The trajectories of one document: its text, a prompt, memories, answers, recall, rewards and advantages."""
    # The first document whose trajectories differ.
    shown = next((n for n, t in enumerate(trajectories) if t.turns[0].advantage), 0) // config.g1
    group = trajectories[shown * config.g1 : (shown + 1) * config.g1]
    first, document = group[0], group[0].document
    text = "\n".join(f"--- chunk {n} ---\n{chunk.strip()}" for n, chunk in enumerate(document.chunks, 1))
    answer = document.answers[0] if len(document.answers) == 1 else document.answers
    show(f"1. A document. Asked: {document.question} The answer, y: {answer}", text or "no text: this agent searches")
    turn = first.turns[min(1, len(first.turns) - 1)]
    show(f"2. A prompt as the model sees it: {len(turn.prompt_ids)} tokens", tokenizer.decode(turn.prompt_ids))
    rewards = [t.reward for t in group]
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    for n, name in {worst: "worst", best: "best"}.items():
        memories = "\n".join(f"m_{k}: {memory}" for k, memory in enumerate(group[n].memories, 1))
        show(f"3. The memories of trajectory {n + 1}, the {name} rewarded", memories)
    print_recall(group, best)
    text = f"recall: the mean R^I. R^E = EM + {config.joint_weight} x recall. A = R^E - {mean(rewards):.3f}, its mean"
    if config.advantage == "group_norm" and len(set(rewards)) > 1:
        text += f", divided by its standard deviation, {stdev(rewards):.3f}"
    show(f"5. The {len(group)} answers of this document, their rewards and advantages (Eq. 1 to 3)", f"{text}.")
    rows = []
    for n, t in enumerate(group, 1):
        shares = (f"{share:.3g}" for share in (t.em, mean(t.recall_rewards or [0.0])))
        rows.append([f"{n}: {one_line(str(t.prediction))}", *shares, t.reward, t.turns[0].advantage])
    show_table(["answer", "EM", "recall", "R^E", "A"], rows)


def print_recall(group: list[Trajectory], best: int) -> None:
    """What one of the trajectories was asked to recall, and its answers; nothing where none was asked."""
    asked = [n for n, t in enumerate(group) if t.target]
    if not asked:
        return
    # Where the answers differ in their rewards, recall has a signal of its own.
    n = min(asked, key=lambda n: (len(set(group[n].recall_rewards)) < 2, n != best))
    target, memories = group[n].target, group[n].memories
    k, chunk = target.memory_turn, target.chunk
    show(
        f"4. Recall of trajectory {n + 1}, from m_{k}: chunk {chunk} with {target.entity} as [TARGET]",
        f"{target.masked_chunk.strip()}\n\nm_{k}: {memories[k - 1]}",
    )
    answers = zip(group[n].recalls, group[n].recall_rewards, strict=True)
    rows = [[f"{j}: {one_line(turn.text)}", f"{own:.0f}", turn.advantage] for j, (turn, own) in enumerate(answers, 1)]
    show_table(["answer", "R^I", "A"], rows)


# ---- the update -------------------------------------------------------------------------------------------


def print_update(policy, reference, optimizer, tokenizer, trajectories, turns: list[Turn], config, lr, twins) -> None:
    """The groups, the tokens of a turn, and the loss by hand beside that by code, before and after the update."""
    micro_batches, token_logprobs = twins
    groups = len(trajectories) // config.g1 + sum(bool(t.recalls) for t in trajectories)
    kept = len({id(t.document) for t in trajectories if t.turns[0].advantage})
    kept += sum(any(turn.advantage for turn in t.recalls) for t in trajectories)
    print(f"\n6. {groups - kept} of {groups} groups have equal rewards: left out. {len(turns)} turns are trained")
    if not turns:
        print("   Nothing is trained. Try another --seed, shorter documents, or `python -m recipes.cold_start` first.")
        return
    if reference is not None:
        with as_reference(reference, config, policy.device):
            for turn, logprobs in fixed_logprobs(reference, turns, config, *twins):
                turn.reference_logprobs = logprobs
    for turn, logprobs in fixed_logprobs(policy, turns, config, *twins):
        turn.old_logprobs = logprobs
    before = [turn.old_logprobs.tolist() for turn in turns]
    by_code = [whole_loss(policy, turns, config, *twins)]
    for part in update_batches(turns, config):
        if set_weights(part):
            for batch in micro_batches(part, config.train_tokens):
                loss, _ = batch_loss(policy, batch, config, token_logprobs)
                loss.backward()
            optimizer.step(lr, config.grad_clip)
    new = {id(turn): logprobs.tolist() for turn, logprobs in fixed_logprobs(policy, turns, config, *twins)}
    after = [new[id(turn)] for turn in turns]
    by_code.append(whole_loss(policy, turns, config, *twins))

    n = max(range(len(turns)), key=lambda n: (turns[n].advantage, len(turns[n].completion_ids)))
    show(
        f"7. The tokens of a turn with the largest advantage, A = {turns[n].advantage:.3f}",
        "The ratio is 1 where they were sampled, and exp(after - before) once the policy is updated.",
    )
    rows = [
        [repr(tokenizer.decode([token])), now, then, math.exp(then - now)]
        for token, now, then in zip(turns[n].completion_ids, before[n], after[n], strict=True)
    ]
    show_table(["token", "log-prob before", "after", "ratio"], rows[:TOKENS])
    if len(rows) > TOKENS:
        print(f"      and {len(rows) - TOKENS} more")
    show("8. The loss (Eq. 4) of all turns", "It falls as the tokens of good samples become likelier.")
    by_hand = [loss_by_hand(turns, before, logprobs, config) for logprobs in (before, after)]
    names = ("before the update, every ratio 1", "after it")
    rows = [[name, f"{hand:+.6f}", f"{code:+.6f}"] for name, hand, code in zip(names, by_hand, by_code, strict=True)]
    show_table(["", "by hand", "by code"], rows)


@torch.no_grad()
def whole_loss(policy, turns: list[Turn], config, micro_batches, token_logprobs) -> float:
    """The loss of Eq. 4 over all turns, as one update would have it."""
    set_weights(turns)
    batches = micro_batches(turns, config.train_tokens)
    return sum(batch_loss(policy, batch, config, token_logprobs)[0].item() for batch in batches)


def loss_by_hand(turns: list, old: list[list[float]], new: list[list[float]], config) -> float:
    """-J of Eq. 4, token by token: the mean over documents of the mean over their turns of the mean over tokens."""
    by_document: dict[int, list[float]] = {}
    for turn, old_logprobs, new_logprobs in zip(turns, old, new, strict=True):
        values = []
        for t, (before, now) in enumerate(zip(old_logprobs, new_logprobs, strict=True)):
            ratio = math.exp(now - before)
            clipped = min(max(ratio, 1 - config.eps_low), 1 + config.eps_high)
            value = min(ratio * turn.advantage, clipped * turn.advantage)
            if config.kl:
                d = float(turn.reference_logprobs[t]) - now
                value -= config.kl * (math.exp(d) - d - 1)
            values.append(value)
        by_document.setdefault(turn.place, []).append(sum(values) / len(values))
    means = [sum(values) / len(values) for values in by_document.values()]
    return -sum(means) / len(means)
