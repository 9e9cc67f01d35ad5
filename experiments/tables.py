"""The tables and figures of what experiments/reproduce-tiny.sh measured: results-tiny.md, and PNGs beside it.

    python -m experiments.tables runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy stands with two 95 %
intervals: over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions
about one subject were independent; and over the seeds' own means (Student's t), which differ in training and questions.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from engine.errors import UserError, run_script
from engine.report import load_pyplot, paired_bootstrap, share

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


class Runs:
    """A reproduction's folder. Raises UserError where a part is missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        settings = self.read("settings.json")
        self.seeds = settings["seeds"]
        self.steps, self.labels = [int(n) for n in settings["steps"]], [int(n) for n in settings["labels"]]
        self.budget = int(settings["budget"][0])
        if not 2 <= len(self.seeds) <= max(STUDENT):
            raise UserError(f"{folder}: {len(self.seeds)} seeds; an interval over seeds needs 2 to {max(STUDENT)}")

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; experiments/reproduce-tiny.sh makes it") from None

    def read(self, name: str):
        return json.loads(self.text(name))

    def scores(self, name: str, memory: str = "kept") -> Scores:
        """What `measure SEED/qa/name` wrote."""
        by_seed = [
            {row["chunks"]: row["scores"] for row in self.read(f"{seed}/qa/{name}.json") if row["memory"] == memory}
            for seed in self.seeds
        ]
        if any(found.keys() != by_seed[0].keys() for found in by_seed):
            raise UserError(f"{self.folder}: qa/{name}.json has other lengths in some seeds")
        return {chunks: [found[chunks] for found in by_seed] for chunks in sorted(by_seed[0])}

    def minutes(self, run: str, steps: int | None = None) -> float:
        """Training minutes of a run up to a step, or whole, the mean over seeds."""
        total = []
        for seed in self.seeds:
            rows = map(json.loads, self.text(f"{seed}/{run}/metrics.jsonl").splitlines()[:steps])
            total.append(sum(row[name] for row in rows for name in row if name.startswith("seconds_")) / 60)
        return float(np.mean(total))


# ---- numbers ---------------------------------------------------------------------------------------------


def flat(lists) -> list:
    return [item for items in lists for item in items]


def over_seeds(means: list[float]) -> float:
    """Half the width of the 95 % interval of the mean of these seeds' means."""
    return STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def seed_means(seeds: Seeds) -> list[float]:
    return [float(np.mean(seed)) for seed in seeds]


def mean_over(parts: list[Seeds]) -> Seeds:
    """Each question's mean over several measurements of it."""
    return [np.mean(same_seed, axis=0).tolist() for same_seed in zip(*parts, strict=True)]


def lengths_of(found: dict[str, list[Scores]]) -> list[int]:
    """The lengths at which all of these were measured."""
    first, *others = flat(found.values())
    return [length for length in first if all(length in other for other in others)]


# ---- text ------------------------------------------------------------------------------------------------


def cell(seeds: Seeds) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": over questions, then over seeds."""
    scores = flat(seeds)
    return f"{share(sum(scores), len(scores))} ± {over_seeds(seed_means(seeds)):.2f}"


def compare(name: str, first: Seeds, second: Seeds, results: dict) -> str:
    """The mean of second - first on the same questions, with both intervals, as a line of a list and in `results`."""
    mean, low, high = paired_bootstrap(flat(first), flat(second))
    by_seed = [float(np.mean(b) - np.mean(a)) for a, b in zip(first, second, strict=True)]
    middle, half = float(np.mean(by_seed)), over_seeds(by_seed)
    results[name] = {
        "mean": mean, "low": low, "high": high, "seeds_low": middle - half, "seeds_high": middle + half,
        "by_seed": by_seed,
    }
    seeds = ", ".join(f"{one:+.2f}" for one in by_seed)
    return (
        f"- {name}: {mean:+.3f}, over questions [{low:+.3f}, {high:+.3f}], over seeds "
        f"[{middle - half:+.3f}, {middle + half:+.3f}] ({seeds})"
    )


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def accuracies(head: str, places: list, found: dict[str, list[Scores]], lengths: list[int]) -> list[str]:
    """A table of `found`, which has the Scores of each place by name: a line per length and name."""
    rows = [
        [f"{name}, {length} chunks", *(cell(scores[length]) for scores in points)]
        for length in lengths for name, points in found.items()
    ]
    return [*markdown([head, *map(str, places)], rows), ""]


# ---- figures ---------------------------------------------------------------------------------------------


def draw_curves(steps: list[int], curves: dict[str, list[Scores]], times: dict, pyplot) -> None:
    """Accuracy by steps of task RL and by minutes, a column for each length; bands over seeds."""
    lengths = list(next(iter(curves.values()))[0])
    _, panels = pyplot.subplots(2, len(lengths), figsize=(4.2 * len(lengths), 7), sharey="col", squeeze=False)
    for height, label in enumerate(("steps of task RL", "minutes of training, MemTrain's own included")):
        for axes, length in zip(panels[height], lengths, strict=True):
            for name, points in curves.items():
                by_step = [seed_means(scores[length]) for scores in points]
                middle, half = np.mean(by_step, axis=1), np.array([over_seeds(means) for means in by_step])
                x = steps if height == 0 else times[name]
                axes.plot(x, middle, marker="o", label=f"from {name}")
                axes.fill_between(x, middle - half, middle + half, alpha=0.15)
            axes.set(xlabel=label, ylabel="exact match", ylim=(0, 1), title=f"{length // lengths[0]} x the length")
            if height == 0:
                axes.set_xscale("symlog", linthresh=2)
                axes.set_xticks(steps, labels=map(str, steps))
                axes.set_xticks([], minor=True)
                axes.set_xlim(-0.3, 1.2 * steps[-1])
            axes.legend(fontsize="small")


def draw_lines(label: str, places: list, panels: dict[str, dict[str, list[list[float]]]], pyplot) -> None:
    """A panel is {line: its seeds' means at each of the places}, by title; bars are intervals over seeds."""
    _, all_axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axes, (title, lines) in zip(all_axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            halves = [over_seeds(means) for means in points]
            axes.errorbar(range(len(places)), np.mean(points, axis=1), halves, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=label, ylim=(0, 1))
        axes.set_xticks(range(len(places)), labels=map(str, places))
        axes.legend(fontsize="small")


# ---- the sections: each returns its text and what draws its figure, and puts its numbers into `results` --------


def claim(runs: Runs, results: dict) -> tuple:
    """Accuracy by steps of task RL from both starts, the claim, and the same at equal minutes."""
    curves = {name: [runs.scores(f"{run}-{step}") for step in runs.steps] for name, run in STARTS.items()}
    base, trained = curves.values()
    text = ["![accuracy by steps and by minutes](curves.png)", "", "**Steps of task RL**, from both starts:", ""]
    for n in (lengths := list(base[0])):
        text += accuracies(f"{n // lengths[0]} x the trained length", runs.steps, curves, [n])
    claimed = [at for at, step in enumerate(runs.steps) if step in CLAIM]
    for n in lengths:
        first, second = (mean_over([points[at][n] for at in claimed]) for points in curves.values())
        name = f"from MemTrain minus from the base, {n} chunks, mean of {CLAIM[0]} to {CLAIM[-1]} steps"
        text.append(compare(name, first, second, results))
    own, last = runs.minutes("memtrain"), runs.steps[-1]
    times = results["minutes"] = {
        name: [runs.minutes(f"{run}-task", step) + own * (run == "memtrain") for step in runs.steps]
        for name, run in STARTS.items()
    }
    for step, minutes, scores in zip(runs.steps, times["MemTrain"], trained, strict=True):
        # The base at the last measured step that takes no longer.
        equal = max((at for at, time in enumerate(times["base"]) if time <= minutes), default=0)
        against = f"the base's {runs.steps[equal]} ({times['base'][equal]:.1f})"
        for n in lengths[:2]:
            name = f"MemTrain and {step} steps ({minutes:.1f} minutes) minus {against}, {n} chunks"
            text.append(compare(name, base[equal][n], scores[n], results))
    closed = flat(runs.scores(f"memtrain-{last}", "empty")[lengths[0]])
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {last} steps of task RL {times['base'][-1]:.1f}."]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    return text, partial(draw_curves, runs.steps, curves, times)


def few_labels(runs: Runs, results: dict) -> tuple:
    """Accuracy by the number of labelled questions, from both starts."""
    ends = [*(f"label-{label}" for label in runs.labels), runs.budget]
    found = {name: [runs.scores(f"{run}-{end}") for end in ends] for name, run in STARTS.items()}
    lengths, places = lengths_of(found), [*runs.labels, "all"]
    text = ["", f"**Labels**, {runs.budget} steps of task RL:", "", "![accuracy by labels](labels.png)", ""]
    text += accuracies("labelled questions", places, found, lengths)
    for place, first, second in zip(places, *found.values(), strict=True):
        for n in lengths[:2]:
            name = f"from MemTrain minus from the base, {place} labels, {n} chunks"
            text.append(compare(name, first[n], second[n], results))
    panels = {
        f"{n // lengths[0]} x the length": {
            f"from {name}": [seed_means(scores[n]) for scores in points] for name, points in found.items()
        }
        for n in lengths
    }
    return text, partial(draw_lines, f"labelled questions, {runs.budget} steps of task RL", places, panels)


def ablations(runs: Runs, results: dict) -> tuple:
    """Accuracy by what MemTrain was made of, before and after task RL."""
    steps = (0, runs.budget)
    found = {name: [runs.scores(f"{run}-{step}") for step in steps] for name, run in MODELS.items()}
    lengths = lengths_of(found)
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{n} chunks, {step} steps" for step in steps for n in lengths)]
    rows = [[name, *(cell(scores[n]) for scores in points for n in lengths)] for name, points in found.items()]
    text += [*markdown(head, rows), ""]
    pairs = [(name, FULL) for name in MODELS if name != FULL] + [("base", "shuffled rewards")]
    for first, second in pairs:
        for step, before, after in zip(steps, found[first], found[second], strict=True):
            for n in lengths[:2]:
                name = f"{second} minus {first}, {n} chunks, {step} steps of task RL"
                text.append(compare(name, before[n], after[n], results))
    panels = {
        f"{step} steps of task RL": {
            name: [seed_means(points[at][n]) for n in lengths] for name, points in found.items()
        }
        for at, step in enumerate(steps)
    }
    return text, partial(draw_lines, "chunks", lengths, panels)


def habits(runs: Runs, results: dict) -> tuple:
    """Recall at each distance in the longest documents, and the share of unchanged memories."""
    recalled, rows, lengths = {}, [], []
    for name, run in MODELS.items():
        measured = [runs.read(f"{seed}/habits/{run}.json") for seed in runs.seeds]  # a row for each length
        lengths = [row["chunks"] for row in measured[0]]
        unchanged = [[float(np.mean(row["unchanged"])) for row in same] for same in zip(*measured, strict=True)]
        recalled[name] = {
            place: [recall_between(low, high, seed[-1]["recall"]) for seed in measured]
            for place, (low, high) in DISTANCES.items() if low < lengths[-1]
        }
        cells = [*unchanged, *recalled[name].values()]
        rows.append([name, *(f"{np.mean(means):.2f} ± {over_seeds(means):.2f}" for means in cells)])
    places = list(recalled["base"])
    head = ["± over seeds", *(f"unchanged memories, {n} chunks" for n in lengths)]
    head += [f"recall at distance {place}, {lengths[-1]} chunks" for place in places]
    text = ["", "**Habits** on held-out masked documents, greedy:", "", "![recall by distance](distance.png)", ""]
    panels = {f"recall, {lengths[-1]} chunks": {name: list(means.values()) for name, means in recalled.items()}}
    return text + markdown(head, rows), partial(draw_lines, "distance k - l", places, panels)


def recall_between(low: int, high: int, hits: dict[str, list[float]]) -> float:
    """The mean of recall's rewards by distance, of those from `low` to `high`."""
    return float(np.mean(flat(rewards for distance, rewards in hits.items() if low <= int(distance) <= high)))


FIGURES = {"curves": claim, "labels": few_labels, "ablations": ablations, "distance": habits}


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m experiments.tables RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    if not (pyplot := load_pyplot()):
        print("no figures: matplotlib is not installed (`pip install matplotlib`)")
    results: dict = {}
    sections = {name: section(runs, results) for name, section in FIGURES.items()}
    (runs.folder / "results.json").write_text(json.dumps(results, indent=1))
    body, page = "\n".join(flat(text for text, _ in sections.values())), docs / "results-tiny.md"
    before, _, rest = page.read_text().partition(BEGIN) if page.exists() else ("", "", "")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}")
    print(body)
    if pyplot:
        for name, (_, draw) in sections.items():
            draw(pyplot)
            pyplot.tight_layout()
            pyplot.savefig(docs / f"{name}.png", dpi=90)
            pyplot.close()


if __name__ == "__main__":
    run_script(main, __doc__)
