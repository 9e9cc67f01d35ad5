"""Skills of the base model, and its success when it samples: tables in markdown.

    python -m tiny.build.measure [MODEL]

Skills, greedy, each beside its bar (tiny/build/skills.py). Then, sampled, what decides whether GRPO has anything to
learn from: end-to-end and recall on training documents, and the questions of tiny/questions.jsonl about unseen
subjects, of one hop and two, each answered by reading its ten paragraphs. Last, some of the memories, to be read.
"""

import random
import sys
from dataclasses import replace

import numpy as np
import torch

from engine.config import Config
from engine.errors import UserError, run_script
from engine.metrics import sample_text, share
from engine.models import load_model
from fast.sampling import generate
from masking import Document, draw_recall, load_corpus
from rewards import exact_match, recall_reward
from rollout import Budget, Sampler, read, recall
from tasks.longqa import LongText
from tasks.questions import load_questions
from tiny.build.skills import BARS, Skills
from tiny.build.world import TINY, encyclopedia, split

DOCUMENTS, SAMPLES = 60, 4


def question_documents(tokenizer, config: Config, hops: int) -> list[Document]:
    """Questions about unseen subjects, of so many hops, each with its own ten paragraphs to read."""
    questions = [q for q in load_questions(TINY / "questions.jsonl") if len(q.gold) == hops]
    some = questions[:: max(1, len(questions) // DOCUMENTS)][:DOCUMENTS]
    texts = [LongText(q, n, [], tokenizer, seed=0, chunk_tokens=config.chunk_tokens) for n, q in enumerate(some)]
    return [text.document(text.draw(10)) for text in texts]


def print_row(cells: list[str], hits: list[bool]) -> None:
    print("|", " | ".join([*cells, share(sum(hits), len(hits)), str(len(hits))]), "|")


def right(trajectories: list) -> list[bool]:
    """Whether each answers right, which also becomes its reward."""
    for t in trajectories:
        t.reward = float(exact_match(t.prediction, t.document.answers))
    return [t.reward == 1 for t in trajectories]


def main() -> None:
    if len(sys.argv) > 2:
        raise UserError("give one model at most: python -m tiny.build.measure [MODEL]")
    config = Config(model=sys.argv[1] if sys.argv[1:] else Config.model, out=str(TINY / "measured"))
    torch.manual_seed(0)
    sample = Sampler(generate, *load_model(config.model, "cpu"), Budget(config.rollout_tokens))
    known, unseen = split(encyclopedia(), random.Random(0))
    print("| skill, greedy | at least | measured | n |\n|---|---|---|---|")
    skills = Skills(replace(sample, greedy=True), known, unseen, n=200, seed="to report")
    for name, hits in skills.measure().items():
        print_row([name, str(BARS[name])], hits)

    corpus = load_corpus(config, sample.tokenizer)
    print("\n| sampled at temperature 1 | success | n |\n|---|---|---|")
    documents = [corpus.document(i) for i in range(DOCUMENTS)]
    trajectories = read(sample, documents, config, samples=SAMPLES, progress="end-to-end")
    print_row(["end-to-end"], right(trajectories))
    rng = np.random.default_rng(0)
    for t in trajectories:
        t.target = draw_recall(t.document, rng)
    recall(sample, trajectories, config)
    print_row(["recall"], [recall_reward(turn.text, t.target.entity) == 1 for t in trajectories for turn in t.recalls])
    shown = trajectories[:: 6 * SAMPLES]
    for hops in (1, 2):
        documents = question_documents(sample.tokenizer, config, hops)
        for name, empty in (("", False), (", empty memory", True)):
            trajectories = read(sample, documents, config, SAMPLES, empty_memory=empty, progress="questions")
            print_row([f"question of {hops} hop{'s' * (hops > 1)}{name}"], right(trajectories))
            if not empty:
                shown += trajectories[:: 20 * SAMPLES]
    print("", *(sample_text(t, name="EM") for t in shown), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
