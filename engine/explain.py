"""One training step, opened up: what memtrain.py --explain prints. Nothing is saved.

The loss by hand is Eq. 4 in Python's own numbers, one token after the other.
"""

import math
from collections.abc import Callable

LONGEST = 1500  # characters of a text before its middle is left out
CELL = 60  # characters of a text in a table
TOKENS = 12  # rows of the table of tokens


def shortened(text: str) -> str:
    half = LONGEST // 2
    if len(text) <= LONGEST:
        return text
    return f"{text[:half]}\n[... {len(text) - LONGEST} characters ...]\n{text[-half:]}"


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CELL else f"{line[:CELL]} ..."


def show(title: str, text: str) -> None:
    """A heading and an indented text."""
    lines = shortened(text).splitlines() or [""]
    print(f"\n{title}", *(f"    {line}".rstrip() for line in lines), sep="\n")


def show_table(head: list[str], rows: list[list]) -> None:
    """A table: the first column aligned left, the others right."""
    cells = [head, *([f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("   ", first.ljust(widths[0]), *right, sep="  ")


def print_rollout(
    tokenizer, g1: int, groups: list, trajectories: list, targets: list, recalls: list, em: list, rewards: list,
    recall_rewards: list,
) -> None:
    """The trajectories of one document: its text, a prompt, memories, answers, recall, rewards and advantages."""
    # The first document whose trajectories differ; their groups come first.
    number = next((n for n in range(len(trajectories) // g1) if not groups[n].degenerate), 0)
    mine = slice(number * g1, (number + 1) * g1)
    lists = (trajectories, targets, recalls, em, rewards, recall_rewards)
    trajectories, targets, recalls, em, rewards, recall_rewards = (values[mine] for values in lists)
    dealt = groups[number].rewards  # those of R^E, but where a control has dealt them out anew
    first, document = trajectories[0], trajectories[0].document
    text = "\n".join(f"--- chunk {n} ---\n{chunk.strip()}" for n, chunk in enumerate(document.chunks, 1))
    answer = document.answers[0] if len(document.answers) == 1 else document.answers
    show(f"1. A document. Asked: {document.question} The answer, y: {answer}", text or "no text: this agent searches")
    turn = first.turns[min(1, len(first.turns) - 1)]
    show(f"2. A prompt as the model sees it: {len(turn.prompt_ids)} tokens", tokenizer.decode(turn.prompt_ids))
    best = max(range(len(trajectories)), key=lambda n: dealt[n])
    worst = min(range(len(trajectories)), key=lambda n: dealt[n])
    for n, name in {worst: "worst", best: "best"}.items():
        memories = "\n".join(f"m_{k}: {memory}" for k, memory in enumerate(trajectories[n].memories, 1))
        show(f"3. The memories of trajectory {n + 1}, the {name} rewarded", memories)
    # Where its answers differ, recall has a signal of its own.
    order = sorted(range(len(targets)), key=lambda n: (len(set(recall_rewards[n])) < 2, targets[n] is None, n != best))
    if target := targets[asked := order[0]]:
        k, chunk = target.memory_turn, target.chunk
        show(
            f"4. Recall, of trajectory {asked + 1}: chunk {chunk} with {target.entity} as [TARGET], asked from m_{k}",
            f"{target.section.strip()}\n\nm_{k}: {trajectories[asked].memories[k - 1]}",
        )
        answers = zip(recalls[asked], recall_rewards[asked], strict=True)
        rows = [[f"{j}: {one_line(turn.text)}", own, turn.advantage] for j, (turn, own) in enumerate(answers, 1)]
        show_table(["answer", "R^I", "A"], rows)
    print("\n5. The group: each trajectory of this document, with its rewards and its advantage (Eq. 1 to 3)")
    rows = []
    for n, trajectory in enumerate(trajectories):
        name = f"{n + 1}: {one_line(str(trajectory.prediction))}"
        rows.append([name, em[n], rewards[n] - em[n], rewards[n], dealt[n], trajectory.turns[0].advantage])
    columns = ["trajectory and its answer", "EM", "lambda x recall", "R^E", "dealt out", "A"]
    if dealt == rewards:  # no control
        rows, columns = [row[:4] + row[5:] for row in rows], columns[:4] + columns[5:]
    show_table(columns, rows)


def print_update(
    tokenizer, config, groups: list, turns: list, store: Callable, loss: Callable, learn: Callable
) -> None:
    """The groups, the tokens of a turn, and the loss by hand beside that by code, before and after the update.

    `store()` sets the turns' old_logprobs to those of now, `loss()` is Eq. 4 over all turns, `learn()` updates.
    """
    equal = sum(group.degenerate for group in groups)
    print(f"\n6. {equal} of {len(groups)} groups have equal rewards: left out. {len(turns)} turns are trained")
    if not turns:
        print("   Nothing is trained. Try another --seed or shorter documents, or recipes/cold_start.py first.")
        return
    store()
    old = [turn.old_logprobs for turn in turns]
    by_code = [loss()]
    learn()
    store()
    new = [turn.old_logprobs for turn in turns]
    for turn, logprobs in zip(turns, old, strict=True):
        turn.old_logprobs = logprobs
    by_code.append(loss())
    before, after = ([logprobs.tolist() for logprobs in stored] for stored in (old, new))

    n = max(range(len(turns)), key=lambda n: (turns[n].advantage, len(turns[n].completion_ids)))
    print(
        f"\n7. The tokens of a turn with the largest advantage, A = {turns[n].advantage:.3f}. The ratio is 1 where "
        "they were sampled,\n   and exp(after - before) once the policy is updated"
    )
    rows = [
        [repr(tokenizer.decode([token])), now, then, math.exp(then - now)]
        for token, now, then in zip(turns[n].completion_ids, before[n], after[n], strict=True)
    ]
    show_table(["token", "log-prob before", "after", "ratio"], rows[:TOKENS])
    if len(rows) > TOKENS:
        print(f"      and {len(rows) - TOKENS} more")
    print("\n8. The loss (Eq. 4) of all turns. It falls as the tokens of good samples become likelier")
    by_hand = [loss_by_hand(turns, before, logprobs, config) for logprobs in (before, after)]
    names = ("before the update, every ratio 1", "after it")
    rows = [[name, f"{hand:+.6f}", f"{code:+.6f}"] for name, hand, code in zip(names, by_hand, by_code, strict=True)]
    show_table(["", "by hand", "by code"], rows)


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
