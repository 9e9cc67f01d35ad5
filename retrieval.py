"""Passages for a query. BM25 here, in memory; a query is any text."""

import re
from collections import Counter

import numpy as np

WORD = re.compile(r"\w+")


class BM25:
    """Okapi BM25 over an inverted index in numpy (Robertson and Zaragoza, 2009, doi 10.1561/1500000019).

    A word's postings are a slice of three flat arrays: which passages hold it, and what each scores for it.
    """

    def __init__(self, texts: list[str], k1: float = 1.5, b: float = 0.75):
        self.vocabulary: dict[str, int] = {}
        words, owners, counts = [], [], []
        lengths = np.zeros(len(texts), dtype=np.float32)
        for n, text in enumerate(texts):
            found = Counter(WORD.findall(text.lower()))
            lengths[n] = sum(found.values())
            for word, count in found.items():
                words.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                owners.append(n)
                counts.append(count)
        order = np.argsort(np.array(words, dtype=np.int64), kind="stable")
        words = np.array(words, dtype=np.int64)[order]
        self.owners = np.array(owners, dtype=np.int32)[order]  # (postings,)
        counts = np.array(counts, dtype=np.float32)[order]
        self.starts = np.searchsorted(words, np.arange(len(self.vocabulary) + 1))  # (words + 1,)
        holders = np.diff(self.starts)  # (words,) passages that hold the word
        idf = np.log1p((len(texts) - holders + 0.5) / (holders + 0.5)).astype(np.float32)
        norm = k1 * (1 - b + b * lengths[self.owners] / max(lengths.mean(), 1e-9))
        self.scores = idf[words] * counts * (k1 + 1) / (counts + norm)  # (postings,) what one query word adds
        self.size = len(texts)

    def search(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        """The `k` best (position, score) for each query, best first, ties by position; none that shares no word."""
        results = []
        for query in queries:
            total = np.zeros(self.size, dtype=np.float32)
            for word, times in Counter(WORD.findall(query.lower())).items():
                if (w := self.vocabulary.get(word)) is not None:
                    postings = slice(self.starts[w], self.starts[w + 1])
                    total[self.owners[postings]] += times * self.scores[postings]
            best = np.argpartition(-total, min(k, self.size - 1))[: k + 1] if k < self.size else np.arange(self.size)
            best = best[np.lexsort((best, -total[best]))][:k]
            results.append([(int(n), float(total[n])) for n in best if total[n] > 0])
        return results
