"""Exact match by the chunk that holds what a question asks about: does a memory keep what it read first, or last?

    python recipes/positions.py --model runs/reproduce/0/memtrain-task/checkpoint --lengths 8 --eval-documents 48

Greedy, on long-text QA. A question of two hops counts where its first gold paragraph stands.
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
    """The first chunk, counted from 1, that holds a line of the gold paragraphs; 0 where a cut goes through all."""
    lines = [line.strip() for line in document.gold.splitlines() if len(line.split()) > 3]
    places = [n for n, chunk in enumerate(document.chunks, 1) if any(line in chunk for line in lines)]
    return min(places, default=0)


def main(config: Positions) -> None:
    if config.task != "longqa":
        raise UserError("--task: positions are measured in long texts; give --task longqa")
    model, tokenizer, sample = load_greedy(config.model, config)
    source, agent = load_task(config, model, tokenizer, Path(".entities"))
    for length, documents in documents_by_length(source, config, config.lengths or [config.chunks], True).items():
        hits: dict[int, list[float]] = {}
        for trajectory in agent(sample, documents, limits_of(config, tokenizer), progress="reading"):
            right = answer_reward(trajectory.prediction, trajectory.document.answers)
            hits.setdefault(chunk_of_gold(trajectory.document), []).append(right)
        print(f"| {length} chunks, gold in | exact match | n |\n|---|---|---|")
        for place, scores in sorted(hits.items()):
            print(f"| chunk {place} | {share(sum(scores), len(scores))} | {len(scores)} |")


if __name__ == "__main__":
    run_with_flags(main, Positions, follow_model=True)
