"""Two models compared on the same questions, and accuracies by length as a picture (which needs matplotlib)."""

from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.files import check_writable
from engine.metrics import unit_of


def paired_bootstrap(first: list[float], second: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(mean of second - first, 95 % interval) on the same questions, by drawing the questions again (Efron 1979)."""
    difference = np.asarray(second) - np.asarray(first)  # (questions,)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(1)  # (draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def differences(rows: list[dict]) -> list[str]:
    """For each row of a further model a line: its scores minus the first model's, on the questions that both have."""
    lines = []
    for row in rows:
        first = next(r for r in rows if all(r[key] == row[key] for key in ("task", "chunks", "memory")))
        old, new = (dict(zip(r["documents"], r["scores"], strict=True)) for r in (first, row))
        shared = sorted(old.keys() & new.keys())
        if shared and first is not row:
            mean, low, high = paired_bootstrap([old[number] for number in shared], [new[number] for number in shared])
            names = f"{row['when']} - {first['when']}, {row['task']}, {row['memory']}, {row['chunks']}"
            lines.append(f"{names}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


# ---- a picture --------------------------------------------------------------------------------------------


def check_picture(picture: str, name: str = "--plot") -> None:
    """Raises UserError for a picture, given by the argument `name`, that can't be drawn: told before hours of work."""
    check_writable(Path(picture))
    if Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{name} {picture}: must end in .png, .svg or .pdf")
    if not load_pyplot():
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
        mine.sort(key=lambda row: row["chunks"])
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
