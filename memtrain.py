"""MemTrain: train a language model to keep a good memory, without labels (arXiv 2606.03197).

    python memtrain.py                                         # tiny default: no download, CPU, minutes
    python memtrain.py --config recipes/qwen3-4b-80gb.args     # a real model on a GPU
    python memtrain.py --task longqa --model runs/X/checkpoint --out runs/Y    # what it is for: task training
    torchrun --nproc_per_node 8 memtrain.py --config ...       # a process a GPU, documents split over them

Where this differs from the paper:
  - Advantages are divided by the group's standard deviation by default (GRPO as DeepSeekMath wrote it), and
    there is no KL; `--advantage mean --kl 1e-3` is the paper's (Eq. 3 and 4), and the recipes/*.args set it.
  - A group is dropped when its rewards are all equal; the paper drops all zero and all one, which says
    nothing of sums such as EM + lambda * recall.
  - The paper is silent on the clip range, on which steps are recalled and on what counts as an occurrence
    of an entity: README lists what was chosen.
  - An answer ends where its box closes, so its EOS is neither sampled nor trained.
  - 20 % of the titles are held out: no pivot of an evaluation was one in training. The entity asked for may have been.

The fast parts have plain twins: `--plain True` samples with rollout.generate and trains with grpo.token_logprobs.
"""

import math
from collections import Counter
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import grpo
import rollout
from engine import packing, parallel, sampling
from engine.config import Config, load_model, run_script
from engine.optimizer import MasterAdamW
from engine.run import Run
from eval import default_lengths, measure
from grpo import Group, assign_advantages, conversation_weights, grpo_loss, recall_groups, trajectory_groups
from masking import Recall, draw_recall
from rewards import answer_reward, recall_reward, trajectory_reward
from rollout import Trajectory, Turn, limits_of, recall, sampler
from tasks.sources import load_task


def main(config: Config) -> None:
    run = Run(config)
    policy, tokenizer = load_model(config.model, run.device, config.dtype)
    reference = load_reference(config, run.device)
    with parallel.main_first():
        source, agent = load_task(config, policy, tokenizer, run.out.parent / ".entities", left_out := Counter())
    if not config.plain:
        packing.enable(policy, reference)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    optimizer = MasterAdamW(policy, config.lr, config.offload_optimizer)
    budget = sampling.Budget(config.rollout_tokens)
    generate = rollout.generate if config.plain else partial(sampling.generate, budget=budget)
    sample, greedy = sampler(generate, policy, tokenizer), sampler(generate, policy, tokenizer, greedy=True)
    limits = limits_of(config, tokenizer)
    evaluation = partial(measure, greedy, agent, source, limits, config, default_lengths(config.chunks))

    run.open(policy, tokenizer, optimizer, budget)
    run.evaluate("before", evaluation)
    run.resume()
    for step in run.steps():
        with run.guard():
            # 1. Read (3.1, 3.2): G1 trajectories a document, document by document; the documents of this process
            documents_D = run.draw(source, step)
            trajectories_DG = agent(sample, documents_D, limits, samples=config.g1)
            run.lap("rollout")
            # 2. Recall (3.3): G2 answers a trajectory; [] where there is nothing to recall
            targets_DG = draw_targets(trajectories_DG, config, step)
            recalls_DG = recall(sample, trajectories_DG, targets_DG, limits, samples=config.g2)
            run.lap("recall")
        # 3. Rewards: Eq. 1, then Eq. 2
        recall_rewards_DG = [recall_rewards(*pair) for pair in zip(recalls_DG, targets_DG, strict=True)]
        correct_DG = [answer_reward(t.prediction, t.document.answers) for t in trajectories_DG]
        rewards_DG = [
            trajectory_reward(correct, own, config.joint_weight)
            for correct, own in zip(correct_DG, recall_rewards_DG, strict=True)
        ]
        # 4. Advantages (Eq. 3) over both kinds of group; groups of equal rewards drop out
        groups = trajectory_groups(trajectories_DG, rewards_DG, config.g1)
        groups += recall_groups(trajectories_DG, recalls_DG, recall_rewards_DG)
        turns = assign_advantages(groups, config.advantage)
        # 5. Update: Eq. 4
        store_reference_logprobs(reference, turns, config, run.device)
        run.lap("reference")
        lr = learning_rate(config, step)
        stats = update(policy, optimizer, turns, lr, config)
        run.lap("update")
        # 6. Log and save
        rows = step_rows(trajectories_DG, recalls_DG, groups, correct_DG, rewards_DG, recall_rewards_DG)
        run.log(step, rows, stats, {"lr": lr, "left_out": left_out.total()})
        run.show(step, sample_text(trajectories_DG[0], recalls_DG[0], rewards_DG[0]), documents_D[0].chunks)
        run.save_if_due(step, stats["bad_updates"])
    if not run.stopped:
        run.evaluate("after", evaluation)
    run.finish()


# ---- the rollout -----------------------------------------------------------------------------------------


def draw_targets(trajectories: list[Trajectory], config: Config, step: int) -> list[Recall | None]:
    """What each trajectory is asked to recall: one draw of (k, l, entity) a trajectory, or a document; or None."""
    targets = []
    for n, trajectory in enumerate(trajectories):
        place = trajectory.document.place
        who = place if config.shared_recall_draw else place * config.g1 + n % config.g1
        rng = np.random.default_rng([config.seed, step, who])
        targets.append(draw_recall(trajectory.document, rng) if config.recalls else None)
    return targets


def recall_rewards(recalls: list[Turn], target: Recall | None) -> list[float]:
    """Eq. 1 for the G2 answers of one trajectory."""
    return [recall_reward(turn.text, target.entity) for turn in recalls]


# ---- the update ------------------------------------------------------------------------------------------


def load_reference(config: Config, device: str):
    """The model that training started from, for the KL; None without."""
    if not config.kl:
        return None
    device = "cpu" if config.offload_reference else device
    return load_model(config.model, device, config.dtype)[0].requires_grad_(False)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine that ends at zero."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


@torch.no_grad()
def logprobs_under(model, turns: list[Turn], config: Config) -> list[tuple[Turn, torch.Tensor]]:
    """Each turn with the log-probs (completion,) of its tokens under `model` as it is now."""
    token_logprobs = grpo.token_logprobs if config.plain else packing.token_logprobs
    found = []
    for batch in packing.micro_batches(model, turns, config.train_tokens):
        logprobs, _, _ = token_logprobs(model, batch)  # (turns, longest)
        found += [(turn, row[: len(turn.completion_ids)]) for turn, row in zip(batch, logprobs, strict=True)]
    return found


def store_reference_logprobs(reference, turns: list[Turn], config: Config, device: str) -> None:
    if reference is None:
        return
    for turn, logprobs in logprobs_under(reference.to(device), turns, config):
        turn.reference_logprobs = logprobs
    if config.offload_reference:
        reference.to("cpu")


def update(policy, optimizer: MasterAdamW, turns: list[Turn], lr: float, config: Config) -> dict[str, float]:
    """Eq. 4 over this process's `turns`, in updates of `--update-batch` documents -> sums for the metrics."""
    # Hugging Face checkpoints activations only in train mode. Dropout stays off: load_model has set it to 0.
    policy.train(config.gradient_checkpointing)
    size = config.update_batch or config.documents
    starts = range(0, config.documents, size)
    if len(starts) > 1:  # from the second update on the policy is no longer the one that sampled
        for turn, logprobs in logprobs_under(policy, turns, config):
            turn.old_logprobs = logprobs
    totals = {"loss": 0.0, "used_tokens": 0, "padded_tokens": 0}
    norms = []
    for start in starts:
        mine = [turn for turn in turns if start <= turn.document < start + size]
        if not weigh(mine):
            continue
        for batch in packing.micro_batches(policy, mine, config.train_tokens):
            loss, stats = batch_loss(policy, batch, config)
            loss.backward()
            used, padded = packing.batch_tokens(policy, batch)
            sums = {name: value.item() for name, value in stats.items()}
            sums |= {"loss": loss.item() / len(starts), "used_tokens": used, "padded_tokens": padded}
            totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
        norms.append(optimizer.step(lr, config.grad_clip))  # sums the gradients of all processes
    policy.eval()
    done = [norm for norm in norms if math.isfinite(norm)]
    totals["grad_norm"] = float(np.mean(done)) if done else 0.0
    return totals | {"updates": len(done), "bad_updates": len(norms) - len(done)}


def weigh(turns: list[Turn]) -> int:
    """Set the weights of an update's turns -> the number of its documents, both over all processes."""
    documents = [turn.document for turn in turns]
    kept = len(set(documents))
    kept_everywhere = sum(parallel.gather(kept))
    if kept_everywhere:
        weights = conversation_weights(documents) * kept / kept_everywhere  # (turns,)
        for turn, weight in zip(turns, weights.tolist(), strict=True):
            turn.weight = weight
    return kept_everywhere


def batch_loss(policy, batch: list[Turn], config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 4's part of one micro-batch -> loss, stats."""
    token_logprobs = grpo.token_logprobs if config.plain else packing.token_logprobs
    logprobs, entropy, mask = token_logprobs(policy, batch, with_entropy=True)  # (turns, longest)
    return grpo_loss(
        logprobs, padded([turn.old_logprobs for turn in batch]), padded([turn.reference_logprobs for turn in batch]),
        mask, torch.tensor([turn.advantage for turn in batch], device=mask.device),
        torch.tensor([turn.weight for turn in batch], device=mask.device),
        config.eps_low, config.eps_high, config.kl, entropy,
    )


def padded(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """(turns, longest), or None where no log-probs were stored."""
    return None if rows[0] is None else pad_sequence(rows, batch_first=True)


# ---- what a step tells -----------------------------------------------------------------------------------


def step_rows(
    trajectories: list[Trajectory], recalls: list[list[Turn]], groups: list[Group], correct: list[float],
    rewards: list[float], recall_rewards: list[list[float]],
) -> dict[str, list]:
    """What the metrics count: a value a sample, turn, group or document."""
    documents = list({id(t.document): t.document for t in trajectories}.values())
    written = [turn for t in trajectories for turn in t.turns] + [turn for group in recalls for turn in group]
    return {
        "correct": correct, "reward": rewards, "recalled": [reward for group in recall_rewards for reward in group],
        "degenerate": [group.degenerate for group in groups],
        "leaks": [document.leaks for document in documents], "draws": [1 + document.redraws for document in documents],
        "truncated": [not turn.ended for turn in written], "unboxed": [t.prediction is None for t in trajectories],
        "memory_tokens": [len(turn.completion_ids) for t in trajectories for turn in t.turns[:-1]],
        "prompt_tokens": [len(turn.prompt_ids) for turn in written], "padding": [turn.padding for turn in written],
        "completion_tokens": [len(turn.completion_ids) for turn in written],
    }


def sample_text(trajectory: Trajectory, recalls: list[Turn], reward: float) -> str:
    """One trajectory as a person would read it: what it kept after each chunk, and what it answered."""
    document = trajectory.document
    answered = f"answered {trajectory.prediction!r}, R^E = {reward:.2f}"
    lines = [f"{document.question} y = {document.answers}, {answered}"]
    lines += [f"  m_{k}: {memory}" for k, memory in enumerate(trajectory.memories, 1)]
    lines += [f"  recall: {turn.text.strip()}" for turn in recalls[:2]]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Config)
