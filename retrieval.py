"""Passages for a query. BM25 over an in-memory inverted index; knows nothing of agents."""

import re
from array import array
from collections import Counter

import numpy as np

WORD = re.compile(r"\w+")


class UserError(Exception):
    """A mistake of the user's: one line saying what, where and what to do. The mains print it and exit with 2."""


class BM25:
    """Okapi BM25 (Robertson and Zaragoza, 2009) with Lucene's idf, log(1 + (N - df + 0.5) / (df + 0.5)), never negative.

    A posting is (passage, weight): the whole score of one term in one passage is computed when the index is
    built, so a search only adds up the postings of its terms. Postings of term t lie at starts[t]:starts[t + 1].
    """

    def __init__(self, texts: list[str], k1: float = 1.5, b: float = 0.75):
        self.terms = {}  # term -> id
        term_ids, passages, counts, lengths = array("i"), array("i"), array("i"), array("i")
        for passage, text in enumerate(texts):
            words = WORD.findall(text.lower())
            lengths.append(len(words))
            for term, count in Counter(words).items():
                term_ids.append(self.terms.setdefault(term, len(self.terms)))
                passages.append(passage)
                counts.append(count)
        term_ids, passages, counts, lengths = (np.array(a, np.int32) for a in (term_ids, passages, counts, lengths))
        self.size = len(lengths)
        frequency = np.bincount(term_ids, minlength=len(self.terms))  # (terms,): in how many passages
        idf = np.log1p((self.size - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.sum() / max(self.size, 1), 1e-9))
        by_term = np.argsort(term_ids, kind="stable")  # stable: within a term, passages stay in order
        term_ids, self.postings, counts = term_ids[by_term], passages[by_term], counts[by_term]
        self.weights = (idf[term_ids] * counts * (k1 + 1) / (counts + norm[self.postings])).astype(np.float32)
        self.starts = np.concatenate([[0], np.cumsum(frequency)])

    def search(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        """For each query its k best passages, [(index, score), ...], best first; equal scores by index.

        A passage that shares no word with the query is never returned, so there may be fewer than k. A word counts as
        often as the query has it.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = np.zeros(self.size, np.float32)
        for word, count in Counter(WORD.findall(query.lower())).items():
            if (term := self.terms.get(word)) is not None:
                span = slice(self.starts[term], self.starts[term + 1])
                scores[self.postings[span]] += count * self.weights[span]  # a passage stands once in a term's postings
        found = np.flatnonzero(scores)
        if 0 < k < len(found):  # all that tie with the k-th stay in, or equal scores would come in no fixed order
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        return [(int(passage), float(scores[passage])) for passage in best]
