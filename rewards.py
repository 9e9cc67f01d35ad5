"""Rewards of generated text (paper 3.3 and 3.4).

    R^I = 1 if a recall answer matches the entity, else 0                                                (Eq. 1)
    R^E = EM(answer, y) + lambda * mean of the trajectory's R^I                                          (Eq. 2)

An answer is the content of the last closed `\\boxed{}` that the model generated and that is not empty; sampling stops
at the first such box, so text after it counts only where a server sampled on. It is right when it matches a gold answer
exactly (EM), after SQuAD's normalisation and the folding that masking uses. Two numbers are compared by value: 1.5 is
not 15, though both normalise to "15"; 1,500.0 is 1500. In longer answers the numbers must agree, too.
"""

import re
import string
from decimal import Decimal

from text.matching import fold

# A minus that doesn't follow a word, digits with or without thousands separators, decimals.
NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:,\d{3})*(?:\.\d+)?")
SCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u2080-\u2089]+")  # superscripts and subscripts
WRAPPER = re.compile(r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|emph)\s*\{([^{}]*)\}")
BOX = "\\boxed{"


# ---- Eq. 1 and Eq. 2 -----------------------------------------------------------------------------------


def recall_reward(completion: str, entity: str) -> float:
    """Eq. 1: R^I of one recall answer, 1 on exact match and 0 otherwise."""
    return float(exact_match(boxed(completion), [entity]))


def trajectory_reward(em: float, recall_rewards: list[float], joint_weight: float) -> float:
    """Eq. 2: R^E = EM + lambda * mean(R^I); EM alone where the trajectory has no recall."""
    if not recall_rewards:
        return em
    return em + joint_weight * sum(recall_rewards) / len(recall_rewards)


def answer_reward(prediction: str | None, answers: list) -> float:
    """EM of Eq. 2, 0 or 1; of several questions asked as one (MEM1), the mean over them.

    Then `answers` has a list for each question, and the prediction answers them in their order, with ";" between. A
    missing answer is wrong, and so is a last answer with more behind it. For [["Ulm"], ["1879"]]: "Ulm; 1879" scores
    1.0, "Ulm" 0.5, "1879; Ulm" 0.0.
    """
    if not answers or isinstance(answers[0], str):
        return float(exact_match(prediction, answers))
    given = (prediction or "").split(";", len(answers) - 1)
    right = [exact_match(one, golds) for one, golds in zip(given, answers, strict=False)]  # fewer may be given
    return sum(right) / len(answers)


# ---- answers out of text -------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{} in `text` that is closed and not empty, braces inside it balanced; or None.

    `boxed(r"so \\boxed{a} or \\boxed{f{x}} \\boxed{} \\boxed{un")` is `"f{x}"`. An empty box doesn't count: models
    repeat the instruction to use one.
    """
    start = text.rfind(BOX)
    while start >= 0:
        depth = 0
        for position in range(start + len(BOX) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                break
        content = text[start + len(BOX) : position]
        if depth == 0 and unwrap(content).strip():
            return content
        start = text.rfind(BOX, 0, start)
    return None


def unwrap(prediction: str) -> str:
    r"""A prediction without the LaTeX around it: `unwrap(r"$\text{Paris}$, 1{,}500")` is "Paris, 1,500"."""
    text = prediction.replace("{,}", ",").replace("$", "")
    while (plain := WRAPPER.sub(r"\1", text)) != text:  # wrappers nest
        text = plain
    return text


# ---- exact match ---------------------------------------------------------------------------------------


def exact_match(prediction: str | None, answers: list[str]) -> bool:
    """True if `prediction` matches one of `answers`; None and answers that normalise to nothing never match."""
    return prediction is not None and any(matches(unwrap(prediction), answer) for answer in answers)


def matches(prediction: str, answer: str) -> bool:
    """Whether two texts name the same: two numbers by their value, others by their words and the numbers in them."""
    if numbers(prediction) != numbers(answer):
        return False
    if all(NUMBER.fullmatch(folded(text).strip()) for text in (prediction, answer)):
        return True
    return normalize(prediction) == normalize(answer) != ""


def folded(text: str) -> str:
    """As masking folds, but superscripts and subscripts are no part of the number before them: 10\u00b2 is not 102."""
    return fold(SCRIPTS.sub(r" \g<0>", text))[0]


def normalize(text: str) -> str:
    """Folded as in masking, then SQuAD's normalisation (arXiv 1606.05250).

    No case, no punctuation, no a/an/the, white space as one space; NFKC, and one kind of quotes and dashes.
    """
    text = "".join(c for c in folded(text) if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def numbers(text: str) -> list[Decimal]:
    """Every number written in digits, in order: "-1,500.0 and 7" gives [-1500.0, 7]."""
    return [Decimal(number.replace(",", "")) for number in NUMBER.findall(folded(text))]
