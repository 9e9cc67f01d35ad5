"""memtrain.py's loop itself: what reaches the update, against rewards, advantages and losses written out here."""

import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import eval as evaluation
import memtrain
from command import command
from engine.attention import enable_packing
from engine.config import Config
from engine.models import load_model
from memtrain import store_reference_logprobs, update
from rollout import Trajectory, Turn, limits_of
from tasks.sources import load_corpus

DOCUMENTS, G1, G2, STEPS, WEIGHT = 3, 4, 3, 3, 0.5


def turn(rng) -> Turn:
    return Turn(rng.integers(5, 90, 6).tolist(), rng.integers(5, 90, 3).tolist(), True, "")


class Script:
    """Stands in for reading, recall and the update: makes up which answers are right, and keeps what it was given."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.steps: list[dict] = []

    def load_task(self, *given):
        source, _ = self.real_task(*given)
        return source, self.read

    def read(self, sample, documents, limits, samples):
        right = self.rng.random((len(documents), samples)) < 0.5
        right[0] = len(self.steps) % 2  # a group whose answers are all alike: recall alone may tell them apart
        trajectories = []
        for document, row in zip(documents, right, strict=True):
            for hit in row:
                turns = [turn(self.rng) for _ in range(len(document.chunks) + 1)]
                said = document.answers[0] if hit else "wrong"
                trajectories.append(Trajectory(document, turns, ["m"] * len(document.chunks), said))
        step = {"right": right, "trajectories": trajectories, "draws": [], "recalled": [], "hits": np.zeros((0, G2))}
        self.steps.append(step)
        return trajectories

    def recall(self, sample, trajectories, targets, limits, samples):
        now = self.steps[-1]
        now["draws"] = [target for target in targets if target]
        assert trajectories == now["trajectories"] and len(now["draws"]) in (0, len(targets))
        now["hits"] = self.rng.random((len(now["draws"]), samples)) < 0.5
        now["recalled"] = [[turn(self.rng) for _ in range(samples)] for _ in now["draws"]]
        for turns, draw, hits in zip(now["recalled"], now["draws"], now["hits"], strict=True):
            for answer, hit in zip(turns, hits, strict=True):
                answer.text = "so \\boxed{" + (draw.entity if hit else "something else") + "}"
        return now["recalled"] or [[] for _ in targets]

    def update(self, policy, optimizer, turns, lr, config, guard):
        references = [t.reference_logprobs for t in turns]
        trained = {id(t): (t.place, t.advantage) for t in turns}
        self.steps[-1] |= {"lr": lr, "references": references, "trained": trained}
        assert len(turns) == len(self.steps[-1]["trained"])  # none comes twice
        return {"loss": 0.0, "used_tokens": 1, "padded_tokens": 1, "grad_norm": 0.0, "updates": 1, "bad_updates": 0}


def advantages(rewards: list[float], mode: str) -> list[float] | None:
    """Of one group, by the formula; None where all are equal."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    if max(rewards) - min(rewards) < 1e-9:
        return None
    return [(r - mean) / (std + 1e-4) if mode == "group_norm" else r - mean for r in rewards]


def check_shuffled(expected: dict, trained: dict):
    """The control's turns stay with their documents, but have other advantages, dealt out among these."""
    assert all(trained[key][0] == document for key, (document, _) in expected.items())
    moved = [key for key, (_, advantage) in expected.items() if abs(trained[key][1] - advantage) > 1e-6]
    values = {round(advantage, 5) for _, advantage in expected.values()}
    assert len(moved) > len(expected) / 4 and {round(advantage, 5) for _, advantage in trained.values()} <= values


@pytest.mark.parametrize("ablation", ["none", "decoupled", "end_to_end", "shuffled_rewards"])
@pytest.mark.parametrize("mode, more", [
    ("mean", ["--shared_recall_draw", "True"]), ("group_norm", ["--kl", 0.1, "--lr_schedule", "constant"]),
])
def test_rewards_become_the_advantages_of_the_turns(tmp_path, monkeypatch, ablation, mode, more):
    """Three steps with made-up rewards: each turn is trained with its document and advantage, or left out."""
    script = Script()
    script.real_task = memtrain.load_task
    for name in ("load_task", "recall", "update"):
        monkeypatch.setattr(memtrain, name, getattr(script, name))

    def marked(model, turns, field, config):
        for t in turns:
            setattr(t, field, ("log-probs of", id(t)))

    monkeypatch.setattr(memtrain, "store_logprobs", marked)
    done = command(
        "--out", tmp_path / "run", "--documents", DOCUMENTS, "--g1", G1, "--g2", G2, "--steps", STEPS,
        "--eval_documents", 0, "--lr", 1, "--lr_warmup", 2, "--recall_weight", WEIGHT, "--ablation", ablation,
        "--advantage", mode, *more,
    )
    assert done.returncode == 0, done.stderr
    assert len(script.steps) == STEPS
    left_out = 0
    for number, step in enumerate(script.steps):
        expected, hits = {}, step["hits"].astype(float)
        assert len(hits) == (0 if ablation == "end_to_end" else DOCUMENTS * G1)  # each document has something to recall
        for document in range(DOCUMENTS):
            group = range(document * G1, (document + 1) * G1)
            rewards = [float(hit) for hit in step["right"][document]]
            if ablation in ("none", "shuffled_rewards"):
                rewards = [reward + WEIGHT * sum(hits[n]) / G2 for reward, n in zip(rewards, group, strict=True)]
            for n, advantage in zip(group, advantages(rewards, mode) or [None] * G1, strict=True):
                expected |= {id(t): (document, advantage) for t in step["trajectories"][n].turns}
            for n in group if len(hits) else []:
                own = advantages(hits[n].tolist(), mode) or [None] * G2
                for answer, advantage in zip(step["recalled"][n], own, strict=True):
                    expected[id(answer)] = document, advantage
        kept = {key: value for key, value in expected.items() if value[1] is not None}
        left_out += len(expected) - len(kept)
        assert kept.keys() == step["trained"].keys()
        if ablation == "shuffled_rewards":
            check_shuffled(kept, step["trained"])
            continue
        for key, (document, advantage) in kept.items():
            assert step["trained"][key] == (document, pytest.approx(advantage, abs=1e-6))

        draws = [(d.memory_turn, d.chunk, d.entity) for d in step["draws"]]
        if draws:
            per_document = [len(set(draws[d * G1 : (d + 1) * G1])) for d in range(DOCUMENTS)]
            assert per_document == [1] * DOCUMENTS if "--shared_recall_draw" in more else max(per_document) > 1
        if "--kl" in more:
            assert step["references"] == [("log-probs of", key) for key in step["trained"]]
        else:
            assert set(step["references"]) <= {None}
        warm, cosine = min(1.0, (number + 1) / 2), 0.5 * (1 + math.cos(math.pi * number / STEPS))
        assert step["lr"] == pytest.approx(warm if "--kl" in more else warm * cosine)
    assert left_out > 0


def plain_logprobs(model, turn: Turn) -> torch.Tensor:
    """(completion,), by one whole pass over this turn alone."""
    ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logits[len(turn.prompt_ids) - 1 + n, token] for n, token in enumerate(turn.completion_ids)])


class Descent:
    """Plain gradient descent in the optimizer's place: Adam would blow rounding up where a gradient is zero."""

    def __init__(self, model):
        self.weights = list(model.parameters())

    def step(self, lr: float, grad_clip: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.weights, grad_clip)
        with torch.no_grad():
            for weight in self.weights:
                weight -= lr * weight.grad
                weight.grad = None
        return norm.item()


@pytest.mark.parametrize("twin", ["packed", "fast", "plain"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_updates_of_a_step_equal_the_formula(kl, twin):
    """Three updates after one rollout: ratios are clipped, as the policy has moved from the old log-probs."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )
    policy, plain, reference = (Qwen3ForCausalLM(shape).eval() for _ in range(3))
    plain.load_state_dict(policy.state_dict())
    rng, turns = np.random.default_rng(1), []
    for document, count in enumerate((3, 2, 4)):
        prompt = turn(rng).prompt_ids
        for n in range(count):
            made = turn(rng)
            made.prompt_ids = prompt if n < 2 else made.prompt_ids
            made.place, made.advantage = document, float(rng.normal()) * 3
            turns.append(made)
    config = Config(
        documents=3, update_batch=1, eps_low=0.02, eps_high=0.03, kl=kl, grad_clip=0.5, train_tokens=30,
        plain=twin == "plain",
    )
    if twin == "packed":
        assert enable_packing(policy) and enable_packing(reference)
    with torch.no_grad():
        old, anchor = ([plain_logprobs(model, t) for t in turns] for model in (plain, reference))
    store_reference_logprobs(reference if kl else None, turns, config, "cpu")
    totals = update(policy, Descent(policy), turns, 0.2, config)

    descent, clipped, tokens = Descent(plain), 0, 0
    for document in range(3):
        mine = [i for i, t in enumerate(turns) if t.place == document]
        losses = []
        for i in mine:
            now, A = plain_logprobs(plain, turns[i]), turns[i].advantage
            terms = []
            for p, q, r in zip(now, old[i], anchor[i], strict=True):
                ratio = torch.exp(p - q)
                held = min(max(ratio.item(), 1 - 0.02), 1 + 0.03)
                stopped = held != ratio.item() and held * A < ratio.item() * A
                clipped, tokens = clipped + stopped, tokens + 1
                terms.append((held * A if stopped else ratio * A) - kl * (torch.exp(r - p) - (r - p) - 1))
            losses.append(-sum(terms) / len(terms))
        (sum(losses) / len(mine)).backward()
        descent.step(0.2, 0.5)
    assert totals["updates"] == 3 and totals["tokens"] == tokens and 0 < totals["clipped"] == clipped < tokens
    assert (totals["kl"] > 0) == bool(kl)
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_controls_of_an_evaluation_have_no_memory(tmp_path, monkeypatch):
    """Kept and empty are measured by separate calls, on the same documents and recall targets, in rows of their own."""
    config = Config(eval_documents=4)
    calls = []

    def read(sample, documents, limits, empty_memory=False, progress=None):
        calls.append(("read", empty_memory, [d.index for d in documents]))
        said = ["wrong" if empty_memory or d.index == 0 else d.answers[0] for d in documents]
        return [Trajectory(d, [], ["m"] * len(d.chunks), word) for d, word in zip(documents, said, strict=True)]

    def recall(sample, trajectories, targets, limits, empty_memory=False):
        asked = list(zip(trajectories, targets, strict=True))
        calls.append(("recall", empty_memory, [(t.document.index, target.entity) for t, target in asked]))
        said = ["wrong" if empty_memory or t.document.index < 2 else target.entity for t, target in asked]
        return [[Turn([], [], True, "\\boxed{" + text + "}")] for text in said]

    monkeypatch.setattr(evaluation, "read", read)
    monkeypatch.setattr(evaluation, "recall", recall)
    model, tokenizer = load_model(config.model, "cpu")
    corpus = load_corpus(config, model, tokenizer, tmp_path)
    rows = evaluation.evaluate(None, corpus, limits_of(config, tokenizer), config, [3], "now")
    assert {(row["task"], row["memory"]): row["accuracy"] for row in rows} == {
        ("end_to_end", "kept"): 0.75, ("end_to_end", "empty"): 0.0, ("recall", "kept"): 0.5, ("recall", "empty"): 0.0,
    }
    kept, empty = ([call[::2] for call in calls if call[1] == control] for control in (False, True))
    assert sorted(kept) == sorted(empty) and len(kept) == 2
