"""memtrain.py's loop itself: what reaches the update, against rewards, advantages and losses written out here."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, command, tiny_model, unpadded_logprobs

import memtrain
from engine.config import Config
from engine.models import load_policy
from engine.optimizer import AdamW
from fast.attention import packs
from grpo import assign_advantages, token_logprobs
from masking import Document
from rollout import Trajectory, Turn, draw_targets

DOCUMENTS, G1, G2, STEPS, WEIGHT = 3, 4, 3, 3, 0.5


def turn(rng) -> Turn:
    return Turn(rng.integers(VOCABULARY, size=6).tolist(), rng.integers(VOCABULARY, size=3).tolist(), True, "")


class Script:
    """Stands in for reading, recall and the update: makes up which answers are right, and keeps what it was given."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.steps: list[dict] = []

    def load_task(self, *given):
        source, _ = self.real_task(*given)
        return source, self.read

    def read(self, sample, documents, config, samples):
        right = self.rng.random((len(documents), samples)) < 0.5
        right[0] = len(self.steps) % 2  # a group whose answers are all alike: recall alone may tell them apart
        trajectories = []
        for document, row in zip(documents, right, strict=True):
            for hit in row:
                turns = [turn(self.rng) for _ in range(len(document.chunks) + 1)]
                said = document.answers[0] if hit else "wrong"
                trajectories.append(Trajectory(document, turns, ["m"] * len(document.chunks), said))
        step = {"right": right, "trajectories": trajectories, "draws": [], "hits": np.zeros((0, G2)), "references": []}
        self.steps.append(step)
        return trajectories

    def recall(self, sample, trajectories, config, samples):
        now = self.steps[-1]
        now["draws"] = [t.target for t in trajectories if t.target]
        assert trajectories == now["trajectories"] and len(now["draws"]) in (0, len(trajectories))
        now["hits"] = self.rng.random((len(now["draws"]), samples)) < 0.5
        for t, hits in zip(trajectories if now["draws"] else [], now["hits"], strict=True):
            t.recalls = [turn(self.rng) for _ in range(samples)]
            for answer, hit in zip(t.recalls, hits, strict=True):
                answer.text = "so \\boxed{" + (t.target.entity if hit else "something else") + "}"

    def fixed_logprobs(self, model, turns, config, *twins):
        assert not any(weight.requires_grad for weight in model.parameters())  # the reference, not the policy
        self.steps[-1]["references"] += map(id, turns)
        return ((t, ("log-probs of", id(t))) for t in turns)

    def update_batches(self, turns, config):
        self.steps[-1]["trained"] = {id(t): (t.place, t.advantage) for t in turns}
        self.steps[-1]["stored"] = [t.reference_logprobs for t in turns]
        assert len(turns) == len(self.steps[-1]["trained"])  # none comes twice
        return []


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
    for name in ("load_task", "recall", "fixed_logprobs", "update_batches"):
        monkeypatch.setattr(memtrain, name, getattr(script, name))
    done = command(
        "--out", tmp_path / "run", "--documents", DOCUMENTS, "--g1", G1, "--g2", G2, "--steps", STEPS,
        "--eval_documents", 0, "--lr", 1, "--lr_warmup", 2, "--recall_weight", WEIGHT, "--ablation", ablation,
        "--advantage", mode, *more,
    )
    assert done.returncode == 0, done.stderr
    assert len(script.steps) == STEPS
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
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
                for answer, advantage in zip(step["trajectories"][n].recalls, own, strict=True):
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
            assert step["references"] == list(step["trained"])
            assert step["stored"] == [("log-probs of", key) for key in step["trained"]]
        else:
            assert step["references"] == [] and set(step["stored"]) <= {None}
        warm, cosine = min(1.0, (number + 1) / 2), 0.5 * (1 + math.cos(math.pi * number / STEPS))
        assert rates[number] == pytest.approx(warm if "--kl" in more else warm * cosine)
    assert left_out > 0


NAMES = [f"Name{n}" for n in range(40)]


def drawn(places, step: int = 0, **settings) -> list[list[tuple]]:
    """What is recalled of one document at these places of a step: at each, the draws of four trajectories."""
    documents = [Document(0, "t", "q", ["y"], [" ".join(NAMES)] * 6, [NAMES] * 6, place=place) for place in places]
    trajectories = [Trajectory(document) for document in documents for _ in range(4)]
    draw_targets(trajectories, Config(g1=4, **settings), step)
    draws = [(t.target.memory_turn, t.target.chunk, t.target.entity) for t in trajectories]
    return [draws[n : n + 4] for n in range(0, len(draws), 4)]


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_recalled_follows_from_seed_step_and_place(shared):
    """A trajectory, or with --shared-recall-draw a document, has its own draw, whichever process reads it."""
    whole = drawn(range(4), shared_recall_draw=shared)
    assert drawn([1, 3], shared_recall_draw=shared) == [whole[1], whole[3]]
    assert all(len(set(draws)) == (1 if shared else 4) for draws in whole)
    step, seed = (drawn(range(4), shared_recall_draw=shared, **other) for other in ({"step": 1}, {"seed": 1}))
    for other in (step, seed, whole[1:]):
        assert all(one != another for one, another in zip(whole, other, strict=False))


def test_nothing_is_drawn_where_nothing_is_recalled():
    """End-to-end, and in the tasks, where there are no names to recall."""
    for settings in ({"ablation": "end_to_end"}, {"task": "longqa"}):
        trajectory = Trajectory(Document(0, "t", "q", ["y"], [" ".join(NAMES)] * 6, [NAMES] * 6))
        draw_targets([trajectory], Config(g1=1, **settings), 0)
        assert trajectory.target is None


def test_the_control_deals_rewards_out_anew_in_each_step_and_process(monkeypatch):
    """The orders of equal groups are those of a seed, a step and a process; without the control nothing moves."""
    def dealt(step=0, seed=0, ablation="shuffled_rewards"):
        document, config = Document(0, "t", "q", ["y"], [], []), Config(ablation=ablation, seed=seed, g1=6)
        trajectories = [Trajectory(document, [Turn([1], [2], True, "")], reward=float(n % 6)) for n in range(24)]
        assign_advantages(trajectories, config, shuffle=memtrain.shuffle_generator(config, step))
        return [t.turns[0].advantage for t in trajectories]

    first = dealt()
    assert first == dealt() and first not in (dealt(1), dealt(seed=1))
    for ablation in ("none", "end_to_end", "decoupled"):
        assert memtrain.shuffle_generator(Config(ablation=ablation), 0) is None
    assert dealt(ablation="none") == 4 * sorted(first[:6]) != first and sorted(dealt(ablation="none")) == sorted(first)
    monkeypatch.setattr(memtrain.parallel, "rank", lambda: 1)
    assert dealt() != first


# ---- the update ------------------------------------------------------------------------------------------


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


class OneStep:
    """In Run's place: a single step, of which it keeps what is logged."""

    logged: dict

    def __init__(self, config, device):
        pass

    def steps(self):
        return [0]

    def log(self, step, trajectories, stats, more):
        OneStep.logged = dict(stats) | more

    def ignore(self, *given):
        pass

    open = evaluate = resume = lap = save_if_due = finish = ignore


def train(monkeypatch, config: Config, policy, turns: list[Turn], reference=None, optimizer=None) -> dict:
    """A step of the loop in which these turns and advantages came out of the rollout -> what is logged of it."""
    stand_ins = {
        "Run": OneStep, "load_task": lambda *_: (None, lambda *_, **more: []), "draw_documents": lambda *_: [],
        "assign_advantages": lambda *_, **more: turns, "make_optimizer": lambda *_: optimizer or Descent(policy),
    }
    stand_ins["check_sampler"] = lambda *_: None
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(memtrain, name, stand_in)
    monkeypatch.setattr(memtrain.models, "load_policy", lambda *_: (policy, None))
    monkeypatch.setattr(memtrain.models, "load_reference", lambda *_: reference)
    memtrain.main(config)
    return OneStep.logged


ONE = dict(lr_warmup=1, lr_schedule="constant")


@pytest.mark.parametrize("twin", ["plain", "packed", "unpacked"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_updates_of_a_step_equal_the_formula(monkeypatch, kl, twin):
    """Three updates after one rollout: ratios are clipped, as the policy has moved from the old log-probs."""
    policy, plain, reference = tiny_model(), tiny_model(), tiny_model(seed=1)
    rng, turns = np.random.default_rng(1), []
    for document, count in enumerate((3, 2, 4)):
        prompt = turn(rng).prompt_ids
        for n in range(count):
            made = turn(rng)
            made.prompt_ids = prompt if n < 2 else made.prompt_ids
            made.place, made.advantage = document, float(rng.normal()) * 3
            turns.append(made)
    config = Config(
        documents=3, update_batch=1, eps_low=0.02, eps_high=0.03, kl=kl, grad_clip=0.5, train_tokens=30, lr=0.2, **ONE,
        fast=twin != "plain",
    )
    if twin == "unpacked":  # the fast twins of a model that can't pack
        for model in (policy, reference):
            model.set_attn_implementation("eager")
    with torch.no_grad():
        old, anchor = ([unpadded_logprobs(model, t)[0] for t in turns] for model in (plain, reference))
    logged = train(monkeypatch, config, policy, turns, reference.requires_grad_(False) if kl else None)
    if twin != "plain":
        assert packs(policy) == (twin == "packed")

    descent, clipped, tokens, means, norms = Descent(plain), 0, 0, [], []
    for document in range(3):
        mine = [i for i, t in enumerate(turns) if t.place == document]
        losses = []
        for i in mine:
            now, A = unpadded_logprobs(plain, turns[i])[0], turns[i].advantage
            terms = []
            for p, q, r in zip(now, old[i], anchor[i], strict=True):
                ratio = torch.exp(p - q)
                held = min(max(ratio.item(), 1 - 0.02), 1 + 0.03)
                stopped = held != ratio.item() and held * A < ratio.item() * A
                clipped, tokens = clipped + stopped, tokens + 1
                terms.append((held * A if stopped else ratio * A) - kl * (torch.exp(r - p) - (r - p) - 1))
            losses.append(-sum(terms) / len(terms))
        means.append(sum(losses) / len(mine))
        means[-1].backward()
        norms.append(descent.step(0.2, 0.5))
    assert (logged["updates"], logged["bad_updates"], logged["lr"]) == (3, 0, 0.2)
    assert logged["tokens"] == tokens and 0 < logged["clipped"] == clipped < tokens
    assert logged["loss"] == pytest.approx(sum(means).item() / 3, abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4) and (logged["kl"] > 0) == bool(kl)
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_an_update_without_turns_is_none(monkeypatch):
    """Of three documents the middle one has no turn: two updates are counted; without any turn nothing moves."""
    policy, rng, turns = tiny_model(), np.random.default_rng(0), []
    for place in (0, 2):
        turns.append(turn(rng))
        turns[-1].place, turns[-1].advantage = place, 1.0
    config = Config(documents=3, update_batch=1, **ONE)
    assert train(monkeypatch, config, policy, turns)["updates"] == 2
    before = [weight.clone() for weight in policy.parameters()]
    logged = train(monkeypatch, config, policy, [])
    assert (logged["updates"], logged["bad_updates"], logged["grad_norm"], logged["loss"]) == (0, 0, 0.0, 0.0)
    assert all(map(torch.equal, before, policy.parameters()))


@pytest.mark.parametrize("asked", [False, True])
def test_only_gradient_checkpointing_computes_a_layer_twice(monkeypatch, asked):
    """With it, backward computes a layer's activations again; an update leaves the policy in eval mode."""
    config, modes, rng = Config(gradient_checkpointing=asked, documents=1, **ONE), [], np.random.default_rng(0)
    policy, _ = load_policy(config, "cpu")
    policy.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda part, given: modes.append(part.training))
    made = turn(rng)
    made.place, made.advantage = 0, 1.0
    train(monkeypatch, config, policy, [made])
    assert modes == ([True, True] if asked else [False]) and not policy.training


@pytest.mark.parametrize("fast", [False, True])
def test_a_positive_advantage_raises_the_probability(monkeypatch, fast):
    """One update makes the rewarded completion likelier and the other less so: the sign of everything together."""
    model = tiny_model()
    turns = [
        Turn([1, 2, 3], [4, 5, 6], True, "", place=0, advantage=1.0),
        Turn([1, 2, 3], [7, 8], True, "", place=0, advantage=-1.0),
    ]
    before = token_logprobs(model, turns)[0].sum(1)
    logged = train(monkeypatch, Config(fast=fast, lr=1e-3, **ONE), model, turns, optimizer=AdamW(model, 1e-3))
    after = token_logprobs(model, turns)[0].sum(1)
    assert after[0] > before[0] and after[1] < before[1] and logged["tokens"] == 5 and logged["updates"] == 1
