"""The tables and figures of what recipes/reproduce-tiny.sh measured: results.md and PNGs.

    python recipes/tables.py runs/reproduce docs

Accuracies are exact matches of greedy answers. No two seeds share a test question. Each number stands with two 95 %
intervals: over the questions of all seeds together (Wilson's, for differences a paired bootstrap), and behind it, over
the seeds' own means (Student's t), which says how much training itself varies.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.report import load_pyplot, paired_bootstrap, share  # noqa: E402

STEPS, BUDGET = (0, 2, 4, 8, 16, 32, 64), 16  # of task RL; BUDGET with few labels and after an ablation
CLAIM = (2, 4, 8, 16)  # the steps over which the claim is averaged
LABELS = (4, 16, 64)
STARTS = {"base": "base", "MemTrain": "memtrain"}
ABLATIONS = {
    "base": "base", "MemTrain, full": "memtrain", "decoupled": "decoupled", "end-to-end": "end_to_end",
    "shuffled rewards": "shuffled_rewards",
}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of seeds
BEGIN, END = "<!-- recipes/tables.py writes what follows -->", "<!-- recipes/tables.py wrote what stands before -->"
Scores = dict[int, list[list[float]]]  # by chunks, one list for each seed, of its questions


def load(folder: Path, name: str, memory: str = "kept") -> Scores:
    """What `measure SEED/qa/name` wrote. Raises FileNotFoundError where a seed lacks it."""
    scores: Scores = {}
    for seed in seeds_of(folder):
        for row in json.loads((seed / "qa" / f"{name}.json").read_text()):
            if row["memory"] == memory:
                scores.setdefault(row["chunks"], []).append(row["scores"])
    return dict(sorted(scores.items()))


def seeds_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/memtrain"))


def minutes(folder: Path, run: str, steps: int | None = None) -> float:
    """Training minutes of a run up to a step, or whole, the mean over seeds."""
    total = []
    for seed in seeds_of(folder):
        rows = [json.loads(line) for line in (seed / run / "metrics.jsonl").read_text().splitlines()][:steps]
        total.append(sum(row[name] for row in rows for name in row if name.startswith("seconds_")) / 60)
    return float(np.mean(total))


# ---- numbers ---------------------------------------------------------------------------------------------


def flat(seeds: list[list[float]]) -> list[float]:
    return [score for seed in seeds for score in seed]


def over_seeds(means: list[float]) -> float:
    """Half the width of the 95 % interval of the mean of these seeds' means; infinite for one seed."""
    if len(means) < 2:
        return float("inf")
    return STUDENT[len(means)] * float(np.std(means, ddof=1)) / len(means) ** 0.5


def cell(seeds: list[list[float]]) -> str:
    """"0.25 [0.20, 0.31] ± 0.04": over questions, then over seeds."""
    scores = flat(seeds)
    return f"{share(sum(scores), len(scores))} ± {over_seeds([float(np.mean(seed)) for seed in seeds]):.2f}"


def difference(first: list[list[float]], second: list[list[float]]) -> dict:
    """How much the second is better on the same questions, each a list by seed."""
    mean, low, high = paired_bootstrap(flat(first), flat(second))
    by_seed = [float(np.mean(b) - np.mean(a)) for a, b in zip(first, second, strict=True)]
    middle, half = float(np.mean(by_seed)), over_seeds(by_seed)
    return {
        "mean": mean, "low": low, "high": high, "seeds_low": middle - half, "seeds_high": middle + half,
        "by_seed": by_seed,
    }


def told(name: str, found: dict) -> str:
    seeds = ", ".join(f"{one:+.2f}" for one in found["by_seed"])
    return (
        f"- {name}: {found['mean']:+.3f}, over questions [{found['low']:+.3f}, {found['high']:+.3f}], over seeds "
        f"[{found['seeds_low']:+.3f}, {found['seeds_high']:+.3f}] ({seeds})"
    )


def mean_over(parts: list[list[list[float]]]) -> list[list[float]]:
    """Each question's mean over several measurements of it, seed by seed."""
    return [np.mean(same_seed, axis=0).tolist() for same_seed in zip(*parts, strict=True)]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


# ---- figures ---------------------------------------------------------------------------------------------


def draw_curves(pyplot, file: Path, curves: dict[str, list[Scores]], times: dict[str, list[float]]) -> None:
    """Accuracy by steps of task RL and by minutes, a column for each length; bands over seeds."""
    lengths = list(next(iter(curves.values()))[0])
    _, panels = pyplot.subplots(2, len(lengths), figsize=(4.2 * len(lengths), 7), sharey="col")
    for line, label in enumerate(("steps of task RL", "minutes of training, MemTrain's own included")):
        for axes, length in zip(panels[line], lengths, strict=True):
            for name, points in curves.items():
                by_seed = [[float(np.mean(seed)) for seed in scores[length]] for scores in points]
                middle, half = np.mean(by_seed, axis=1), np.array([over_seeds(means) for means in by_seed])
                x = STEPS if line == 0 else times[name]
                axes.plot(x, middle, marker="o", label=f"from {name}")
                axes.fill_between(x, middle - half, middle + half, alpha=0.15)
            axes.set(xlabel=label, ylabel="exact match", ylim=(0, 1), title=f"{length // lengths[0]} x the length")
            if line == 0:
                axes.set_xscale("symlog", linthresh=2)
                axes.set_xticks(STEPS, labels=map(str, STEPS))
            axes.legend(fontsize="small")
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=90)
    pyplot.close()


def draw_lines(pyplot, file: Path, panels: list[tuple], x_label: str) -> None:
    """Panels of (title, x, {name: by x, by seed}), with bars over seeds."""
    _, all_axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axes, (title, x, lines) in zip(all_axes[0], panels, strict=True):
        for name, points in lines.items():
            halves = [over_seeds(means) for means in points]
            axes.errorbar(range(len(x)), np.mean(points, axis=1), halves, marker="o", capsize=3, label=name)
        axes.set(title=title, xlabel=x_label, ylim=(0, 1))
        axes.set_xticks(range(len(x)), labels=map(str, x))
        axes.legend(fontsize="small")
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=90)
    pyplot.close()


def seed_means(scores: Scores, length: int) -> list[float]:
    return [float(np.mean(seed)) for seed in scores[length]]


# ---- the sections of results.md --------------------------------------------------------------------------


def claim(folder: Path, results: dict) -> list[str]:
    curves = {name: [load(folder, f"{run}-{step}") for step in STEPS] for name, run in STARTS.items()}
    lengths = list(curves["base"][0])
    text = ["**Steps of task RL**, on questions about subjects that no demonstration named:", ""]
    for length in lengths:
        rows = [
            [f"{name}, {length} chunks", *(cell(scores[length]) for scores in points)]
            for name, points in curves.items()
        ]
        text += markdown([f"{length // lengths[0]} x the trained length", *map(str, STEPS)], rows) + [""]
    for length in lengths:
        first, second = (
            mean_over([scores[length] for step, scores in zip(STEPS, points, strict=True) if step in CLAIM])
            for points in curves.values()
        )
        results[f"claim at {length}"] = difference(first, second)
        name = f"from MemTrain minus from the base, {length} chunks, mean of {CLAIM[0]} to {CLAIM[-1]} steps"
        text.append(told(name, results[f"claim at {length}"]))
    own = minutes(folder, "memtrain")
    times = {
        name: [minutes(folder, f"{run}-task", step) + own * (run == "memtrain") for step in STEPS]
        for name, run in STARTS.items()
    }
    text += ["", f"MemTrain took {own:.1f} minutes a seed, {STEPS[-1]} steps of task RL {times['base'][-1]:.1f}."]
    closed = flat(load(folder, "memtrain-64", "empty")[lengths[0]])
    text.append(f"With an empty memory, after MemTrain and all steps: {share(sum(closed), len(closed))}.")
    results["curves"], results["minutes"] = curves, times
    return text


def few_labels(folder: Path, results: dict) -> list[str]:
    found = {
        name: [load(folder, f"{run}-label-{label}") for label in LABELS] + [load(folder, f"{run}-{BUDGET}")]
        for name, run in STARTS.items()
    }
    lengths = list(found["base"][0])
    rows = [
        [f"{name}, {length} chunks", *(cell(scores[length]) for scores in points)]
        for length in lengths for name, points in found.items()
    ]
    results["labels"] = found
    head = [f"labelled questions, {BUDGET} steps", *map(str, LABELS), "all"]
    return ["", "**Labels**:", "", *markdown(head, rows)]


def ablations(folder: Path, results: dict) -> list[str]:
    found = {
        name: {step: load(folder, f"{run}-{step}") for step in (0, BUDGET)} for name, run in ABLATIONS.items()
    }
    lengths = list(found["base"][0])
    text = ["", "**Ablations**, and the control whose rewards are dealt out at random:", ""]
    head = ["", *(f"{length} chunks, {step} steps" for step in (0, BUDGET) for length in lengths)]
    rows = [
        [name, *(cell(by_step[step][length]) for step in (0, BUDGET) for length in lengths)]
        for name, by_step in found.items()
    ]
    text += markdown(head, rows) + [""]
    for other in ("MemTrain, full", "shuffled rewards"):
        for step in (0, BUDGET):
            one = difference(found["base"][step][lengths[1]], found[other][step][lengths[1]])
            results[f"{other} at {step}"] = one
            text.append(told(f"{other} minus base, {lengths[1]} chunks, {step} steps of task RL", one))
    results["ablations"] = found
    return text


def habits(folder: Path, results: dict) -> list[str]:
    found: dict[str, dict[int, dict]] = {}
    for name, run in ABLATIONS.items():
        for seed in seeds_of(folder):
            for row in json.loads((seed / "habits" / f"{run}.json").read_text()):
                own = found.setdefault(name, {}).setdefault(row["chunks"], {"recall": {}, "unchanged": []})
                own["unchanged"] += row["unchanged"]
                for distance, hits in row["recall"].items():
                    own["recall"].setdefault(int(distance), []).append(hits)
    results["habits"] = found
    lengths = sorted(next(iter(found.values())))
    distances = sorted(next(iter(found.values()))[lengths[0]]["recall"])
    head = ["masked documents, greedy", *(f"unchanged updates, {n} chunks" for n in lengths)]
    head += [f"recall at distance {n}, {lengths[0]} chunks" for n in distances]
    rows = []
    for name, by_length in found.items():
        same = [share(sum(by_length[n]["unchanged"]), len(by_length[n]["unchanged"])) for n in lengths]
        asked = [flat(by_length[lengths[0]]["recall"][n]) for n in distances]
        rows.append([name, *same, *(share(sum(hits), len(hits)) for hits in asked)])
    return ["", "**Habits**:", "", *markdown(head, rows)]


def draw(folder: Path, results: dict) -> None:
    """All figures as PNGs. Says so where matplotlib is missing."""
    if not (pyplot := load_pyplot()):
        print("no plot: matplotlib is not installed (`pip install matplotlib`)")
        return
    draw_curves(pyplot, folder / "curves.png", results["curves"], results["minutes"])
    lengths = list(results["curves"]["base"][0])
    panels = [
        (f"{n // lengths[0]} x the length", [*LABELS, "all"],
         {f"from {name}": [seed_means(scores, n) for scores in points] for name, points in results["labels"].items()})
        for n in lengths
    ]
    draw_lines(pyplot, folder / "labels.png", panels, f"labelled questions, {BUDGET} steps of task RL")
    panels = [
        (f"{step} steps of task RL", lengths,
         {name: [seed_means(by_step[step], n) for n in lengths] for name, by_step in results["ablations"].items()})
        for step in (0, BUDGET)
    ]
    draw_lines(pyplot, folder / "ablations.png", panels, "chunks")
    longest = max(next(iter(results["habits"].values())))
    distances = sorted(next(iter(results["habits"].values()))[longest]["recall"])
    lines = {
        name: [[float(np.mean(hits)) for hits in by_length[longest]["recall"][n]] for n in distances]
        for name, by_length in results["habits"].items()
    }
    draw_lines(pyplot, folder / "distance.png", [(f"recall, {longest} chunks", distances, lines)], "distance k - l")


def main() -> None:
    if len(sys.argv) != 3:
        print("error: give two folders: python recipes/tables.py RUNS DOCS", file=sys.stderr)
        sys.exit(2)
    folder, docs = map(Path, sys.argv[1:])
    results: dict = {}
    try:
        text = claim(folder, results) + few_labels(folder, results) + ablations(folder, results)
        text += habits(folder, results)
    except FileNotFoundError as error:
        print(f"error: {error.filename} is missing; recipes/reproduce-tiny.sh makes it", file=sys.stderr)
        sys.exit(2)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    draw(docs, results)
    body, page = "\n".join(text), docs / "results-tiny.md"
    if page.exists():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}")
    print(body)


if __name__ == "__main__":
    main()
