"""rewards.py: the answer in a box, exact match, Eq. 1 and Eq. 2."""

import json
import random
import re
import string
from pathlib import Path

import pytest

from rewards import boxed, exact_match, normalize, recall_reward, trajectory_reward

SHARED = Path(__file__).parents[2] / "shared/data"


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{Paris}", "Paris"),
        (r"first \boxed{Paris}, no: \boxed{Rome}", "Rome"),
        (r"\boxed{f{x}{y}}", "f{x}{y}"),
        (r"\boxed{Rome} and \boxed{never closed", "Rome"),
        (r"\boxed{outer \boxed{inner", None),
        (r"\boxed{}", ""),
        ("Paris", None),
        (r"\boxed Paris", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, content):
    """Nested braces stay inside, an unclosed box is passed over, no box is None and not an empty answer."""
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
                    return inside
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
    ],
)
def test_exact_match(prediction, gold, match):
    """SQuAD's normalisation on both sides, and numbers agree as numbers."""
    assert exact_match(prediction, [gold]) is match


def test_any_of_several_answers():
    """One of the gold answers is enough, and none of none is."""
    assert exact_match("NYC", ["New York", "NYC"]) and not exact_match("NYC", [])


def test_normalisation_against_a_written_out_squad_scorer():
    """On the gold answers of real question sets, against the steps of SQuAD's script written out one by one."""
    path = SHARED / "qa/nq_open_dev_3610.jsonl"
    if not path.exists():
        pytest.skip("needs the shared question sets, which are not here")
    for line in path.read_text().splitlines():
        for answer in json.loads(line)["answer"]:
            words = []
            for word in "".join("" if c in set(string.punctuation) else c for c in answer.lower()).split():
                if word not in {"a", "an", "the"}:
                    words.append(word)
            if re.search(r"[^\x00-\x7f]", answer):
                continue  # re's \b and white-space splitting differ on exotic characters
            assert normalize(answer) == " ".join(words)
            assert exact_match(answer, [answer]) is bool(words)


def test_rewards_of_eq_1_and_eq_2():
    """Eq. 1 is 0 or 1 by the box alone; Eq. 2 adds lambda times the mean, and nothing without recall."""
    assert recall_reward(r"so \boxed{Ulm}", "Ulm") == 1.0 and recall_reward("Ulm", "Ulm") == 0.0
    assert trajectory_reward(True, [1.0, 0.0, 0.0, 0.0], 0.5) == 1.125
    assert trajectory_reward(False, [1.0, 1.0], 0.5) == 0.5
    assert trajectory_reward(True, [], 0.5) == 1.0
