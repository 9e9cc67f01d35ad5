"""retrieval.py: BM25 against the formula written out with loops."""

import math
import random
import re

from retrieval import BM25


def reference(texts, query, k1=1.5, b=0.75):
    docs = [re.findall(r"\w+", t.lower()) for t in texts]
    mean = sum(map(len, docs)) / len(docs)
    scores = []
    for doc in docs:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holders = sum(word in d for d in docs)
            if holders and word in doc:
                idf = math.log(1 + (len(docs) - holders + 0.5) / (holders + 0.5))
                f = doc.count(word)
                score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(doc) / mean))
        scores.append(score)
    return scores


def test_scores_and_order_equal_the_formula():
    """Random texts and queries: same scores to 1e-4, same order where scores differ, never a passage without a match."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 30))) for _ in range(60)]
    index = BM25(texts)
    for _ in range(40):
        query = " ".join(rng.choices([*words, "unknown"], k=rng.randrange(1, 8))).upper()
        expected, k = reference(texts, query), rng.randrange(1, 70)
        (found,) = index.search([query], k)
        assert len(found) == min(k, sum(s > 0 for s in expected))
        for n, score in found:
            assert abs(score - expected[n]) < 1e-4
        best = sorted((s for s in expected if s > 0), reverse=True)[:k]
        assert all(abs(score - wanted) < 1e-4 for (_, score), wanted in zip(found, best))


def test_several_queries_and_a_tie():
    """One result list a query, in order; equal scores go by position; nothing matches nothing."""
    index = BM25(["red apple", "green pear", "red apple"])
    red, none = index.search(["red", "blue"], 5)
    assert [n for n, _ in red] == [0, 2] and none == []
