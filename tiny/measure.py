"""How often the base model succeeds when it samples: the figure that decides whether GRPO has anything to learn from.

    python tiny/measure.py [MODEL]

End-to-end and recall on training documents, and the questions of tiny/questions.jsonl about unseen subjects, of one
hop and two, each answered by reading its ten paragraphs.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import wilson  # noqa: E402
from masking import Document, draw_recall  # noqa: E402
from qa import Pool, load_questions, long_documents  # noqa: E402
from rewards import exact_match, recall_reward  # noqa: E402
from rollout import read, recall  # noqa: E402
from settings import Setting, limits, load_corpus, load_model  # noqa: E402

HERE = Path(__file__).parent
DOCUMENTS, SAMPLES = 60, 4


def question_documents(tokenizer, setting: Setting, hops: int) -> list[Document]:
    """Questions about unseen subjects, of so many hops, each with its own ten paragraphs to read."""
    questions = [q for q in load_questions(HERE / "questions.jsonl") if len(q.gold) == hops]
    some = questions[:: max(1, len(questions) // DOCUMENTS)][:DOCUMENTS]
    return long_documents(some, Pool([], tokenizer), seed=0, chunk_tokens=setting.chunk_tokens, documents=10)


def report(name: str, hits: list[bool]) -> None:
    low, high = wilson(int(sum(hits)), len(hits))
    print(f"| {name} | {np.mean(hits):.2f} [{low:.2f}, {high:.2f}] | {len(hits)} |")


def main() -> None:
    setting = Setting(*sys.argv[1:2])
    torch.manual_seed(0)
    model, tokenizer = load_model(setting.model, "cpu")
    corpus = load_corpus(setting, model, tokenizer, HERE / ".entities")
    print("| sampled at temperature 1 | success | n |\n|---|---|---|")
    documents = [corpus.document(i) for i in range(DOCUMENTS)]
    trajectories = read(model, tokenizer, documents, limits(setting), samples=SAMPLES, progress="end-to-end")
    report("end-to-end", [exact_match(t.prediction, t.document.answers) for t in trajectories])
    rng = np.random.default_rng(0)
    draws = [(t, draw) for t in trajectories if (draw := draw_recall(t.document, rng))]
    answers = recall(model, tokenizer, draws, limits(setting))
    report("recall", [recall_reward(turn.text, draw.entity) == 1 for (_, draw), (turn,) in zip(draws, answers, strict=True)])
    for hops in (1, 2):
        documents = question_documents(tokenizer, setting, hops)
        for name, empty in (("", False), (", empty memory", True)):
            trajectories = read(model, tokenizer, documents, limits(setting), samples=SAMPLES, empty_memory=empty, progress="questions")
            report(f"question of {hops} hops{name}", [exact_match(t.prediction, t.document.answers) for t in trajectories])


if __name__ == "__main__":
    main()
