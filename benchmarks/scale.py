"""Start-up and documents at the sizes of real corpora, on made-up passages: seconds and GiB of this machine.

    python -m benchmarks.scale                                 # 500,000 passages; nine minutes
    python -m benchmarks.scale --passages 20000 --tokenizer FOLDER

Each part runs in a process of its own, whose highest memory is shown; the passages themselves are part of it. Seconds
are CPU seconds of one process. Entities of made-up passages are known, so finding them is measured on 20,000 passages.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from engine.config import ROOT, Config
from engine.errors import run_script
from masking import Corpus, find_entities
from tasks.evaluate import documents_by_length
from tasks.longqa import LongQA, measured
from tasks.questions import load_questions
from text.bm25 import BM25
from text.corpus import Passage

SYLLABLES = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])


def made_up_passages(count: int, words: int = 85) -> list[Passage]:
    """Passages of common words, by Zipf's law, with four names each; every name stands in a few passages."""
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


def started(began: float) -> float:
    return time.process_time() - began


def per_call(function, calls: int = 6) -> float:
    """Median CPU seconds of function(i)."""
    seconds = []
    for i in range(calls):
        began = time.process_time()
        function(i)
        seconds.append(started(began))
    return float(np.median(seconds))


# ---- the parts: each returns seconds by what they are of -----------------------------------------------------


def masked(passages: list[Passage], tokenizer) -> dict[str, float]:
    """The proxy task: the recipes' 8 chunks of 5,120 tokens, and 64 of them."""
    began = time.process_time()
    corpus = Corpus(passages, tokenizer, seed=0, chunk_tokens=5120, n_chunks=8, n_related=29)
    found = {"masked documents: start-up": started(began)}
    for chunks in (8, 64):
        found[f"a masked document of {chunks} chunks"] = per_call(lambda i, n=chunks: corpus.document(i, chunks=n))
    return found


def long_text_source(passages: list[Passage], tokenizer) -> LongQA:
    pool = measured([(passage.title, passage.text) for passage in passages], tokenizer)
    questions = load_questions(ROOT / "tiny/questions.jsonl")
    return LongQA({"train": questions, "test": questions}, pool, tokenizer, seed=0, chunk_tokens=5120, chunks=8)


def long_texts(passages: list[Passage], tokenizer) -> dict[str, float]:
    began = time.process_time()
    source = long_text_source(passages, tokenizer)
    found = {"long-text QA: start-up, a pool": started(began)}
    for chunks in (8, 48):
        found[f"a long text of {chunks} chunks"] = per_call(lambda i, n=chunks: source.document(i, "test", n))
    return found


def evaluation(passages: list[Passage], tokenizer) -> dict[str, float]:
    """All documents of one evaluation of long-text QA, before and after training."""
    source = long_text_source(passages, tokenizer)
    config, found = Config(task="longqa", eval_documents=128), {}
    for when in ("", ", again"):
        began = time.process_time()
        documents_by_length(source, config, [3, 6, 12, 24, 48], True)
        found[f"128 questions at 3, 6, 12, 24 and 48 chunks{when}"] = started(began)
    return found


def entities(passages: list[Passage], tokenizer) -> dict[str, float]:
    some = passages[:20_000]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        find_entities(some, "rules", Path(folder))
    return {f"entities of {len(some):,} passages by rules, one process": started(began)}


def search(passages: list[Passage], tokenizer) -> dict[str, float]:
    began = time.process_time()
    index = BM25([f"{passage.title} {passage.text}" for passage in passages])
    found = {"BM25: start-up": started(began)}
    queries = [" ".join(passage.text.split()[:12]) for passage in passages[:: max(1, len(passages) // 50)]]
    found["a BM25 search of 12 words"] = per_call(lambda i: index.search([queries[i]], 3), 40)
    return found


PARTS = {part.__name__: part for part in (masked, long_texts, entities, search, evaluation)}


def measure(part: str, count: int, tokenizer: str) -> tuple[dict[str, float], float]:
    """(seconds of a part on so many passages, the highest memory of this process in GiB)."""
    seconds = PARTS[part](made_up_passages(count), AutoTokenizer.from_pretrained(tokenizer))
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=500_000)
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny/model"), help="folder or hub name (the tiny model's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    print(f"| {arguments.passages:,} passages | CPU seconds | GiB at most |\n|---|---|---|")
    for part in arguments.parts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            seconds, gib = fresh.submit(measure, part, arguments.passages, arguments.tokenizer).result()
        for n, (name, value) in enumerate(seconds.items()):
            print(f"| {name} | {value:.2f} | {f'{gib:.1f}' if n == 0 else ''} |", flush=True)


if __name__ == "__main__":
    run_script(main)
