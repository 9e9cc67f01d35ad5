"""fast/packing.py: batches within a budget, and log-probs against those of grpo.py, the plain twin."""

import random
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import CONFIGS, EOS, LENGTHS, VOCABULARY, parameter_gradient, random_turns, turn_of, unpadded_logprobs
from transformers import FalconConfig, FalconForCausalLM, Gemma2Config, GemmaConfig, GraniteConfig, MistralConfig

import grpo
from fast.attention import enable_packing, packs
from fast.packing import by_length, by_prompt, enable, micro_batches, row_tokens, token_logprobs
from grpo import grpo_loss, turn_weights

every_kind = pytest.mark.parametrize("kind", CONFIGS)


def tiny_model(*config, pack=False, **settings):
    """That of helpers, which packs on demand."""
    model = helpers.tiny_model(*config, **settings)
    assert not pack or enable_packing(model)
    return model


def with_siblings(turns, copies, longest=12, shortest=1, seed=5):
    """Further completions of every turn's prompt, shuffled among them: what a group of samples looks like."""
    rng = np.random.default_rng(seed)
    more = [
        turn_of(list(turn.prompt_ids), rng.integers(0, VOCABULARY, rng.integers(shortest, longest + 1)).tolist())
        for n, turn in enumerate(turns) for _ in range(copies if n % 3 else 0)
    ]  # every third prompt keeps its one completion
    both = [*turns, *more]
    return [both[i] for i in rng.permutation(len(both))]


# ---- batches -------------------------------------------------------------------------------------------


def test_batches_hold_everything_once_within_the_budget():
    """Property over random lengths: a partition, longest first, in budget with padding, as full as asked."""
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(40))]
        budget = rng.randrange(20, 600)
        fill = rng.choice([0.0, 0.5, 0.875])
        batches = by_length(lengths, budget, fill)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)
        for n, batch in enumerate(batches):
            width, used = lengths[batch[0]], sum(lengths[i] for i in batch)
            assert len(batch) == 1 or (len(batch) * width <= budget and used >= fill * len(batch) * width)
            if n + 1 < len(batches):  # no batch ends before it must
                one_more = (len(batch) + 1) * width
                assert one_more > budget or used + lengths[batches[n + 1][0]] < fill * one_more


def test_equal_prompts_are_grouped_by_their_tokens():
    """Equality of ids, not of objects, in order of first appearance."""
    assert by_prompt([[1, 2], [3], [1, 2], [], [3], [2, 1]]) == [[0, 2], [1, 4], [3], [5]]


def test_micro_batches_keep_the_token_budget():
    """Every turn once; padded size within the budget, or one row alone; equal prompts together; little padding."""
    packing_model, model = tiny_model(pack=True), tiny_model()
    lengths = [3, 10, 4, 30, 9, 10]
    turns = [turn_of([1], [2] * (length - 1)) for length in lengths]

    def places(model, turns, budget):
        order = [id(turn) for turn in turns]  # some of them are equal
        return [[order.index(id(turn)) for turn in batch] for batch in micro_batches(turns, budget, model)]

    assert places(model, turns, 20) == [[3], [1, 5], [4], [2, 0]]  # 30 alone, 10 + 10, 9 is too far from 4, 4 + 3
    assert places(model, turns, 0) == [[3], [1], [5], [4], [2], [0]] and places(model, [], 20) == []
    assert places(packing_model, turns[1:3], 14) == [[0, 1]]  # 1 + 9 + 3 tokens in one row
    assert places(packing_model, turns[1:3], 12) == [[0], [1]]
    many = with_siblings(random_turns(np.random.default_rng(0).integers(1, 200, (200, 2)).tolist()), 4)
    for packed in (False, True):
        batches = micro_batches(many, 2048, packing_model if packed else model)
        padded = used = 0
        for batch in batches:
            rows = {}
            for n, turn in enumerate(batch):
                rows.setdefault(tuple(turn.prompt_ids) if packed else n, []).append(turn)
            sizes = [len(row[0].prompt_ids) + sum(len(t.completion_ids) for t in row) for row in rows.values()]
            assert max(sizes) * len(sizes) <= 2048
            assert not packed or len({len(row) > 1 for row in rows.values()}) == 1
            assert [row_tokens(row) for row in rows.values()] == sizes
            padded, used = padded + max(sizes) * len(sizes), used + sum(sizes)
        assert sorted(id(turn) for batch in batches for turn in batch) == sorted(map(id, many))
        assert padded < 1.1 * used and len(batches) < 1.5 * used / 2048


# ---- log-probs -----------------------------------------------------------------------------------------


@every_kind
def test_training_logprobs_equal_rollout_logprobs(kind, monkeypatch):
    """What HF generate sampled from, left-padded in a batch, is what training scores: same tokens, 1e-4, pad = EOS."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", 7)
    model, turns = tiny_model(CONFIGS[kind]), random_turns([(p, 1) for p in (3, 11, 7, 1, 5, 8)])
    width = max(len(turn.prompt_ids) for turn in turns)
    prompts = torch.tensor([[EOS] * (width - len(turn.prompt_ids)) + turn.prompt_ids for turn in turns])
    attention = torch.tensor([[0] * (width - len(turn.prompt_ids)) + [1] * len(turn.prompt_ids) for turn in turns])
    torch.manual_seed(3)
    sampled = model.generate(
        prompts, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=12, eos_token_id=[EOS, 2, 3, 4, 5, 6], pad_token_id=EOS, output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(sampled.scores, 1).log_softmax(-1)  # (turns, new, vocabulary)
    ends = []
    for turn, row in zip(turns, sampled.sequences[:, width:].tolist(), strict=True):
        end = next((t + 1 for t, token in enumerate(row) if token in (EOS, 2, 3, 4, 5, 6)), len(row))
        turn.completion_ids = row[:end]
        ends.append(end)
    assert min(ends) < max(ends)  # some ended early, or padding after EOS would go untested
    with torch.no_grad():
        logprobs, _, mask = token_logprobs(model, turns)
    for i in range(len(turns)):
        rollout = scores[i].gather(1, sampled.sequences[i, width:, None])[: ends[i], 0]
        torch.testing.assert_close(logprobs[i, : ends[i]], rollout, atol=1e-4, rtol=0)
    assert mask.sum(1).tolist() == ends


@pytest.mark.parametrize(
    "recompute, head_tokens, even", [(False, 1, False), (False, 1000, True), (False, 1000, False), (True, 16, False)]
)
@pytest.mark.parametrize("config", [*CONFIGS.values(), partial(MistralConfig, sliding_window=None), GemmaConfig])
def test_packed_and_unpacked_completions_equal_the_twins(config, recompute, head_tokens, even, monkeypatch):
    """One row each, or one for a prompt and all its completions: the log-probs, entropies and gradient of grpo's
    token_logprobs to 1e-5, with padding or with all turns of one length, whatever the slices of the head."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", head_tokens)
    model = tiny_model(config)
    turns = with_siblings(random_turns([(6, 5)] * 5), 3, 5, 5) if even else with_siblings(random_turns(LENGTHS), 3)
    if recompute:
        model.activation_checkpointing_enable()
        model.train()
    coefficients = torch.randn(len(turns), 13, generator=torch.Generator().manual_seed(1))
    results, rows = [], []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for how in ("twin", "plain", "packed"):
        assert how != "packed" or enable_packing(model)
        compute = grpo.token_logprobs if how == "twin" else token_logprobs
        logprobs, entropy, mask = compute(model, turns, with_entropy=True)
        assert logprobs.dtype == torch.float32 and not logprobs[~mask].any() and not entropy.requires_grad
        (coefficients[:, : logprobs.shape[1]] * logprobs).sum().backward()
        results.append((logprobs.detach(), entropy, mask, parameter_gradient(model)))
    hook.remove()
    *unpacked, (packed, entropy, mask, gradient) = results
    for plain, plain_entropy, plain_mask, plain_gradient in unpacked:
        torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy, plain_entropy, atol=1e-5, rtol=0)
        assert torch.equal(mask, plain_mask)
        assert (gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()
    each_a_row = len(turns) * max(len(t.prompt_ids + t.completion_ids) for t in turns)
    together = {}
    for turn in turns:
        key = tuple(turn.prompt_ids)
        together[key] = together.get(key, len(key)) + len(turn.completion_ids)
    assert rows == [each_a_row, each_a_row, len(together) * max(together.values())]


@every_kind
def test_a_packed_row_of_one_completion_token(kind):
    """Beside an empty completion: the mask of so few queries is not taken for one of all queries."""
    model = tiny_model(CONFIGS[kind], pack=True)
    turns = [turn_of([1, 2, 3, 4, 5], [9]), turn_of([1, 2, 3, 4, 5], [])]
    with torch.no_grad():
        (packed, *_), (alone, *_) = token_logprobs(model, turns), token_logprobs(model, turns[:1])
    torch.testing.assert_close(packed[:1], alone, atol=1e-5, rtol=0)
    assert packed[0, 0].item() == pytest.approx(unpadded_logprobs(model, turns[0])[0].item(), abs=1e-5)


def test_one_completion_a_prompt_takes_the_plain_causal_path():
    """Without anything to share no attention mask is built, so that fast kernels stay in use."""
    model, seen = tiny_model(pack=True), []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    turns = random_turns(LENGTHS)
    token_logprobs(model, turns)
    token_logprobs(model, with_siblings(turns, 1))
    assert "attention_mask" not in seen[0] and "attention_mask" in seen[1]


@every_kind
def test_eos_is_trained(kind):
    """A rewarded completion that is nothing but its EOS makes that EOS likelier, though padding has the same id."""
    model, turns = tiny_model(CONFIGS[kind]), [turn_of([5, 6, 7], [EOS]), turn_of([8, 9], [10, 11, 12, EOS])]
    logprobs, _, mask = token_logprobs(model, turns)
    logprobs.retain_grad()
    assert mask.tolist() == [[True, False, False, False], [True] * 4]
    loss, _ = grpo_loss(logprobs, None, None, mask, torch.ones(2), turn_weights([0, 1]), 0.2, 0.2, 0.0)
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.5, 0, 0, 0], [-0.125] * 4]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        after, _, _ = token_logprobs(model, turns)
    assert after[0, 0] > logprobs[0, 0] and after[1, 3] > logprobs[1, 3]


@every_kind
@pytest.mark.parametrize("pack", [False, True], ids=["", "packed"])
def test_empty_completions_and_prompts(kind, pack):
    """An empty completion scores nothing and spoils no neighbour; an empty prompt is an error, not a shifted mask."""
    model, turns = tiny_model(CONFIGS[kind], pack=pack), random_turns(LENGTHS[:2])
    alone, entropy, _ = token_logprobs(model, turns)
    assert entropy is None  # unless asked for
    mixed, _, mask = token_logprobs(model, [turns[0], turn_of([3, 4, 5], []), turns[1]])
    torch.testing.assert_close(mixed[[0, 2]], alone)
    assert mask.sum(1).tolist() == [4, 0, 7]
    logprobs, _, mask = token_logprobs(model, [turn_of([3], []), turn_of([4], [])])
    loss, _ = grpo_loss(logprobs, None, None, mask, torch.ones(2), torch.ones(2), 0.2, 0.2, 0.0)
    assert logprobs.shape == mask.shape == (2, 0) and loss == 0
    loss.backward()
    with pytest.raises(ValueError, match="empty prompt"):
        token_logprobs(model, [turn_of([], [3, 4])])


def test_head_never_sees_more_than_its_chunk_and_keeps_no_logits(monkeypatch):
    """Forward and backward make logits of at most HEAD_TOKENS positions, only of completions, and store none."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", 8)
    model, turns, seen, stored = tiny_model(), random_turns(LENGTHS), [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))

    def remember(tensor):
        stored.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logprobs, _, _ = token_logprobs(model, turns)
    tokens = sum(len(turn.completion_ids) for turn in turns)
    assert sum(rows for rows, _ in seen) == tokens > 8 and set(seen) <= {(8, VOCABULARY), (tokens % 8, VOCABULARY)}
    assert not any(VOCABULARY in shape[-1:] for shape in stored)
    logprobs.sum().backward()
    assert sum(rows for rows, _ in seen) == 2 * tokens and max(seen) == (8, VOCABULARY)


CAPPED, SCALED = partial(Gemma2Config, final_logit_softcapping=2.0), partial(GraniteConfig, logits_scaling=0.5)


@pytest.mark.parametrize("config, packed", [(CAPPED, False), (SCALED, True)], ids=["Gemma 2", "Granite"])
def test_logits_that_are_capped_or_scaled(config, packed):
    """The twin takes the model's own logits, capped as Gemma's or scaled as Granite's, packed too where it can be."""
    model, turns = tiny_model(config), with_siblings(random_turns(LENGTHS[:4]), 2)
    wanted = [unpadded_logprobs(model, turn)[0].detach() for turn in turns]
    found = [token_logprobs(model, turns)[0].detach()]
    assert enable_packing(model) == packed
    found.append(token_logprobs(model, turns)[0].detach())
    for logprobs in found:
        for row, own in zip(logprobs, wanted, strict=True):
            torch.testing.assert_close(row[: len(own)].double(), own, atol=2e-5, rtol=0)


def test_enable_packs_or_tells(capsys):
    """Policy and reference pack, and batches are the policy's; a model that can't is told of and goes on unpacked."""
    policy, reference, turns = tiny_model(), tiny_model(), with_siblings(random_turns(LENGTHS), 3)
    batches = enable(policy, reference)
    assert packs(policy) and packs(reference) and not capsys.readouterr().out
    assert batches(turns, 40) == micro_batches(turns, 40, policy) != micro_batches(turns, 40, tiny_model())
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    )
    batches = enable(falcon)
    assert not packs(falcon) and "completions are not packed behind their prompts" in capsys.readouterr().out
    assert batches(turns, 40) == micro_batches(turns, 40, tiny_model())


# ---- micro-batches of one update ------------------------------------------------------------------------


def batch_gradient(model, turns, batches):
    """Gradient of one Eq. 4 batch (a moved policy, KL, a turn of weight 0), accumulated over the micro-batches."""
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.5, 1.5, -1.0, 0.7])
    weights = torch.cat([turn_weights([0, 0, 1, 1, 1, 2]), torch.zeros(1)])
    kind = type(model.config)
    old_model, reference_model = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    places = {id(turn): n for n, turn in enumerate(turns)}
    total, totals = 0.0, {}
    for part in batches:
        batch = [places[id(turn)] for turn in part]
        logprobs, entropy, mask = token_logprobs(model, part, with_entropy=True)
        with torch.no_grad():
            drift = 0.05 * token_logprobs(old_model, part)[0]
            reference = logprobs + 0.1 * token_logprobs(reference_model, part)[0]
        loss, stats = grpo_loss(
            logprobs, (logprobs + drift).detach(), reference, mask, advantages[batch], weights[batch], 0.1, 0.2, 0.05,
            entropy,
        )
        loss.backward()
        total += loss.item()
        totals = {name: totals.get(name, 0) + value.item() for name, value in stats.items()}
    return total, parameter_gradient(model), totals


@every_kind
def test_any_micro_batch_size_gives_the_same_gradient(kind, monkeypatch):
    """One batch, cut in any way, adds up to the same loss, gradient (1e-5) and stats."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", 8)
    model, turns = tiny_model(CONFIGS[kind]), random_turns(LENGTHS)
    loss, gradient, stats = batch_gradient(model, turns, [turns])
    assert gradient.norm() > 1e-3 and 0 < stats["clipped"] < stats["tokens"] == sum(c for _, c in LENGTHS[:6])
    cuts = [[[i] for i in range(7)], [[0, 1], [2, 3], [4, 5], [6]], [[6, 2, 0], [1, 3, 4, 5]]]
    by_place = [[[turns[i] for i in batch] for batch in cut] for cut in cuts]
    for cut in (*by_place, micro_batches(turns, 30, model)):
        part_loss, part_gradient, part_stats = batch_gradient(model, turns, cut)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert (part_gradient - gradient).norm() < 1e-5 * gradient.norm()
        assert part_stats == pytest.approx(stats, rel=1e-4)


@every_kind
def test_gradient_checkpointing_changes_nothing(kind, monkeypatch):
    """In train mode (dropout 0) with activation checkpointing, the gradient is the one of eval mode."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", 8)
    model, turns = tiny_model(CONFIGS[kind]), random_turns(LENGTHS)
    _, gradient, _ = batch_gradient(model, turns, [turns])
    model.activation_checkpointing_enable()
    _, again, _ = batch_gradient(model.train(), turns, [turns])
    assert (again - gradient).norm() < 1e-6 * gradient.norm()


@every_kind
def test_packed_micro_batches_give_the_same_gradient(kind, monkeypatch):
    """The whole batch packed and cut equals the whole batch plain, also where a prompt's completions are split."""
    monkeypatch.setattr(grpo, "HEAD_TOKENS", 8)
    model, turns = tiny_model(CONFIGS[kind]), random_turns(LENGTHS)
    for n in (1, 4, 6):
        turns[n].prompt_ids = list(turns[0].prompt_ids)
    loss, gradient, _ = batch_gradient(model, turns, [turns])
    enable_packing(model)
    rows = []
    for budget in (14, 25, 1000):
        batches = micro_batches(turns, budget, model)
        rows.append(sum(len(by_prompt([turn.prompt_ids for turn in batch])) for batch in batches))
        part_loss, part_gradient, _ = batch_gradient(model, turns, batches)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert (part_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert rows == [7, 5, 4]  # each apart, the shared prompt twice, and once
