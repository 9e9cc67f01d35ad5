"""How good a memory is: end-to-end and recall accuracy by document length, on pivots held out of training.

    python eval.py --model runs/tiny/checkpoint

prints a table and writes the same rows as JSON. Each number stands beside its control, the same question with an empty
memory: it tells what the model knows, or what the text gives away, without having remembered anything.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

import rollout
from engine import parallel, report, sampling
from engine.config import Config, load_model, run_script
from engine.errors import UserError
from masking import Corpus, draw_recall
from rewards import exact_match, recall_reward
from rollout import Limits, limits_of, read, recall, sampler
from tasks import evaluate as questions
from tasks.sources import check_window, load_task


@dataclass
class Evaluation(Config):
    """The settings of a run, and what an evaluation adds to them."""

    out: str | None = field(
        default=None, metadata={"help": "where the rows go as JSON (default: eval.json in a local model's folder)"}
    )
    lengths: list[int] | None = field(
        default=None, metadata={"help": "numbers of chunks (default: trained length x 1/2, 1, 2, 4, 8)"}
    )
    controls: list[str] = field(
        default_factory=lambda: ["empty"],
        metadata={"help": "longqa: any of empty, full, oracle; the other tasks: empty"},
    )
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "further models, on the same questions: differences with a paired bootstrap"},
    )
    plot: str | None = field(
        default=None, metadata={"help": "where to write a plot of accuracy by length (needs matplotlib)"}
    )


def default_lengths(trained: int) -> list[int]:
    """Trained length x 1/2, 1, 2, 4, 8."""
    return sorted({max(1, trained // 2), trained, 2 * trained, 4 * trained, 8 * trained})


def measure(
    sample, agent, source, limits: Limits, config: Config, lengths: list[int], when: str, **more
) -> list[dict]:
    """Rows of the task's evaluation. `sample` is greedy; all processes call this, share the work and get all rows."""
    if config.task == "memtrain":
        return evaluate(sample, source, limits, config, lengths, when)
    return questions.evaluate_questions(sample, agent, source, limits, config, lengths, when, **more)


def evaluate(
    sample, corpus: Corpus, limits: Limits, config: Config, lengths: list[int], when: str
) -> list[dict]:
    """Accuracy on `eval_documents` held-out documents of each number of chunks in `lengths`.

    One row per length, task (end_to_end, recall) and memory (kept, empty): when, task, chunks, memory, n, accuracy,
    low, high, and scores, one a document in an order that is the same for every model.
    """
    documents = [document for chunks in lengths for document in heldout_documents(corpus, config, chunks)]
    shown = f"evaluation {when}" if parallel.rank() == 0 else None
    trajectories = read(sample, documents, limits, progress=shown)
    targets = []
    for document in documents:
        rng = np.random.default_rng([config.seed, len(document.chunks), document.index])
        targets.append(draw_recall(document, rng))
    scores: dict[tuple, list[float]] = {}
    for memory in ("kept", "empty"):
        empty = memory == "empty"
        answered = read(sample, documents, limits, empty_memory=True) if empty else trajectories
        recalls = recall(sample, trajectories, targets, limits, empty_memory=empty)
        for trajectory, turns, target in zip(answered, recalls, targets, strict=True):
            document = trajectory.document
            right = float(exact_match(trajectory.prediction, document.answers))
            scores.setdefault(("end_to_end", len(document.chunks), memory), []).append(right)
            for turn in turns:
                right = recall_reward(turn.text, target.entity)
                scores.setdefault(("recall", len(document.chunks), memory), []).append(right)
    together: dict[tuple, list[float]] = {}
    for part in parallel.gather(scores):
        for key, values in part.items():
            together.setdefault(key, []).extend(values)
    order = sorted(together, key=lambda key: (key[0], key[1], key[2] != "kept"))
    return [report.row(when, *key, together[key]) for key in order]


def heldout_documents(corpus: Corpus, config: Config, chunks: int) -> list:
    """This process's documents of one length; none, for all processes, where the corpus can't fill one."""
    documents, error = [], None
    try:
        for i in range(parallel.rank(), config.eval_documents, parallel.count()):
            documents.append(corpus.document(i, "heldout", chunks=chunks))
    except UserError as met:  # a small corpus can't fill the longest documents
        error = met
    if error := parallel.first_error(error):
        if parallel.rank() == 0:
            print(f"evaluation at {chunks} chunks is left out: {error}")
        return []
    return documents


def main(evaluation: Evaluation) -> None:
    questions.check(evaluation)
    folder = Path(evaluation.model)
    out = Path(evaluation.out or (folder / "eval.json" if folder.is_dir() else "eval.json"))
    report.check_files(out, evaluation.plot)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = sorted(set(evaluation.lengths or default_lengths(evaluation.chunks)))
    rows, source, agent = [], None, None
    for name in (evaluation.model, *evaluation.against):
        model, tokenizer = load_model(name, device, evaluation.dtype, "--against" if source else "--model")
        if source:  # the same texts for all, by the first model's tokenizer
            check_window(evaluation, model, tokenizer)
        else:
            source, agent = load_task(evaluation, model, tokenizer, out.parent / ".entities")
        budget = sampling.Budget(evaluation.rollout_tokens)
        generate = rollout.generate if evaluation.plain else partial(sampling.generate, budget=budget)
        sample, limits = sampler(generate, model, tokenizer, greedy=True), limits_of(evaluation, tokenizer)
        more = {}
        if evaluation.task != "memtrain":
            full = partial(questions.full_text, model, tokenizer, limits)
            more = {"controls": evaluation.controls, "full": full}
        when = name if evaluation.against else "now"
        rows += measure(sample, agent, source, limits, evaluation, lengths, when, **more)
        out.write_text(json.dumps(rows, indent=1))
    print(report.table(rows), *report.differences(rows), f"95 % intervals; rows in {out}", sep="\n")
    if evaluation.plot:
        report.plot(rows, evaluation.plot)


if __name__ == "__main__":
    run_script(main, Evaluation, follow_model=True)
