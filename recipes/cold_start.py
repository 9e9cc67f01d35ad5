"""A supervised start, without labels, for a model that can't produce the format: RL learns only from what it samples.

    python -m recipes.cold_start --model runs/smollm2/model --corpus passages.jsonl --out runs/smollm2/cold
    python memtrain.py --model runs/smollm2/cold --corpus passages.jsonl --out runs/smollm2/memtrain

Demonstrations come from the corpus itself, from the masked documents that MemTrain trains on:
  - A memory: random sentences of the old memory and the chunk, more often those with [MASK].
  - An answer: the masked entity, boxed.
  - A recall answer: an entity that is still in the memory. Any other entity would teach the model to guess.
So they only teach a preference for sentences with [MASK]; what else is worth keeping is left to RL. Success is sampled
before and after, on held-out documents.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import spacy
import torch
from tqdm import tqdm

import grpo
import rollout
from engine import parallel
from engine.checks import check_sampler
from engine.config import Config, check, option, run_with_flags
from engine.errors import UserError
from engine.metrics import row, sample_text, table
from engine.models import load_policy
from engine.optimizer import AdamW
from masking import Document, draw_recall, load_corpus
from memtrain import learning_rate, make_optimizer, twins
from recipes.folders import check_new, save_new
from rewards import answer_reward, boxed, recall_reward
from rollout import EMPTY_MEMORY, Budget, Sampler, Turn, draw_documents, encode_prompt, fill, read, recall
from text.matching import MASK, occurrences

WORD = "Xmaskx"  # stands for [MASK] while sentences are cut
RECALL_DRAWS = 16  # most draws of a recall target, until one is in the memory
SPLITTER = spacy.blank("en")
SPLITTER.add_pipe("sentencizer")


@dataclass
class ColdStart(Config):
    """The settings of a run, with other defaults. Those of RL, tasks and checkpoints have no effect here."""

    out: str = option("runs/cold-start", "folder for the resulting model; it must not exist")
    steps: int = option(200, "updates")
    documents: int = option(8, "documents per update; each gives a demonstration of every turn")
    lr: float = option(1e-4, "peak learning rate of AdamW")
    eval_documents: int = option(200, "held-out documents on which success is sampled, before and after")


# ---- demonstrations ----------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a text, by spaCy's rules; a line break always ends one."""
    lines = text.replace(MASK, WORD).split("\n")  # spaCy would split off the bracket after a full stop
    found = [" ".join(sentence.text.split()) for line in lines for sentence in SPLITTER(line).sents]
    return [sentence.replace(WORD, MASK) for sentence in found if sentence]


def demonstrate_memory(old: list[str], section: str, tokenizer, max_tokens: int, rng) -> list[str]:
    """The sentences of a new memory, from the old one and the chunk `section`, in order, within `max_tokens` tokens.

    A random share of the memory is filled, 60 to 100 %. Sentences with [MASK] are preferred to most others.
    """
    candidates = list(dict.fromkeys(old + sentences(section)))
    room = int(max_tokens * rng.uniform(0.6, 1.0)) - 1  # the EOS counts too
    kept: list[int] = []
    for n in sorted(range(len(candidates)), key=lambda n: rng.random() - 0.5 * (MASK in candidates[n])):
        wanted = sorted([*kept, n])
        if len(tokenizer(" ".join(candidates[i] for i in wanted), add_special_tokens=False)["input_ids"]) <= room:
            kept = wanted
    return [candidates[n] for n in kept]


def demonstrate(document: Document, tokenizer, memory_tokens: int, rng) -> dict[str, list[Turn]]:
    """One reading of a document, written by rules -> its turns by kind: "memory", "answer" and "recall"."""

    def show(completion: str, prompt: str, **slots) -> Turn:
        prompt_ids = encode_prompt(tokenizer, fill(prompt, **slots))
        ids = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return Turn(prompt_ids, [*ids, tokenizer.eos_token_id], True, completion, place=document.place)

    question, kept, memories, reads, recalls = document.question, [], [EMPTY_MEMORY], [], []
    for chunk in document.chunks:
        kept = demonstrate_memory(kept, chunk, tokenizer, memory_tokens, rng)
        memory = " ".join(kept) or EMPTY_MEMORY
        reads.append(show(memory, rollout.READ_PROMPT, problem=question, memory=memories[-1], section=chunk))
        memories.append(memory)
    answer = f"\\boxed{{{document.answers[0]}}}"
    answers = [show(answer, rollout.ANSWER_PROMPT, problem=question, memory=memories[-1])]
    for target in (draw_recall(document, rng) for _ in range(RECALL_DRAWS)):
        if target and occurrences(memory := memories[target.memory_turn], target.entity):
            answer, section = f"\\boxed{{{target.entity}}}", target.masked_chunk
            recalls.append(show(answer, rollout.RECALL_PROMPT, memory=memory, section=section))
            break
    return {"memory": reads, "answer": answers, "recall": recalls}


# ---- learning and measuring --------------------------------------------------------------------------------


def learn(
    policy, optimizer: AdamW, turns: list[Turn], lr: float, config: Config,
    micro_batches=grpo.micro_batches, token_logprobs=grpo.token_logprobs,
) -> float:
    """One update on the turns -> their loss: -log p in nats per token, averaged with the weights of Eq. 4."""
    policy.train(config.gradient_checkpointing)
    grpo.set_weights(turns)
    total = 0.0
    for batch in micro_batches(turns, config.train_tokens):
        logprobs, _, mask = token_logprobs(policy, batch)  # (turns, longest)
        weights = torch.tensor([turn.weight for turn in batch], device=mask.device)  # (turns,)
        loss = -(weights * logprobs.sum(1) / mask.sum(1)).sum()
        loss.backward()
        total += loss.item()
    optimizer.step(lr, config.grad_clip)
    policy.eval()
    return total


def sampled_success(sample: Sampler, documents: list[Document], config: Config, when: str) -> tuple[list[dict], list]:
    """Success at temperature 1 -> (a row of engine/metrics.py for each measure, two trajectories)."""
    trajectories = read(sample, documents, config, progress="sampling")
    for t in trajectories:
        t.target = draw_recall(t.document, np.random.default_rng([config.seed, t.document.index]))
        t.em = t.reward = answer_reward(t.prediction, t.document.answers)
    recall(sample, trajectories, config)
    answers = [turn for t in trajectories for turn in (t.turns[-1], *t.recalls)]
    scores = {
        "boxed": [float(boxed(turn.text) is not None) for turn in answers],
        "memory ends": [float(turn.ended) for t in trajectories for turn in t.turns[:-1]],
        "end_to_end": [t.em for t in trajectories],
        "recall": [recall_reward(turn.text, t.target.entity) for t in trajectories for turn in t.recalls],
    }
    rows = [row(when, name, config.chunks, "kept", dict(enumerate(own))) for name, own in scores.items() if own]
    return rows, trajectories[:2]


def main(config: ColdStart) -> None:
    check(config)
    out = Path(config.out)
    check_new(out)
    if "LOCAL_RANK" in os.environ:
        raise UserError("a cold start takes minutes on one device: run it with python, not torchrun")
    torch.manual_seed(config.seed)
    device = parallel.start()
    policy, tokenizer = load_policy(config, device)
    generate, micro_batches, token_logprobs = twins(config, policy)
    sample = Sampler(generate, policy, tokenizer, Budget(config.rollout_tokens))
    check_sampler(sample, token_logprobs, config.model)
    optimizer = make_optimizer(policy, config)
    corpus = load_corpus(config, tokenizer)
    heldout = [corpus.document(i, "heldout") for i in range(config.eval_documents)]
    before, _ = sampled_success(sample, heldout, config, "before")
    counts, tokens, began = Counter(), 0, time.perf_counter()
    bar = tqdm(range(config.steps), desc="cold start")
    for step in bar:
        turns = []
        for document in draw_documents(corpus, config, step):
            rng = np.random.default_rng([config.seed, document.index])
            shown = demonstrate(document, tokenizer, config.memory_tokens, rng)
            counts.update({kind: len(own) for kind, own in shown.items()})
            turns += chain(*shown.values())
        tokens += sum(map(grpo.turn_tokens, turns))
        loss = learn(policy, optimizer, turns, learning_rate(config, step), config, micro_batches, token_logprobs)
        bar.set_postfix(loss=f"{loss:.2f}")
    minutes = (time.perf_counter() - began) / 60
    save_new(policy, tokenizer, out)
    after, examples = sampled_success(sample, heldout, config, "after")
    made = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    made = f"demonstrations: {made}; {tokens} tokens, {minutes:.1f} minutes on {device}; model in {out}"
    print(*(sample_text(t, name="EM") for t in examples), table(before + after), made, sep="\n")
    result = {"rows": before + after, "demonstrations": counts, "tokens": tokens, "minutes": minutes}
    (out / "cold_start.json").write_text(json.dumps(result | {"settings": asdict(config)}, indent=1))


if __name__ == "__main__":
    run_with_flags(main, ColdStart)
