"""Skills of the base model, and its success when it samples: tables in markdown.

    python -m tiny.build.measure [MODEL]

Skills, greedy, each beside its bar (tiny/build/skills.py). Then, sampled, what decides whether GRPO has anything to
learn from: end-to-end and recall on training documents, and the questions of tiny/questions.jsonl about unseen
subjects, of one hop and two, each answered by reading its ten paragraphs. Last, some of the memories, to be read.
"""

import random
import sys
from functools import partial

import numpy as np
import torch

from engine.config import Config
from engine.errors import UserError, run_script
from engine.models import load_model
from engine.report import sample_text, share
from engine.sampling import Budget, generate
from masking import Document, draw_recall
from rewards import exact_match, recall_reward
from rollout import limits_of, read, recall, sampler
from tasks.longqa import Pool, long_documents
from tasks.questions import load_questions
from tasks.sources import load_corpus
from tiny.build.skills import BARS, Skills
from tiny.build.world import TINY, encyclopedia, split

DOCUMENTS, SAMPLES = 60, 4


def question_documents(tokenizer, config: Config, hops: int) -> list[Document]:
    """Questions about unseen subjects, of so many hops, each with its own ten paragraphs to read."""
    questions = [q for q in load_questions(TINY / "questions.jsonl") if len(q.gold) == hops]
    some = questions[:: max(1, len(questions) // DOCUMENTS)][:DOCUMENTS]
    return long_documents(some, Pool([], tokenizer), seed=0, chunk_tokens=config.chunk_tokens, documents=10)


def print_row(cells: list[str], hits: list[bool]) -> None:
    print("|", " | ".join([*cells, share(sum(hits), len(hits)), str(len(hits))]), "|")


def in_words(trajectories: list, recalls: list[list], right: list[bool]) -> list[str]:
    return [sample_text(*parts, name="EM") for parts in zip(trajectories, recalls, map(float, right), strict=True)]


def main() -> None:
    if len(sys.argv) > 2:
        raise UserError("give one model at most: python -m tiny.build.measure [MODEL]")
    config = Config(model=sys.argv[1]) if sys.argv[1:] else Config()
    torch.manual_seed(0)
    model, tokenizer = load_model(config.model, "cpu")
    fast = partial(generate, budget=Budget(config.rollout_tokens))
    known, unseen = split(encyclopedia(), random.Random(0))
    print("| skill, greedy | at least | measured | n |\n|---|---|---|---|")
    for name, hits in Skills(fast, model, tokenizer, known, unseen, n=200, seed="to report").measure().items():
        print_row([name, str(BARS[name])], hits)

    sample, limits = sampler(fast, model, tokenizer), limits_of(config, tokenizer)
    corpus = load_corpus(config, model, tokenizer, TINY / ".entities")
    print("\n| sampled at temperature 1 | success | n |\n|---|---|---|")
    documents = [corpus.document(i) for i in range(DOCUMENTS)]
    trajectories = read(sample, documents, limits, samples=SAMPLES, progress="end-to-end")
    right = [exact_match(t.prediction, t.document.answers) for t in trajectories]
    print_row(["end-to-end"], right)
    rng = np.random.default_rng(0)
    targets = [draw_recall(t.document, rng) for t in trajectories]
    recalls = recall(sample, trajectories, targets, limits)
    answers = zip(targets, recalls, strict=True)
    hits = [recall_reward(turn.text, target.entity) == 1 for target, turns in answers for turn in turns]
    print_row(["recall"], hits)
    shown = in_words(trajectories, recalls, right)[:: 6 * SAMPLES]
    for hops in (1, 2):
        documents = question_documents(tokenizer, config, hops)
        for name, empty in (("", False), (", empty memory", True)):
            trajectories = read(sample, documents, limits, SAMPLES, empty_memory=empty, progress="questions")
            hits = [exact_match(t.prediction, t.document.answers) for t in trajectories]
            print_row([f"question of {hops} hop{'s' * (hops > 1)}{name}"], hits)
            if not empty:
                shown += in_words(trajectories, [[]] * len(hits), hits)[:: 20 * SAMPLES]
    print("", *shown, sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
