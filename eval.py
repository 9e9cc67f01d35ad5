"""How good a memory is: end-to-end and recall accuracy by document length, on pivots held out of training.

    python eval.py --model runs/tiny/checkpoint

prints a table and writes the same rows as JSON. Each number stands beside its control: the same
question with an empty memory, which tells what the model knows, or what the text gives away, without
having remembered anything.
"""

import json
import math
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from errors import UserError, run
from masking import Corpus, draw_recall
from parallel import first_error, gather
from retrieval import open_retriever
from rewards import boxed, exact_match, f1_score, objective_scores, substring_match
from rollout import EMPTY_MEMORY, answer, cut, prompt_overhead, read, recall, search
from settings import Setting, check_model, check_window, limits, load_model, load_source, option, parse


@dataclass
class Evaluation:
    lengths: list[int] | None = field(default=None, metadata={"help": "numbers of chunks (default: trained length x 1/2, 1, 2, 4, 8)"})
    controls: list[str] = field(default_factory=lambda: ["empty"], metadata={"help": "longqa: any of empty, full, oracle; the other tasks: empty"})
    against: list[str] = field(default_factory=list, metadata={"help": "further models, on the same questions: differences with a paired bootstrap"})
    plot: str | None = option(None, "where to write a plot of accuracy by length (needs matplotlib)")
    out: str | None = option(None, "where the rows go as JSON (default: eval.json in the model's folder if that is local)")


def score(prediction: str | None, document) -> float:
    """Exact match, 0 or 1; of several objectives their mean."""
    several = bool(document.answers) and isinstance(document.answers[0], list)
    return objective_scores(prediction, document.answers) if several else float(exact_match(prediction, document.answers))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927), which stays inside 0..1 and is sound for small n."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # rounding may step outside


def evaluate(
    model, tokenizer, corpus: Corpus, setting: Setting, lengths: list[int], when: str, rank: int = 0, processes: int = 1
) -> list[dict]:
    """Greedy accuracy on `eval_documents` held-out documents of each number of chunks in `lengths`.

    One row per length, task (end_to_end, recall) and memory (kept, empty): when, task, chunks, memory, n,
    accuracy, low, high, and scores, one a document in an order that is the same for every model. Several processes share
    the documents, and all get all rows.
    """
    documents, budget = [], limits(setting)
    for chunks in lengths:
        try:  # long ones take seconds each, so every process builds its own
            built, lost = [corpus.document(i, "heldout", chunks=chunks) for i in range(rank, setting.eval_documents, processes)], None
        except UserError as error:  # a small corpus can't fill the longest documents
            built, lost = [], error
        if lost := first_error(lost):
            if rank == 0:
                print(f"evaluation at {chunks} chunks is left out: {lost}")
        else:
            documents += built
    shown = f"evaluation {when}" if rank == 0 else None
    trajectories = read(model, tokenizer, documents, budget, greedy=True, progress=shown)
    draws = []
    for t in trajectories:
        rng = np.random.default_rng([setting.seed, len(t.document.chunks), t.document.index])
        if draw := draw_recall(t.document, rng):
            draws.append((t, draw))
    right: dict[tuple, list[bool]] = {}
    for memory in ("kept", "empty"):
        empty = memory == "empty"
        answered = read(model, tokenizer, documents, budget, greedy=True, empty_memory=True) if empty else trajectories
        for t in answered:
            key = (len(t.document.chunks), "end_to_end", memory)
            right.setdefault(key, []).append(exact_match(t.prediction, t.document.answers))
        recalled = recall(model, tokenizer, draws, budget, greedy=True, empty_memory=empty)
        for (t, draw), (turn,) in zip(draws, recalled, strict=True):
            key = (len(t.document.chunks), "recall", memory)
            right.setdefault(key, []).append(exact_match(boxed(turn.text), [draw.entity]))
    parts, right = gather(right), {}
    for part in parts:
        for key, hits in part.items():
            right.setdefault(key, []).extend(hits)
    rows = []
    for (chunks, task, memory), hits in sorted(right.items(), key=lambda item: (item[0][1], item[0][0], item[0][2] != "kept")):
        low, high = wilson(sum(hits), len(hits))
        rows.append(
            {"when": when, "task": task, "chunks": chunks, "memory": memory, "n": len(hits),
             "accuracy": sum(hits) / len(hits), "low": low, "high": high, "scores": [float(hit) for hit in hits]}
        )  # fmt: skip
    return rows


def evaluate_questions(
    model, tokenizer, source, setting: Setting, lengths: list[int], when: str, rank: int = 0, processes: int = 1,
    retriever=None, controls: tuple[str, ...] = ("kept", "empty"),
) -> list[dict]:  # fmt: skip
    """Greedy exact match, F1 and substring match on up to `eval_documents` questions: longqa at each length, searchqa once.

    controls: "kept" is the agent itself; the others answer in one step, from "empty" memory (searchqa: with no search
    left), from the "full" text as far as the window allows, from the "oracle" memory, the gold paragraphs. One row each;
    `scores` are per question, in an order that is the same for every model and length.
    """
    found, budget = {}, limits(setting)
    shown = f"evaluation {when}" if rank == 0 else None
    asked = documents_by_length(source, setting, source.lengths(lengths, setting.eval_split), rank == 0)
    places = [(length, i) for length in asked for i in range(len(asked[length]))][rank::processes]
    documents = [asked[length][i] for length, i in places]
    if "oracle" in controls and (lacking := next((d for d in documents if not d.gold), None)):
        raise UserError(f"--controls oracle: question {lacking.title} comes without gold paragraphs; leave it out")
    for control in controls:
        if setting.task == "searchqa":  # asked as ever, but closed-book without a search to make
            allowed = budget if control == "kept" else replace(budget, searches=0)
            predictions = [t.prediction for t in search(model, tokenizer, documents, retriever, allowed, greedy=True, progress=shown)]
        elif control == "kept":  # all lengths together: short documents fill the batches of the long ones
            predictions = [t.prediction for t in read(model, tokenizer, documents, budget, greedy=True, progress=shown)]
        else:
            memories = [control_memory(control, document, model, tokenizer, setting) for document in documents]
            predictions = [boxed(turn.text) for turn in answer(model, tokenizer, documents, memories, budget, greedy=True)]
        for (length, i), p, d in zip(places, predictions, documents, strict=True):
            more = (f1_score(p, d.answers), substring_match(p, d.answers)) if setting.task == "longqa" else (0.0, 0.0)
            found.setdefault((length, control), {})[i] = score(p, d), *more
    parts, rows = gather(found), []
    for length, control in ((length, control) for length in asked for control in controls):
        scores = [value for _, value in sorted(item for part in parts for item in part.get((length, control), {}).items())]
        exact, f1, substring = np.mean(scores, axis=0).tolist()
        low, high = wilson(exact * len(scores), len(scores))
        more = {"f1": f1, "substring": substring} if setting.task == "longqa" else {}
        rows.append(
            {"when": when, "task": setting.task, "chunks": length, "memory": control, "n": len(scores), "accuracy": exact, "low": low,
             "high": high, **more, "scores": [one[0] for one in scores]}
        )  # fmt: skip
    return rows


def documents_by_length(source, setting: Setting, lengths: list[int], told: bool) -> dict[int, list]:
    """{length: documents}, of the same questions at every length, each question once: those that can be brought to all.

    A length is left out, and where `told` printed, to which more than a tenth of the first 20 questions can't be brought:
    with the others gone, what remains would not be the same task.
    """
    order = range(len(source.questions[setting.eval_split]))
    document = cache(lambda i, length: source.document(i, setting.eval_split, length))  # the first ones are asked for twice
    for length in list(lengths):
        reasons = []
        for i in order[:20]:
            try:
                document(i, length)
            except UserError as error:
                reasons.append(error)
        if len(reasons) > len(order[:20]) / 10:
            lengths = [other for other in lengths if other != length]
            if told:
                print(f"evaluation at {length} chunks is left out, {len(reasons)} of {len(order[:20])} questions can't be brought to it: {reasons[0]}")
    built: dict[int, list] = {length: [] for length in lengths}
    for i in order if lengths else ():
        try:
            documents = [document(i, length) for length in lengths]
        except UserError:
            continue
        for length, one in zip(lengths, documents, strict=True):
            built[length].append(one)
        if len(built[lengths[0]]) == setting.eval_documents:
            break
    return {length: documents for length, documents in built.items() if documents}


def control_memory(control: str, document, model, tokenizer, setting: Setting) -> str:
    """What stands in for the memory in a control that doesn't read."""
    if control == "empty":
        return EMPTY_MEMORY
    if control == "oracle":
        return document.gold
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    question = len(tokenizer(document.question)["input_ids"])
    return cut(tokenizer, "".join(document.chunks), window - prompt_overhead(tokenizer) - question - setting.answer_tokens)


def paired_bootstrap(first: list[float], second: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(mean of second - first, 95 % interval) on the same questions, by drawing the questions again (Efron 1979)."""
    difference = np.asarray(second) - np.asarray(first)  # (questions,)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(1)  # (draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def table(rows: list[dict]) -> str:
    """The rows as a markdown table: a line per task, memory and measure, a column per number of chunks; n is a length's."""
    lengths = sorted({row["chunks"] for row in rows})
    if not rows:
        return "no document could be built, so nothing was evaluated"
    unit = "objectives" if rows[0]["task"] == "searchqa" else "chunks"
    lines = ["| | memory | n | " + " | ".join(f"{c} {unit}" for c in lengths) + " |", "|---|---|---|" + "---|" * len(lengths)]
    for key in dict.fromkeys((row["task"], row["when"], row["memory"]) for row in rows):
        task, when, memory = key
        mine = {row["chunks"]: row for row in rows if (row["task"], row["when"], row["memory"]) == key}
        n = sorted({row["n"] for row in mine.values()})
        for measure, name in (("accuracy", ""), ("f1", ", F1"), ("substring", ", substring")):
            if measure not in next(iter(mine.values())):
                continue
            cells = [
                "-" if chunks not in mine else f"{mine[chunks][measure]:.2f}"
                + (f" [{mine[chunks]['low']:.2f}, {mine[chunks]['high']:.2f}]" if measure == "accuracy" else "")
                for chunks in lengths
            ]  # fmt: skip
            lines.append(f"| {task}, {when}{name} | {memory} | {'-'.join(map(str, n[:: max(1, len(n) - 1)]))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def default_lengths(trained: int) -> list[int]:
    """Trained length x 1/2, 1, 2, 4, 8."""
    return sorted({max(1, trained // 2), trained, 2 * trained, 4 * trained, 8 * trained})


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
        mine = sorted((row for row in rows if (row["when"], row["task"], row["memory"]) == key), key=lambda row: row["chunks"])
        x, y = [row["chunks"] for row in mine], [row["accuracy"] for row in mine]
        spread = [[row["accuracy"] - row["low"] for row in mine], [row["high"] - row["accuracy"] for row in mine]]
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=2, label=" ".join(key), linestyle="-" if key[2] == "kept" else "--")
    axes.set(xscale="log", ylim=(0, 1), xlabel="chunks", ylabel="accuracy, greedy")
    axes.set_xticks(x, labels=map(str, x))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    setting, _ = parse(Setting, Evaluation)
    saved: dict = {}  # of the run that wrote this checkpoint, runs/NAME/checkpoint or runs/NAME/checkpoints/step-N
    if trained := next((file for folder in Path(setting.model).parents[:2] if (file := folder / "config.json").is_file()), None):
        try:
            written = json.loads(trained.read_text())
        except ValueError:
            written = None
        if isinstance(written, dict) and "chunk_tokens" in written:  # other programs' models have a config.json, too
            saved = {name: value for name, value in written.items() if name not in ("model", "out")}
            print(f"settings are those of {trained}, but for the command line's")
    setting, evaluation = parse(Setting, Evaluation, saved=saved)
    if bad := [control for control in evaluation.controls if control not in ("empty", "full", "oracle")]:
        raise UserError(f"--controls {bad[0]}: choose from empty, full and oracle")
    if setting.task == "memtrain" and evaluation.controls != ["empty"]:
        raise UserError(f"--controls {' '.join(evaluation.controls)}: masked documents have the control empty only")
    if setting.task == "searchqa" and {"full", "oracle"} & set(evaluation.controls):
        raise UserError(f"--controls {' '.join(evaluation.controls)}: search questions come without a text; use empty")
    if setting.eval_documents < 1:
        raise UserError("--eval-documents 0: nothing to evaluate; ask for at least one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(setting.model)
    out = Path(evaluation.out) if evaluation.out else folder / "eval.json" if folder.is_dir() else Path("eval.json")
    # What would fail at the end fails now: an evaluation can take hours.
    for file in filter(None, (out, evaluation.plot)):
        if not Path(file).parent.is_dir() or not os.access(Path(file).parent, os.W_OK):
            raise UserError(f"{file}: its folder is missing or can't be written to; name another")
        if Path(file).is_dir():
            raise UserError(f"{file}: is a folder; name a file in it")
    if evaluation.plot and Path(evaluation.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {evaluation.plot}: must end in .png, .svg or .pdf")
    if evaluation.plot and not load_pyplot():
        raise UserError("--plot: matplotlib is not installed; run `pip install matplotlib`, or leave --plot out")
    for name in evaluation.against:
        check_model(name, "--against")
    retriever = open_retriever(setting.retriever, setting.text, setting.encoder) if setting.task == "searchqa" else None
    lengths, rows, source = sorted(set(evaluation.lengths or default_lengths(setting.chunks))), [], None
    for name in (setting.model, *evaluation.against):
        model, tokenizer = load_model(name, device, setting.dtype, "--model" if name == setting.model else "--against")
        if source:  # the same texts for all, by one tokenizer
            check_window(setting, model, tokenizer)
        else:
            source = load_source(setting, model, tokenizer, out.parent / ".entities")
        when = name if evaluation.against else "now"
        if setting.task == "memtrain":
            rows += evaluate(model, tokenizer, source, setting, lengths, when)
        else:
            controls = ("kept", *evaluation.controls)
            rows += evaluate_questions(model, tokenizer, source, setting, lengths, when, retriever=retriever, controls=controls)
        out.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    for row in rows:
        first = next(r for r in rows if all(r[k] == row[k] for k in ("task", "chunks", "memory")))
        if first is not row and "scores" in row:
            mean, low, high = paired_bootstrap(first["scores"], row["scores"])
            print(f"{row['when']} - {first['when']}, {row['memory']}, {row['chunks']}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"95 % intervals; rows in {out}")
    if evaluation.plot:
        plot(rows, evaluation.plot)


if __name__ == "__main__":
    run(main)
