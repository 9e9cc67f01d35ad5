"""The tables and figures of what experiments/reproduce-tiny.sh measured: results-tiny.md, and PNGs beside it.

    python -m experiments.tables runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy stands with two 95 %
intervals: over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions
about one subject were independent; and over the seeds' own means (Student's t), which differ in training and questions.
"""

import json
import sys
from itertools import chain
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
Scores = dict[int, Seeds]  # by chunks
Found = dict[str, dict[object, Scores]]  # by the name of a start or a model, then by the place on a figure's x
Lines = dict[str, tuple[list, Seeds]]  # by name: x, and the seeds' means at each x


class Runs:
    """A reproduction's folder. Raises UserError where a part is missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        settings = self.read("settings.json")
        self.seeds = settings["seeds"]
        self.steps, self.labels = [int(n) for n in settings["steps"]], [int(n) for n in settings["labels"]]
        self.budget = int(settings["budget"][0])

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; experiments/reproduce-tiny.sh makes it") from None

    def read(self, name: str):
        return json.loads(self.text(name))

    def scores(self, name: str, memory: str = "kept") -> Scores:
        """What `measure SEED/qa/name` wrote."""
        found: Scores = {}
        for seed in self.seeds:
            for row in self.read(f"{seed}/qa/{name}.json"):
                if row["memory"] == memory:
                    found.setdefault(row["chunks"], []).append(row["scores"])
        return found

    def found(self, runs: dict[str, str], ends: dict) -> Found:
        """The scores of qa/RUN-END, of all these runs and ends."""
        return {name: {at: self.scores(f"{run}-{end}") for at, end in ends.items()} for name, run in runs.items()}

    def minutes(self, run: str, steps: int | None = None) -> float:
        """Training minutes of a run up to a step, or whole, the mean over seeds."""
        logs = [self.text(f"{seed}/{run}/metrics.jsonl").splitlines()[:steps] for seed in self.seeds]
        rows = [json.loads(line) for log in logs for line in log]
        seconds = sum(value for row in rows for name, value in row.items() if name.startswith("seconds_"))
        return seconds / 60 / len(self.seeds)


# ---- numbers ---------------------------------------------------------------------------------------------


def over_seeds(means: list[float]) -> float:
    """Half the width of the 95 % interval of the mean of these seeds' means."""
    return STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def seed_means(seeds: Seeds) -> list[float]:
    return [float(np.mean(seed)) for seed in seeds]


def cell(seeds: Seeds) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": over questions, then over seeds."""
    scores = [*chain(*seeds)]
    return f"{share(sum(scores), len(scores))} ± {over_seeds(seed_means(seeds)):.2f}"


def compare(name: str, first: Seeds, second: Seeds) -> str:
    """The mean of second - first on the same questions, with both intervals and each seed's own."""
    mean, low, high = paired_bootstrap([*chain(*first)], [*chain(*second)])
    by_seed = [after - before for before, after in zip(seed_means(first), seed_means(second), strict=True)]
    middle, half = float(np.mean(by_seed)), over_seeds(by_seed)
    seeds = ", ".join(f"{one:+.2f}" for one in by_seed)
    over_questions = f"over questions [{low:+.3f}, {high:+.3f}]"
    return f"- {name}: {mean:+.3f}, {over_questions}, over seeds [{middle - half:+.3f}, {middle + half:+.3f}] ({seeds})"


# ---- tables and figures ----------------------------------------------------------------------------------


def markdown(head: list, rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)]


def accuracies(head: str, found: Found, lengths: list[int]) -> list[str]:
    """A table with a line per length and name, and a column per place."""
    rows = [
        [f"{name}, {n} chunks", *(cell(scores[n]) for scores in own.values())]
        for n in lengths for name, own in found.items()
    ]
    return [*markdown([head, *next(iter(found.values()))], rows), ""]


def from_starts(found: Found, n: int, x: dict[str, list] | None = None) -> Lines:
    """Accuracy at n chunks by place, from each start; `x` are other places than those of `found`."""
    lines = {}
    for name, own in found.items():
        places = x[name] if x else [*map(str, own)]
        lines[f"from {name}"] = places, [seed_means(scores[n]) for scores in own.values()]
    return lines


def draw(rows: list[list[tuple[str, str, Lines]]], pyplot) -> None:
    """Panels, each (title, label of x, lines). Words on x stand evenly, numbers where they are; bars are over seeds."""
    columns = len(rows[0])
    _, grid = pyplot.subplots(len(rows), columns, figsize=(4.4 * columns, 3.6 * len(rows)), squeeze=False)
    for axes, (title, label, lines) in zip(grid.flat, chain(*rows), strict=True):
        for name, (x, points) in lines.items():
            halves = [over_seeds(means) for means in points]
            axes.errorbar(x, np.mean(points, axis=1), halves, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=label, ylabel="exact match", ylim=(0, 1))
        axes.legend(fontsize="small")


# ---- the sections: each returns its lines of text, and the panels of its figure -----------------------------


def claim(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by steps of task RL from both starts, the claim, and the same at equal minutes."""
    curves = runs.found(STARTS, {step: step for step in runs.steps})
    base, trained = curves.values()
    lengths, last = list(base[0]), runs.steps[-1]
    text = ["![accuracy by steps and by minutes](curves.png)", "", "**Steps of task RL**, from both starts:", ""]
    for n in lengths:
        text += accuracies(f"{n // lengths[0]} x the trained length", curves, [n])
    for n in lengths:
        # Each question's mean over the steps.
        first, second = (
            [np.mean(seed, axis=0).tolist() for seed in zip(*(own[step][n] for step in CLAIM), strict=True)]
            for own in curves.values()
        )
        name = f"from MemTrain minus from the base, {n} chunks, mean of {CLAIM[0]} to {CLAIM[-1]} steps"
        text.append(compare(name, first, second))
    own = runs.minutes("memtrain")
    times = {step: runs.minutes("base-task", step) for step in runs.steps}
    own_times = {step: own + runs.minutes("memtrain-task", step) for step in runs.steps}
    for step, minutes in own_times.items():
        equal = max((other for other, time in times.items() if time <= minutes), default=0)
        against = f"the base's {equal} ({times[equal]:.1f})"
        for n in lengths[:2]:
            name = f"MemTrain and {step} steps ({minutes:.1f} minutes) minus {against}, {n} chunks"
            text.append(compare(name, base[equal][n], trained[step][n]))
    closed = [*chain(*runs.scores(f"memtrain-{last}", "empty")[lengths[0]])]
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {last} steps of task RL {times[last]:.1f}."]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    titles = {n: f"{n // lengths[0]} x the length" for n in lengths}
    x = {"base": [*times.values()], "MemTrain": [*own_times.values()]}
    return text, [
        [(titles[n], "steps of task RL", from_starts(curves, n)) for n in lengths],
        [(titles[n], "minutes of training, MemTrain's own included", from_starts(curves, n, x)) for n in lengths],
    ]


def few_labels(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by the number of labelled questions, from both starts."""
    ends = {label: f"label-{label}" for label in runs.labels} | {"all": runs.budget}
    found, label = runs.found(STARTS, ends), f"labelled questions, {runs.budget} steps of task RL"
    lengths = list(found["base"][runs.labels[0]])
    text = ["", f"**Labels**, {runs.budget} steps of task RL:", "", "![accuracy by labels](labels.png)", ""]
    text += accuracies("labelled questions", found, lengths)
    for place in ends:
        for n in lengths[:2]:
            name = f"from MemTrain minus from the base, {place} labels, {n} chunks"
            text.append(compare(name, found["base"][place][n], found["MemTrain"][place][n]))
    return text, [[(f"{n // lengths[0]} x the length", label, from_starts(found, n)) for n in lengths]]


def ablations(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by what MemTrain was made of, before and after task RL."""
    steps = (0, runs.budget)
    found = runs.found(MODELS, {step: step for step in steps})
    lengths = list(found["decoupled"][0])
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{n} chunks, {step} steps" for step in steps for n in lengths)]
    rows = [[name, *(cell(own[step][n]) for step in steps for n in lengths)] for name, own in found.items()]
    text += [*markdown(head, rows), ""]
    for first, second in [*((name, FULL) for name in MODELS if name != FULL), ("base", "shuffled rewards")]:
        for step in steps:
            for n in lengths[:2]:
                name = f"{second} minus {first}, {n} chunks, {step} steps of task RL"
                text.append(compare(name, found[first][step][n], found[second][step][n]))
    panels = []
    for step in steps:
        points = {name: [seed_means(own[step][n]) for n in lengths] for name, own in found.items()}
        lines = {name: ([*map(str, lengths)], own) for name, own in points.items()}
        panels.append((f"{step} steps of task RL", "chunks", lines))
    return text, [panels]


def habits(runs: Runs) -> tuple[list[str], list]:
    """Recall at each distance in the longest documents, and the share of unchanged memories."""
    rows, lines = [], {}
    for name, run in MODELS.items():
        by_seed = [runs.read(f"{seed}/habits/{run}.json") for seed in runs.seeds]  # of each seed a row for each length
        lengths = [row["chunks"] for row in by_seed[0]]
        bins = {place: bounds for place, bounds in DISTANCES.items() if bounds[0] < lengths[-1]}
        unchanged = [seed_means([row["unchanged"] for row in same]) for same in zip(*by_seed, strict=True)]
        recalled = [[recall_between(*bounds, seed[-1]["recall"]) for seed in by_seed] for bounds in bins.values()]
        rows.append([name, *(f"{np.mean(means):.2f} ± {over_seeds(means):.2f}" for means in unchanged + recalled)])
        lines[name] = list(bins), recalled
    head = ["± over seeds", *(f"unchanged memories, {n} chunks" for n in lengths)]
    head += [f"recall at distance {place}, {lengths[-1]} chunks" for place in bins]
    text = ["", "**Habits** on held-out masked documents, greedy:", "", "![recall by distance](distance.png)", ""]
    return text + markdown(head, rows), [[(f"recall, {lengths[-1]} chunks", "distance k - l", lines)]]


def recall_between(low: int, high: int, hits: dict[str, list[float]]) -> float:
    """The mean of recall's rewards by distance, of those from `low` to `high`."""
    return float(np.mean([hit for distance, own in hits.items() if low <= int(distance) <= high for hit in own]))


FIGURES = {"curves": claim, "labels": few_labels, "ablations": ablations, "distance": habits}


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m experiments.tables RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    sections = {name: section(runs) for name, section in FIGURES.items()}
    body, page = "\n".join(chain(*(text for text, _ in sections.values()))), docs / "results-tiny.md"
    before, _, rest = page.read_text().partition(BEGIN) if page.exists() else ("", "", "")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}")
    print(body)
    if not (pyplot := load_pyplot()):
        return print("no figures: matplotlib is not installed (`pip install matplotlib`)")
    for name, (_, panels) in sections.items():
        draw(panels, pyplot)
        pyplot.tight_layout()
        pyplot.savefig(docs / f"{name}.png", dpi=90)
        pyplot.close()


if __name__ == "__main__":
    run_script(main, __doc__)
