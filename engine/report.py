"""Numbers for people: accuracies with their intervals, as rows, tables and plots; and a step's metrics."""

import json
import math
import os
from pathlib import Path

import numpy as np

from engine.errors import UserError
from text.matching import KINDS, kind


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


def paired_bootstrap(first: list[float], second: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(mean of second - first, 95 % interval) on the same questions, by drawing the questions again (Efron 1979)."""
    difference = np.asarray(second) - np.asarray(first)  # (questions,)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(1)  # (draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


# ---- an evaluation -------------------------------------------------------------------------------------


def row(when: str, task: str, chunks: int, memory: str, scores: dict[int, float], **more: float) -> dict:
    """One accuracy: of a task, at a length, with a memory or a control in its place; `more` are further measures.

    `scores` are by the number of their document. Row["scores"] and row["documents"] are in the order of these numbers,
    however many processes there were.
    """
    documents = sorted(scores)
    values = [scores[number] for number in documents]
    low, high = wilson(sum(values), len(values))
    place = {"when": when, "task": task, "chunks": chunks, "memory": memory, "n": len(values)}
    accuracy = {"accuracy": float(np.mean(values)), "low": low, "high": high}
    return place | accuracy | more | {"scores": values, "documents": documents}


def paired(first: dict, second: dict) -> tuple[list[float], list[float]]:
    """The scores of two rows on the documents that both have."""
    one, other = (dict(zip(row["documents"], row["scores"], strict=True)) for row in (first, second))
    shared = sorted(one.keys() & other.keys())
    return [one[number] for number in shared], [other[number] for number in shared]


def table(rows: list[dict]) -> str:
    """The rows as a markdown table: a line per task, memory and measure, a column per number of chunks."""
    lengths = sorted({row["chunks"] for row in rows})
    if not rows:
        return "no document could be built, so nothing was evaluated"
    unit = unit_of(rows)
    heads = " | ".join(f"{length} {unit}" for length in lengths)
    lines = [f"| | memory | n | {heads} |", "|---|---|---|" + "---|" * len(lengths)]
    for key in dict.fromkeys((row["task"], row["when"], row["memory"]) for row in rows):
        task, when, memory = key
        mine = {row["chunks"]: row for row in rows if (row["task"], row["when"], row["memory"]) == key}
        n = count_of(mine.values())
        for measure, name in (("accuracy", ""), ("f1", ", F1"), ("substring", ", substring")):
            if measure in next(iter(mine.values())):
                cells = " | ".join(cell(mine.get(length), measure) for length in lengths)
                lines.append(f"| {task}, {when}{name} | {memory} | {n} | {cells} |")
    return "\n".join(lines)


def unit_of(rows: list[dict]) -> str:
    """The unit of the rows' lengths."""
    return "objectives" if rows[0]["task"] == "searchqa" else "chunks"


def count_of(rows) -> str:
    """How many documents the rows stand on: "64", or the least and the most, "60-64"."""
    counts = sorted({row["n"] for row in rows})
    return "-".join(map(str, counts[:: max(1, len(counts) - 1)]))


def cell(row: dict | None, measure: str) -> str:
    if row is None:
        return "-"
    interval = f" [{row['low']:.2f}, {row['high']:.2f}]" if measure == "accuracy" else ""
    return f"{row[measure]:.2f}{interval}"


def differences(rows: list[dict]) -> list[str]:
    """For each row of a further model a line: its scores minus the first model's, on the same questions."""
    lines = []
    for row in rows:
        first = next(r for r in rows if all(r[key] == row[key] for key in ("task", "chunks", "memory")))
        if first is not row:
            scores = paired(first, row)
            if not scores[0]:
                continue
            mean, low, high = paired_bootstrap(*scores)
            names = f"{row['when']} - {first['when']}, {row['task']}, {row['memory']}, {row['chunks']}"
            lines.append(f"{names}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def check_files(rows: Path, picture: str | None, name: str = "--plot") -> None:
    """Raises UserError for files that can't be written: an evaluation can take hours, so they are tried first.

    `name` is what the command line calls the picture.
    """
    for file in map(Path, filter(None, (rows, picture))):
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f"{file}: its folder is missing or can't be written to; name another")
        if file.is_dir():
            raise UserError(f"{file}: is a folder; name a file in it")
    if picture and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{name} {picture}: must end in .png, .svg or .pdf")
    if picture and not load_pyplot():
        raise UserError(f"{name} {picture}: matplotlib is not installed; run `pip install matplotlib`")


def load_pyplot():
    """matplotlib's pyplot, drawing to files only; None where it isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(rows: list[dict], file: str) -> None:
    """Accuracy by number of chunks, a line per model, task and memory, with its 95 % interval. Needs matplotlib."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in dict.fromkeys((row["when"], row["task"], row["memory"]) for row in rows):
        mine = [row for row in rows if (row["when"], row["task"], row["memory"]) == key]
        mine = sorted(mine, key=lambda row: row["chunks"])
        x, y = [row["chunks"] for row in mine], [row["accuracy"] for row in mine]
        spread = [[row["accuracy"] - row["low"] for row in mine], [row["high"] - row["accuracy"] for row in mine]]
        style = "-" if key[2] == "kept" else "--"
        label = f"{key[1]}, {key[0]}" + ("" if key[2] == "kept" else f", {key[2]} memory")
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=2, label=label, linestyle=style)
    axes.set_xscale("log", base=2)
    axes.set(ylim=(-0.02, 1), xlabel=unit_of(rows), ylabel="accuracy, greedy")
    lengths = sorted({row["chunks"] for row in rows})
    axes.set_xticks(lengths, labels=map(str, lengths))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150, bbox_inches="tight")


def write_page(folder: str) -> None:
    """The run in a folder as a page to look at. Raises UserError where it holds no run."""
    from engine.page import write  # here, since page.py imports this file

    print(f"look at {write(folder)}")


# ---- a step --------------------------------------------------------------------------------------------


def step_metrics(rows: dict[str, list], sums: dict[str, float], seconds: dict[str, float]) -> dict:
    """A line of metrics.jsonl, of all processes' samples (`rows`) and updates (`sums`); see docs/metrics.md."""
    numbers = {name: values for name, values in rows.items() if name != "answers"}
    mean = {name: float(np.mean(values)) if values else None for name, values in numbers.items()}
    std = {name: float(np.std(values)) if values else None for name, values in numbers.items()}
    trained = max(sums.get("tokens", 0), 1)
    kinds = [kind(answer) for answer in rows["answers"]]
    padding, tokens = sum(rows["padding"]), sum(rows["prompt_tokens"]) + sum(rows["completion_tokens"])
    return {
        "end_to_end": mean["correct"], "end_to_end_std": std["correct"],
        "recall": mean["recalled"], "recall_std": std["recalled"],
        "reward": mean["reward"], "reward_std": std["reward"],
        "degenerate": mean["degenerate"], "leaky": sum(rows["leaks"]) / sum(rows["draws"]),
        "recall_leaky": mean["recall_leaky"],
    } | {f"y_{name}": kinds.count(name) / len(kinds) for name in KINDS} | {
        "truncated": mean["truncated"], "unboxed": mean["unboxed"], "memory_tokens": mean["memory_tokens"],
        "loss": sums["loss"], "kl": sums.get("kl", 0) / trained, "approx_kl": sums.get("approx_kl", 0) / trained,
        "clip_fraction": sums.get("clipped", 0) / trained, "entropy": sums.get("entropy", 0) / trained,
        "padding_rollout": padding / (tokens + padding),
        "padding_update": 1 - sums["used_tokens"] / sums["padded_tokens"] if sums["padded_tokens"] else 0.0,
        "tokens_per_second": tokens / sum(seconds.values()),
    } | {f"seconds_{name}": value for name, value in seconds.items()}


def step_rows(
    trajectories: list, targets: list, recalls: list[list], groups: list, em: list[float], rewards: list[float],
    recall_rewards: list[list[float]],
) -> dict[str, list]:
    """The values of which the metrics are means or sums: one per sample, turn, group or document."""
    documents = list({id(t.document): t.document for t in trajectories}.values())  # each once
    all_turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    all_turns += [turn for answers in recalls for turn in answers]
    return {
        "correct": em,
        "reward": rewards,
        "recalled": [reward for answers in recall_rewards for reward in answers],
        "degenerate": [group.degenerate for group in groups],
        "leaks": [document.leaks for document in documents],
        "draws": [1 + document.redraws for document in documents],
        "answers": [first_answer(document.answers) for document in documents],
        "recall_leaky": [target.leaky for target in targets if target],
        "truncated": [not turn.ended for turn in all_turns],
        "unboxed": [trajectory.prediction is None for trajectory in trajectories],
        "memory_tokens": [len(turn.completion_ids) for t in trajectories for turn in t.turns[:-1]],
        "prompt_tokens": [len(turn.prompt_ids) for turn in all_turns],
        "completion_tokens": [len(turn.completion_ids) for turn in all_turns],
        "padding": [turn.padding for turn in all_turns],
    }


def first_answer(answers: list) -> str:
    """The first answer; where `answers` holds the answers of several questions (MEM1), the first question's."""
    return answers[0] if isinstance(answers[0], str) else answers[0][0]


def json_line(values: dict) -> str:
    """A line of JSON; numbers that are not finite, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


# ---- samples to read -----------------------------------------------------------------------------------


def sample_rows(trajectories: list, targets: list, recalls: list[list], rewards: list, recall_rewards: list) -> dict:
    """The trajectories of one document as a line of samples.jsonl, for the page of `eval.py --report`."""
    document, rows = trajectories[0].document, []
    for trajectory, target, turns, reward, own in zip(
        trajectories, targets, recalls, rewards, recall_rewards, strict=True
    ):
        asked = target and {
            "k": target.memory_turn, "l": target.chunk, "entity": target.entity, "section": target.section,
            "answers": [
                {"text": turn.text.strip(), "reward": value, "advantage": turn.advantage}
                for turn, value in zip(turns, own, strict=True)
            ],
        }
        rows.append({
            "memories": trajectory.memories, "searches": trajectory.searches, "prediction": trajectory.prediction,
            "reward": reward, "advantage": trajectory.turns[0].advantage, "recall": asked,
        })
    about = {"question": document.question, "answers": document.answers, "document": document.chunks}
    return about | {"trajectories": rows}


def sample_text(trajectory, recalls: list, score: float, name: str = "R^E") -> str:
    """One trajectory in words: its memories, its answer with the score of this name, and two answers of recall."""
    document = trajectory.document
    outcome = f"answered {trajectory.prediction!r}, {name} = {score:.2f}"
    lines = [f"{document.question} y = {document.answers}, {outcome}"]
    lines += [f"  m_{k}: {memory}" for k, memory in enumerate(trajectory.memories, 1)]
    lines += [f"  recall: {turn.text.strip()}" for turn in recalls[:2]]
    return "\n".join(lines)
