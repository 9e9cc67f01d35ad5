"""A supervised start, without labels, for a model that can't do the format: RL learns only from what it samples.

    python recipes/cold_start.py --model runs/smollm2/model --corpus passages.jsonl --out runs/smollm2/cold
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
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from spacy.lang.en import English
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # noqa: E402
from engine import packing, parallel, sampling  # noqa: E402
from engine.config import Config, option, run_with_flags  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.models import check_new, load_policy, save_new  # noqa: E402
from engine.optimizer import MasterAdamW  # noqa: E402
from engine.report import sample_text, share  # noqa: E402
from masking import Document, draw_recall  # noqa: E402
from memtrain import learning_rate, logprobs_twin, set_weights  # noqa: E402
from rewards import answer_reward, boxed, recall_reward  # noqa: E402
from rollout import (  # noqa: E402
    ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, Limits, Turn, encode_prompt, fill, limits_of, read, recall,
    sampler,
)
from tasks.sources import load_corpus  # noqa: E402
from text.matching import MASK, occurrences  # noqa: E402

WORD = "Xmaskx"  # stands for [MASK] while sentences are cut
RECALL_DRAWS = 16  # of a recall target, until the memory holds one


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
    found = [" ".join(sentence.text.split()) for line in lines for sentence in splitter()(line).sents]
    return [sentence.replace(WORD, MASK) for sentence in found if sentence]


@cache
def splitter():
    nlp = English()
    nlp.add_pipe("sentencizer")
    return nlp


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


def demonstrate(document: Document, tokenizer, limits: Limits, rng) -> dict[str, list[Turn]]:
    """One reading of a document, written by rule: its turns by kind, "memory", "answer" and "recall"."""
    memory: list[str] = []
    texts, memories = {"memory": [], "answer": [], "recall": []}, []  # (prompt, completion)
    for section in document.chunks:
        prompt = fill(READ_PROMPT, problem=document.question, memory=text_of(memory), section=section)
        memory = demonstrate_memory(memory, section, tokenizer, limits.memory_tokens, rng)
        texts["memory"].append((prompt, text_of(memory)))
        memories.append(text_of(memory))
    prompt = fill(ANSWER_PROMPT, problem=document.question, memory=memories[-1])
    texts["answer"].append((prompt, box(document.answers[0])))
    for target in (draw_recall(document, rng) for _ in range(RECALL_DRAWS)):
        if target and occurrences(memories[target.memory_turn - 1], target.entity):
            prompt = fill(RECALL_PROMPT, memory=memories[target.memory_turn - 1], section=target.section)
            texts["recall"].append((prompt, box(target.entity)))
            break
    return {kind: [turn_of(document, *pair, tokenizer) for pair in pairs] for kind, pairs in texts.items()}


def text_of(memory: list[str]) -> str:
    return " ".join(memory) or EMPTY_MEMORY


def box(name: str) -> str:
    return f"\\boxed{{{name}}}"


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


def sampled_success(sample, documents: list[Document], limits: Limits, config: Config) -> tuple[dict, list[str]]:
    """Success at temperature 1 -> {measure: (right, n)}, and two trajectories in words."""
    trajectories = read(sample, documents, limits, progress="sampling")
    targets = [draw_recall(d, np.random.default_rng([config.seed, d.index])) for d in documents]
    recalls = recall(sample, trajectories, targets, limits)
    answers = [t.turns[-1] for t in trajectories] + [turn for turns in recalls for turn in turns]
    memories = [turn for t in trajectories for turn in t.turns[:-1]]
    asked = [(turns[0], target) for turns, target in zip(recalls, targets, strict=True) if target]
    scores = {
        "boxed": [boxed(turn.text) is not None for turn in answers],
        "memory ends": [turn.ended for turn in memories],
        "end-to-end": [answer_reward(t.prediction, t.document.answers) for t in trajectories],
        "recall": [recall_reward(turn.text, target.entity) for turn, target in asked],
    }
    shown = list(zip(trajectories, recalls, scores["end-to-end"], strict=True))[:2]
    samples = [sample_text(*parts, name="EM") for parts in shown]
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
    limits = limits_of(config, tokenizer)
    budget = sampling.Budget(config.rollout_tokens)
    generate = rollout.generate if config.plain else partial(sampling.generate, budget=budget)
    success = partial(
        sampled_success, sampler(generate, policy, tokenizer),
        [corpus.document(i, "heldout") for i in range(config.eval_documents)], limits, config,
    )
    measured = {"before": success()[0]}
    counts = dict.fromkeys(("memory", "answer", "recall"), 0)
    tokens = 0
    optimizer = MasterAdamW(policy, config.lr, config.offload_optimizer)
    began = time.perf_counter()
    bar = tqdm(range(config.steps), desc="cold start")
    for step in bar:
        turns = []
        for place in range(config.documents):
            number = step * config.documents + place
            document = corpus.document(number)
            document.place = place
            by_kind = demonstrate(document, tokenizer, limits, np.random.default_rng([config.seed, number]))
            counts = {kind: counts[kind] + len(own) for kind, own in by_kind.items()}
            turns += [turn for own in by_kind.values() for turn in own]
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
