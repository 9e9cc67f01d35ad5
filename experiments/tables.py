"""Tables and figures of what experiments/reproduce-tiny.sh measured: results-tiny.md, and PNGs next to it.

    python -m experiments.tables runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy has two 95 % intervals:
over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions about the same
subject were independent; and over the seeds' means (Student's t), which differ in training and questions.
"""

import json
import sys
from itertools import chain, cycle, product
from pathlib import Path

import numpy as np

from engine.errors import UserError, run_script
from engine.metrics import share
from look.compare import load_pyplot, paired_bootstrap

CLAIM = (2, 4, 8, 16)  # steps of task RL over which the claim is averaged
STARTS = {"base": "base", "MemTrain": "memtrain"}
FULL = "MemTrain, full"
MODELS = {
    "base": "base", FULL: "memtrain", "decoupled": "decoupled", "end-to-end": "end_to_end",
    "shuffled rewards": "shuffled_rewards",
}
DISTANCES = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-15": (9, 15)}  # k - l, in bins
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of seeds
BEGIN = "<!-- experiments/tables.py writes what follows -->"
END = "<!-- experiments/tables.py wrote what stands before -->"
Seeds = list[list[float]]  # scores of questions, a list for each seed
Series = dict[str, list[Seeds]]  # {name of a table row or a plotted line: its values from left to right}


class Runs:
    """A reproduction's folder. Raises UserError if a part is missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        settings = self.read("settings.json")
        self.seeds, self.budget = settings["seeds"], int(settings["budget"][0])
        self.steps, self.labels = [int(n) for n in settings["steps"]], [int(n) for n in settings["labels"]]

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; run experiments/reproduce-tiny.sh first") from None

    def read(self, name: str):
        return json.loads(self.text(name))

    def lengths(self, name: str) -> list[int]:
        """The chunks of the texts on which qa/NAME was measured."""
        return list(dict.fromkeys(row["chunks"] for row in self.read(f"{self.seeds[0]}/qa/{name}.json")))

    def scores(self, name: str, chunks: int, memory: str = "kept") -> Seeds:
        """The scores that `measure SEED/qa/NAME` wrote."""
        rows = [row for seed in self.seeds for row in self.read(f"{seed}/qa/{name}.json")]
        return [row["scores"] for row in rows if (row["chunks"], row["memory"]) == (chunks, memory)]

    def from_starts(self, ends: list, chunks: int) -> Series:
        """The scores of qa/RUN-END for each of these ends, starting from the base and from MemTrain."""
        starts = {f"{name}, {chunks} chunks": run for name, run in STARTS.items()}
        return {name: [self.scores(f"{run}-{end}", chunks) for end in ends] for name, run in starts.items()}

    def minutes(self, run: str, steps: int | None = None) -> float:
        """Training minutes of a run, up to step `steps` or in all; the mean over seeds."""
        lines = [line for seed in self.seeds for line in self.text(f"{seed}/{run}/metrics.jsonl").splitlines()[:steps]]
        seconds = [value for line in lines for name, value in json.loads(line).items() if name.startswith("seconds_")]
        return sum(seconds) / 60 / len(self.seeds)


# ---- numbers, tables, figures ------------------------------------------------------------------------------


def over_seeds(seeds: list) -> tuple[float, float]:
    """(mean of the seeds' means, half the width of its 95 % interval); a seed is a list of scores, or their mean."""
    means = [np.mean(seed) for seed in seeds]
    return float(np.mean(means)), STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def cell(seeds: Seeds) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": the interval over questions, then that over seeds."""
    scores = [*chain(*seeds)]
    return f"{share(sum(scores), len(scores))} ± {over_seeds(seeds)[1]:.2f}"


def compare(name: str, first: Seeds, second: Seeds) -> str:
    """A line with the mean of second - first on the same questions, both intervals, and each seed's mean."""
    mean, low, high = paired_bootstrap([*chain(*first)], [*chain(*second)])
    by_seed = [np.mean(after) - np.mean(before) for before, after in zip(first, second, strict=True)]
    middle, half = over_seeds(by_seed)
    seeds = ", ".join(f"{one:+.2f}" for one in by_seed)
    over_questions = f"over questions [{low:+.3f}, {high:+.3f}]"
    return f"- {name}: {mean:+.3f}, {over_questions}, over seeds [{middle - half:+.3f}, {middle + half:+.3f}] ({seeds})"


def table(head: list, *series: Series, cell=cell) -> list[str]:
    rows = [[name, *map(cell, points)] for own in series for name, points in own.items()]
    return [*(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)), ""]


def panels(series: dict[int, Series], label: str, *x: list) -> list[tuple]:
    """A row of panels for `draw`, one for each length; `x` is shared by all lines, or there is one for each."""
    return [(f"{n // min(series)} x the length", label, x, lines) for n, lines in series.items()]


def draw(rows: list[list[tuple[str, str, tuple[list, ...], Series]]], file: Path, pyplot) -> None:
    """Draw rows of panels. Words on the x axis are evenly spaced, numbers to scale; error bars are over seeds."""
    columns = len(rows[0])
    figure, grid = pyplot.subplots(len(rows), columns, figsize=(4.4 * columns, 3.6 * len(rows)), squeeze=False)
    for axes, (title, label, x, series) in zip(grid.flat, chain(*rows), strict=True):
        for (name, points), places in zip(series.items(), cycle(x), strict=False):
            means, bars = zip(*map(over_seeds, points), strict=True)
            axes.errorbar(places, means, bars, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=label, ylabel="exact match", ylim=(0, 1))
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=90)


# ---- the sections: each returns its lines of text and its figure's rows of panels ------------------------------


def claim(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by steps of task RL from both starts, the claim, and the comparison at equal minutes."""
    curves = {n: runs.from_starts(runs.steps, n) for n in runs.lengths("base-0")}
    lengths, last = list(curves), runs.steps[-1]
    text = ["![accuracy by steps and by minutes](curves.png)", "", "**Steps of task RL**, from both starts:", ""]
    for n in lengths:
        text += table([f"{n // lengths[0]} x the trained length", *runs.steps], curves[n])
    for n in lengths:
        starts = runs.from_starts(CLAIM, n).values()
        means = [[np.mean(seed, axis=0) for seed in zip(*own, strict=True)] for own in starts]  # of each question
        name = f"from MemTrain minus from the base, {n} chunks, mean of {CLAIM[0]} to {CLAIM[-1]} steps"
        text.append(compare(name, *means))
    own = runs.minutes("memtrain")
    times = {step: runs.minutes("base-task", step) for step in runs.steps}
    own_times = {step: own + runs.minutes("memtrain-task", step) for step in runs.steps}
    for step, minutes in own_times.items():
        equal = max((other for other, time in times.items() if time <= minutes), default=0)
        name = f"MemTrain and {step} steps ({minutes:.1f} minutes) minus the base's {equal} ({times[equal]:.1f})"
        for n in lengths[:2]:
            scores = runs.scores(f"base-{equal}", n), runs.scores(f"memtrain-{step}", n)
            text.append(compare(f"{name}, {n} chunks", *scores))
    closed = [*chain(*runs.scores(f"memtrain-{last}", lengths[0], "empty"))]
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {last} steps of task RL {times[last]:.1f}."]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    by_minutes = "minutes of training, MemTrain's own included", [*times.values()], [*own_times.values()]
    return text, [panels(curves, "steps of task RL", [*map(str, runs.steps)]), panels(curves, *by_minutes)]


def few_labels(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by the number of labelled questions, from both starts."""
    places, ends = [*runs.labels, "all"], [*(f"label-{label}" for label in runs.labels), runs.budget]
    series = {n: runs.from_starts(ends, n) for n in runs.lengths(f"base-{ends[0]}")}
    text = ["", f"**Labels**, {runs.budget} steps of task RL:", "", "![accuracy by labels](labels.png)", ""]
    text += table(["labelled questions", *places], *series.values())
    for (place, end), n in product(zip(places, ends, strict=True), series):
        name = f"from MemTrain minus from the base, {place} labels, {n} chunks"
        text.append(compare(name, runs.scores(f"base-{end}", n), runs.scores(f"memtrain-{end}", n)))
    return text, [panels(series, f"labelled questions, {runs.budget} steps of task RL", [*map(str, places)])]


def ablations(runs: Runs) -> tuple[list[str], list]:
    """Accuracy after each ablation of MemTrain, before and after task RL."""
    steps, lengths = (0, runs.budget), runs.lengths("decoupled-0")
    by_step = {
        step: {name: [runs.scores(f"{run}-{step}", n) for n in lengths] for name, run in MODELS.items()}
        for step in steps
    }
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{n} chunks, {step} steps" for step, n in product(steps, lengths))]
    text += table(head, {name: [*chain(*(own[name] for own in by_step.values()))] for name in MODELS})
    for first, second in [*((name, FULL) for name in MODELS if name != FULL), ("base", "shuffled rewards")]:
        for step, own in by_step.items():
            for n, *scores in zip(lengths, own[first], own[second], strict=True):
                text.append(compare(f"{second} minus {first}, {n} chunks, {step} steps of task RL", *scores))
    x = [*map(str, lengths)]
    return text, [[(f"{step} steps of task RL", "chunks", (x,), own) for step, own in by_step.items()]]


def habits(runs: Runs) -> tuple[list[str], list]:
    """Recall at each distance in the longest documents, and the share of unchanged memories."""
    unchanged, recalled = {}, {}
    for name, run in MODELS.items():
        by_seed = [runs.read(f"{seed}/habits/{run}.json") for seed in runs.seeds]  # for each seed, a row per length
        lengths = [row["chunks"] for row in by_seed[0]]
        bins = {place: ends for place, ends in DISTANCES.items() if ends[0] < lengths[-1]}
        unchanged[name] = [[row["unchanged"] for row in same] for same in zip(*by_seed, strict=True)]
        recalled[name] = [[recall_between(*ends, seed[-1]["recall"]) for seed in by_seed] for ends in bins.values()]
    head = ["± over seeds", *(f"unchanged memories, {n} chunks" for n in lengths)]
    head += [f"recall at distance {place}, {lengths[-1]} chunks" for place in bins]
    text = ["", "**Habits** on held-out masked documents, greedy:", "", "![recall by distance](distance.png)", ""]
    series = {name: unchanged[name] + recalled[name] for name in MODELS}
    text += table(head, series, cell=lambda seeds: "{:.2f} ± {:.2f}".format(*over_seeds(seeds)))
    return text, [[(f"recall, {lengths[-1]} chunks", "distance k - l", ([*bins],), recalled)]]


def recall_between(low: int, high: int, hits: dict[str, list[float]]) -> list[float]:
    """The recall rewards at distances from `low` to `high`."""
    return [hit for distance, own in hits.items() if low <= int(distance) <= high for hit in own]


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m experiments.tables RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    sections = {
        "curves": claim(runs), "labels": few_labels(runs), "ablations": ablations(runs), "distance": habits(runs),
    }
    body, page = "\n".join(chain(*(text for text, _ in sections.values()))), docs / "results-tiny.md"
    before, _, rest = page.read_text().partition(BEGIN) if page.exists() else ("", "", "")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{rest.partition(END)[2]}")
    print(body)
    if not (pyplot := load_pyplot()):
        return print("no figures: matplotlib is not installed (`pip install matplotlib`)")
    for name, (_, rows) in sections.items():
        draw(rows, docs / f"{name}.png", pyplot)


if __name__ == "__main__":
    run_script(main, __doc__)
