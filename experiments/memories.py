"""A document's last memory before and after training, with a recall that is right and one that is wrong.

    python -m experiments.memories tiny/model runs/first-0/checkpoint    # README's example

Both models read held-out documents greedily. The document shown is the first that only one of them answers right.
Recall asks the last memory for every entity of the earlier chunks, in their order; its first right and first wrong
answer are shown.
"""

import sys
from dataclasses import replace

from engine.config import Config
from engine.errors import UserError, run_script
from eval import load_sampler
from masking import RecallTarget, load_corpus, mask
from rewards import answer_reward, boxed, recall_reward
from rollout import read, recall
from text.matching import TARGET

DOCUMENTS = 32  # of which one is shown


def recalled(sample, trajectory, config) -> list[tuple[bool, str]]:
    """(whether it is right, the answer in a line) of every recall that the last memory can be asked for."""
    document, asked = trajectory.document, []
    for number, names in enumerate(document.recall_candidates[:-1], 1):
        for name in names:
            masked_chunk = mask(document.chunks[number - 1], name, TARGET)
            asked.append(replace(trajectory, target=RecallTarget(len(document.chunks), number, name, masked_chunk)))
    recall(sample, asked, config)
    lines = []
    for t in asked:
        (turn,), target = t.recalls, t.target
        sentences = target.masked_chunk.replace("\n", " ").split(". ")
        sentence = next(s for s in sentences if TARGET in s).strip().rstrip(".")
        right = bool(recall_reward(turn.text, target.entity))
        answer = (boxed(turn.text) or "nothing").strip()
        lines.append((right, f"{sentence}: {answer}" + ("" if right else f" (it was {target.entity})")))
    return lines


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two models: python -m experiments.memories tiny/model runs/X/checkpoint")
    config = Config(out="runs/memories", fast=True)
    samplers = [replace(load_sampler(model, config), greedy=True) for model in sys.argv[1:]]
    corpus = load_corpus(config, samplers[0].tokenizer)
    documents = [corpus.document(i, "heldout") for i in range(DOCUMENTS)]
    readings = [read(sample, documents, config, progress="reading") for sample in samplers]
    for before, after in zip(*readings, strict=True):
        if len({answer_reward(t.prediction, t.document.answers) for t in (before, after)}) == 2:
            break
    else:
        raise UserError(f"of {DOCUMENTS} documents none is answered right by one model only")
    document = before.document
    print(f"document {document.index}: {document.question}  y = {document.answers[0]}")
    for when, sample, trajectory in zip(("before", "after"), samplers, (before, after), strict=True):
        print(f"\n{when}: answered {(trajectory.prediction or 'nothing').strip()}, last memory:\n{trajectory.memory}")
        lines = recalled(sample, trajectory, config)
        print(f"recall: {sum(right for right, _ in lines)} of {len(lines)} right")
        for wanted, name in ((True, "right"), (False, "wrong")):
            for line in [line for right, line in lines if right == wanted][:1]:
                print(f"  {name}: {line}")


if __name__ == "__main__":
    run_script(main, __doc__)
