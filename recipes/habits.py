"""How a model keeps its memory: recall by distance, and the share of memories that a turn left unchanged.

    python recipes/habits.py --model runs/tiny/checkpoint --lengths 4 16 --out habits.json

Greedy, on held-out masked documents. Recall asks in each for several entities; its distance is k - l, the chunks that
lie between the section asked about and the memory that must supply it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import Config, option, run_with_flags  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.report import check_files  # noqa: E402
from eval import heldout_documents, load_greedy  # noqa: E402
from masking import draw_recall  # noqa: E402
from rewards import recall_reward  # noqa: E402
from rollout import limits_of, read, recall  # noqa: E402
from tasks.sources import load_corpus  # noqa: E402


@dataclass
class Habits(Config):
    """The settings of a run, and what is measured."""

    out: str = option("habits.json", "where the figures go as JSON")
    lengths: list[int] | None = option(None, "chunks of a document, several values (default: as trained)")
    questions_a_document: int = option(8, "recall questions about each document")


def main(config: Habits) -> None:
    if not config.eval_documents:
        raise UserError("--eval-documents 0: nothing would be read")
    lengths = config.lengths or [config.chunks]
    if min(lengths) < 2:
        raise UserError("recall needs an earlier chunk: give --lengths of at least 2")
    check_files(Path(config.out), None)
    model, tokenizer, sample = load_greedy(config.model, config)
    corpus = load_corpus(config, model, tokenizer, Path(config.out).parent / ".entities")
    rows = []
    for chunks in lengths:
        documents = heldout_documents(corpus, config, chunks)
        if not documents:
            raise UserError(f"--lengths {chunks}: the corpus can't fill so many chunks; give others, or more text")
        recalled, unchanged = habits_of(sample, documents, config, limits_of(config, tokenizer))
        rows.append({"chunks": chunks, "recall": recalled, "unchanged": unchanged})
        print(f"{chunks} chunks: {np.mean(unchanged):.2f} of {len(unchanged)} memories are unchanged")
        for distance, hits in recalled.items():
            print(f"  recall at distance {distance}: {np.mean(hits):.2f} of {len(hits)}")
    Path(config.out).write_text(json.dumps(rows))


def habits_of(sample, documents: list, config: Habits, limits) -> tuple[dict[int, list[float]], list[bool]]:
    """(recall rewards by distance, whether each turn after the first left the memory as it was)."""
    trajectories = read(sample, documents, limits, progress="reading")
    asked, rng = trajectories * config.questions_a_document, np.random.default_rng(config.seed)
    targets = [draw_recall(trajectory.document, rng) for trajectory in asked]
    hits: dict[int, list[float]] = {}
    for target, turns in zip(targets, recall(sample, asked, targets, limits), strict=True):
        for turn in turns:
            hits.setdefault(target.memory_turn - target.chunk, []).append(recall_reward(turn.text, target.entity))
    unchanged = [
        after == before for t in trajectories for before, after in zip(t.memories, t.memories[1:], strict=False)
    ]
    return dict(sorted(hits.items())), unchanged


if __name__ == "__main__":
    run_with_flags(main, Habits, follow_model=True)
