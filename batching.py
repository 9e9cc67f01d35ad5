"""The same work in fewer tokens: batches of similar length, and prompts that several samples share found by their tokens.

Sampling and training both cut their work with `by_length`. Where conversations start from one and the same prompt (the
G1 first memories of a document, the G2 answers of a recall) the prompt is computed and held once, see attention.py.
Equal prompts are found by their token ids, which is always right: the network can't tell them apart, and every sample
keeps its own reward and advantage.
"""


def by_length(lengths: list[int], max_tokens: int, fill: float = 0.875) -> list[list[int]]:
    """Positions in batches of at most `max_tokens` tokens with padding, longest first; one over the budget stands alone.

    A batch also ends where less than `fill` of it would be tokens and the rest padding: sizes that differ much don't meet.
    """
    batches: list[list[int]] = []
    used = 0  # tokens of the last batch without its padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first of a batch is its longest, so it sets the width of every row.
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and padded <= max_tokens and used + lengths[i] >= fill * padded:
            batches[-1].append(i)
            used += lengths[i]
        else:
            batches.append([i])
            used = lengths[i]
    return batches


def by_prompt(prompts: list[list[int]]) -> list[list[int]]:
    """Positions of equal prompts together, in the order in which each prompt first comes."""
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(i)
    return list(groups.values())
