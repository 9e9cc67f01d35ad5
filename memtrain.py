"""MemTrain: train a language model to keep a good memory, without labels (arXiv 2606.03197).

    python memtrain.py                                         # tiny default: no download, CPU, minutes
    python memtrain.py --config recipes/qwen3-4b-80gb.args     # a real model on a GPU

Where this differs from the paper:
  - Advantages are divided by the group's standard deviation by default (GRPO as DeepSeekMath wrote it);
    `--advantage mean` is the paper's (Eq. 3), and its recipes set it.
  - A group is dropped when its rewards are all equal; the paper drops all zero and all one, which says
    nothing of sums such as EM + lambda * recall.
  - The paper is silent on the clip range, on which steps are recalled and on what counts as an occurrence
    of an entity: README lists what was chosen.
  - 20 % of the titles are held out, so that what is evaluated was never masked in training.
"""

import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import Setting, default_lengths, evaluate, limits, load_corpus, load_model, option, parse, run, table
from grpo import completion_logprobs, conversation_weights, group_advantages, grpo_loss, micro_batches
from masking import UserError, draw_recall
from rewards import exact_match, recall_reward, trajectory_reward
from rollout import Trajectory, Turn, read, recall


@dataclass
class Training:
    """GRPO on the two proxy tasks. The defaults are those of the tiny model."""

    out: str = option("runs/tiny", "folder of this run; it must not hold another")
    steps: int = option(36, "steps: one rollout of every document, then its updates (paper: 300)")
    documents: int = option(8, "documents a step (paper: 32)")
    g1: int = option(8, "trajectories a document, a group")
    g2: int = option(4, "recall answers a trajectory, a group (paper: 8)")
    recall_weight: float = option(0.5, "lambda of Eq. 2")
    ablation: str = option("none", "none, end_to_end (no recall at all) or decoupled (recall stays out of R^E)", choices=["none", "end_to_end", "decoupled"])
    shared_recall_draw: bool = option(False, "one draw of what to recall for all trajectories of a document")

    lr: float = option(3e-4, "peak learning rate of AdamW (paper: 1e-6)")
    lr_warmup: int = option(2, "steps of linear warm-up")
    lr_schedule: str = option("constant", "constant or cosine (down to zero)", choices=["constant", "cosine"])
    grad_clip: float = option(1.0, "largest gradient norm")
    advantage: str = option("group_norm", "group_norm, or mean as in the paper (Eq. 3)", choices=["group_norm", "mean"])
    eps_low: float = option(0.2, "clip range below 1")
    eps_high: float = option(0.2, "clip range above 1")
    kl: float = option(0.0, "beta, KL to the model that training started from (paper: 1e-3); 0 loads no reference")
    update_batch: int | None = option(None, "documents an update (default: all of a step's)")
    train_tokens: int = option(16384, "padded tokens of one forward and backward; gradients add up over them")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third slower")

    sample_every: int = option(10, "show a decoded trajectory every so many steps")
    save_every: int = option(100, "write the checkpoint every so many steps, and at the end")


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then constant or a cosine that ends at zero."""
    rate = training.lr * min(1.0, (step + 1) / max(1, training.lr_warmup))
    if training.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / training.steps))
    return rate


def mark(turns: list[Turn], document: int, group: int, advantage: float) -> list[Turn]:
    """The turns with their document, their group and the advantage that all their tokens get."""
    for turn in turns:
        turn.document, turn.group, turn.advantage = document, group, advantage
    return turns


def update(model, reference, optimizer, turns: list[Turn], training: Training) -> dict[str, float]:
    """Eq. 4 over `turns`, in updates of `--update-batch` documents: sums of grpo_loss's stats, the loss, gradient norms."""
    size = training.update_batch or training.documents
    documents = list(dict.fromkeys(turn.document for turn in turns))
    slices = [set(documents[i : i + size]) for i in range(0, len(documents), size)]
    old: dict[int, torch.Tensor] = {}
    if len(slices) > 1:  # From the second update on the policy is no longer the one that sampled.
        with torch.no_grad():
            for batch in micro_batches(turns, training.train_tokens):
                logprobs, _, _ = completion_logprobs(model, [turns[i] for i in batch])
                old.update({i: row[: len(turns[i].completion_ids)] for i, row in zip(batch, logprobs, strict=True)})
    totals = {"loss": 0.0, "grad_norm": 0.0, "updates": len(slices)}
    for chosen in slices:
        mine = [i for i, turn in enumerate(turns) if turn.document in chosen]
        weights = conversation_weights([turns[i].document for i in mine], [True] * len(mine)).tolist()
        weight = dict(zip(mine, weights, strict=True))
        for positions in micro_batches([turns[i] for i in mine], training.train_tokens):
            batch = [mine[p] for p in positions]
            part = [turns[i] for i in batch]
            logprobs, entropy, mask = completion_logprobs(model, part, with_entropy=True)  # (turns, longest)
            old_logprobs = reference_logprobs = None
            if old:
                old_logprobs = torch.nn.utils.rnn.pad_sequence([old[i] for i in batch], batch_first=True)
            if reference is not None:
                with torch.no_grad():
                    reference_logprobs, _, _ = completion_logprobs(reference, part)
            loss, stats = grpo_loss(
                logprobs, old_logprobs, reference_logprobs, mask,
                torch.tensor([turn.advantage for turn in part], device=mask.device),
                torch.tensor([weight[i] for i in batch], device=mask.device),
                training.eps_low, training.eps_high, training.kl, entropy,
            )  # fmt: skip
            loss.backward()
            totals["loss"] += loss.item() / len(slices)
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        totals["grad_norm"] += norm.item() / len(slices)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return totals


def sample_text(trajectory: Trajectory, recalled: list[Turn], reward: float) -> str:
    """One trajectory as a person would read it: what it kept after each chunk, and what it answered."""
    lines = [f"y = {trajectory.document.answers[0]!r}, answered {trajectory.prediction!r}, R^E = {reward:.2f}"]
    lines += [f"  m_{k}: {memory}" for k, memory in enumerate(trajectory.memories, 1)]
    lines += [f"  recall: {turn.text.strip()}" for turn in recalled[:2]]
    return "\n".join(lines)


def save(model, tokenizer, setting: Setting, training: Training, step: int) -> Path:
    """Write out/checkpoint, complete or not at all: AutoModelForCausalLM and AutoTokenizer load it."""
    folder, fresh = Path(training.out) / "checkpoint", Path(training.out) / "checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [memtrain, grpo]\n---\n# A MemTrain checkpoint\n\n"
        f"`{setting.model}` after {step} steps of MemTrain (arXiv 2606.03197) on `{setting.corpus}`: it reads a text "
        f"chunk by chunk ({setting.chunk_tokens} tokens) and keeps a memory of up to {setting.memory_tokens} tokens.\n"
        "Made to be trained further on a task. The settings are in `config.json` of the run's folder.\n"
    )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def main() -> None:
    setting, training = parse(Setting, Training)
    out = Path(training.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: the folder holds another run; choose another or delete it")
    if training.g1 < 2 or (training.g2 < 2 and training.ablation != "end_to_end"):
        raise UserError("--g1 and --g2 must be at least 2: an advantage compares the samples of a group")
    random.seed(setting.seed)
    np.random.seed(setting.seed)
    torch.manual_seed(setting.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model, tokenizer = load_model(setting.model, device)
    reference = load_model(setting.model, device)[0].requires_grad_(False) if training.kl else None
    corpus = load_corpus(setting, model, tokenizer, out.parent / ".entities")
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.0)
    autocast = torch.autocast(device, torch.bfloat16, enabled=setting.dtype == "bfloat16")

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(setting) | asdict(training), indent=1))
    lengths, rows = default_lengths(setting.chunks), []
    if setting.eval_documents:
        with autocast:
            rows = evaluate(model, tokenizer, corpus, setting, lengths, "before")
        print(table(rows))

    bar = tqdm(range(training.steps), desc="memtrain")
    started = time.perf_counter()
    for step in bar:
        clock = [time.perf_counter()]
        documents = [corpus.document(step * training.documents + n) for n in range(training.documents)]
        with autocast:
            trajectories = read(model, tokenizer, documents, limits(setting), samples=training.g1)
        clock.append(time.perf_counter())

        # One draw of (k, l, entity) a trajectory, or a document; None where a document has nothing to recall.
        draws = []
        for n, trajectory in enumerate(trajectories):
            who = n // training.g1 if training.shared_recall_draw else n
            rng = np.random.default_rng([setting.seed, step, who])
            draws.append(None if training.ablation == "end_to_end" else draw_recall(trajectory.document, rng))
        asked = [n for n, draw in enumerate(draws) if draw]
        with autocast:
            answers = recall(model, tokenizer, [(trajectories[n], draws[n]) for n in asked], limits(setting), training.g2)
        recalled = dict(zip(asked, answers, strict=True))
        clock.append(time.perf_counter())

        recall_rewards = {n: [recall_reward(turn.text, draws[n].entity) for turn in recalled[n]] for n in asked}  # Eq. 1
        correct = [exact_match(t.prediction, t.document.answers) for t in trajectories]
        added = {} if training.ablation == "decoupled" else recall_rewards
        rewards = [trajectory_reward(c, added.get(n, []), training.recall_weight) for n, c in enumerate(correct)]  # Eq. 2

        rewards_DG = torch.tensor(rewards, dtype=torch.float64).view(-1, training.g1)  # (documents, G1)
        advantages_DG, dull_D = group_advantages(rewards_DG, training.advantage)  # Eq. 3
        turns, dropped = [], int(dull_D.sum())
        for n, trajectory in enumerate(trajectories):
            document, sample = divmod(n, training.g1)
            if not dull_D[document]:
                turns += mark(trajectory.turns, document, document, advantages_DG[document, sample].item())
        if asked:
            recall_RG = torch.tensor([recall_rewards[n] for n in asked], dtype=torch.float64)  # (recalls, G2)
            advantages_RG, dull_R = group_advantages(recall_RG, training.advantage)
            dropped += int(dull_R.sum())
            for n, advantages, dull in zip(asked, advantages_RG.tolist(), dull_R, strict=True):
                for turn, advantage in zip(recalled[n], advantages, strict=True):
                    if not dull:
                        turns += mark([turn], n // training.g1, training.documents + n, advantage)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        # Hugging Face checkpoints activations only in train mode; dropout, the other thing that mode switches on, stays
        # off because load_model zeroes it.
        model.train(training.gradient_checkpointing)
        with autocast:
            stats = update(model, reference, optimizer, turns, training)
        model.eval()
        clock.append(time.perf_counter())

        written = [turn for t in trajectories for turn in t.turns] + [turn for group in answers for turn in group]
        memories = [turn for t in trajectories for turn in t.turns[:-1]]
        tokens = sum(len(turn.prompt_ids) + len(turn.completion_ids) for turn in written)
        trained = max(stats.get("tokens", 0.0), 1.0)
        flat = [r for group in recall_rewards.values() for r in group]
        metrics = {
            "step": step + 1,
            "end_to_end": float(np.mean(correct)), "end_to_end_std": float(np.std(correct)),
            "recall": float(np.mean(flat)) if flat else None, "recall_std": float(np.std(flat)) if flat else None,
            "reward": float(np.mean(rewards)), "reward_std": float(np.std(rewards)),
            "degenerate": dropped / (len(documents) + len(asked)),
            "leaky": sum(d.leaks for d in documents) / sum(1 + d.redraws for d in documents),
            "truncated": 1 - float(np.mean([turn.ended for turn in written])),
            "unboxed": float(np.mean([t.prediction is None for t in trajectories])),
            "memory_tokens": float(np.mean([len(turn.completion_ids) for turn in memories])),
            "loss": stats["loss"], "kl": stats.get("kl", 0.0) / trained, "approx_kl": stats.get("approx_kl", 0.0) / trained,
            "clip_fraction": stats.get("clipped", 0.0) / trained, "entropy": stats.get("entropy", 0.0) / trained,
            "grad_norm": stats["grad_norm"], "lr": learning_rate(training, step), "updates": stats["updates"],
            "tokens_per_second": tokens / (clock[3] - clock[0]),
            "seconds_rollout": clock[1] - clock[0], "seconds_recall": clock[2] - clock[1], "seconds_update": clock[3] - clock[2],
        }  # fmt: skip
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        shown = {"e2e": metrics["end_to_end"], "recall": metrics["recall"] or 0.0, "entropy": metrics["entropy"]}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
        if step % training.sample_every == 0:
            text = sample_text(trajectories[0], recalled.get(0, []), rewards[0])
            tqdm.write(f"step {step + 1}: {text}")
            with (out / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"step": step + 1, "document": documents[0].chunks, "text": text}) + "\n")
        if (step + 1) % training.save_every == 0:
            save(model, tokenizer, setting, training, step + 1)

    minutes = (time.perf_counter() - started) / 60
    folder = save(model, tokenizer, setting, training, training.steps)
    if setting.eval_documents:
        with autocast:
            rows += evaluate(model, tokenizer, corpus, setting, lengths, "after")
        print(table(rows))
        (out / "eval.json").write_text(json.dumps(rows, indent=1))
    print(f"{training.steps} steps in {minutes:.1f} minutes on {device}; checkpoint in {folder}")


if __name__ == "__main__":
    run(main)
