"""Start-up and documents at the sizes of real corpora, on made-up passages: seconds and GiB of this machine.

    python benchmarks/scale.py                                 # 500,000 passages; nine minutes
    python benchmarks/scale.py --passages 20000 --tokenizer FOLDER

Each part runs in a process of its own, whose highest memory is shown; the passages themselves are part of it. Seconds
are CPU seconds of one process. Entities of made-up passages are known, so finding them is measured on 20,000 passages.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.config import Config  # noqa: E402
from engine.errors import run_script  # noqa: E402
from masking import Corpus  # noqa: E402
from tasks.evaluate import documents_by_length  # noqa: E402
from tasks.longqa import LongQA, Pool  # noqa: E402
from tasks.questions import load_questions  # noqa: E402
from tasks.retrieval import Http, Local  # noqa: E402
from tasks.retrieval_server import Server  # noqa: E402
from text.bm25 import BM25  # noqa: E402
from text.corpus import Passage, find_entities  # noqa: E402

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def made_up_passages(count: int, words: int = 85) -> list[Passage]:
    """Passages of common words, by Zipf's law, with four names each; every name stands in a few passages."""
    rng = np.random.default_rng(0)
    syllables = np.array(SYLLABLES)
    vocabulary = ["".join(some) for some in syllables[rng.integers(len(syllables), size=(30_000, 3))]]
    first = ["".join(some).capitalize() for some in syllables[rng.integers(len(syllables), size=(5_000, 2))]]
    last = ["".join(some).capitalize() for some in syllables[rng.integers(len(syllables), size=(count // 2 + 10, 4))]]
    passages = []
    for n in range(count):
        ranks = (len(vocabulary) ** rng.random(words)).astype(int) - 1  # Zipf's law
        tokens = [vocabulary[rank] for rank in ranks.tolist()]
        people = rng.integers(len(last), size=4).tolist()
        names = [f"{first[person % len(first)]} {last[person]}" for person in people]
        pieces, spans, length = [], [], 0
        for k, name in enumerate(names):
            piece = name + " " + " ".join(tokens[k * words // 4 : (k + 1) * words // 4]) + ". "
            spans.append((length, length + len(name)))
            pieces.append(piece)
            length += len(piece)
        passages.append(Passage(f"Title {n}", "".join(pieces).strip(), spans))
    return passages


def masked(passages: list[Passage], tokenizer) -> dict:
    """The proxy task: the recipes' 8 chunks of 5,120 tokens, and 64 of them."""
    began = time.process_time()
    corpus = Corpus(passages, tokenizer, seed=0, chunk_tokens=5120, n_chunks=8, n_related=29)
    found = {"masked documents: start-up": time.process_time() - began}
    for chunks in (8, 64):
        found[f"a masked document of {chunks} chunks"] = per_call(lambda i, n=chunks: corpus.document(i, chunks=n))
    return found


def long_text_source(passages: list[Passage], tokenizer) -> LongQA:
    pool = Pool(((passage.title, passage.text) for passage in passages), tokenizer)
    questions = load_questions(ROOT / "tiny/questions.jsonl")
    return LongQA({"train": questions, "test": questions}, pool, seed=0, chunk_tokens=5120, chunks=8)


def long_texts(passages: list[Passage], tokenizer) -> dict:
    began = time.process_time()
    source = long_text_source(passages, tokenizer)
    found = {"long-text QA: start-up, a pool": time.process_time() - began}
    for chunks in (8, 48):
        found[f"a long text of {chunks} chunks"] = per_call(lambda i, n=chunks: source.document(i, "test", n))
    return found


def evaluation(passages: list[Passage], tokenizer) -> dict:
    """All documents of one evaluation of long-text QA, before and after training."""
    source = long_text_source(passages, tokenizer)
    config, found = Config(task="longqa", eval_documents=128), {}
    for when in ("", ", again"):
        began = time.process_time()
        documents_by_length(source, config, [3, 6, 12, 24, 48], True)
        found[f"128 questions at 3, 6, 12, 24 and 48 chunks{when}"] = time.process_time() - began
    return found


def entities(passages: list[Passage], tokenizer) -> dict:
    some = passages[:20_000]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        find_entities(some, "rules", Path(folder))
    return {f"entities of {len(some):,} passages by rules, one process": time.process_time() - began}


def search(passages: list[Passage], tokenizer) -> dict:
    began = time.process_time()
    index = BM25([f"{passage.title} {passage.text}" for passage in passages])
    found = {"BM25: start-up": time.process_time() - began}
    queries = [" ".join(passage.text.split()[:12]) for passage in passages[:: max(1, len(passages) // 50)]]
    found["a BM25 search of 12 words"] = per_call(lambda i: index.search([queries[i]], 3), 40)
    rows = [{"title": passage.title, "text": passage.text} for passage in passages]
    with Server("127.0.0.1", 0) as server:
        server.server_bind()
        server.server_activate()
        server.retriever = Local(index, rows)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
        began = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:  # raises where one of them fails
            answers = list(pool.map(lambda _: Http(url).search((queries * 2)[:64], 3), range(8)))
        assert all(len(answer) == 64 for answer in answers)
        found["8 clients with 64 searches each, of the server (seconds)"] = time.perf_counter() - began
        server.shutdown()
    return found


def per_call(function, calls: int = 6) -> float:
    """Median CPU seconds of function(i)."""
    seconds = []
    for i in range(calls):
        began = time.process_time()
        function(i)
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


PARTS = {
    "masked": masked, "long_texts": long_texts, "entities": entities, "search": search, "evaluation": evaluation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=500_000)
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny/model"), help="folder or hub name (the tiny model's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        from transformers import AutoTokenizer

        passages = made_up_passages(arguments.passages)
        found = PARTS[arguments.parts[0]](passages, AutoTokenizer.from_pretrained(arguments.tokenizer))
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return print(json.dumps({"seconds": found, "gib": gib}))
    print(f"| {arguments.passages:,} passages | CPU seconds | GiB at most |\n|---|---|---|")
    for part in arguments.parts:
        command = [sys.executable, __file__, "--passages", str(arguments.passages), "--parts", part, "--alone"]
        done = subprocess.run([*command, "--tokenizer", arguments.tokenizer], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        result = json.loads(done.stdout.splitlines()[-1])
        for n, (name, seconds) in enumerate(result["seconds"].items()):
            gib = f"{result['gib']:.1f}" if n == 0 else ""
            print(f"| {name} | {seconds:.2f} | {gib} |", flush=True)


if __name__ == "__main__":
    run_script(main)
