"""Exact match by the chunk that holds what a question asks about: does a memory keep what it read first, or last?

    python recipes/positions.py --model runs/reproduce/0/memtrain-task/checkpoint --lengths 8 --eval-documents 48 \\
        --eval-questions runs/reproduce/test-0.jsonl

Greedy, on long-text QA. A question of two hops counts where its first uncut gold paragraph stands.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import Config, option, run_with_flags  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.report import share  # noqa: E402
from eval import load_greedy  # noqa: E402
from rewards import answer_reward  # noqa: E402
from rollout import limits_of  # noqa: E402
from tasks.evaluate import documents_by_length  # noqa: E402
from tasks.longqa import LongDocument  # noqa: E402
from tasks.sources import load_task  # noqa: E402


@dataclass
class Positions(Config):
    """The settings of a run, and the lengths to measure at."""

    lengths: list[int] | None = option(None, "chunks of a text, several values (default: as trained)")


def chunk_of_gold(document: LongDocument) -> int:
    """The first chunk, counted from 1, that holds the whole text of a gold paragraph; 0 where a cut goes through all.

    Raises UserError for a question that names no gold paragraph.
    """
    if not document.gold_texts:
        raise UserError(f"question {document.title}: comes without gold paragraphs; give others by --eval-questions")
    chunks = enumerate(document.chunks, 1)
    return min((n for n, chunk in chunks if any(text in chunk for text in document.gold_texts)), default=0)


def main(config: Positions) -> None:
    if config.task != "longqa":
        raise UserError("--task: positions are measured in long texts; give --task longqa")
    if not config.eval_documents:
        raise UserError("--eval-documents 0: nothing would be read")
    model, tokenizer, sample = load_greedy(config.model, config)
    source, agent = load_task(config, model, tokenizer, Path(".entities"))
    lengths = source.lengths(config.lengths or [config.chunks], config.eval_split)
    for length, documents in documents_by_length(source, config, lengths, True).items():
        places, hits = [chunk_of_gold(document) for document in documents], {}
        trajectories = agent(sample, documents, limits_of(config, tokenizer), progress="reading")
        for place, trajectory in zip(places, trajectories, strict=True):
            right = answer_reward(trajectory.prediction, trajectory.document.answers)
            hits.setdefault(place, []).append(right)
        print(f"\n| {length} chunks, gold in | exact match | n |\n|---|---|---|")
        for place, scores in sorted(hits.items()):
            name = f"chunk {place}" if place else "cut through"
            print(f"| {name} | {share(sum(scores), len(scores))} | {len(scores)} |")


if __name__ == "__main__":
    run_with_flags(main, Positions, follow_model=True)
