"""How good a memory is: end-to-end and recall accuracy by document length, on pivots held out of training.

    python eval.py --model runs/tiny/checkpoint

prints a table and writes the same rows as JSON. Each number stands beside a control: the same question with an empty
memory. The control measures how much can be answered without a memory.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

import rollout
from engine import models, parallel, report, sampling
from engine.config import Config, run_with_flags
from engine.errors import UserError
from masking import Corpus, Document, Recall, draw_recall
from rewards import answer_reward, recall_reward
from rollout import Limits, limits_of, read, recall, sampler
from tasks import evaluate as task_evaluation
from tasks.sources import load_task


@dataclass
class Evaluation(Config):
    """The settings of a run, and what an evaluation adds to them."""

    out: str | None = field(
        default=None, metadata={"help": "where the rows go as JSON (default: eval.json in a local model's folder)"}
    )
    lengths: list[int] | None = field(
        default=None, metadata={"help": "chunks of a document, several values (default: trained x 1/2, 1, 2, 4, 8)"}
    )
    controls: list[str] = field(
        default_factory=lambda: ["empty"],
        metadata={"help": "in the memory's place: empty; in longqa also full (text) and oracle (gold paragraphs)"},
    )
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "further models, on the same questions: differences with a paired bootstrap"},
    )
    report: str | None = field(
        default=None, metadata={"help": "folder of a run: write a page to look at, report.html, and evaluate nothing"}
    )
    plot: str | None = field(
        default=None, metadata={"help": "where to write a plot of accuracy by length (needs matplotlib)"}
    )


def default_lengths(trained_chunks: int) -> list[int]:
    """Trained length x 1/2, 1, 2, 4, 8."""
    n = trained_chunks
    return sorted({max(1, n // 2), n, 2 * n, 4 * n, 8 * n})


def measure(
    sample, agent, source, limits: Limits, config: Config, lengths: list[int], when: str, **more
) -> list[dict]:
    """Evaluate on the task's held-out documents -> rows, labelled `when`.

    `sample` is greedy. Each process does its share, and all get all rows. Questions of the other tasks are evaluated in
    tasks/evaluate.py, with the agent and the further arguments.
    """
    if config.task == "memtrain":
        return evaluate(sample, source, limits, config, lengths, when)
    return task_evaluation.evaluate_questions(sample, agent, source, limits, config, lengths, when, **more)


def evaluate(
    sample, corpus: Corpus, limits: Limits, config: Config, lengths: list[int], when: str
) -> list[dict]:
    """Greedy accuracy on `eval_documents` held-out documents of each number of chunks in `lengths`.

    One row per length, task (end_to_end, recall) and memory (kept, empty), see report.row. Its scores are by document;
    recall has them for documents that have a target.
    """
    documents = [document for chunks in lengths for document in heldout_documents(corpus, config, chunks)]
    targets = [draw_target(document, config) for document in documents]
    progress = f"evaluation {when}" if parallel.rank() == 0 else None
    kept = read(sample, documents, limits, progress=progress)
    empty = read(sample, documents, limits, empty_memory=True)
    scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    for memory, trajectories in (("kept", kept), ("empty", empty)):
        recalls = recall(sample, kept, targets, limits, empty_memory=memory == "empty")
        for trajectory, answers, target in zip(trajectories, recalls, targets, strict=True):
            document, chunks = trajectory.document, len(trajectory.document.chunks)
            correct = answer_reward(trajectory.prediction, document.answers)
            scores["end_to_end", chunks, memory][document.index] = correct
            for turn in answers:
                scores["recall", chunks, memory][document.index] = recall_reward(turn.text, target.entity)
    all_scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    for part in parallel.gather(dict(scores)):
        for key, by_document in part.items():
            all_scores[key] |= by_document
    in_order = sorted(all_scores, key=lambda key: (key[0], key[1], key[2] == "empty"))
    return [report.row(when, *key, all_scores[key]) for key in in_order]


def draw_target(document: Document, config: Config) -> Recall | None:
    rng = np.random.default_rng([config.seed, len(document.chunks), document.index])
    return draw_recall(document, rng)


def heldout_documents(corpus: Corpus, config: Config, chunks: int) -> list[Document]:
    """This process's documents of one length; an empty list on all processes if any of them can't build its own."""
    documents, error = [], None
    try:
        for i in range(parallel.rank(), config.eval_documents, parallel.count()):
            documents.append(corpus.document(i, "heldout", chunks=chunks))
    except UserError as caught:  # a small corpus can't fill the longest documents
        error = caught
    first = parallel.first_error(error)
    if first and parallel.rank() == 0:
        print(f"evaluation at {chunks} chunks is left out: {first}")
    return [] if first else documents


def main(evaluation: Evaluation) -> None:
    if evaluation.report:
        return report.write_page(evaluation.report)
    task_evaluation.check(evaluation)
    folder = Path(evaluation.model)
    out = Path(evaluation.out or (folder / "eval.json" if folder.is_dir() else "eval.json"))
    report.check_files(out, evaluation.plot)
    task, rows = None, []
    for name in (evaluation.model, *evaluation.against):
        task, new_rows = evaluate_model(name, evaluation, task, out.parent / ".entities")
        rows += new_rows
        out.write_text(json.dumps(rows, indent=1))  # after each model: a large one takes hours
    print(report.table(rows), *report.differences(rows), f"95 % intervals; rows in {out}", sep="\n")
    if evaluation.plot:
        report.plot(rows, evaluation.plot)


def evaluate_model(name: str, evaluation: Evaluation, task: tuple | None, cache: Path) -> tuple[tuple, list[dict]]:
    """Rows of one model -> (task, rows). The first model's `task`, source and agent, is handed to the others."""
    model, tokenizer, sample = load_greedy(name, evaluation, given="--against" if task else "--model")
    source, agent = task = load_task(evaluation, model, tokenizer, cache, loaded=task)
    limits = limits_of(evaluation, tokenizer)
    lengths = sorted(set(evaluation.lengths or default_lengths(evaluation.chunks)))
    more = {}
    if evaluation.task != "memtrain":
        more = {"controls": evaluation.controls, "full": partial(task_evaluation.full_text, model, tokenizer, limits)}
    when = name if evaluation.against else "now"
    return task, measure(sample, agent, source, limits, evaluation, lengths, when, **more)


def load_greedy(name: str, config: Config, given: str = "--model") -> tuple:
    """(model, tokenizer, greedy sample) of a model folder or hub name, `given` by this flag. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = models.load_model(name, device, config.dtype, given)
    budget = sampling.Budget(config.rollout_tokens)
    generate = rollout.generate if config.plain else partial(sampling.generate, budget=budget)
    return model, tokenizer, sampler(generate, model, tokenizer, greedy=True)


if __name__ == "__main__":
    run_with_flags(main, Evaluation, follow_model=True)  # by default the settings of the run that wrote --model
