"""MemTrain: train a language model to keep a good memory while it reads, without labels (arXiv 2606.03197).

    python memtrain.py                                                         # tiny default: no download, CPU, minutes
    python memtrain.py --config recipes/qwen3-4b-lora-24gb.args                # a real model on one GPU
    python memtrain.py --task longqa --model runs/X/checkpoint --out runs/Y    # then, from there: training on a task
    torchrun --nproc_per_node 8 memtrain.py --config ...                       # a process per GPU, a share of documents

One step, in the paper's letters:
  - D documents of T - 1 chunks. In each, every occurrence of one entity, y, reads [MASK].
  - The model reads each document G1 times: G1 trajectories of T turns. After chunk k the model writes the memory m_k,
    which is all that it sees of chunks 1..k from then on. The last turn names y from m_{T-1} alone.
  - Of each trajectory, recall asks: an entity of an earlier chunk l < k reads [TARGET]; name it from m_k. G2 answers.
  - Rewards: R^I of a recall answer, right or wrong (Eq. 1); R^E of a trajectory, EM of y plus lambda times its mean R^I
    (Eq. 2). Advantages compare the G1 trajectories of a document, and the G2 answers of a trajectory (Eq. 3). The
    update is GRPO over all their turns (Eq. 4), so the reward of recall also trains the turns that wrote the memory.

Where this differs from the paper:
  - The defaults are `--advantage group_norm --kl 0`: advantages divided by the group's standard deviation (GRPO as
    DeepSeekMath wrote it), and no KL. The paper's are `--advantage mean --kl 1e-3`; the recipes/*.args set them.
  - The paper drops groups whose rewards are all 0 or all 1. R^E takes other values, too, so here every group of equal
    rewards is dropped, before the means of Eq. 4 are taken.
  - The paper doesn't give the clip range, how k and l are drawn, or when a string counts as the entity.
    docs/decisions.md lists what was chosen.
  - An answer is stopped where its box closes, so it has no EOS; a memory ends with its EOS, which is trained.
  - 20 % of the titles are held out, by a hash: their passages are never pivots in training, and their names never
    masked. Other documents may contain their text.

`--plain True` samples with rollout.generate and trains with grpo.token_logprobs: short reference code that gives what
engine/sampling.py and engine/packing.py give, only slower. A name that ends in _D is a list with an item per document
of this process, one that ends in _DG with an item per trajectory, document by document.
"""

import math
from collections import Counter
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import grpo
import rollout
from engine import models, packing, parallel, report, sampling
from engine.config import Config, run_with_flags
from engine.optimizer import MasterAdamW
from engine.run import Run
from eval import default_lengths, measure
from grpo import (
    Group, assign_advantages, conversation_weights, grpo_loss, recall_groups, shuffle_rewards, trajectory_groups,
)
from masking import Recall, draw_recall
from rewards import answer_reward, recall_reward, trajectory_reward
from rollout import Trajectory, Turn, limits_of, recall, sampler
from tasks.sources import load_task


def main(config: Config) -> None:
    run = Run(config)  # joins the processes; refuses a folder that holds another run
    policy, tokenizer = models.load_policy(config, run.device)  # with --lora, an adapter is all that is trained
    reference = models.load_reference(config, policy, run.device)  # None without --kl
    left_out = Counter()  # passages that can't be used, by reason
    source, agent = load_task(config, policy, tokenizer, run.out.parent / ".entities", left_out)
    if not config.plain:
        packing.enable(policy, reference)
    optimizer = MasterAdamW(policy, config.lr, config.offload_optimizer, config.shard_optimizer)
    budget = sampling.Budget(config.rollout_tokens)  # of one batch; running out of memory halves it
    generate = rollout.generate if config.plain else partial(sampling.generate, budget=budget)
    sample = sampler(generate, policy, tokenizer)
    greedy = sampler(generate, policy, tokenizer, greedy=True)
    limits = limits_of(config, tokenizer)
    evaluation = partial(measure, greedy, agent, source, limits, config, default_lengths(config.chunks))

    run.open(policy, tokenizer, optimizer, budget)
    run.evaluate("before", evaluation)  # with the weights of --model, so before a checkpoint is loaded; once a run
    run.resume()
    for step in run.steps():
        with run.guard():  # if one process runs out of text or GPU memory, or its retriever fails, all save and stop
            # 1. Read (3.1, 3.2): this process's documents, each G1 times
            documents_D = run.draw(source, step)
            trajectories_DG = agent(sample, documents_D, limits, samples=config.g1)
            run.lap("rollout")
            # 2. Recall (3.3): G2 answers per trajectory; [] for a trajectory without a target
            targets_DG = draw_targets(trajectories_DG, config, step)
            recalls_DG = recall(sample, trajectories_DG, targets_DG, limits, samples=config.g2)
            run.lap("recall")
            # 3. Rewards: R^I (Eq. 1), EM, R^E (Eq. 2)
            recall_rewards_DG = [
                [recall_reward(turn.text, target.entity) for turn in turns]
                for turns, target in zip(recalls_DG, targets_DG, strict=True)
            ]
            em_DG = [answer_reward(t.prediction, t.document.answers) for t in trajectories_DG]
            rewards_DG = [
                trajectory_reward(em, own_rewards, config.joint_weight)
                for em, own_rewards in zip(em_DG, recall_rewards_DG, strict=True)
            ]
            # 4. Advantages (Eq. 3) within both kinds of group; the turns of degenerate groups are left out
            groups = trajectory_groups(trajectories_DG, rewards_DG, config.g1)
            groups += recall_groups(trajectories_DG, recalls_DG, recall_rewards_DG)
            control_rewards(groups, config, step)
            turns = assign_advantages(groups, config.advantage)
            # 5. Reference log-probs, then the update (Eq. 4)
            store_reference_logprobs(reference, turns, config, run.device)
            run.lap("reference")
        lr = learning_rate(config, step)
        if config.explain:
            sampled = trajectories_DG, targets_DG, recalls_DG, em_DG, rewards_DG, recall_rewards_DG
            return explain_step(run, policy, optimizer, sampled, groups, turns, lr, config)
        stats = update(policy, optimizer, turns, lr, config, run.guard)
        run.lap("update")
        # 6. Log and save
        rows = report.step_rows(trajectories_DG, targets_DG, recalls_DG, groups, em_DG, rewards_DG, recall_rewards_DG)
        run.log(step, rows, stats, {"lr": lr, "left_out": left_out.total()})
        run.show(step, trajectories_DG, targets_DG, recalls_DG, rewards_DG, recall_rewards_DG)
        run.save_if_due(step, stats["bad_updates"])
    run.evaluate("after", evaluation)  # not where SIGTERM or Ctrl-C has stopped the run
    run.finish()


# ---- the rollout -----------------------------------------------------------------------------------------


def draw_targets(trajectories: list[Trajectory], config: Config, step: int) -> list[Recall | None]:
    """Draw (k, l, entity) for each trajectory, or None. With --shared-recall-draw a document's G1 share one draw."""
    if not config.recalls:
        return [None] * len(trajectories)
    targets = []
    for n, trajectory in enumerate(trajectories):
        place = trajectory.document.place
        stream = place if config.shared_recall_draw else place * config.g1 + n % config.g1
        targets.append(draw_recall(trajectory.document, np.random.default_rng([config.seed, step, stream])))
    return targets


def control_rewards(groups: list[Group], config: Config, step: int) -> None:
    """In the control shuffled_rewards, deal out each group's rewards at random before they become advantages."""
    if config.ablation == "shuffled_rewards":
        stream = [config.seed, step, parallel.rank(), 1]  # the last one keeps it apart from draw_targets'
        shuffle_rewards(groups, np.random.default_rng(stream))


# ---- the update ------------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, times a constant or a cosine that would be 0 in the step after the last."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


def logprobs_twin(config: Config):
    """token_logprobs: the lesson's own, or the fast one."""
    return grpo.token_logprobs if config.plain else packing.token_logprobs


@torch.no_grad()
def store_logprobs(model, turns: list[Turn], field: str, config: Config) -> None:
    """Set the `field` of each turn to the log-probs (completion,) of its tokens under `model`."""
    token_logprobs = logprobs_twin(config)
    for batch in packing.micro_batches(model, turns, config.train_tokens):
        logprobs, _, _ = token_logprobs(model, batch)  # (turns, longest)
        for turn, row in zip(batch, logprobs, strict=True):
            setattr(turn, field, row[: len(turn.completion_ids)])


def store_reference_logprobs(reference, turns: list[Turn], config: Config, device: str) -> None:
    """Set turn.reference_logprobs, if there is a reference."""
    if reference is None:
        return
    with models.as_reference(reference, config, device):
        store_logprobs(reference, turns, "reference_logprobs", config)


def update(
    policy, optimizer: MasterAdamW, turns: list[Turn], lr: float, config: Config, guard=nullcontext
) -> dict[str, float]:
    """One optimizer step (Eq. 4) per `--update-batch` documents, by default one in all -> sums for the metrics.

    `turns` are this process's; gradients and weights are those of all processes together.
    """
    # Hugging Face checkpoints activations in train mode only. Dropout stays off: engine/models.py has set it to 0.
    policy.train(config.gradient_checkpointing)
    documents_per_update = config.update_batch or config.documents
    starts = range(0, config.documents, documents_per_update)
    if len(starts) > 1:  # the first update moves the policy away from the one that sampled
        with guard():
            store_logprobs(policy, turns, "old_logprobs", config)
    totals = Counter(loss=0.0, used_tokens=0, padded_tokens=0)
    norms = []
    for start in starts:
        own = [turn for turn in turns if start <= turn.place < start + documents_per_update]
        documents = set_weights(own)
        if documents == 0:  # no process has a turn, so all skip this update
            continue
        with guard():
            for batch in packing.micro_batches(policy, own, config.train_tokens):
                loss, stats = batch_loss(policy, batch, config)
                loss.backward()
                used, padded = packing.batch_tokens(policy, batch)
                totals.update({name: value.item() for name, value in stats.items()})  # Counter.update adds
                totals.update(loss=loss.item() / len(starts), used_tokens=used, padded_tokens=padded)
        norms.append(optimizer.step(lr, config.grad_clip))
    policy.eval()
    finite = [norm for norm in norms if math.isfinite(norm)]
    totals["grad_norm"] = float(np.mean(finite)) if finite else 0.0
    return dict(totals) | {"updates": len(finite), "bad_updates": len(norms) - len(finite)}


def set_weights(turns: list[Turn]) -> int:
    """Set turn.weight for an update's turns -> the number of documents with a turn, over all processes."""
    documents = [turn.place for turn in turns]
    kept = len(set(documents))
    kept_everywhere = sum(parallel.gather(kept))
    if kept_everywhere:
        # The weights of a process sum to its share of the documents.
        weights = conversation_weights(documents) * kept / kept_everywhere  # (turns,)
        for turn, weight in zip(turns, weights.tolist(), strict=True):
            turn.weight = weight
    return kept_everywhere


def batch_loss(policy, batch: list[Turn], config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's share of the loss of Eq. 4 -> loss, stats."""
    logprobs, entropy, mask = logprobs_twin(config)(policy, batch, with_entropy=True)  # (turns, longest)
    return grpo_loss(
        logprobs,
        old_logprobs=pad_rows([turn.old_logprobs for turn in batch]),
        reference_logprobs=pad_rows([turn.reference_logprobs for turn in batch]),
        mask=mask,
        advantages=torch.tensor([turn.advantage for turn in batch], device=mask.device),
        weights=torch.tensor([turn.weight for turn in batch], device=mask.device),
        eps_low=config.eps_low, eps_high=config.eps_high, beta=config.kl, entropy=entropy,
    )


def explain_step(run: Run, policy, optimizer, sampled: tuple, groups: list[Group], turns, lr, config: Config) -> None:
    """--explain: print a step from inside, with its update. `sampled` are the step's six lists by trajectory."""
    store = partial(store_logprobs, policy, turns, "old_logprobs", config)
    loss = partial(whole_loss, policy, turns, config)
    run.explain(sampled, groups, turns, store, loss, learn=partial(update, policy, optimizer, turns, lr, config))


@torch.no_grad()
def whole_loss(policy, turns: list[Turn], config: Config) -> float:
    """The loss of Eq. 4 over all turns, as one update would have it."""
    set_weights(turns)
    batches = packing.micro_batches(policy, turns, config.train_tokens)
    return sum(batch_loss(policy, batch, config)[0].item() for batch in batches)


def pad_rows(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows (completion,) as one (turns, longest). None for rows that were not stored; all are, or none."""
    return None if rows[0] is None else pad_sequence(rows, batch_first=True)


if __name__ == "__main__":
    run_with_flags(main, Config)
