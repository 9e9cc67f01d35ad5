"""batching.py: partitions within a budget, and equal prompts."""

import random

from batching import by_length, by_prompt


def test_batches_hold_everything_once_within_the_budget():
    """Property over random lengths: a partition, longest first, padded size in budget and as full as asked unless alone."""
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
