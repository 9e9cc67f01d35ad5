"""Tables and figures of what experiments/reproduce-tiny.sh measured: a page, its appendix, and PNGs next to them.

    python -m experiments.tables runs/reproduce docs      # results-tiny.md, results-tiny-tables.md

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy has two 95 % intervals:
over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions about the same
subject were independent; and over the seeds' means (Student's t), which differ in training and questions.
The ceiling is the base, before MemTrain and task RL, told to focus, on the same questions: an estimate of what a policy
can reach.
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
MODELS = STARTS | {"decoupled": "decoupled", "end-to-end": "end_to_end", "shuffled rewards": "shuffled_rewards"}
CONTROL = "base", "shuffled rewards"
HOPS = {"one hop": "single", "two hops": "bridge"}  # {name: the question file's "type"}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of seeds
DIFFERENCE = ["difference", "estimate", "95 % over questions", "95 % over seeds", "per seed"]
PAGE, APPENDIX = "results-tiny.md", "results-tiny-tables.md"
BEGIN = "<!-- experiments/tables.py writes what follows -->"
END = "<!-- experiments/tables.py wrote what stands before -->"
Seeds = list[list[float]]  # scores of questions, a list for each seed
Series = dict[str, list[Seeds]]  # {name of a table row or a plotted line: its values from left to right}
Section = tuple[list[str], list[str], list]  # lines of the page, lines of the appendix, its figure's rows of panels


class Runs:
    """A reproduction's folder. Raises UserError if a part is missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        settings = self.read("settings.json")

        def numbers(name: str) -> list[int]:
            return [int(n) for n in settings[name]]

        self.seeds, self.side_seeds = settings["seeds"], settings["side_seeds"]
        self.steps, self.search_steps, self.labels = map(numbers, ("steps", "search_steps", "labels"))
        self.lengths, self.far_steps = map(numbers, ("lengths", "far_steps"))
        self.claimed_steps = numbers("claimed_steps")
        (self.budget,), (self.chunks,) = map(numbers, ("budget", "chunks"))
        (self.claimed,), (self.far,) = map(numbers, ("claimed", "far"))
        (self.rate,), (self.other_rate,) = settings["rate"], settings["other_rate"]
        files = {seed: self.text(f"test-{seed}.jsonl").splitlines() for seed in self.seeds}
        self.types = {seed: [json.loads(line)["type"] for line in lines] for seed, lines in files.items()}
        self.asked: dict[tuple, list[int]] = {}  # {(seed, task): the question numbers that every file must have}

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; run experiments/reproduce-tiny.sh first") from None

    def read(self, name: str):
        return json.loads(self.text(name))

    def scores(self, name: str, chunks: int, memory: str = "kept", hops: str = "", seeds: list | None = None) -> Seeds:
        """The scores that `measure SEED/qa/NAME` wrote; `hops`, "single" or "bridge", keeps only such questions.

        A question's number is its place in the order in which the seed draws the questions, not its line in the file.
        Raises UserError unless all files of a seed and task have the same questions.
        """
        found = []
        for seed in seeds or self.seeds:
            file = f"{seed}/qa/{name}.json"
            rows = {(row["chunks"], row["memory"]): row for row in self.read(file)}
            row = rows.get((chunks, memory))
            if not row or self.asked.setdefault((seed, row["task"]), row["documents"]) != row["documents"]:
                raise UserError(f"{self.folder / file}: at {chunks} chunks, its questions aren't the other files'")
            kinds = [questions.draw(self.types[seed], number, int(seed)) for number in row["documents"]]
            found.append([score for score, kind in zip(row["scores"], kinds, strict=True) if hops in ("", kind)])
        return found

    def from_starts(self, ends: list, chunks: int, hops: str = "", seeds: list | None = None) -> Series:
        """The scores of qa/RUN-END for each of these ends, starting from the base and from MemTrain; the ceiling's."""
        names = {start: [f"{run}-{end}" for end in ends] for start, run in STARTS.items()}
        names[CEILING] = ["ceiling"] * len(ends)
        lines = {f"{line}, {chunks} chunks": own for line, own in names.items()}
        return {line: [self.scores(name, chunks, "kept", hops, seeds) for name in own] for line, own in lines.items()}

    def times(self, chunks: int) -> str:
        return f"{chunks / self.chunks:g} x the trained length"

    def minutes_by_step(self) -> list[dict[int, float]]:
        """{steps of task RL: minutes}, from the base and from MemTrain, with MemTrain's own."""
        own = self.minutes("memtrain")
        starts = ("base-task", 0.0), ("memtrain-task", own)
        return [{step: before + self.minutes(run, step) for step in self.steps} for run, before in starts]

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


def of_seeds(seeds: list) -> str:
    """"0.25 ± 0.04": the interval over seeds."""
    return "{:.2f} ± {:.2f}".format(*over_seeds(seeds))


def compare(first: Seeds, second: Seeds) -> list[str]:
    """Cells for DIFFERENCE: the mean of second - first on the same questions, both intervals, and each seed's mean."""
    mean, low, high = paired_bootstrap([*chain(*first)], [*chain(*second)])
    by_seed = [np.mean(after) - np.mean(before) for before, after in zip(first, second, strict=True)]
    middle, half = over_seeds(by_seed)
    intervals = f"[{low:+.3f}, {high:+.3f}]", f"[{middle - half:+.3f}, {middle + half:+.3f}]"
    return [f"{mean:+.3f}", *intervals, ", ".join(f"{one:+.2f}" for one in by_seed)]


def difference(
    runs: Runs, first: str, second: str, chunks: int, steps: list[int], task: str = "", seeds: list | None = None
) -> tuple[str, list[str]]:
    """(name, `compare`) of two of MODELS; a question's score is its mean over these steps of task RL."""
    files = [[f"{MODELS[name]}-{task}{step}" for step in steps] for name in (first, second)]
    scores = [[runs.scores(file, chunks, seeds=seeds) for file in own] for own in files]
    means = [[np.mean(seed, axis=0) for seed in zip(*own, strict=True)] for own in scores]
    at = f"mean of {steps[0]} to {steps[-1]}" if len(steps) > 1 else steps[0]
    return f"{second} minus {first}, {chunks} chunks, {at} steps of task RL", compare(*means)


def table(head: list, *series: Series, cell=cell) -> list[str]:
    """Markdown, with an empty line at its end; a series may hold anything that `cell` makes a cell of."""
    rows = [[name, *map(cell, points)] for own in series for name, points in own.items()]
    return [*(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)), ""]


def panels(runs: Runs, series: dict[int, Series], label: str, *x: list) -> list[tuple]:
    """A row of panels for `draw`, one for each length; `x` is shared by all lines, or there is one for each."""
    return [(runs.times(n), label, x, lines) for n, lines in series.items()]


def draw(rows: list[list[tuple[str, str, tuple[list, ...], Series]]], file: Path, pyplot) -> None:
    """Draw rows of panels. Words on the x axis are evenly spaced, numbers to scale; error bars are over seeds."""
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


# ---- the sections -----------------------------------------------------------------------------------------


def claim(runs: Runs) -> Section:
    """The claim and its control; accuracy by steps and by minutes of task RL, from both starts, and far beyond."""
    curves = {n: runs.from_starts(runs.steps, n) for n in runs.lengths}
    gains = dict(difference(runs, "base", "MemTrain", n, runs.claimed_steps) for n in runs.lengths)
    name, cells = difference(runs, "base", "MemTrain", runs.claimed, runs.claimed_steps, "other-")
    gains[f"{name} at a rate of {runs.other_rate}"] = cells
    gains |= dict(difference(runs, "base", "MemTrain", runs.far, [step]) for step in runs.far_steps)
    rows = gains | dict(difference(runs, *CONTROL, runs.claimed, [step]) for step in (0, runs.budget))
    about = f"**The claim**, at {runs.times(runs.claimed)}, and the control whose rewards are dealt out at random"
    page = [f"{about} (task RL at a rate of {runs.rate}, unless another is given):", ""]
    page += table(DIFFERENCE[:-1], {name: cells[:-1] for name, cells in rows.items()}, cell=str)
    page += ["![accuracy by steps and by minutes](curves.png)", ""]
    page += ["**Steps of task RL**, from both starts; [95 % over questions], ± half of 95 % over seeds:", ""]
    for n, lines in curves.items():
        page += table([runs.times(n), *runs.steps], lines)
    page += table([runs.times(runs.far), *runs.far_steps], runs.from_starts(runs.far_steps, runs.far))
    base, trained = ([*minutes.values()] for minutes in runs.minutes_by_step())
    x = base, trained, [0, *trained[1:]]  # the ceiling's line spans the panel
    by_minutes = panels(runs, curves, "minutes of training, MemTrain's own included", *x)
    by_steps = panels(runs, curves, "steps of task RL", [*map(str, runs.steps)])
    return page, ["**The claim**, per seed:", "", *table(DIFFERENCE, rows, cell=str)], [by_steps, by_minutes]


def equal_minutes(runs: Runs) -> Section:
    """MemTrain and each number of steps, compared with the base after the most steps that take no longer."""
    (base, trained), last, rows = runs.minutes_by_step(), runs.steps[-1], {}
    for step, n in product(runs.steps, runs.lengths):
        equal = max(other for other, minutes in base.items() if minutes <= trained[step])
        name = f"MemTrain and {step} steps ({trained[step]:.1f} minutes) minus the base's {equal} ({base[equal]:.1f})"
        rows[f"{name}, {n} chunks"] = compare(runs.scores(f"base-{equal}", n), runs.scores(f"memtrain-{step}", n))
    text = ["**Equal minutes** of training:", "", *table(DIFFERENCE, rows, cell=str)]
    text.append(f"MemTrain took {trained[0]:.1f} minutes per seed, {last} steps of task RL {base[last]:.1f}.")
    empty = [*chain(*runs.scores(f"memtrain-{last}", runs.lengths[0], "empty"))]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(empty), len(empty))}.")
    return [], [*text, ""], []


def of_ceiling(runs: Runs) -> Section:
    """Each start's accuracy by steps of task RL, divided by the ceiling's on the same questions, seed by seed."""
    reached = {}
    for n in runs.lengths:
        *starts, (_, (ceiling, *_)) = runs.from_starts(runs.steps, n).items()
        for name, points in starts:
            reached[name] = [[np.mean(a) / np.mean(b) for a, b in zip(seeds, ceiling, strict=True)] for seeds in points]
    page = ["**Share of the ceiling reached**, by steps of task RL, ± over seeds:", ""]
    return page + table(["accuracy / ceiling", *runs.steps], reached, cell=of_seeds), [], []


def by_hops(runs: Runs) -> Section:
    """Accuracy by steps of task RL, on questions of one hop and of two; the claim's length goes to the page."""
    page, appendix = (["**Hops**, by steps of task RL:", ""] for _ in range(2))
    for n, (name, hops) in product(runs.lengths, HOPS.items()):
        lines = table([f"{name}, {runs.times(n)}", *runs.steps], runs.from_starts(runs.steps, n, hops))
        (page if n == runs.claimed else appendix).extend(lines)
    return page, appendix, []


def few_labels(runs: Runs) -> Section:
    """Accuracy by the number of labelled questions, from both starts."""
    places, ends = [*runs.labels, "all"], [*(f"label-{label}" for label in runs.labels), runs.budget]
    series, rows = {n: runs.from_starts(ends, n, seeds=runs.side_seeds) for n in runs.lengths}, {}
    for n, lines in series.items():
        for place, base, trained, _ in zip(places, *lines.values(), strict=True):
            rows[f"MemTrain minus base, {place} labels, {n} chunks"] = compare(base, trained)
    text = [f"**Labels**, {runs.budget} steps of task RL, {len(runs.side_seeds)} seeds:", ""]
    text += ["![accuracy by labels](labels.png)", ""]
    text += table(["labelled questions", *places], *series.values()) + table(DIFFERENCE, rows, cell=str)
    return [], text, [panels(runs, series, f"labelled questions, {runs.budget} steps of task RL", [*map(str, places)])]


def ablations(runs: Runs) -> Section:
    """Accuracy after each ablation of MemTrain, before and after task RL."""
    steps, lengths, seeds, by_step = (0, runs.budget), runs.lengths, runs.side_seeds, {}
    for step in steps:
        names = {name: f"{run}-{step}" for name, run in MODELS.items()} | {CEILING: "ceiling"}
        by_step[step] = {name: [runs.scores(own, n, seeds=seeds) for n in lengths] for name, own in names.items()}
    text = [f"**Ablations**, and the control whose rewards are dealt out at random, {len(seeds)} seeds:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{n} chunks, {step} steps" for step, n in product(steps, lengths))]
    text += table(head, {name: [*chain(*(own[name] for own in by_step.values()))] for name in by_step[0]})
    pairs = [(name, "MemTrain") for name in MODELS if name != "MemTrain"]
    rows = dict(difference(runs, *pair, n, [step], seeds=seeds) for pair, step, n in product(pairs, steps, lengths))
    text += table(DIFFERENCE, rows, cell=str)
    x = [*map(str, lengths)]
    return [], text, [[(f"{step} steps of task RL", "chunks", (x,), own) for step, own in by_step.items()]]


def search(runs: Runs) -> Section:
    """Accuracy in search QA by steps of task RL on it, from both starts."""
    seeds, steps, series = runs.side_seeds, runs.search_steps, {}
    for start, run in STARTS.items():
        series[start] = [runs.scores(f"{run}-search-{step}", 1, seeds=seeds) for step in steps]
    head = [f"**Search QA**, {len(seeds)} seeds, by steps of task RL on it:", ""]
    pairs = zip(steps, *series.values(), strict=True)
    rows = {f"MemTrain minus base, search QA, {step} steps": compare(*scores) for step, *scores in pairs}
    return head + table(["", *steps], series), head + table(DIFFERENCE, rows, cell=str), []


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m experiments.tables RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    sections = {
        "curves": claim(runs), "ceiling": of_ceiling(runs), "hops": by_hops(runs), "search": search(runs),
        "minutes": equal_minutes(runs), "labels": few_labels(runs), "ablations": ablations(runs),
    }
    page, appendix = ("\n".join(chain(*(section[n] for section in sections.values()))) for n in (0, 1))
    page += f"\nFew labels, ablations, equal minutes, each seed's figures: [{APPENDIX}]({APPENDIX}).\n"
    file = docs / PAGE
    before, _, rest = file.read_text().partition(BEGIN) if file.exists() else ("", "", "")
    file.write_text(f"{before}{BEGIN}\n\n{page}\n{END}{rest.partition(END)[2]}")
    head = f"# Appendix to [{PAGE}]({PAGE}), written by `python -m experiments.tables {sys.argv[1]} {docs}`"
    (docs / APPENDIX).write_text(f"{head}\n\n{appendix}")
    print(page, appendix, sep="\n")
    if not (pyplot := load_pyplot()):
        return print("no figures: matplotlib is not installed (`pip install matplotlib`)")
    for name, (*_, rows) in sections.items():
        if rows:
            draw(rows, docs / f"{name}.png", pyplot)


if __name__ == "__main__":
    run_script(main, __doc__)
