"""rewards.py: the answer in a box, exact match, Eq. 1 and Eq. 2."""

import random
import re
import string
import unicodedata
from decimal import Decimal
from functools import cache
from itertools import combinations, islice

import pytest
from helpers import records

from rewards import answer_reward, boxed, exact_match, recall_reward, trajectory_reward
from tasks.evaluate import f1_score, substring_match


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{Paris}", "Paris"),
        (r"first \boxed{Paris}, no: \boxed{Rome}", "Rome"),
        (r"\boxed{f{x}{y}}", "f{x}{y}"),
        (r"\boxed{Rome} and \boxed{never closed", "Rome"),
        (r"\boxed{outer \boxed{inner", None),
        (r"\boxed{}", None),
        (r"the final answer in \boxed{}. The clues point to \boxed{Paris}", "Paris"),
        (r"\boxed{Paris}, so I put it in \boxed{ }", "Paris"),
        (r"\boxed{Paris} \boxed{\text{ }} \boxed{\boxed{}}", "Paris"),
        ("Paris", None),
        (r"\boxed Paris", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, content):
    """Nested braces stay inside, an unclosed or empty box is passed over, and no box is no answer."""
    assert boxed(text) == content


def test_boxes_against_a_brute_force_scan():
    """Over random strings: boxed() equals the last start whose braces balance, found by trying every end."""
    rng = random.Random(0)

    def slow(text):
        for start in reversed([m.end() for m in re.finditer(re.escape("\\boxed{"), text)]):
            for end in range(start, len(text)):
                inside = text[start:end]
                balance = [inside[:n].count("{") - inside[:n].count("}") for n in range(len(inside) + 1)]
                if text[end] == "}" and balance[-1] == 0 and min(balance) >= 0:
                    left = inside
                    while (less := re.sub(r"\\boxed\{\s*\}", "", left)) != left:
                        left = less
                    if left.strip():
                        return inside
                    break
        return None

    for _ in range(3000):
        text = "".join(rng.choice(["\\boxed{", "{", "}", "a", " "]) for _ in range(rng.randrange(12)))
        assert boxed(text) == slow(text), text


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        ("the  Eiffel-Tower!", "Eiffeltower", True),
        ("An Apple", "apple", True),
        ("1.5", "15", False),  # SQuAD's normalisation alone would say True
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("1,500", "1500", True),
        ("1500.0", "1500", True),
        ("1879.", "1879", True),
        ("1.5 km", "15 km", False),
        ("5th", "5 th", False),
        ("U-235", "U235", True),
        ("", "the", False),
        ("the", "a", False),
        ("", "", False),
        (None, "Paris", False),
        ("Paris, France", "Paris", False),
        (r"\text{Paris}", "Paris", True),
        (r"$\mathbf{\textbf{Paris}}$", "Paris", True),
        (r"\mathrm {Ulm}", "Ulm", True),
        ("1{,}500", "1500", True),
        ("1{,}500", "1.500", False),
        ("1939\u20131945", "1939-1945", True),
        ("Gauss\u2014Markov", "Gauss-Markov", True),
        ("O\u2019Brien", "O'Brien", True),
        ("\u201cEmma\u201d", '"Emma"', True),
        ("\ufb01re", "fire", True),
        ("\uff21da", "Ada", True),
        ("e\u0301tude", "\u00e9tude", True),
        ("10\u201315", "1015", False),
        ("102", "10\u00b2", False),
        ("10\u00b2", "10\u00b2", True),
        ("H\u2082O", "H\u2082O", True),
        ("Paris", r"\text{Paris}", False),  # a gold answer is taken as it is
    ],
)
def test_exact_match(prediction, gold, match):
    """Masking's folding and SQuAD's normalisation on both sides, LaTeX off the prediction, numbers as numbers."""
    assert exact_match(prediction, [gold]) is match


def test_any_of_several_answers():
    """One of the gold answers is enough, and none of none is."""
    assert exact_match("NYC", ["New York", "NYC"]) and not exact_match("NYC", [])


@cache
def squad_words(text):
    """The words that the SQuAD v1.1 script compares, step by step: small letters, no punctuation, no articles.

    Before that, NFKC, and quotes and dashes of all kinds are gone as their ASCII forms are.
    """
    small = [c.isdigit() and unicodedata.decomposition(c)[:4] in ("<sup", "<sub") for c in text]
    text = "".join(" " + c if small[n] and not (n and small[n - 1]) else c for n, c in enumerate(text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(c for c in text if c not in set(string.punctuation) | set(OTHER_MARKS))
    return tuple(re.sub(r"\b(a|an|the)\b", " ", text).split())


OTHER_MARKS = "\u2019\u2018\u201a\u2032\u201c\u201d\u201e\u2033\u00ab\u00bb\u2010\u2011\u2012\u2013\u2014\u2212"


def squad_exact(prediction, golds):
    return any(squad_words(prediction) == squad_words(gold) for gold in golds)


def squad_f1(prediction, golds):
    scores = []
    for gold in golds:
        left, right, shared = squad_words(prediction), list(squad_words(gold)), 0
        for word in left:
            if word in right:
                right.remove(word)
                shared += 1
        precision, recall = shared / max(len(left), 1), shared / max(len(squad_words(gold)), 1)
        scores.append(2 * precision * recall / (precision + recall) if shared else 0.0)
    return max(scores)


def digits(text):
    """The numbers of a text as the guard reads them, with no use of its expression: by hand, character by character."""
    found, n = [], 0
    while n < len(text):
        if not text[n].isdecimal():
            n += 1
            continue
        start = n
        while n < len(text) and text[n].isdecimal():
            n += 1
        while text[n : n + 1] == "," and text[n + 1 : n + 4].isdecimal() and len(text[n + 1 : n + 4]) == 3:
            n += 4
        if text[n : n + 1] == "." and text[n + 1 : n + 2].isdecimal():
            n += 1
            while n < len(text) and text[n].isdecimal():
                n += 1
        before = text[start - 2 : start - 1] if start > 1 else ""
        minus = start > 0 and text[start - 1] in "-\u2212" and not (before.isalnum() or before == "_")
        found.append((-1 if minus else 1) * Decimal(text[start:n].replace(",", "")))
    return found


@cache
def answer_pairs():
    """(prediction, golds) of the shared question sets: pairs of answers to one question, and answers to others."""
    fields = {"nq_open_dev_3610": "answer", "bamboogle_125": "golden_answers", "popqa_1000": "golden_answers",
              "triviaqa_1000": "golden_answers", "hotpotqa_dev_distractor_200": "answer"}
    rng, pairs = random.Random(0), []
    for name, field in fields.items():
        rows = [row[field] for row in records(f"qa/{name}.jsonl")]
        rows = [row if isinstance(row, list) else [row] for row in rows]
        for row in rows:
            pairs += [(a, [a]) for a in row]
            pairs += [pair for a, b in islice(combinations(row, 2), 40) for pair in ((a, [b]), (b, [a]))]
            pairs += [(rng.choice(rng.choice(rows)), row) for _ in range(2)]
    return pairs


def test_exact_match_and_f1_against_a_written_out_squad_scorer():
    """On all pairs of real answers F1 is SQuAD's, and exact match too, but where the guard for numbers says otherwise.

    The guard: what SQuAD takes for equal is right only if both have the same numbers, and two plain numbers are
    right if they are equal as numbers. What has no words is never right.
    """
    guarded = matched = partial = 0
    for prediction, golds in answer_pairs():
        f1 = f1_score(prediction, golds)
        assert abs(f1 - squad_f1(prediction, golds)) < 1e-12, (prediction, golds)
        partial += 0 < f1 < 1
        same, plain = exact_match(prediction, golds), squad_exact(prediction, golds)
        matched += same
        if same != plain:
            guarded += 1
            equal = [gold for gold in golds if squad_words(gold) == squad_words(prediction)]
            if plain:
                rightly = all(digits(gold) != digits(prediction) or not squad_words(gold) for gold in equal)
                assert rightly, (prediction, golds)
            else:
                number = re.compile(r"[-\u2212]?[\d,.]+")
                same = any(digits(gold) == digits(prediction) and number.fullmatch(gold.strip()) for gold in golds)
                assert same, (prediction, golds)
                assert number.fullmatch(prediction.strip())
    assert matched > 5000 and partial > 5000 and 0 < guarded < 0.001 * matched, (matched, partial, guarded)


@pytest.mark.parametrize(
    "prediction, golds, f1, inside",
    [
        ("Paris", ["Paris"], 1.0, True),
        ("the city of Paris", ["Paris"], 0.5, True),
        ("Paris", ["the city of Paris"], 0.5, False),  # MemAgent's scripts count this direction too
        ("Parisian", ["Paris"], 0.0, False),
        ("New, York!", ["new york city", "York"], 0.8, True),
        ("York New", ["New York"], 1.0, False),
        ("yes yes yes", ["yes"], 0.5, True),
        ("no", ["yes", "NO."], 1.0, True),
        ("", ["the"], 0.0, False),
        ("", [""], 0.0, False),
        ("anything", ["the", "!"], 0.0, False),
        ("the", ["the"], 0.0, False),
        ("Paris", [], 0.0, False),
        (None, ["Paris"], 0.0, False),
    ],
)
def test_f1_and_substring(prediction, golds, f1, inside):
    """The best of several golds; the gold's whole words inside the prediction only; nothing is never right."""
    assert abs(f1_score(prediction, golds) - f1) < 1e-12 and substring_match(prediction, golds) is inside


def test_substring_against_a_scan_of_the_words():
    """On every fourth pair of real answers: some gold's words stand at some place of the prediction's words."""
    found = 0
    for prediction, golds in answer_pairs()[::4]:
        words, lists = squad_words(prediction), [squad_words(gold) for gold in golds]
        slow = any(gold and words[n : n + len(gold)] == gold for gold in lists for n in range(len(words)))
        assert substring_match(prediction, golds) is slow, (prediction, golds)
        found += slow and not squad_exact(prediction, golds)
    assert found > 500


@pytest.mark.parametrize(
    "prediction, score",
    [
        ("Ulm; 1879", 1.0),
        ("the Ulm;1879;", 1.0),
        ("Ulm", 0.5),
        ("Ulm;", 0.5),
        ("; 1879", 0.5),
        ("1879; Ulm", 0.0),
        ("Ulm; 1879; Bern", 0.5),
        ("Ulm 1879", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_two_objectives(prediction, score):
    """Answers count in their order; a missing one is wrong, a guess too many spoils the last."""
    assert answer_reward(prediction, [["Ulm", "Ulm, Germany"], ["1879"]]) == score


def test_one_objective_is_exact_match():
    """One question's answer is not split, and of four right answers each is worth a quarter."""
    assert answer_reward("Rock; Paper", [["rock paper"]]) == 1.0
    assert answer_reward("Rock", [["Rock"], *[["x"]] * 3]) == 0.25


def test_the_reward_of_an_answer():
    """Exact match of one question, 0 or 1; of several their mean; nothing for no answer."""
    assert answer_reward("ulm", ["Bern", "Ulm"]) == 1.0 and answer_reward("Ulm am See", ["Ulm"]) == 0.0
    assert answer_reward("Ulm; Bern", [["Ulm"], ["Basel"]]) == 0.5
    assert answer_reward(None, ["Ulm"]) == 0.0 and answer_reward(None, [["Ulm"], ["Basel"]]) == 0.0


def test_rewards_of_eq_1_and_eq_2():
    """Eq. 1 is 0 or 1 by the box alone; Eq. 2 adds lambda times the mean, and nothing without recall."""
    assert recall_reward(r"so \boxed{Ulm}", "Ulm") == 1.0 and recall_reward("Ulm", "Ulm") == 0.0
    assert trajectory_reward(True, [1.0, 0.0, 0.0, 0.0], 0.5) == 1.125
    assert trajectory_reward(False, [1.0, 1.0], 0.5) == 0.5
    assert trajectory_reward(True, [], 0.5) == 1.0
