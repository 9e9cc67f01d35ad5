"""batching.py: partitions within a budget, equal prompts, and which models can share them."""

import random

import torch
from transformers.cache_utils import DynamicLayer

from batching import RoomyLayer, by_length, by_prompt


def test_batches_hold_everything_once_within_the_budget():
    """Property over random lengths: a partition, longest first, padded size in budget unless alone, an eighth padding."""
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(40))]
        budget = rng.randrange(20, 600)
        batches = by_length(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)
        for n, batch in enumerate(batches):
            width, used = lengths[batch[0]], sum(lengths[i] for i in batch)
            assert len(batch) == 1 or (len(batch) * width <= budget and used >= 0.875 * len(batch) * width)
            if n + 1 < len(batches):  # no batch ends before it must
                one_more = (len(batch) + 1) * width
                assert one_more > budget or used + lengths[batches[n + 1][0]] < 0.875 * one_more


def test_equal_prompts_are_grouped_by_their_tokens():
    """Equality of ids, not of objects, in order of first appearance."""
    assert by_prompt([[1, 2], [3], [1, 2], [], [3], [2, 1]]) == [[0, 2], [1, 4], [3], [5]]


def test_a_roomy_layer_holds_what_a_plain_one_holds():
    """Over random appends, selections of rows, crops and resets, with little room, so that it often has to grow."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        plain, roomy, rows, seen = DynamicLayer(), RoomyLayer(), 3, []
        roomy.room = rng.randrange(1, 6)
        for _ in range(25):
            kind, held = rng.random(), plain.get_seq_length()
            if kind < 0.7 or not held:
                new = torch.randn(2, rows, 2, rng.choice((1, 1, 1, 5)), 4)
                given = plain.update(new[0], new[1]), roomy.update(new[0], new[1])
                assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
                seen.append((given[0][0].clone(), given[1][0]))
            elif kind < 0.85:
                chosen = torch.randint(rows, (rng.randrange(1, 5),))
                rows = len(chosen)
                plain.batch_select_indices(chosen)
                roomy.batch_select_indices(chosen)
            elif kind < 0.95:
                plain.crop(-1)
                roomy.crop(-1)
                seen = []  # the next append may write where these end
            else:
                plain.reset()
                roomy.reset()
            assert plain.get_seq_length() == roomy.get_seq_length()
            assert not plain.get_seq_length() or torch.equal(plain.values, roomy.values)
        assert all(torch.equal(a, b) for a, b in seen)  # what was handed out stays as it was
