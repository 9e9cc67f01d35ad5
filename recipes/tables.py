"""The tables and figures of what recipes/reproduce-tiny.sh measured: results-tiny.md, and PNGs beside it.

    python recipes/tables.py runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. An accuracy stands with two 95 %
intervals: over the questions of all seeds together (Wilson's; for differences a paired bootstrap), as if questions
about one subject were independent; and over the seeds' own means (Student's t), which differ in training and questions.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.errors import UserError, run_script  # noqa: E402
from engine.report import load_pyplot, paired_bootstrap, share  # noqa: E402

CLAIM = (2, 4, 8, 16)  # steps of task RL over which the claim is averaged
STARTS = {"base": "base", "MemTrain": "memtrain"}
MODELS = {
    "base": "base", "MemTrain, full": "memtrain", "decoupled": "decoupled", "end-to-end": "end_to_end",
    "shuffled rewards": "shuffled_rewards",
}
DISTANCES = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-15": (9, 15)}  # k - l, in bins
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of seeds
BEGIN, END = "<!-- recipes/tables.py writes what follows -->", "<!-- recipes/tables.py wrote what stands before -->"
Scores = dict[int, list[list[float]]]  # by chunks, one list for each seed, of its questions


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

    def read(self, name: str):
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            raise UserError(f"{self.folder / name} is missing; recipes/reproduce-tiny.sh makes it") from None

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
            file = self.folder / seed / run / "metrics.jsonl"
            if not file.is_file():
                raise UserError(f"{file} is missing; recipes/reproduce-tiny.sh makes it")
            lines = file.read_text().splitlines()[:steps]
            rows = [json.loads(line) for line in lines]
            total.append(sum(row[name] for row in rows for name in row if name.startswith("seconds_")) / 60)
        return float(np.mean(total))


# ---- numbers ---------------------------------------------------------------------------------------------


def flat(lists) -> list:
    return [item for items in lists for item in items]


def over_seeds(means: list[float]) -> float:
    """Half the width of the 95 % interval of the mean of these seeds' means."""
    return STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def seed_means(seeds: list[list[float]]) -> list[float]:
    return [float(np.mean(seed)) for seed in seeds]


def cell(seeds: list[list[float]]) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": over questions, then over seeds."""
    scores = flat(seeds)
    return f"{share(sum(scores), len(scores))} ± {over_seeds(seed_means(seeds)):.2f}"


def difference(first: list[list[float]], second: list[list[float]]) -> dict:
    """The mean of second - first on the same questions, with both intervals; each holds scores by seed."""
    mean, low, high = paired_bootstrap(flat(first), flat(second))
    by_seed = [float(np.mean(b) - np.mean(a)) for a, b in zip(first, second, strict=True)]
    middle, half = float(np.mean(by_seed)), over_seeds(by_seed)
    return {
        "mean": mean, "low": low, "high": high, "seeds_low": middle - half, "seeds_high": middle + half,
        "by_seed": by_seed,
    }


def bullet(name: str, found: dict) -> str:
    seeds = ", ".join(f"{one:+.2f}" for one in found["by_seed"])
    return (
        f"- {name}: {found['mean']:+.3f}, over questions [{found['low']:+.3f}, {found['high']:+.3f}], over seeds "
        f"[{found['seeds_low']:+.3f}, {found['seeds_high']:+.3f}] ({seeds})"
    )


def mean_over(parts: list[list[list[float]]]) -> list[list[float]]:
    """Each question's mean over several measurements of it, seed by seed."""
    return [np.mean(same_seed, axis=0).tolist() for same_seed in zip(*parts, strict=True)]


def lengths_of(points) -> list[int]:
    """The lengths at which all of these were measured."""
    first, *others = points
    return [length for length in first if all(length in other for other in others)]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


# ---- figures ---------------------------------------------------------------------------------------------


def draw_curves(pyplot, file: Path, steps: list[int], curves: dict[str, list[Scores]], times: dict) -> None:
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
    save(pyplot, file)


def draw_lines(pyplot, file: Path, panels: list[tuple], label: str) -> None:
    """A panel is (title, labels on x, {line: its means, by label and seed}); bars are intervals over seeds."""
    _, all_axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axes, (title, places, lines) in zip(all_axes[0], panels, strict=True):
        for name, points in lines.items():
            halves = [over_seeds(means) for means in points]
            axes.errorbar(range(len(places)), np.mean(points, axis=1), halves, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=label, ylim=(0, 1))
        axes.set_xticks(range(len(places)), labels=map(str, places))
        axes.legend(fontsize="small")
    save(pyplot, file)


def save(pyplot, file: Path) -> None:
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=90)
    pyplot.close()


def draw(folder: Path, runs: Runs, results: dict) -> None:
    """All figures as PNGs. Says so where matplotlib is missing."""
    if not (pyplot := load_pyplot()):
        print("no plot: matplotlib is not installed (`pip install matplotlib`)")
        return
    draw_curves(pyplot, folder / "curves.png", runs.steps, results["curves"], results["minutes"])
    lengths, panels = lengths_of(flat(results["labels"].values())), []
    for n in lengths:
        lines = {
            f"from {name}": [seed_means(scores[n]) for scores in points] for name, points in results["labels"].items()
        }
        panels.append((f"{n // lengths[0]} x the length", [*runs.labels, "all"], lines))
    draw_lines(pyplot, folder / "labels.png", panels, f"labelled questions, {runs.budget} steps of task RL")
    lengths, panels = lengths_of(flat(by_step.values() for by_step in results["ablations"].values())), []
    for step in (0, runs.budget):
        lines = {
            name: [seed_means(by_step[step][n]) for n in lengths] for name, by_step in results["ablations"].items()
        }
        panels.append((f"{step} steps of task RL", lengths, lines))
    draw_lines(pyplot, folder / "ablations.png", panels, "chunks")
    longest = max(next(iter(results["habits"].values())))
    lines = {name: list(by_length[longest]["recall"].values()) for name, by_length in results["habits"].items()}
    places = list(next(iter(results["habits"].values()))[longest]["recall"])
    draw_lines(pyplot, folder / "distance.png", [(f"recall, {longest} chunks", places, lines)], "distance k - l")


# ---- the sections of results-tiny.md: each returns its text, and puts its numbers into `results` --------------


def claim(runs: Runs, results: dict) -> list[str]:
    """Accuracy by steps of task RL from both starts, the claim, and the same at equal minutes."""
    curves = {name: [runs.scores(f"{run}-{step}") for step in runs.steps] for name, run in STARTS.items()}
    lengths = list(curves["base"][0])
    text = ["![accuracy by steps and by minutes](curves.png)", "", "**Steps of task RL**, from both starts:", ""]
    for length in lengths:
        rows = [
            [f"{name}, {length} chunks", *(cell(scores[length]) for scores in points)]
            for name, points in curves.items()
        ]
        text += markdown([f"{length // lengths[0]} x the trained length", *map(str, runs.steps)], rows) + [""]
    for length in lengths:
        first, second = (
            mean_over([scores[length] for step, scores in zip(runs.steps, points, strict=True) if step in CLAIM])
            for points in curves.values()
        )
        results[f"claim at {length}"] = difference(first, second)
        name = f"from MemTrain minus from the base, {length} chunks, mean of {CLAIM[0]} to {CLAIM[-1]} steps"
        text.append(bullet(name, results[f"claim at {length}"]))
    own, last = runs.minutes("memtrain"), runs.steps[-1]
    times = {
        name: [runs.minutes(f"{run}-task", step) + own * (run == "memtrain") for step in runs.steps]
        for name, run in STARTS.items()
    }
    for n, step in enumerate(runs.steps):  # the base at the last measured step that takes no longer
        equal = max((m for m, time in enumerate(times["base"]) if time <= times["MemTrain"][n]), default=0)
        names = f"MemTrain and {step} steps ({times['MemTrain'][n]:.1f} minutes) minus the base's {runs.steps[equal]}"
        for length in lengths[:2]:
            found = difference(curves["base"][equal][length], curves["MemTrain"][n][length])
            text.append(bullet(f"{names} ({times['base'][equal]:.1f}), {length} chunks", found))
    closed = flat(runs.scores(f"memtrain-{last}", "empty")[lengths[0]])
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {last} steps of task RL {times['base'][-1]:.1f}."]
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    results["curves"], results["minutes"] = curves, times
    return text


def few_labels(runs: Runs, results: dict) -> list[str]:
    """Accuracy by the number of labelled questions, from both starts."""
    found = {
        name: [*(runs.scores(f"{run}-label-{label}") for label in runs.labels), runs.scores(f"{run}-{runs.budget}")]
        for name, run in STARTS.items()
    }
    lengths, places = lengths_of(flat(found.values())), [*map(str, runs.labels), "all"]
    rows = [
        [f"{name}, {length} chunks", *(cell(scores[length]) for scores in points)]
        for length in lengths for name, points in found.items()
    ]
    results["labels"] = found
    text = ["", f"**Labels**, {runs.budget} steps of task RL:", "", "![accuracy by labels](labels.png)", ""]
    text += markdown(["labelled questions", *places], rows) + [""]
    for place, first, second in zip(places, found["base"], found["MemTrain"], strict=True):
        for length in lengths[:2]:
            name = f"from MemTrain minus from the base, {place} labels, {length} chunks"
            text.append(bullet(name, difference(first[length], second[length])))
    return text


def ablations(runs: Runs, results: dict) -> list[str]:
    """Accuracy by what MemTrain was made of, before and after task RL."""
    steps = (0, runs.budget)
    found = {name: {step: runs.scores(f"{run}-{step}") for step in steps} for name, run in MODELS.items()}
    lengths = lengths_of(flat(by_step.values() for by_step in found.values()))
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    text += ["![accuracy by what MemTrain was made of](ablations.png)", ""]
    head = ["", *(f"{length} chunks, {step} steps" for step in steps for length in lengths)]
    rows = [
        [name, *(cell(by_step[step][length]) for step in steps for length in lengths)]
        for name, by_step in found.items()
    ]
    text += markdown(head, rows) + [""]
    full = "MemTrain, full"
    others = [name for name in MODELS if name != full]
    for first, second in [*((other, full) for other in others), ("base", "shuffled rewards")]:
        for step, length in ((step, length) for step in steps for length in lengths[:2]):
            one = difference(found[first][step][length], found[second][step][length])
            results[f"{second} minus {first} at {step}, {length} chunks"] = one
            text.append(bullet(f"{second} minus {first}, {length} chunks, {step} steps of task RL", one))
    results["ablations"] = found
    return text


def habits(runs: Runs, results: dict) -> list[str]:
    """Recall at each distance, and the share of unchanged memories."""
    found: dict[str, dict[int, dict]] = {}
    for name, run in MODELS.items():
        for seed in runs.seeds:
            for row in runs.read(f"{seed}/habits/{run}.json"):
                own = found.setdefault(name, {}).setdefault(row["chunks"], {"recall": {}, "unchanged": []})
                own["unchanged"].append(float(np.mean(row["unchanged"])))
                for place, (low, high) in DISTANCES.items():
                    hits = flat([hits for n, hits in row["recall"].items() if low <= int(n) <= high])
                    if low < row["chunks"]:
                        own["recall"].setdefault(place, []).append(float(np.mean(hits)))
    results["habits"] = found
    lengths = sorted(next(iter(found.values())))
    places = list(next(iter(found.values()))[lengths[-1]]["recall"])
    head = ["± over seeds", *(f"unchanged memories, {n} chunks" for n in lengths)]
    head += [f"recall at distance {place}, {lengths[-1]} chunks" for place in places]
    rows = []
    for name, by_length in found.items():
        cells = [by_length[n]["unchanged"] for n in lengths] + [by_length[lengths[-1]]["recall"][p] for p in places]
        rows.append([name, *(f"{np.mean(means):.2f} ± {over_seeds(means):.2f}" for means in cells)])
    text = ["", "**Habits** on held-out masked documents, greedy:", "", "![recall by distance](distance.png)", ""]
    return text + markdown(head, rows)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python recipes/tables.py RUNS DOCS")
    runs, docs = Runs(Path(sys.argv[1])), Path(sys.argv[2])
    if not docs.is_dir():
        raise UserError(f"{docs}: no such folder; name one for tables and figures")
    results: dict = {}
    text = claim(runs, results) + few_labels(runs, results) + ablations(runs, results) + habits(runs, results)
    (runs.folder / "results.json").write_text(json.dumps(results, indent=1))
    body, page = "\n".join(text), docs / "results-tiny.md"
    before, _, rest = page.read_text().partition(BEGIN) if page.exists() else ("", "", "")
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}")
    print(body)
    draw(docs, runs, results)


if __name__ == "__main__":
    run_script(main, __doc__)
