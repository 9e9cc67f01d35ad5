"""Numbers for people: accuracies with their intervals, as rows and tables; a step's metrics and samples."""

import math
from itertools import groupby, product

import numpy as np


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927), which stays inside 0..1 and is sound for small n."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # rounding may step outside


def share(right: float, n: int) -> str:
    """"0.25 [0.20, 0.31]": a share with its 95 % interval."""
    low, high = wilson(right, n)
    return f"{right / max(1, n):.2f} [{low:.2f}, {high:.2f}]"


# ---- an evaluation -------------------------------------------------------------------------------------


def row(
    when: str, task: str, chunks: int, memory: str, scores: dict[int, float], said: dict[int, dict] | None = None,
    **more: float,
) -> dict:
    """One accuracy: of a task, at a length, with a memory or a control in its place; `more` are further measures.

    `scores` are by the number of their document, as is what was `said` of it. Row["scores"], row["documents"] and
    row["said"] are in the order of these numbers, however many processes there were.
    """
    documents = sorted(scores)
    values = [scores[number] for number in documents]
    low, high = wilson(sum(values), len(values))
    place = {"when": when, "task": task, "chunks": chunks, "memory": memory, "n": len(values)}
    accuracy = {"accuracy": float(np.mean(values)), "low": low, "high": high}
    texts = {"said": [said[number] for number in documents]} if said else {}
    return place | accuracy | more | {"scores": values, "documents": documents} | texts


MEASURES = {"accuracy": "", "f1": ", F1", "substring": ", substring"}


def table(rows: list[dict]) -> str:
    """The rows as a markdown table: a line per task, memory and length, a column per `when`.

    Neighbouring lengths whose cells are equal share a line. F1 and substring have lines where they differ from EM.
    """
    if not rows:
        return "no document could be built, so nothing was evaluated"
    whens = list(dict.fromkeys(row["when"] for row in rows))
    lines = [["", "memory", unit_of(rows), "n", *whens]]
    for (task, memory), measure in product(dict.fromkeys((row["task"], row["memory"]) for row in rows), MEASURES):
        found = []  # of each length: the length, n, and a cell for each `when`
        for length in sorted({row["chunks"] for row in rows}):
            mine = [row for row in rows if (row["task"], row["memory"], row["chunks"]) == (task, memory, length)]
            cells = {row["when"]: cell(row, measure) for row in mine if measure in row}
            if cells and (measure == "accuracy" or any(cells[row["when"]] != f"{row['accuracy']:.2f}" for row in mine)):
                found.append((length, ends([row["n"] for row in mine]), *(cells.get(when, "-") for when in whens)))
        for cells, same in groupby(found, key=lambda line: line[1:]):
            lines.append([task + MEASURES[measure], memory, ends([length for length, *_ in same]), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def summary(rows: list[dict]) -> str:
    """The rows in a line: of each task the least and the greatest accuracy over all lengths, with the memory kept."""
    kept = [row for row in rows if row["memory"] == "kept"]
    if not kept:
        return table(rows)
    tasks = {task: [row["accuracy"] for row in kept if row["task"] == task] for task in (row["task"] for row in kept)}
    ranges = ", ".join(f"{task} {min(found):.2f} to {max(found):.2f}" for task, found in tasks.items())
    return f"{ranges} at {ends([row['chunks'] for row in kept])} {unit_of(rows)}"


def unit_of(rows: list[dict]) -> str:
    """The unit of the rows' lengths."""
    return "objectives" if rows[0]["task"] == "searchqa" else "chunks"


def ends(numbers: list[int]) -> str:
    """The least and the greatest of some numbers, "2-32", or the one that they all are."""
    low, high = min(numbers), max(numbers)
    return f"{low}-{high}" if low < high else str(low)


def cell(row: dict, measure: str) -> str:
    interval = f" [{row['low']:.2f}, {row['high']:.2f}]" if measure == "accuracy" else ""
    return f"{row[measure]:.2f}{interval}"


# ---- a step --------------------------------------------------------------------------------------------

MEANS = (
    "end_to_end", "recall", "reward", "degenerate", "recall_leaky", "truncated", "thinking", "unboxed", "memory_tokens",
)


def step_values(trajectories: list) -> dict[str, list]:
    """The values of which a step's metrics are means or sums: one per trajectory, turn, group or document."""
    by_document = [list(same) for _, same in groupby(trajectories, key=lambda t: t.document.place)]
    documents = [group[0].document for group in by_document]
    turns = [turn for t in trajectories for turn in t.turns + t.recalls]
    # Where the rewards of a group are equal, its advantages are 0.
    groups = [[t.turns[0].advantage for t in group] for group in by_document]
    groups += [[turn.advantage for turn in t.recalls] for t in trajectories if t.recalls]
    return {
        "end_to_end": [t.em for t in trajectories],
        "recall": [reward for t in trajectories for reward in t.recall_rewards],
        "reward": [t.reward for t in trajectories],
        "degenerate": [not any(advantages) for advantages in groups],
        "recall_leaky": [t.target.leaky for t in trajectories if t.target],
        "truncated": [not turn.ended for turn in turns],
        "thinking": [turn.thought for turn in turns],
        "unboxed": [t.prediction is None for t in trajectories],
        "memory_tokens": [len(turn.completion_ids) for t in trajectories for turn in t.turns[:-1]],
        "leaks": [document.leaks for document in documents],
        "draws": [1 + document.redraws for document in documents],
        "tokens": [len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns],
    }


def step_metrics(values: dict[str, list], sums: dict[str, float], seconds: dict[str, float]) -> dict:
    """A line of metrics.jsonl, of all processes' samples (`values`) and updates (`sums`); see docs/metrics.md."""
    mean = {name: float(np.mean(values[name])) if values[name] else None for name in MEANS}
    std = {f"{name}_std": float(np.std(values[name])) if values[name] else None for name in MEANS[:3]}
    trained = max(sums.get("tokens", 0), 1)
    return mean | std | {
        "leaky": sum(values["leaks"]) / sum(values["draws"]), "loss": sums["loss"],
        "kl": sums.get("kl", 0) / trained, "approx_kl": sums.get("approx_kl", 0) / trained,
        "clip_fraction": sums.get("clipped", 0) / trained, "entropy": sums.get("entropy", 0) / trained,
        "tokens_per_second": sum(values["tokens"]) / sum(seconds.values()),
    } | {f"seconds_{name}": value for name, value in seconds.items()}


def changes(first: dict, now: dict) -> str:
    """A step's success, in brackets how much it has risen since the first step, and its entropy."""
    parts = []
    for name in ("end_to_end", "recall"):
        if now[name] is not None:
            risen = "" if first[name] is None else f" ({now[name] - first[name]:+z.2f})"
            parts.append(f"{name} {now[name]:.2f}{risen}")
    return ", ".join([*parts, f"entropy {now['entropy']:.2f}"])


# ---- samples to read -----------------------------------------------------------------------------------


def sample_rows(trajectories: list) -> dict:
    """The trajectories of one document as a line of samples.jsonl."""
    document, rows = trajectories[0].document, []
    for t in trajectories:
        said = {"memories": t.memories, "searches": t.searches, "prediction": t.prediction}
        rows.append(said | {"reward": t.reward, "advantage": t.turns[0].advantage, "recall": recall_row(t)})
    about = {"question": document.question, "answers": document.answers, "document": document.chunks}
    return about | {"trajectories": rows}


def said_row(trajectory) -> dict:
    """What was asked in an evaluation, what was answered, and the last memory."""
    asked = {"question": trajectory.document.question, "answers": trajectory.document.answers}
    return asked | {"memory": trajectory.memory, "prediction": trajectory.prediction}


def recall_row(trajectory) -> dict | None:
    """What a trajectory was asked to recall, and its answers; None where nothing was asked."""
    target = trajectory.target
    if not target:
        return None
    answers = [
        {"text": turn.text.strip(), "reward": reward, "advantage": turn.advantage}
        for turn, reward in zip(trajectory.recalls, trajectory.recall_rewards, strict=True)
    ]
    asked = {"k": target.memory_turn, "l": target.chunk, "entity": target.entity, "section": target.masked_chunk}
    return asked | {"answers": answers}


def sample_text(trajectory, name: str = "R^E") -> str:
    """One trajectory in words: its memories, its answer with its reward, called `name`, and two answers of recall."""
    document = trajectory.document
    outcome = f"answered {trajectory.prediction!r}, {name} = {trajectory.reward:.2f}"
    lines = [f"{document.question} y = {document.answers}, {outcome}"]
    lines += [f"  m_{k}: {memory}" for k, memory in enumerate(trajectory.memories, 1)]
    lines += [f"  recall: {turn.text.strip()}" for turn in trajectory.recalls[:2]]
    return "\n".join(lines)


def sample_line(trajectory, width: int) -> str:
    """One trajectory in a line: y, the answer, and the memory that it was given from (/ is a line's end), cut there."""
    memory = " / ".join(filter(None, trajectory.memories[-1].splitlines())) if trajectory.memories else ""
    wanted = ", ".join(map(str, trajectory.document.answers))
    line = f"  y = {wanted}, answered {(trajectory.prediction or 'nothing').strip()}, from: {memory}"
    return line if len(line) <= width else f"{line[: width - 3]}..."
