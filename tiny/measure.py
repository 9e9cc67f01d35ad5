"""How often the base model succeeds when it samples: the figure that decides whether GRPO has anything to learn from.

    python tiny/measure.py [MODEL]

End-to-end and recall on training documents, and the questions of tiny/questions.jsonl about unseen subjects, of one
hop and two, each answered by reading its ten paragraphs. Then, greedy: whether focused notes find what is asked.
"""

import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import Config  # noqa: E402
from engine.models import load_model  # noqa: E402
from engine.report import share  # noqa: E402
from engine.sampling import Budget, generate  # noqa: E402
from masking import Document, draw_recall  # noqa: E402
from rewards import exact_match, recall_reward  # noqa: E402
from rollout import (  # noqa: E402
    EMPTY_MEMORY, READ_PROMPT, encode_prompt, fill, limits_of, read, recall, sampler,
)
from tasks.longqa import Pool, long_documents  # noqa: E402
from tasks.questions import load_questions  # noqa: E402
from tasks.sources import load_corpus  # noqa: E402
from tiny.demonstrations import FOCUSED, Demonstrations  # noqa: E402
from tiny.world import encyclopedia, split  # noqa: E402

HERE = Path(__file__).parent
DOCUMENTS, SAMPLES = 60, 4


def question_documents(tokenizer, config: Config, hops: int) -> list[Document]:
    """Questions about unseen subjects, of so many hops, each with its own ten paragraphs to read."""
    questions = [q for q in load_questions(HERE / "questions.jsonl") if len(q.gold) == hops]
    some = questions[:: max(1, len(questions) // DOCUMENTS)][:DOCUMENTS]
    return long_documents(some, Pool([], tokenizer), seed=0, chunk_tokens=config.chunk_tokens, documents=10)


def focused_notes(
    generate, model, tokenizer, demonstrations: Demonstrations, world: list[dict], new_tokens: int
) -> list[bool]:
    """Whether greedy notes on one section, begun as the focused begin theirs, hold the paragraph about what is asked.

    Half of the questions are of two hops; then it is the paragraph about the first.
    """
    prompts, wanted = [], []
    while len(prompts) < 2 * DOCUMENTS:
        row = demonstrations.question(world)
        titles, passages, _ = demonstrations.context(row, world, 10)
        asked = titles.index(row["hops"][0][0])
        section = next(s for s in demonstrations.sections(passages, titles) if f"Document {asked + 1}:" in s)
        text = fill(READ_PROMPT, problem=row["question"], memory=EMPTY_MEMORY, section=section)
        prompts.append(encode_prompt(tokenizer, text) + tokenizer(FOCUSED)["input_ids"])
        wanted.append(passages[asked][0])
    notes = generate(model, tokenizer, prompts, new_tokens, greedy=True)
    return [sentence in tokenizer.decode(note.ids) for sentence, note in zip(wanted, notes, strict=True)]


def report(name: str, hits: list[bool]) -> None:
    print(f"| {name} | {share(int(sum(hits)), len(hits))} | {len(hits)} |")


def main() -> None:
    config = Config(*sys.argv[1:2])
    torch.manual_seed(0)
    model, tokenizer = load_model(config.model, "cpu")
    fast = partial(generate, budget=Budget(config.rollout_tokens))
    sample, limits = sampler(fast, model, tokenizer), limits_of(config, tokenizer)
    corpus = load_corpus(config, model, tokenizer, HERE / ".entities")
    print("| sampled at temperature 1 | success | n |\n|---|---|---|")
    documents = [corpus.document(i) for i in range(DOCUMENTS)]
    trajectories = read(sample, documents, limits, samples=SAMPLES, progress="end-to-end")
    report("end-to-end", [exact_match(t.prediction, t.document.answers) for t in trajectories])
    rng = np.random.default_rng(0)
    targets = [draw_recall(t.document, rng) for t in trajectories]
    answers = zip(targets, recall(sample, trajectories, targets, limits), strict=True)
    report("recall", [recall_reward(turn.text, target.entity) == 1 for target, turns in answers for turn in turns])
    for hops in (1, 2):
        documents = question_documents(tokenizer, config, hops)
        for name, empty in (("", False), (", empty memory", True)):
            trajectories = read(sample, documents, limits, SAMPLES, empty_memory=empty, progress="questions")
            hits = [exact_match(t.prediction, t.document.answers) for t in trajectories]
            report(f"question of {hops} hops{name}", hits)
    known, unseen = split(encyclopedia(), random.Random(0))
    demonstrations = Demonstrations(known, unseen, tokenizer, seed=2)
    worlds = {"known": known, "unseen": unseen, "invented": demonstrations.inventor.fresh(60)}
    for name, world in worlds.items():
        tokens = np.mean([len(tokenizer(s["title"])["input_ids"]) for s in world])
        hits = focused_notes(fast, model, tokenizer, demonstrations, world, config.memory_tokens)
        report(f"focused notes hold what is asked, {name} subjects, {tokens:.1f} tokens a name", hits)


if __name__ == "__main__":
    main()
