"""The tables and figures of what recipes/reproduce-tiny.sh measured: as results.json, in README and as a plot.

    python recipes/tables.py runs/reproduce [README.md]

Accuracies are exact matches of greedy answers, all seeds' questions together; no two seeds have the same. Their 95 %
intervals are Wilson's, those of averages over lengths and of differences a (paired) bootstrap over the questions, one
question being its mean over lengths. They say how sure the numbers are for these trained models: how much training
itself varies, the seeds' own differences show.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.report import load_pyplot, paired_bootstrap, share  # noqa: E402

BEGIN, END = "<!-- recipes/tables.py writes what follows -->", "<!-- recipes/tables.py wrote what stands before -->"
Scores = dict[int, list[list[float]]]  # by chunks or objectives, one list for each seed, of its questions


def load(folder: Path, name: str, memory: str = "kept") -> Scores:
    """What `measure SEED/name` wrote. Empty unless every seed has it."""
    scores: Scores = {}
    files = sorted(folder.glob(f"*/{name}.json"))
    for file in files if len(files) == len(list(folder.glob("*/memtrain"))) else []:
        for row in json.loads(file.read_text()):
            if row["memory"] == memory:
                scores.setdefault(row["chunks"], []).append(row["scores"])
    return scores


def minutes(folder: Path, *runs: tuple[str, int | None]) -> float:
    """Training minutes of these runs, each up to a step or whole, the mean over seeds."""
    seconds = []
    for run, steps in runs:
        for file in sorted(folder.glob(f"*/{run}/metrics.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()][:steps]
            seconds.append(sum(row[name] for row in rows for name in row if name.startswith("seconds_")))
    return sum(seconds) / 60 / len(list(folder.glob(f"*/{runs[0][0]}/metrics.jsonl")))


def cell(scores: list[float]) -> str:
    return share(sum(scores), len(scores))  # of halves, in search, the interval is a little too wide


def together(scores: Scores) -> list[list[float]]:
    """Each question's mean over the lengths at which it was asked, seed by seed."""
    return [np.mean(lengths, axis=0).tolist() for lengths in zip(*scores.values(), strict=True)]


def flat(seeds: list[list[float]]) -> list[float]:
    return [score for seed in seeds for score in seed]


def average(scores: Scores) -> str:
    means = flat(together(scores))
    if len(set(means)) == 1 and means[0] in (0, 1):  # drawing the same number again says nothing about how sure it is
        return cell(means)
    mean, low, high = paired_bootstrap([0.0] * len(means), means)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def accuracy_table(title: str, unit: str, rows: dict[str, Scores]) -> list[str]:
    lengths = sorted(next(iter(rows.values())))
    count = sorted({len(flat(scores[n])) for scores in rows.values() for n in lengths})
    head = [f"{title}, n = {'-'.join(map(str, count))}", *(f"{n} {unit}" for n in lengths)]
    head += ["average"] if len(lengths) > 1 else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, scores in rows.items():
        cells = [cell(flat(scores[n])) for n in lengths] + ([average(scores)] if len(lengths) > 1 else [])
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def difference(results: dict, first: str, second: str, a: Scores, b: Scores) -> str:
    """A line that says by how much the second is better; kept in `results` too."""
    a, b = together(a), together(b)
    mean, low, high = paired_bootstrap(flat(a), flat(b))
    by_seed = [float(np.mean(after) - np.mean(before)) for before, after in zip(a, b, strict=True)]
    n, interval = len(flat(a)), {"mean": mean, "low": low, "high": high}
    results["differences"].append({"of": second, "minus": first} | interval | {"n": n, "by_seed": by_seed})
    seeds = ", ".join(f"{d:+.2f}" for d in by_seed)
    return f"- {second} minus {first}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], n = {n}; by seed {seeds}"


def plot(file: Path, figures: list[tuple[str, dict[str, Scores]]], curve: dict[str, list[tuple[float, float]]]) -> None:
    """Accuracy by length, one panel a figure, and accuracy by training minutes. Says so where matplotlib is missing."""
    if not (pyplot := load_pyplot()):
        print("no plot: matplotlib is not installed (`pip install matplotlib`)")
        return
    _, panels = pyplot.subplots(1, len(figures) + 1, figsize=(4.5 * (len(figures) + 1), 3.6))
    for axes, (title, rows) in zip(panels, figures, strict=False):
        for name, scores in rows.items():
            axes.plot(sorted(scores), [np.mean(flat(scores[n])) for n in sorted(scores)], marker="o", label=name)
        axes.set(title=title, xscale="log", xlabel="chunks", ylabel="exact match", ylim=(0, 1))
        axes.set_xticks(sorted(scores), labels=map(str, sorted(scores)))
        axes.legend(fontsize="small")
    for name, points in curve.items():
        panels[-1].plot(*zip(*points, strict=True), marker="o", label=name)
    panels[-1].set(title="Figure 4: at equal compute", xlabel="minutes of training")
    panels[-1].set(ylabel="exact match, all lengths", ylim=(0, 1))
    panels[-1].legend(fontsize="small")
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=110)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reproduce")
    longqa = {
        name: load(folder, f"longqa-{name}")
        for name in sorted({file.stem.removeprefix("longqa-") for file in folder.glob("*/longqa-*.json")})
    }
    runs = {
        "base": "base", "+ MemTrain": "memtrain", "+ task RL": "search", "+ MemTrain + task RL": "memtrain-search",
    }
    search = {name: load(folder, f"search-{file}") for name, file in runs.items()}
    measured = [name for name, scores in longqa.items() if scores and name.startswith("task-")]
    steps = sorted(int(name.removeprefix("task-")) for name in measured)
    if not steps or not all(longqa.get(name) for name in ("base", "memtrain", "memtrain-task")):
        why = f"{folder} lacks results of Table 1 for every seed; recipes/reproduce-tiny.sh makes them"
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    seeds, task = len(list(folder.glob("*/longqa-base.json"))), f"task-{steps[0]}"
    results: dict = {"seeds": seeds, "longqa": longqa, "search": search, "differences": [], "minutes": {}}

    table_1 = {
        "base": longqa["base"], "+ MemTrain": longqa["memtrain"], "+ task RL": longqa[task],
        "+ MemTrain + task RL": longqa["memtrain-task"],
    }
    closed = {
        f"{name}, empty memory": load(folder, f"longqa-{file}", "empty")
        for name, file in (("base", "base"), ("+ MemTrain + task RL", "memtrain-task"))
    }
    text = ["**Table 1**, long-text QA about subjects that the base never saw:", ""]
    text += accuracy_table(f"{seeds} seeds", "chunks", table_1 | closed)
    text += ["", difference(results, "task RL", "MemTrain + task RL", longqa[task], longqa["memtrain-task"])]
    text += [difference(results, "base", "MemTrain", longqa["base"], longqa["memtrain"])]

    if all(search.values()):
        told = "search QA about them, two questions asked as one, exact match averaged over the two"
        text += ["", f"**Table 2**, {told}:", ""]
        text += accuracy_table(f"{seeds} seeds", "objectives", search)
        names = "task RL (search)", "MemTrain + task RL (search)"
        text += ["", difference(results, *names, search["+ task RL"], search["+ MemTrain + task RL"])]

    runs = {"full": "memtrain", "decoupled": "decoupled", "end-to-end": "end_to_end"}
    figure_3 = {name: longqa.get(f"{run}-task") for name, run in runs.items()}
    if all(figure_3.values()):
        text += ["", "**Figure 3**, after task RL, by what MemTrain was made of:", ""]
        text += accuracy_table(f"{seeds} seeds", "chunks", figure_3)
        text += ["", difference(results, "end-to-end", "full", figure_3["end-to-end"], figure_3["full"])]
        text += [difference(results, "decoupled", "full", figure_3["decoupled"], figure_3["full"])]

    alone = [(n, f"task-{n}", minutes(folder, ("task", n))) for n in steps]
    after = [
        (0, "memtrain", minutes(folder, ("memtrain", None))),
        (steps[0], "memtrain-task", minutes(folder, ("memtrain", None), ("memtrain-task", None))),
    ]
    text += ["", "**Figure 4**, by minutes of training, all lengths together:", ""]
    text += ["| | steps of task RL | minutes | exact match |", "|---|---|---|---|"]
    for name, stages in (("task RL", alone), ("MemTrain, then task RL", after)):
        text += [f"| {name} | {n} | {time:.1f} | {average(longqa[stage])} |" for n, stage, time in stages]
        results["minutes"][name] = [(time, float(np.mean(flat(together(longqa[stage]))))) for _, stage, time in stages]
    # Not less than the other had, where a run is that long.
    equal, stage, spent = next((found for found in alone if found[2] >= after[1][2]), alone[-1])
    names = f"task RL of {equal} steps, {spent:.1f} minutes", f"MemTrain + task RL, {after[1][2]:.1f} minutes"
    text += ["", difference(results, *names, longqa[stage], longqa["memtrain-task"])]

    (folder / "results.json").write_text(json.dumps(results, indent=1))
    figures = [("Table 1", table_1), *([("Figure 3", figure_3)] if all(figure_3.values()) else [])]
    plot(folder / "figures.png", figures, results["minutes"])
    body = "\n".join(text)
    for readme in map(Path, sys.argv[2:]):
        before, found, rest = readme.read_text().partition(BEGIN)
        _, ended, after_it = rest.partition(END)
        if not (found and ended):
            sys.exit(f"error: {readme} lacks the two marks that the tables stand between; add {BEGIN} and {END}")
        readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after_it}")
    print(body)


if __name__ == "__main__":
    main()
