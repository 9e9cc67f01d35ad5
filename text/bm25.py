"""BM25: finds the passages most relevant to a query by the words they share."""

import re
from array import array
from collections import Counter

import numpy as np
from tqdm import tqdm

WORD = re.compile(r"\w+")


class BM25:
    """Okapi BM25 (Robertson and Zaragoza, 2009) with Lucene's idf, log(1 + (N - df + 0.5) / (df + 0.5)).

    A posting is (passage, weight): a term's full score in a passage is computed when the index is built, so a search
    only sums the postings of its terms. The postings of term t are at starts[t]:starts[t + 1].
    """

    def __init__(self, texts, k1: float = 1.5, b: float = 0.75):
        self.terms = {}  # term -> id
        term_ids, counts, distinct, lengths = array("i"), array("i"), array("i"), array("i")
        for text in tqdm(texts, desc="BM25 index", unit=" passages", delay=5, mininterval=1):
            words = Counter(WORD.findall(text.lower()))
            lengths.append(words.total())
            distinct.append(len(words))
            term_ids.extend([self.terms.setdefault(term, len(self.terms)) for term in words])
            counts.extend(words.values())
        term_ids, counts, distinct, lengths = (np.asarray(a, np.int32) for a in (term_ids, counts, distinct, lengths))
        self.size = len(lengths)
        frequency = np.bincount(term_ids, minlength=len(self.terms))  # (terms,): number of passages with the term
        idf = np.log1p((self.size - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.sum() / max(self.size, 1), 1e-9))
        by_term = np.argsort(term_ids, kind="stable")  # stable: within a term, passages stay in order
        self.postings = np.repeat(np.arange(self.size, dtype=np.int32), distinct)[by_term]
        self.weights = np.empty(len(by_term), np.float32)
        for start in range(0, len(by_term), 1 << 22):  # in blocks: float64 for all postings at once is gigabytes
            block = slice(start, start + (1 << 22))
            count, own_idf = counts[by_term[block]], idf[term_ids[by_term[block]]]
            self.weights[block] = own_idf * count * (k1 + 1) / (count + norm[self.postings[block]])
        self.starts = np.concatenate([[0], np.cumsum(frequency)])

    def holding(self, word: str) -> np.ndarray:
        """Numbers of the texts that contain this word, in any case."""
        return self.postings[self._span(word.lower())]

    def _span(self, word: str) -> slice:
        """Where the postings of a lower-case word are."""
        term = self.terms.get(word)
        return slice(0) if term is None else slice(self.starts[term], self.starts[term + 1])

    def search(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        """For each query its k best passages, [(index, score), ...], best first; ties by index.

        A passage that shares no word with the query is never returned, so there may be fewer than k. A repeated word
        in the query counts each time.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = np.zeros(self.size, np.float32)
        for word, count in Counter(WORD.findall(query.lower())).items():
            span = self._span(word)
            scores[self.postings[span]] += count * self.weights[span]  # a passage occurs once in a term's postings
        found = np.flatnonzero(scores)
        if 0 < k < len(found):  # keep all ties with the k-th, or the order of equal scores would vary
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        return [(int(passage), float(scores[passage])) for passage in best]
