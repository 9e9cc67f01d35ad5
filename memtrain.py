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
"""

import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoints
import parallel
from attention import can_pack_completions
from errors import UserError, run
from eval import default_lengths, evaluate, evaluate_questions, score, table
from grpo import batch_tokens, completion_logprobs, conversation_weights, group_advantages, grpo_loss, logits_agree, micro_batches
from masking import draw_recall
from masters import MasterAdamW
from parallel import first_error, gather
from retrieval import open_retriever
from rewards import recall_reward, trajectory_reward
from rollout import Trajectory, Turn, read, recall, search
from settings import Setting, limits, load_model, load_source, option, parse


@dataclass
class Training:
    """GRPO on the two proxy tasks. The defaults are those of the tiny model."""

    out: str = option("runs/tiny", "folder of this run; it must not hold another")
    steps: int = option(22, "steps: one rollout of every document, then its updates (paper: 300)")
    documents: int = option(8, "documents a step (paper: 32)")
    g1: int = option(8, "trajectories a document, a group")
    g2: int = option(4, "recall answers a trajectory, a group (paper: 8)")
    recall_weight: float = option(0.5, "lambda of Eq. 2")
    ablation: str = option("none", "none, end_to_end (no recall at all) or decoupled (recall stays out of R^E)", choices=["none", "end_to_end", "decoupled"])
    shared_recall_draw: bool = option(False, "one draw of what to recall for all trajectories of a document")

    lr: float = option(4e-4, "peak learning rate of AdamW (paper: 1e-6)")
    lr_warmup: int = option(2, "steps of linear warm-up")
    lr_schedule: str = option("cosine", "constant or cosine (down to zero)", choices=["constant", "cosine"])
    grad_clip: float = option(1.0, "largest gradient norm; 0 clips nothing")
    advantage: str = option("group_norm", "group_norm, or mean as in the paper (Eq. 3)", choices=["group_norm", "mean"])
    eps_low: float = option(0.2, "clip range below 1")
    eps_high: float = option(0.2, "clip range above 1")
    kl: float = option(0.0, "beta, KL to the model that training started from (paper: 1e-3); 0 loads no reference")
    update_batch: int | None = option(None, "documents an update (default: all of a step's)")
    train_tokens: int = option(4096, "padded tokens of one forward and backward; gradients add up over them")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, slower")
    offload_optimizer: bool = option(False, "master weights and moments in CPU memory: 12 bytes a parameter less on the GPU")
    offload_reference: bool = option(False, "the reference in CPU memory while it isn't used")

    sample_every: int = option(10, "show a decoded trajectory every so many steps")
    save_every: int = option(100, "write a checkpoint every so many steps, and at the end")
    keep: int = option(2, "checkpoints to keep")
    resume: str = option("auto", "auto goes on with an unfinished run of the same settings in --out; never refuses", choices=["auto", "never"])
    max_bad_steps: int = option(3, "stop after so many steps in a row whose gradient is not finite; their updates are left out")


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then constant or a cosine that ends at zero."""
    rate = training.lr * min(1.0, (step + 1) / max(1, training.lr_warmup))
    if training.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / training.steps))
    return rate


def mark(turns: list[Turn], document: int, advantage: float) -> list[Turn]:
    """The turns with their document and the advantage that all their tokens get."""
    for turn in turns:
        turn.document, turn.advantage = document, advantage
    return turns


def logprobs_of(model, turns: list[Turn], training: Training, pack: bool) -> list[torch.Tensor]:
    """Log-probs (completion,) of every turn under `model` as it is now, without gradient."""
    found: list = [None] * len(turns)
    with torch.no_grad():
        for batch in micro_batches(turns, training.train_tokens, pack):
            logprobs, _, _ = completion_logprobs(model, [turns[i] for i in batch], share_prompts=pack)
            for i, row in zip(batch, logprobs, strict=True):
                found[i] = row[: len(turns[i].completion_ids)]
    return found


def update(
    model, optimizer: MasterAdamW, lr: float, turns: list[Turn], frozen: list[torch.Tensor] | None, training: Training, pack: bool
) -> dict[str, float]:
    """Eq. 4 over this process' `turns`, in updates of `--update-batch` documents: sums for the metrics.

    `frozen` are the reference's log-probs of the turns, or None without KL. Weights are those of all processes'
    documents together, and the optimizer adds up the gradients.
    """
    size = training.update_batch or training.documents
    starts = range(0, training.documents, size)
    # From the second update on the policy is no longer the one that sampled.
    old = logprobs_of(model, turns, training, pack) if len(starts) > 1 else None
    totals = {"loss": 0.0, "used_tokens": 0, "padded_tokens": 0}
    norms = []
    for start in starts:
        mine = [i for i, turn in enumerate(turns) if start <= turn.document < start + size]
        kept = len({turns[i].document for i in mine})
        kept_everywhere = sum(gather(kept))
        if not kept_everywhere:
            continue
        weights = conversation_weights([turns[i].document for i in mine], [True] * len(mine)) * kept / kept_everywhere
        weight = dict(zip(mine, weights.tolist(), strict=True))
        for positions in micro_batches([turns[i] for i in mine], training.train_tokens, pack):
            batch = [mine[p] for p in positions]
            part = [turns[i] for i in batch]
            logprobs, entropy, mask = completion_logprobs(model, part, share_prompts=pack, with_entropy=True)  # (turns, longest)
            then, anchor = ([rows[i] for i in batch] if rows else None for rows in (old, frozen))
            loss, stats = grpo_loss(
                logprobs, pad_sequence(then, True) if then else None, pad_sequence(anchor, True) if anchor else None, mask,
                torch.tensor([turn.advantage for turn in part], device=mask.device),
                torch.tensor([weight[i] for i in batch], device=mask.device),
                training.eps_low, training.eps_high, training.kl, entropy,
            )  # fmt: skip
            loss.backward()
            used, padded = batch_tokens(part, pack)
            sums = {name: value.item() for name, value in stats.items()}
            sums |= {"loss": loss.item() / len(starts), "used_tokens": used, "padded_tokens": padded}
            totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
        norms.append(optimizer.step(lr, training.grad_clip))
    done = [norm for norm in norms if math.isfinite(norm)]
    return totals | {"grad_norm": float(np.mean(done)) if done else 0.0, "updates": len(done), "bad_updates": len(norms) - len(done)}


def sample_text(trajectory: Trajectory, recalled: list[Turn], reward: float) -> str:
    """One trajectory as a person would read it: what it kept after each chunk, and what it answered."""
    lines = [f"{trajectory.document.question} y = {trajectory.document.answers}, answered {trajectory.prediction!r}, R^E = {reward:.2f}"]
    lines += [f"  m_{k}: {memory}" for k, memory in enumerate(trajectory.memories, 1)]
    lines += [f"  recall: {turn.text.strip()}" for turn in recalled[:2]]
    return "\n".join(lines)


def model_card(setting: Setting, step: int) -> str:
    return (
        f"---\nlibrary_name: transformers\ntags: [memtrain, grpo]\n---\n# A MemTrain checkpoint\n\n"
        f"`{setting.model}` after {step} steps of {setting.task} (arXiv 2606.03197) on `{setting.text}`: it reads a text "
        f"chunk by chunk ({setting.chunk_tokens} tokens) and keeps a memory of up to {setting.memory_tokens} tokens.\n"
        "Made to be trained further on a task. The settings are in `config.json` of the run's folder.\n"
    )


def checkpoint(
    model, tokenizer, optimizer, setting: Setting, training: Training, drawn: dict[str, torch.Tensor], state: dict, rank: int
) -> None:
    """Write what going on needs; `drawn` is this process' random state at the end of `state["step"]`. Called by all processes."""
    states = gather(drawn)
    if rank == 0:
        ended = state["step"] == training.steps  # nothing takes the optimizer on from here
        tensors = {} if ended else {f"optimizer/{name}": tensor for name, tensor in optimizer.tensors().items()}
        tensors |= {f"random/{n}/{name}": tensor for n, part in enumerate(states) for name, tensor in part.items()}
        checkpoints.save(Path(training.out), state, model, tokenizer, model_card(setting, state["step"]), training.keep, tensors)


def step_metrics(rows: dict[str, list], sums: dict[str, float], clock: list[float]) -> dict:
    """A line of metrics.jsonl, of what all processes sampled (`rows`) and trained on (`sums`)."""
    mean = {name: float(np.mean(values)) if values else None for name, values in rows.items()}
    std = {name: float(np.std(values)) if values else None for name, values in rows.items()}
    trained = max(sums.get("tokens", 0), 1)
    padding, tokens = sum(rows["padding"]), sum(rows["prompt_tokens"]) + sum(rows["completion_tokens"])
    return {
        "end_to_end": mean["correct"], "end_to_end_std": std["correct"], "recall": mean["recalled"], "recall_std": std["recalled"],
        "reward": mean["reward"], "reward_std": std["reward"],
        "degenerate": mean["dull"], "leaky": sum(rows["leaks"]) / sum(rows["draws"]),
        "truncated": mean["truncated"], "unboxed": mean["unboxed"], "memory_tokens": mean["memory_tokens"],
        "loss": sums["loss"], "kl": sums.get("kl", 0) / trained, "approx_kl": sums.get("approx_kl", 0) / trained,
        "clip_fraction": sums.get("clipped", 0) / trained, "entropy": sums.get("entropy", 0) / trained,
        "padding_rollout": padding / (tokens + padding),
        "padding_update": 1 - sums["used_tokens"] / sums["padded_tokens"] if sums["padded_tokens"] else 0.0,
        "tokens_per_second": tokens / (clock[4] - clock[0]),
        "seconds_rollout": clock[1] - clock[0], "seconds_recall": clock[2] - clock[1],
        "seconds_reference": clock[3] - clock[2], "seconds_update": clock[4] - clock[3],
    }  # fmt: skip


def main() -> None:
    setting, training = parse(Setting, Training)
    out, config = Path(training.out), asdict(setting) | asdict(training)
    if Path(setting.model).is_dir():
        config["model"] = str(Path(setting.model).resolve())  # runs/X/checkpoint leads elsewhere when X goes on
    resuming = checkpoints.unfinished(out, config, training.resume)
    if training.g1 < 2 or (training.g2 < 2 and training.ablation != "end_to_end" and setting.task == "memtrain"):
        raise UserError("--g1 and --g2 must be at least 2: an advantage compares the samples of a group")
    rank, processes, device = parallel.start()
    if training.documents < processes:
        raise UserError(f"--documents {training.documents}: each of the {processes} processes needs at least one")
    last = checkpoints.newest(out) if resuming else None
    evaluated = resuming and (out / "eval.json").exists()
    if len(set(gather((resuming, last, evaluated)))) > 1:
        raise UserError(f"--out {out}: the processes don't see the same folder; give a path that all machines share")
    seed = setting.seed + 1_000_003 * rank  # every process draws its own samples
    torch.manual_seed(seed)

    model, tokenizer = load_model(setting.model, device, setting.dtype)
    if not logits_agree(model):
        raise UserError(f"--model {setting.model}: {type(model).__name__} scales or caps its logits in a way that grpo.py doesn't know")
    reference = None
    if training.kl:
        reference = load_model(setting.model, "cpu" if training.offload_reference else device, setting.dtype)[0].requires_grad_(False)
    with parallel.main_first(rank):  # the others find what it has cached
        corpus = load_source(setting, model, tokenizer, out.parent / ".entities", left_out := Counter())
        retriever = open_retriever(setting.retriever, setting.text, setting.encoder) if setting.task == "searchqa" else None
    recalls = setting.task == "memtrain" and training.ablation != "end_to_end"
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = MasterAdamW(model, training.lr, training.offload_optimizer)
    pack = can_pack_completions(model)
    if rank == 0:
        print(f"{setting.task} on {processes} x {device}")
        if not pack:
            print(f"{setting.model}: completions are not packed behind shared prompts, as not every layer attends to the whole text by sdpa")

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = checkpoints.lock(out)  # noqa: F841  held until this process ends
        if checkpoints.unfinished(out, config, training.resume) != resuming:
            raise UserError(f"--out {out}: another run came and went meanwhile; run the same command again")
        checkpoints.write_config(out, config)
    lengths, rows, budget = default_lengths(setting.chunks), [], limits(setting)
    measure, more = (evaluate, {}) if setting.task == "memtrain" else (evaluate_questions, {"retriever": retriever})
    if evaluated:
        rows = json.loads((out / "eval.json").read_text())
    elif setting.eval_documents:
        rows = measure(model, tokenizer, corpus, setting, lengths, "before", rank, processes, **more)
        if rank == 0:
            print(table(rows))
            checkpoints.replace_text(out / "eval.json", json.dumps(rows, indent=1))
    state = {"step": 0, "processes": processes, "seconds": 0.0, "bad_steps": 0, "rollout_tokens": budget.rollout_tokens}
    if last:
        state |= checkpoints.load(last, model, optimizer, rank, processes)
        budget.rollout_tokens = min(budget.rollout_tokens, state["rollout_tokens"])
        if rank == 0:
            print(f"going on after step {state['step']}")
            checkpoints.point(out, last, training.keep)  # a kill may have come between its writing and this
    if rank == 0:
        checkpoints.rewind(out, state)

    signals = checkpoints.catch_signals()
    bar = tqdm(range(state["step"], training.steps), desc="memtrain", disable=rank > 0, initial=state["step"], total=training.steps)
    for step in bar:
        clock, drawn = [time.perf_counter()], checkpoints.random_state()
        mine = range(rank, training.documents, processes)  # this process' documents of the step
        try:
            documents = [corpus.document(step * training.documents + n) for n in mine]
            if retriever:
                trajectories = search(model, tokenizer, documents, retriever, budget, samples=training.g1)
            else:
                trajectories = read(model, tokenizer, documents, budget, samples=training.g1)
            lost = None
        except UserError as error:
            lost = error
        if lost := first_error(lost):  # text, retriever or memory gave out, for one or for all
            if step:
                checkpoint(model, tokenizer, optimizer, setting, training, drawn, state, rank)  # keep what was learned
            raise lost
        places = [n * training.g1 + sample for n in mine for sample in range(training.g1)]  # among all of the step
        clock.append(time.perf_counter())

        # One draw of (k, l, entity) a trajectory, or a document; None where a document has nothing to recall.
        draws = []
        for place, trajectory in zip(places, trajectories, strict=True):
            who = place // training.g1 if training.shared_recall_draw else place
            rng = np.random.default_rng([setting.seed, step, who])
            draws.append(draw_recall(trajectory.document, rng) if recalls else None)
        asked = [n for n, draw in enumerate(draws) if draw]
        answers = recall(model, tokenizer, [(trajectories[n], draws[n]) for n in asked], budget, training.g2)
        recalled = dict(zip(asked, answers, strict=True))
        clock.append(time.perf_counter())

        recall_rewards = {n: [recall_reward(turn.text, draws[n].entity) for turn in recalled[n]] for n in asked}  # Eq. 1
        correct = [score(t.prediction, t.document) for t in trajectories]
        added = {} if training.ablation == "decoupled" else recall_rewards
        rewards = [trajectory_reward(c, added.get(n, []), training.recall_weight) for n, c in enumerate(correct)]  # Eq. 2

        rewards_DG = torch.tensor(rewards, dtype=torch.float64).view(-1, training.g1)  # (documents, G1)
        advantages_DG, dull_D = group_advantages(rewards_DG, training.advantage)  # Eq. 3
        turns, dull = [], dull_D.tolist()
        for n, trajectory in enumerate(trajectories):
            document, sample = divmod(n, training.g1)
            if not dull_D[document]:
                turns += mark(trajectory.turns, mine[document], advantages_DG[document, sample].item())
        if asked:
            recall_RG = torch.tensor([recall_rewards[n] for n in asked], dtype=torch.float64)  # (recalls, G2)
            advantages_RG, dull_R = group_advantages(recall_RG, training.advantage)
            dull += dull_R.tolist()
            for n, advantages, equal in zip(asked, advantages_RG.tolist(), dull_R, strict=True):
                for turn, advantage in zip(recalled[n], advantages, strict=True):
                    if not equal:
                        turns += mark([turn], mine[n // training.g1], advantage)

        frozen = None
        if reference is not None:
            frozen = logprobs_of(reference.to(device), turns, training, pack)
            if training.offload_reference:
                reference.to("cpu")
        clock.append(time.perf_counter())

        # Hugging Face checkpoints activations only in train mode; dropout, the other thing that mode switches on, stays
        # off because load_model zeroes it.
        model.train(training.gradient_checkpointing)
        sums = update(model, optimizer, learning_rate(training, step), turns, frozen, training, pack)
        model.eval()
        clock.append(time.perf_counter())

        written = [turn for t in trajectories for turn in t.turns] + [turn for group in answers for turn in group]
        part = {
            "correct": correct, "reward": rewards, "recalled": [r for group in recall_rewards.values() for r in group], "dull": dull,
            "leaks": [d.leaks for d in documents], "draws": [1 + d.redraws for d in documents],
            "truncated": [not turn.ended for turn in written], "unboxed": [t.prediction is None for t in trajectories],
            "memory_tokens": [len(turn.completion_ids) for t in trajectories for turn in t.turns[:-1]],
            "prompt_tokens": [len(turn.prompt_ids) for turn in written], "padding": [turn.padding for turn in written],
            "completion_tokens": [len(turn.completion_ids) for turn in written],
        }  # fmt: skip
        parts, all_sums, stops, budgets = zip(*gather((part, sums, bool(signals), budget.rollout_tokens)), strict=True)
        if rank == 0:
            metrics = {"step": step + 1} | step_metrics(
                {name: [value for part in parts for value in part[name]] for name in part},
                {name: sum(sums.get(name, 0) for sums in all_sums) for name in set().union(*all_sums)}, clock,
            ) | {name: sums[name] for name in ("grad_norm", "updates", "bad_updates")}  # fmt: skip
            metrics |= {"lr": learning_rate(training, step), "left_out": left_out.total()}
            metrics = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in metrics.items()}
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            shown = {"e2e": metrics["end_to_end"], "recall": metrics["recall"] or 0.0, "entropy": metrics["entropy"] or 0.0}
            bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
            if step % training.sample_every == 0:
                text = sample_text(trajectories[0], recalled.get(0, []), rewards[0])
                tqdm.write(f"step {step + 1}: {text}")
                with (out / "samples.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step + 1, "document": documents[0].chunks, "text": text}) + "\n")

        state["step"], state["seconds"] = step + 1, state["seconds"] + time.perf_counter() - clock[0]
        state["bad_steps"] = state["bad_steps"] + 1 if sums["bad_updates"] else 0
        state["rollout_tokens"] = min(budgets)
        broken = state["bad_steps"] >= training.max_bad_steps
        if broken or any(stops) or (step + 1) % training.save_every == 0 or step + 1 == training.steps:
            checkpoint(model, tokenizer, optimizer, setting, training, checkpoints.random_state(), state, rank)
        if broken:
            raise UserError(f"the gradient was not finite in {state['bad_steps']} steps in a row, up to step {step + 1}; {out}/checkpoint has "
                            "the weights from before: look at the corpus, or lower --lr")  # fmt: skip
        if any(stops):
            break
    checkpoints.release_signals()
    if state["step"] < training.steps:
        if rank == 0:
            print(f"stopped after step {state['step']}; go on with: {checkpoints.command(processes)}")
        return parallel.stop()

    if setting.eval_documents:
        rows = [row for row in rows if row["when"] == "before"]
        rows += measure(model, tokenizer, corpus, setting, lengths, "after", rank, processes, **more)
    if rank == 0:
        if setting.eval_documents:
            print(table(rows))
            checkpoints.replace_text(out / "eval.json", json.dumps(rows, indent=1))
        (out / "finished").touch()
        print(f"{training.steps} steps in {state['seconds'] / 60:.1f} minutes on {processes} x {device}; checkpoint in {out / 'checkpoint'}")
    parallel.stop()


if __name__ == "__main__":
    run(main)
