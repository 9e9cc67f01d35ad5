"""MemTrain: train a language model to keep a good memory while it reads, without labels (arXiv 2606.03197).

    python memtrain.py                                                         # tiny default: no download, CPU, minutes
    python memtrain.py --config recipes/wiki-24gb.args                         # a real model on one GPU
    python memtrain.py --task longqa --model runs/X/checkpoint --out runs/Y    # then, from there: training on a task
    torchrun --nproc_per_node 8 memtrain.py --config ...                       # a process per GPU, a share of documents

One step, in the paper's notation, with each flag and its default in brackets:
  - D documents [--documents 8] of T - 1 chunks [--chunks 4]. In each, every occurrence of one entity, y, reads [MASK].
  - The model reads each document G1 times [--g1 8]: G1 trajectories of T turns. After chunk k it writes the memory m_k,
    which is all it keeps of chunks 1..k. The last turn names y from m_{T-1} alone.
  - Recall shows each trajectory m_k and an earlier chunk l < k in which an entity reads [TARGET], and asks for it: G2
    answers [--g2 4]. So a step samples D G1 (T + G2) completions.
  - Rewards: R^I of a recall answer, right or wrong (Eq. 1); R^E of a trajectory, EM of y plus lambda [--recall-weight
    0.5] times its mean R^I (Eq. 2). Since R^E includes recall's reward, recall also trains the turns that wrote the
    memory. Advantages compare the G1 trajectories of a document, and the G2 answers of a trajectory (Eq. 3).
  - The update is GRPO over all these turns (Eq. 4): one optimizer step, or with --update-batch several.

Where this differs from the paper:
  - The defaults are `--advantage group_norm --kl 0`: advantages divided by the group's standard deviation (GRPO as
    DeepSeekMath wrote it), and no KL. The paper's are `--advantage mean --kl 1e-3`; the recipes/*.args set them. With
    group_norm, lambda changes nothing in a group whose EMs are all equal.
  - The paper drops groups whose rewards are all 0 or all 1. R^E has other values too, so here every group of equal
    rewards is dropped, before the means of Eq. 4 are taken.
  - The paper doesn't give the clip range, how k and l are drawn, or when a string counts as the entity.
    docs/decisions.md lists what was chosen.
  - An answer stops where its box closes, and then has no EOS. The EOS of a memory is trained.
  - 20 % of the titles are held out, by a hash. In training their passages are never the pivot (the passage that y is
    taken from), and no such title is y or a recall target. Documents may contain their text, but recall asks for
    nothing in it.

`--fast True` replaces three functions, rollout.generate, grpo.micro_batches and grpo.token_logprobs, with their twins
in fast/, which give the same results, but for rounding and the order of random draws, in less time.
"""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

import grpo
import rollout
from engine import models, parallel
from engine.checks import check_sampler
from engine.config import Config, check, run_with_flags
from engine.optimizer import AdamW
from engine.run import Run
from eval import evaluate, load_task
from grpo import assign_advantages, batch_loss, fixed_logprobs, set_weights, update_batches
from masking import SHUFFLE_DRAW
from rewards import answer_reward, recall_reward, trajectory_reward
from rollout import Budget, Sampler, draw_documents, draw_targets, recall


def main(config: Config) -> None:
    check(config)  # reports what is missing before any work
    device = parallel.start()
    torch.manual_seed(config.seed + 1_000_003 * parallel.rank())  # every process draws its own samples
    run = None if config.explain else Run(config, device)  # locks the folder; refuses one that holds another run
    policy, tokenizer = models.load_policy(config, device)  # with --lora, only an adapter is trained
    reference = models.load_reference(config, policy, device)  # None if --kl is 0
    generate, micro_batches, token_logprobs = twins(config, policy, reference)
    sample = Sampler(generate, policy, tokenizer, Budget(config.rollout_tokens))
    check_sampler(sample, token_logprobs, config.model)  # it must draw from the distribution that is trained
    optimizer = make_optimizer(policy, config)
    if run:
        run.open(policy, tokenizer, optimizer, sample.budget)
    left_out = Counter()  # passages that can't be used, by reason
    source, agent = load_task(config, policy, tokenizer, left_out)  # by default a masking.Corpus, and rollout.read
    if config.explain:
        from look.explain import explain

        lr, shuffle = learning_rate(config, step=0), shuffle_generator(config, step=0)
        functions = micro_batches, token_logprobs
        return explain(policy, reference, optimizer, sample, source, agent, config, lr, shuffle, functions)

    draw_documents(source, config, 0)  # a text that can't fill them is reported before hours of evaluation
    # The first evaluation is of the weights of --model, so it comes before a checkpoint is loaded.
    run.evaluate("before", lambda when: evaluate(sample, agent, source, config, when))
    run.resume()
    for step in run.steps():
        # 1. Read (3.1, 3.2): each of this process's documents G1 times
        documents = draw_documents(source, config, step)
        trajectories = agent(sample, documents, config, samples=config.g1)
        run.lap("rollout")

        # 2. Recall (3.3): draw t.target, then ask for it G2 times: t.recalls
        draw_targets(trajectories, config, step)
        recall(sample, trajectories, config, samples=config.g2)
        run.lap("recall")

        # 3. Rewards
        for t in trajectories:
            t.em = answer_reward(t.prediction, t.document.answers)
            t.recall_rewards = [recall_reward(turn.text, t.target.entity) for turn in t.recalls]  # R^I, Eq. 1
            t.reward = trajectory_reward(t.em, t.recall_rewards, config.joint_weight)  # R^E, Eq. 2, with lambda

        # 4. Advantages (Eq. 3): one for all turns of a trajectory, one for each recall answer; the kept turns
        kept = assign_advantages(trajectories, config, shuffle=shuffle_generator(config, step))

        # 5. Update (Eq. 4)
        if reference is not None:
            with models.as_reference(reference, config, device):
                for turn, logprobs in fixed_logprobs(reference, kept, config, micro_batches, token_logprobs):
                    turn.reference_logprobs = logprobs  # (completion,)
        run.lap("reference")
        updates = update_batches(kept, config)
        if len(updates) > 1:  # the first update moves the policy away from the one that sampled
            for turn, logprobs in fixed_logprobs(policy, kept, config, micro_batches, token_logprobs):
                turn.old_logprobs = logprobs  # (completion,)
        # transformers checkpoints activations in train mode only. Dropout stays off: engine/models.py has set it to 0.
        policy.train(mode=config.gradient_checkpointing)
        lr = learning_rate(config, step)
        stats, norms = Counter(loss=0.0), []
        for update in updates:
            documents_kept = set_weights(update)  # the outer means of Eq. 4
            if documents_kept == 0:  # none on any process: all of them skip this update
                continue
            for batch in micro_batches(update, config.train_tokens):
                loss, batch_stats = batch_loss(policy, batch, config, token_logprobs)
                loss.backward()
                stats["loss"] += loss.item() / len(updates)
                for name, value in batch_stats.items():
                    stats[name] += value.item()
            # Sums the gradients over processes, clips, steps (unless the norm isn't finite) and clears the gradients.
            norms.append(optimizer.step(lr, config.grad_clip))
        policy.eval()
        run.lap("update")

        # 6. Log and save
        finite = [norm for norm in norms if math.isfinite(norm)]
        bad_updates = len(norms) - len(finite)
        more = {
            "grad_norm": float(np.mean(finite)) if finite else 0.0, "updates": len(finite), "bad_updates": bad_updates,
            "lr": lr, "left_out": left_out.total(),
        }
        run.log(step, trajectories, stats, more)
        run.save_if_due(step, bad_updates)  # raises UserError after too many bad steps in a row
    run.evaluate("after", lambda when: evaluate(sample, agent, source, config, when))  # skipped after a signal
    run.finish()


def twins(config: Config, policy, reference=None) -> tuple[Callable, Callable, Callable]:
    """(generate, micro_batches, token_logprobs): the lesson's own, or with --fast True their twins in fast/."""
    if config.fast:
        from fast import packing, sampling

        return sampling.generate, packing.enable(policy, reference), packing.token_logprobs
    return rollout.generate, grpo.micro_batches, grpo.token_logprobs


def make_optimizer(policy, config: Config) -> AdamW:
    """The optimizer for the policy's dtype and the settings. Raises UserError where --shard-optimizer can't be used."""
    if config.shard_optimizer:
        from engine.sharding import ShardedAdamW

        return ShardedAdamW(policy, config.lr, config.offload_optimizer)
    if config.offload_optimizer or any(p.dtype != torch.float32 for p in policy.parameters() if p.requires_grad):
        from engine.masters import MasterAdamW

        return MasterAdamW(policy, config.lr, config.offload_optimizer)
    return AdamW(policy, config.lr)


def shuffle_generator(config: Config, step: int):
    """The generator for the control `--ablation shuffled_rewards`, which permutes each group's rewards; else None."""
    if config.ablation != "shuffled_rewards":
        return None
    return np.random.default_rng([config.seed, step, parallel.rank(), SHUFFLE_DRAW])


def learning_rate(config: Config, step: int) -> float:
    """The rate of `step`, counted from 0: linear warm-up, times 1 or a cosine that reaches 0 after the last step."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


if __name__ == "__main__":
    run_with_flags(main, Config)
