"""Time and memory of start-up and documents at the size of real corpora, on synthetic passages.

    python -m benchmarks.scale                                 # 500,000 passages; nine minutes
    python -m benchmarks.scale --passages 20000 --tokenizer FOLDER

Seconds are CPU seconds of one process. Memory is the peak so far, the passages included. The entities of synthetic
passages are known, so finding them is measured separately, on 20,000 passages.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
from transformers import AutoTokenizer

from engine.config import ROOT, Config
from engine.errors import run_script
from masking import Corpus, common_words, entities_of
from tasks.evaluate import documents_by_length
from tasks.longqa import LongQA, measured
from tasks.questions import load_questions
from text.bm25 import BM25
from text.corpus import Passage

SYLLABLES = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])


def made_up_passages(count: int, words: int = 85) -> list[Passage]:
    """Passages of common words, by Zipf's law, with four names each; every name occurs in a few passages."""
    rng = np.random.default_rng(0)
    vocabulary, first, last = (
        ["".join(some) for some in SYLLABLES[rng.integers(len(SYLLABLES), size=size)]]
        for size in ((30_000, 3), (5_000, 2), (count // 2 + 10, 4))
    )
    passages = []
    for n in range(count):
        ranks = (len(vocabulary) ** rng.random(words)).astype(int) - 1  # Zipf's law
        tokens = [vocabulary[rank] for rank in ranks.tolist()]
        people = rng.integers(len(last), size=4).tolist()
        text, spans = "", []
        for k, person in enumerate(people):
            name = f"{first[person % len(first)].capitalize()} {last[person].capitalize()}"
            spans.append((len(text), len(text) + len(name)))
            text += f"{name} {' '.join(tokens[k * words // 4 : (k + 1) * words // 4])}. "
        passages.append(Passage(f"Title {n}", text.strip(), spans))
    return passages


def timed(name: str, function: Callable[[int], object], calls: int = 1):
    """Call function(0), function(1), ... and print the median of their CPU seconds -> the last call's result."""
    seconds = []
    for i in range(calls):
        began = time.process_time()
        result = function(i)
        seconds.append(time.process_time() - began)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {name} | {np.median(seconds):.2f} | {gib:.1f} |", flush=True)
    return result


def entities_and_search(passages: list[Passage], tokenizer) -> None:
    texts, names = [p.text for p in passages[:20_000]], frozenset(p.name for p in passages[:20_000])
    what = f"entities of {len(texts):,} passages by rules, one process"
    timed(what, lambda _: entities_of(texts, "rules", names, common_words(texts)))
    index = timed("BM25: start-up", lambda _: BM25([f"{p.title} {p.text}" for p in passages]))
    queries = [" ".join(p.text.split()[:12]) for p in passages[:: max(1, len(passages) // 50)]]
    timed("a BM25 search of 12 words", lambda i: index.search([queries[i]], 3), calls=40)


def long_texts(passages: list[Passage], tokenizer) -> None:
    """Long-text QA: the recipes' chunks, and all documents of one evaluation, before and after training."""
    pairs, questions = [(p.title, p.text) for p in passages], load_questions(ROOT / "tiny/questions.jsonl")
    pool = timed("long-text QA: start-up, a pool", lambda _: measured(pairs, tokenizer))
    source = LongQA({"train": questions, "test": questions}, pool, tokenizer, seed=0, chunk_tokens=5120, chunks=8)
    timed("a long text of 8 chunks", lambda i: source.document(i), calls=6)
    timed("a long text of 48 chunks", lambda i: source.document(i, chunks=48), calls=6)
    config, lengths = Config(task="longqa", eval_documents=128), [3, 6, 12, 24, 48]
    for when in ("", ", again"):
        what = f"128 questions at 3, 6, 12, 24 and 48 chunks{when}"
        timed(what, lambda _: documents_by_length(source, config, lengths, verbose=True))


def masked(passages: list[Passage], tokenizer) -> None:
    """The proxy task: the recipes' 8 chunks of 5,120 tokens, and 64 of them."""
    how = dict(seed=0, chunk_tokens=5120, n_chunks=8, n_related=29)
    corpus = timed("masked documents: start-up", lambda _: Corpus(passages, tokenizer, **how))
    timed("a masked document of 8 chunks", lambda i: corpus.document(i), calls=6)
    timed("a masked document of 64 chunks", lambda i: corpus.document(i, chunks=64), calls=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=500_000, help="passages to make (default: 500,000)")
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny/model"), help="folder or hub name (the tiny model's)")
    arguments = parser.parse_args()
    passages, tokenizer = made_up_passages(arguments.passages), AutoTokenizer.from_pretrained(arguments.tokenizer)
    print(f"| {arguments.passages:,} passages | CPU seconds | GiB at most |\n|---|---|---|")
    for part in (entities_and_search, long_texts, masked):
        part(passages, tokenizer)


if __name__ == "__main__":
    run_script(main)
