"""The tables and figures of what experiments/reproduce-tiny.sh measured: results-tiny.md, and PNGs beside it.

    python -m experiments.tables runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy stands with two 95 %
intervals: over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions
about one subject were independent; and over the seeds' own means (Student's t), which differ in training and questions.

The ceiling is the base, untrained, told to focus on the same questions: as well as a policy can learn to read.
"""

import json
import sys
from itertools import chain, cycle, product
from pathlib import Path

import numpy as np

from engine.errors import UserError, run_script
from engine.metrics import share
from look.compare import load_pyplot, paired_bootstrap
from tasks import questions

CEILING = "ceiling: the base, told to focus"
STARTS = {"base": "base", "MemTrain": "memtrain"}
FULL = "MemTrain, full"
MODELS = {
    "base": "base", FULL: "memtrain", "decoupled": "decoupled", "end-to-end": "end_to_end",
    "shuffled rewards": "shuffled_rewards",
}
CONTROL = "base", "shuffled rewards"
HOPS = {"one hop": "single", "two hops": "bridge"}  # and the question file's word
DISTANCES = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-15": (9, 15)}  # k - l, in bins
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of seeds
BEGIN = "<!-- experiments/tables.py writes what follows -->"
END = "<!-- experiments/tables.py wrote what stands before -->"
Seeds = list[list[float]]  # scores of questions, a list for each seed
Series = dict[str, list[Seeds]]  # by the name of a line, of a table or a figure: its values from left to right


class Runs:
    """A reproduction's folder. Raises UserError where a part is missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        settings = self.read("settings.json")

        def numbers(name: str) -> list[int]:
            return [int(n) for n in settings[name]]

        self.seeds, self.search_seeds = settings["seeds"], settings["search_seeds"]
        self.steps, self.search_steps, self.labels = map(numbers, ("steps", "search_steps", "labels"))
        self.lengths, self.shorter = map(numbers, ("lengths", "shorter"))
        (self.budget,), (self.chunks,) = map(numbers, ("budget", "chunks"))
        self.claimed = self.lengths[1]  # the claim's length
        self.claimed_steps = [step for step in self.steps if 0 < step <= self.budget]
        files = {seed: self.text(f"test-{seed}.jsonl").splitlines() for seed in self.seeds}
        self.types = {seed: [json.loads(line)["type"] for line in lines] for seed, lines in files.items()}
        self.asked: dict[tuple, list[int]] = {}  # by seed and task, the questions' numbers: all files have the same

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; experiments/reproduce-tiny.sh makes it") from None

    def read(self, name: str):
        return json.loads(self.text(name))

    def scores(self, name: str, chunks: int, memory: str = "kept", hops: str = "", seeds: list | None = None) -> Seeds:
        """What `measure SEED/qa/NAME` wrote; of `hops`, "single" or "bridge", only. Raises UserError.

        A question's number is its place in the order in which the seed draws them, not its line in the file.
        """
        found = []
        for seed in seeds or self.seeds:
            file = f"{seed}/qa/{name}.json"
            rows = {(row["chunks"], row["memory"]): row for row in self.read(file)}
            row = rows.get((chunks, memory))
            if not row or self.asked.setdefault((seed, row["task"]), row["documents"]) != row["documents"]:
                raise UserError(f"{self.folder / file}: at {chunks} chunks not the questions that other files ask")
            kinds = [questions.draw(self.types[seed], number, int(seed)) for number in row["documents"]]
            found.append([one for one, kind in zip(row["scores"], kinds, strict=True) if hops in ("", kind)])
        return found

    def from_starts(self, ends: list, chunks: int, hops: str = "") -> Series:
        """From the base and from MemTrain: the scores of qa/RUN-END for each of these ends. Beneath: the ceiling."""
        names = {start: [f"{run}-{end}" for end in ends] for start, run in STARTS.items()}
        names[CEILING] = ["ceiling"] * len(ends)
        lines = {f"{line}, {chunks} chunks": own for line, own in names.items()}
        return {line: [self.scores(name, chunks, hops=hops) for name in own] for line, own in lines.items()}

    def times(self, chunks: int) -> str:
        return f"{chunks / self.chunks:g} x the trained length"

    def minutes(self, run: str, steps: int | None = None) -> float:
        """Training minutes of a run up to a step, or whole, the mean over seeds."""
        lines = [line for seed in self.seeds for line in self.text(f"{seed}/{run}/metrics.jsonl").splitlines()[:steps]]
        seconds = [value for line in lines for name, value in json.loads(line).items() if name.startswith("seconds_")]
        return sum(seconds) / 60 / len(self.seeds)


# ---- numbers, tables, figures ------------------------------------------------------------------------------


def over_seeds(seeds: list) -> tuple[float, float]:
    """The mean of the seeds' means, and half the width of its 95 % interval; a seed is its scores, or their mean."""
    means = [np.mean(seed) for seed in seeds]
    return float(np.mean(means)), STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def cell(seeds: Seeds) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": over questions, then over seeds."""
    scores = [*chain(*seeds)]
    return f"{share(sum(scores), len(scores))} ± {over_seeds(seeds)[1]:.2f}"


def of_seeds(seeds: list) -> str:
    """"0.25 ± 0.04": over seeds."""
    return "{:.2f} ± {:.2f}".format(*over_seeds(seeds))


def compare(name: str, first: Seeds, second: Seeds) -> str:
    """The mean of second - first on the same questions, with both intervals and each seed's own."""
    mean, low, high = paired_bootstrap([*chain(*first)], [*chain(*second)])
    by_seed = [np.mean(after) - np.mean(before) for before, after in zip(first, second, strict=True)]
    middle, half = over_seeds(by_seed)
    seeds = ", ".join(f"{one:+.2f}" for one in by_seed)
    over_questions = f"over questions [{low:+.3f}, {high:+.3f}]"
    return f"- {name}: {mean:+.3f}, {over_questions}, over seeds [{middle - half:+.3f}, {middle + half:+.3f}] ({seeds})"


def table(head: list, *series: Series, cell=cell) -> list[str]:
    rows = [[name, *map(cell, points)] for own in series for name, points in own.items()]
    return [*(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)), ""]


def panels(runs: Runs, series: dict[int, Series], label: str, *x: list) -> list[tuple]:
    """A row for `draw`, a panel for each length; `x` for all lines, or one for each."""
    return [(runs.times(n), label, x, lines) for n, lines in series.items()]


def draw(rows: list[list[tuple[str, str, tuple[list, ...], Series]]], file: Path, pyplot) -> None:
    """Rows of panels. Words on x stand evenly, numbers where they are; bars are over seeds, the ceiling is dashed."""
    columns = len(rows[0])
    figure, grid = pyplot.subplots(len(rows), columns, figsize=(4.4 * columns, 3.6 * len(rows)), squeeze=False)
    for axes, (title, label, x, series) in zip(grid.flat, chain(*rows), strict=True):
        for (name, points), places in zip(series.items(), cycle(x), strict=False):
            means, bars = zip(*map(over_seeds, points), strict=True)
            if name.startswith(CEILING):
                axes.plot(places, means, "k--", label=name)
            else:
                axes.errorbar(places, means, bars, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=label, ylabel="exact match", ylim=(0, 1))
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=90)


# ---- the sections: each returns its lines of text, and its figure's rows of panels, if any ---------------------


def claim(runs: Runs) -> tuple[list[str], list]:
    """The claim and its control; accuracy by steps of task RL from both starts, and at equal minutes."""
    curves = {n: runs.from_starts(runs.steps, n) for n in runs.lengths}
    text = [f"**The claim**, at {runs.times(runs.claimed)}, and the control whose rewards are dealt out at random:", ""]
    text.append(gain(runs, runs.claimed))
    text += [difference(runs, *CONTROL, runs.claimed, step) for step in (0, runs.budget)]
    text += ["", "![accuracy by steps and by minutes](curves.png)", "", "**Steps of task RL**, from both starts:", ""]
    for n, lines in curves.items():
        text += table([runs.times(n), *runs.steps], lines)
    text += [gain(runs, n) for n in runs.lengths if n != runs.claimed]
    own, last = runs.minutes("memtrain"), runs.steps[-1]
    times = {step: runs.minutes("base-task", step) for step in runs.steps}
    own_times = {step: own + runs.minutes("memtrain-task", step) for step in runs.steps}
    for step, minutes in own_times.items():
        equal = max((other for other, time in times.items() if time <= minutes), default=0)
        name = f"MemTrain and {step} steps ({minutes:.1f} minutes) minus the base's {equal} ({times[equal]:.1f})"
        for n in runs.shorter:
            scores = runs.scores(f"base-{equal}", n), runs.scores(f"memtrain-{step}", n)
            text.append(compare(f"{name}, {n} chunks", *scores))
    closed = [*chain(*runs.scores(f"memtrain-{last}", runs.lengths[0], "empty"))]
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {last} steps of task RL {times[last]:.1f}."]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    x = [*times.values()], [*own_times.values()]
    across = [0, *x[1][1:]]  # the ceiling's x, from end to end
    by_minutes = panels(runs, curves, "minutes of training, MemTrain's own included", *x, across)
    return text, [panels(runs, curves, "steps of task RL", [*map(str, runs.steps)]), by_minutes]


def gain(runs: Runs, chunks: int) -> str:
    """How far MemTrain is ahead, in the mean of the claim's steps."""
    steps = runs.claimed_steps
    base, trained, _ = runs.from_starts(steps, chunks).values()
    means = [[np.mean(seed, axis=0) for seed in zip(*own, strict=True)] for own in (base, trained)]  # of each question
    where = f"{chunks} chunks, mean of {steps[0]} to {steps[-1]} steps"
    return compare(f"from MemTrain minus from the base, {where}", *means)


def difference(runs: Runs, first: str, second: str, chunks: int, step: int) -> str:
    scores = [runs.scores(f"{MODELS[name]}-{step}", chunks) for name in (first, second)]
    return compare(f"{second} minus {first}, {chunks} chunks, {step} steps of task RL", *scores)


def of_ceiling(runs: Runs) -> tuple[list[str], list]:
    """Each start's accuracy by steps, divided by the ceiling's on the same questions, seed by seed."""
    reached = {}
    for n in runs.lengths:
        *starts, (_, (ceiling, *_)) = runs.from_starts(runs.steps, n).items()
        for name, points in starts:
            pairs = [zip(seeds, ceiling, strict=True) for seeds in points]
            reached[name] = [[np.mean(own) / np.mean(told) for own, told in seeds] for seeds in pairs]
    text = ["", "**How much of the ceiling each start reaches**, by steps of task RL, ± over seeds:", ""]
    return text + table(["accuracy divided by the ceiling's", *runs.steps], reached, cell=of_seeds), []


def by_hops(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by steps of task RL, questions of one hop and of two apart."""
    text = ["**Hops**, by steps of task RL:", ""]
    for name, hops in HOPS.items():
        text += table([name, *runs.steps], *(runs.from_starts(runs.steps, n, hops) for n in runs.lengths))
    return text, []


def few_labels(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by the number of labelled questions, from both starts."""
    places, ends = [*runs.labels, "all"], [*(f"label-{label}" for label in runs.labels), runs.budget]
    series = {n: runs.from_starts(ends, n) for n in runs.shorter}
    text = [f"**Labels**, {runs.budget} steps of task RL:", "", "![accuracy by labels](labels.png)", ""]
    text += table(["labelled questions", *places], *series.values())
    for (place, end), n in product(zip(places, ends, strict=True), series):
        name = f"from MemTrain minus from the base, {place} labels, {n} chunks"
        text.append(compare(name, runs.scores(f"base-{end}", n), runs.scores(f"memtrain-{end}", n)))
    return text, [panels(runs, series, f"labelled questions, {runs.budget} steps of task RL", [*map(str, places)])]


def ablations(runs: Runs) -> tuple[list[str], list]:
    """Accuracy by what MemTrain was made of, before and after task RL."""
    steps, lengths, by_step = (0, runs.budget), runs.shorter, {}
    for step in steps:
        names = {name: f"{run}-{step}" for name, run in MODELS.items()} | {CEILING: "ceiling"}
        by_step[step] = {name: [runs.scores(own, n) for n in lengths] for name, own in names.items()}
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{n} chunks, {step} steps" for step, n in product(steps, lengths))]
    text += table(head, {name: [*chain(*(own[name] for own in by_step.values()))] for name in by_step[0]})
    for pair in [*((name, FULL) for name in MODELS if name != FULL), CONTROL]:
        for step, n in product(steps, lengths):
            if (pair, n) != (CONTROL, runs.claimed):  # that one stands with the claim
                text.append(difference(runs, *pair, n, step))
    x = [*map(str, lengths)]
    return text, [[(f"{step} steps of task RL", "chunks", (x,), own) for step, own in by_step.items()]]


def search(runs: Runs) -> tuple[list[str], list]:
    """Accuracy in search by steps of task RL in search, from both starts."""
    seeds, steps, series = runs.search_seeds, runs.search_steps, {}
    for start, run in STARTS.items():
        series[start] = [runs.scores(f"{run}-search-{step}", 1, seeds=seeds) for step in steps]
    text = ["", f"**Search**, {len(seeds)} seeds, by steps of task RL in search:", ""]
    text += table(["", *steps], series)
    for step, *scores in zip(steps, *series.values(), strict=True):
        text.append(compare(f"from MemTrain minus from the base, search, {step} steps", *scores))
    return text, []


def habits(runs: Runs) -> tuple[list[str], list]:
    """Recall at each distance in the longest documents, and the share of unchanged memories."""
    unchanged, recalled = {}, {}
    for name, run in MODELS.items():
        by_seed = [runs.read(f"{seed}/habits/{run}.json") for seed in runs.seeds]  # of each seed a row for each length
        lengths = [row["chunks"] for row in by_seed[0]]
        bins = {place: ends for place, ends in DISTANCES.items() if ends[0] < lengths[-1]}
        unchanged[name] = [[row["unchanged"] for row in same] for same in zip(*by_seed, strict=True)]
        recalled[name] = [[recall_between(*ends, seed[-1]["recall"]) for seed in by_seed] for ends in bins.values()]
    head = ["± over seeds", *(f"unchanged memories, {n} chunks" for n in lengths)]
    head += [f"recall at distance {place}, {lengths[-1]} chunks" for place in bins]
    text = ["", "**Habits** on held-out masked documents, greedy:", "", "![recall by distance](distance.png)", ""]
    series = {name: unchanged[name] + recalled[name] for name in MODELS}
    text += table(head, series, cell=of_seeds)
    return text, [[(f"recall, {lengths[-1]} chunks", "distance k - l", ([*bins],), recalled)]]


def recall_between(low: int, high: int, hits: dict[str, list[float]]) -> list[float]:
    """Of recall's rewards by distance those from `low` to `high`."""
    return [hit for distance, own in hits.items() if low <= int(distance) <= high for hit in own]


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m experiments.tables RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    sections = {
        "curves": claim(runs), "ceiling": of_ceiling(runs), "hops": by_hops(runs), "labels": few_labels(runs),
        "ablations": ablations(runs), "search": search(runs), "distance": habits(runs),
    }
    body, page = "\n".join(chain(*(text for text, _ in sections.values()))), docs / "results-tiny.md"
    before, _, rest = page.read_text().partition(BEGIN) if page.exists() else ("", "", "")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{rest.partition(END)[2]}")
    print(body)
    if not (pyplot := load_pyplot()):
        return print("no figures: matplotlib is not installed (`pip install matplotlib`)")
    for name, (_, rows) in sections.items():
        if rows:
            draw(rows, docs / f"{name}.png", pyplot)


if __name__ == "__main__":
    run_script(main, __doc__)
