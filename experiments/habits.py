"""How a model keeps its memory: recall by distance, copied and unchanged memories, what it keeps of a long text.

    python -m experiments.habits --model runs/tiny/checkpoint --lengths 4 16 --out habits.json
    python -m experiments.habits --model runs/reproduce/0/memtrain-task/checkpoint --lengths 16 --eval-documents 48 \\
        --eval-questions runs/reproduce/test-0.jsonl

On held-out masked documents, recall asks for several entities of each. Its distance is k - l, the number of chunks from
the chunk asked about to the memory that must supply the entity. A sentence is copied if it stands word for word in the
memory before or in the chunk. With --task longqa, exact match by the chunk that has the gold paragraph: does a memory
keep what it read first, or last? For a question of two hops, the chunk is that of its first uncut gold paragraph.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from engine.config import Config, check, option, run_with_flags
from engine.errors import UserError
from engine.files import check_writable
from engine.metrics import share
from eval import heldout_documents, load_sampler, load_task
from masking import draw_recall
from recipes.cold_start import sentences
from rewards import answer_reward, recall_reward
from rollout import EMPTY_MEMORY, read, recall
from tasks.evaluate import documents_by_length
from tasks.longqa import LongDocument


@dataclass
class Habits(Config):
    """The settings of a run, and those of the measurement."""

    out: str = option("habits.json", "JSON file for the figures of masked documents")
    lengths: list[int] | None = option(None, "document lengths in chunks (default: --chunks)")
    questions_a_document: int = option(8, "recall questions per document")
    sampled: bool = option(False, "sample at temperature 1, instead of greedily")


def main(config: Habits) -> None:
    if config.task == "searchqa":
        raise UserError("--task searchqa: has no texts to read in chunks; give memtrain or longqa")
    if not config.eval_documents:
        raise UserError("--eval-documents 0: nothing would be read; ask for at least one")
    lengths = config.lengths or [config.chunks]
    if config.task == "memtrain" and min(lengths) < 2:
        raise UserError("recall needs an earlier chunk: give --lengths of at least 2")
    check(config)
    check_writable(Path(config.out))
    torch.manual_seed(config.seed)
    sample = replace(load_sampler(config.model, config), greedy=not config.sampled)
    source, _ = load_task(config, sample.model, sample.tokenizer)
    if config.task == "longqa":
        return print_positions(sample, source, lengths, config)
    rows = []
    for chunks in lengths:
        documents = heldout_documents(source, config, chunks)
        if not documents:
            raise UserError(f"--lengths {chunks}: the corpus can't fill that many chunks; give fewer, or more text")
        found = habits_of(sample, documents, config)
        rows.append({"chunks": chunks} | found)
        print(f"| {chunks} chunks | share | n |\n|---|---|---|")
        for name, hits in found.items():
            by_distance = isinstance(hits, dict)
            lines = {f"{name}, distance {k}": own for k, own in hits.items()} if by_distance else {name: hits}
            for line, own in lines.items():
                print(f"| {line} | {share(sum(own), len(own))} | {len(own)} |")
    Path(config.out).write_text(json.dumps(rows))


def habits_of(sample, documents: list, config: Habits) -> dict:
    """{measure: hits}: "recall" and "recall, empty memory" by distance, of memories and sentences, and end-to-end."""
    trajectories = read(sample, documents, config, progress="reading")
    empty = read(sample, documents, config, empty_memory=True)
    rng = np.random.default_rng(config.seed)
    asked = [replace(t, target=draw_recall(t.document, rng)) for t in trajectories * config.questions_a_document]
    found = {
        "end-to-end": [answer_reward(t.prediction, t.document.answers) for t in trajectories],
        "end-to-end, empty memory": [answer_reward(t.prediction, t.document.answers) for t in empty],
    }
    for name, empty_memory in (("recall", False), ("recall, empty memory", True)):
        recall(sample, asked, config, empty_memory=empty_memory)
        hits = defaultdict(list)
        for t in asked:
            for turn in t.recalls:
                hits[t.target.memory_turn - t.target.chunk].append(recall_reward(turn.text, t.target.entity))
        found[name] = dict(sorted(hits.items()))
    copied, repeating = [], []
    for t in trajectories:
        for chunk, before, after in zip(t.document.chunks, ["", *t.memories], t.memories, strict=False):
            source, lines = " ".join(f"{before} {chunk}".split()), sentences(after)
            copied.append([line in source for line in lines if line != EMPTY_MEMORY])
            repeating.append(len(set(lines)) < len(lines))
    return found | {
        "unchanged": [after == before for t in trajectories for before, after in pairwise(t.memories)],
        "sentences copied": [hit for own in copied for hit in own],
        "memories copied": [all(own) for own in copied],
        "memories that repeat a sentence": repeating,
    }


def print_positions(sample, source, lengths: list[int], config: Habits) -> None:
    """Print a table per length: exact match by the chunk of the gold paragraph."""
    lengths = source.lengths(lengths, config.eval_split)
    for length, documents in documents_by_length(source, config, lengths, verbose=True).items():
        places, hits = [chunk_of_gold(document) for document in documents], defaultdict(list)
        for place, t in zip(places, read(sample, documents, config, progress="reading"), strict=True):
            hits[place].append(answer_reward(t.prediction, t.document.answers))
        print(f"\n| {length} chunks, gold in | exact match | n |\n|---|---|---|")
        for place, scores in sorted(hits.items()):
            name = f"chunk {place}" if place else "cut through"
            print(f"| {name} | {share(sum(scores), len(scores))} | {len(scores)} |")


def chunk_of_gold(document: LongDocument) -> int:
    """The first chunk, counted from 1, with the complete text of a gold paragraph; 0 if all of them are cut.

    Raises UserError for a question without gold paragraphs.
    """
    if not document.gold:
        raise UserError(f"question {document.title}: has no gold paragraphs; give others with --eval-questions")
    chunks = enumerate(document.chunks, 1)
    return min((n for n, chunk in chunks if any(text in chunk for _, text in document.gold)), default=0)


if __name__ == "__main__":
    run_with_flags(main, Habits, follow_model=True)
