"""A supervised start, without labels, for a model that can't do the format: RL learns only from what it samples.

    python -m recipes.cold_start --model runs/smollm2/model --corpus passages.jsonl --out runs/smollm2/cold
    python memtrain.py --model runs/smollm2/cold --corpus passages.jsonl --out runs/smollm2/memtrain

Demonstrations come from the corpus itself, from the masked documents that MemTrain trains on:
  - A memory: sentences of the old memory and of the section, at random, those with [MASK] more often.
  - An answer: the masked entity, in its box.
  - A recall answer: an entity that the memory still holds. Any other entity would teach the model to guess.
So only a preference for sentences with [MASK] is taught; what else is worth keeping is left to RL. Success is sampled
before and after, on documents that are held out.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import spacy
import torch
from tqdm import tqdm

import rollout
from engine import packing, parallel, sampling
from engine.config import Config, option, run_with_flags
from engine.errors import UserError
from engine.models import check_new, load_policy, save_new
from engine.optimizer import MasterAdamW
from engine.report import sample_text, share
from masking import Document, draw_recall
from memtrain import learning_rate, logprobs_twin, set_weights
from rewards import answer_reward, boxed, recall_reward
from rollout import EMPTY_MEMORY, Turn, encode_prompt, fill, limits_of, read, recall, sampler
from tasks.sources import load_corpus
from text.matching import MASK, occurrences

WORD = "Xmaskx"  # stands for [MASK] while sentences are cut
RECALL_DRAWS = 16  # of a recall target, until the memory holds one
SPLITTER = spacy.blank("en")
SPLITTER.add_pipe("sentencizer")


@dataclass
class ColdStart(Config):
    """The settings of a run, with other defaults. Those of RL, of a task and of checkpoints change nothing here."""

    out: str = option("runs/cold-start", "folder of the model that comes out; it must not exist")
    steps: int = option(200, "updates")
    documents: int = option(8, "documents an update; each gives a demonstration of every turn")
    lr: float = option(1e-4, "peak learning rate of AdamW")
    eval_documents: int = option(200, "held-out documents on which success is sampled, before and after")


# ---- demonstrations ----------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a text, by spaCy's rules; a line end always ends one."""
    lines = text.replace(MASK, WORD).split("\n")  # after a full stop, spaCy would leave the bracket behind
    found = [" ".join(sentence.text.split()) for line in lines for sentence in SPLITTER(line).sents]
    return [sentence.replace(WORD, MASK) for sentence in found if sentence]


def demonstrate_memory(old: list[str], section: str, tokenizer, max_tokens: int, rng) -> list[str]:
    """The sentences of a new memory: of the old one and of the section, in their order, as long as they fit.

    Each reader fills another share of the memory. A sentence with [MASK] comes before most others.
    """
    candidates = list(dict.fromkeys(old + sentences(section)))
    room = int(max_tokens * rng.uniform(0.6, 1.0)) - 1  # the EOS counts, too
    order = sorted(range(len(candidates)), key=lambda n: rng.random() - 0.5 * (MASK in candidates[n]))
    kept: list[int] = []
    for n in order:
        wanted = sorted([*kept, n])
        if len(tokenizer(" ".join(candidates[i] for i in wanted), add_special_tokens=False)["input_ids"]) <= room:
            kept = wanted
    return [candidates[n] for n in kept]


def demonstrate(document: Document, tokenizer, memory_tokens: int, rng) -> dict[str, list[Turn]]:
    """One reading of a document, written by rule: its turns by kind, "memory", "answer" and "recall"."""
    kept, memories = [], [EMPTY_MEMORY]  # m_0, m_1, ...
    shown = {"memory": [], "answer": [], "recall": []}  # of (prompt, completion)
    for chunk in document.chunks:
        kept = demonstrate_memory(kept, chunk, tokenizer, memory_tokens, rng)
        prompt = fill(rollout.READ_PROMPT, problem=document.question, memory=memories[-1], section=chunk)
        memories.append(" ".join(kept) or EMPTY_MEMORY)
        shown["memory"].append((prompt, memories[-1]))
    prompt = fill(rollout.ANSWER_PROMPT, problem=document.question, memory=memories[-1])
    shown["answer"].append((prompt, f"\\boxed{{{document.answers[0]}}}"))
    for target in (draw_recall(document, rng) for _ in range(RECALL_DRAWS)):
        if target and occurrences(memories[target.memory_turn], target.entity):
            prompt = fill(rollout.RECALL_PROMPT, memory=memories[target.memory_turn], section=target.section)
            shown["recall"].append((prompt, f"\\boxed{{{target.entity}}}"))
            break
    return {kind: [turn_of(document, *pair, tokenizer) for pair in pairs] for kind, pairs in shown.items()}


def turn_of(document: Document, prompt: str, completion: str, tokenizer) -> Turn:
    ids = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    prompt_ids = encode_prompt(tokenizer, prompt)
    return Turn(prompt_ids, [*ids, tokenizer.eos_token_id], True, completion, place=document.place)


# ---- learning ----------------------------------------------------------------------------------------------


def learn(policy, optimizer: MasterAdamW, turns: list[Turn], lr: float, config: Config) -> float:
    """One update towards the turns -> their loss: -log p in nats a token, averaged with the weights of Eq. 4."""
    policy.train(config.gradient_checkpointing)
    set_weights(turns)
    total = 0.0
    for batch in packing.micro_batches(policy, turns, config.train_tokens):
        logprobs, _, mask = logprobs_twin(config)(policy, batch)  # (turns, longest)
        weights = torch.tensor([turn.weight for turn in batch], device=mask.device)  # (turns,)
        loss = -(weights * logprobs.sum(1) / mask.sum(1)).sum()
        loss.backward()
        total += loss.item()
    optimizer.step(lr, config.grad_clip)
    policy.eval()
    return total


# ---- what is measured --------------------------------------------------------------------------------------


def sampled_success(sample, documents: list[Document], config: Config, limits) -> tuple[dict, list[str]]:
    """Success at temperature 1 -> {measure: (right, n)}, and two trajectories in words."""
    trajectories = read(sample, documents, limits, progress="sampling")
    targets = [draw_recall(d, np.random.default_rng([config.seed, d.index])) for d in documents]
    recalls = recall(sample, trajectories, targets, limits)
    asked = [(turns[0], target) for turns, target in zip(recalls, targets, strict=True) if target]
    answers = [t.turns[-1] for t in trajectories] + [turn for turn, _ in asked]
    em = [answer_reward(t.prediction, t.document.answers) for t in trajectories]
    scores = {
        "boxed": [boxed(turn.text) is not None for turn in answers],
        "memory ends": [turn.ended for t in trajectories for turn in t.turns[:-1]],
        "end-to-end": em,
        "recall": [recall_reward(turn.text, target.entity) for turn, target in asked],
    }
    samples = [sample_text(trajectories[n], recalls[n], em[n], name="EM") for n in range(min(2, len(em)))]
    return {name: (sum(values), len(values)) for name, values in scores.items()}, samples


def table(measured: dict[str, dict[str, tuple[float, int]]]) -> str:
    """{"before": {measure: (right, n)}, "after": ...} as a markdown table with 95 % intervals."""
    lines = ["| sampled | " + " | ".join(measured) + " | n |", "|---|" + "---|" * (len(measured) + 1)]
    for name, (_, n) in next(iter(measured.values())).items():
        cells = [share(*scores[name]) for scores in measured.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {n} |")
    return "\n".join(lines)


def main(config: ColdStart) -> None:
    out = Path(config.out)
    check_new(out)
    if "LOCAL_RANK" in os.environ:
        raise UserError("a cold start takes minutes on one device: run it by python, not by torchrun")
    torch.manual_seed(config.seed)
    _, _, device = parallel.start()
    policy, tokenizer = load_policy(config, device)
    if not config.plain:
        packing.enable(policy)
    corpus = load_corpus(config, policy, tokenizer, out.parent / ".entities")
    budget = sampling.Budget(config.rollout_tokens)
    generate = rollout.generate if config.plain else partial(sampling.generate, budget=budget)
    sample = sampler(generate, policy, tokenizer)
    heldout = [corpus.document(i, "heldout") for i in range(config.eval_documents)]
    success = partial(sampled_success, sample, heldout, config, limits_of(config, tokenizer))
    measured = {"before": success()[0]}
    counts, tokens, began = Counter(), 0, time.perf_counter()
    optimizer = MasterAdamW(policy, config.lr, config.offload_optimizer)
    bar = tqdm(range(config.steps), desc="cold start")
    for step in bar:
        turns = []
        for place in range(config.documents):
            number = step * config.documents + place
            document = corpus.document(number)
            document.place = place
            rng = np.random.default_rng([config.seed, number])
            for kind, shown in demonstrate(document, tokenizer, config.memory_tokens, rng).items():
                counts[kind] += len(shown)
                turns += shown
        tokens += sum(len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns)
        loss = learn(policy, optimizer, turns, learning_rate(config, step), config)
        bar.set_postfix(loss=f"{loss:.2f}")
    minutes = (time.perf_counter() - began) / 60
    save_new(policy, tokenizer, out)
    measured["after"], samples = success()
    made = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    print(*samples, f"demonstrations: {made}; {tokens} tokens, {minutes:.1f} minutes on {device}", sep="\n")
    print(table(measured), f"model in {out}", sep="\n")
    result = {"measured": measured, "demonstrations": counts, "tokens": tokens, "minutes": minutes, "samples": samples}
    (out / "cold_start.json").write_text(json.dumps(result | {"settings": asdict(config)}, indent=1))


if __name__ == "__main__":
    run_with_flags(main, ColdStart)
