"""Rewards of generated text (paper 3.3 and 3.4).

    R^I = 1 if a recall answer matches the entity, else 0                                                (Eq. 1)
    R^E = EM(answer, y) + lambda * mean of the trajectory's R^I                                          (Eq. 2)

An answer is the content of a closed, non-empty `\\boxed{}` that the model generated: sampling stops at the first. Of
several, which only other samplers leave, it is the one that opens last. An answer is right if it matches a gold answer
exactly (EM): if both have the same normal form.
"""

import re
import string
import unicodedata
from functools import lru_cache

from text.latex import unwrap
from text.matching import fold

# ---- Eq. 1 and Eq. 2 -----------------------------------------------------------------------------------


def recall_reward(completion: str, entity: str) -> float:
    """Eq. 1: R^I of one recall answer, 1 on exact match and 0 otherwise."""
    return float(exact_match(boxed(completion), [entity]))


def trajectory_reward(em: float, recall_rewards: list[float], joint_weight: float) -> float:
    """Eq. 2: R^E = EM + lambda * mean(R^I), lambda being `joint_weight`; EM alone without recall rewards."""
    if not recall_rewards:
        return em
    return em + joint_weight * sum(recall_rewards) / len(recall_rewards)


def answer_reward(prediction: str | None, answers: list) -> float:
    """EM of Eq. 2, 0 or 1; for several questions asked as one (MEM1), the mean over them.

    In that case `answers` has a list for each question, and the prediction answers them in order, separated by ";". A
    missing answer is wrong, and so is a last answer followed by more text. With [["Ulm"], ["1879"]], "Ulm; 1879" scores
    1.0, "Ulm" 0.5, "1879; Ulm" 0.0.
    """
    if not answers or isinstance(answers[0], str):
        return float(exact_match(prediction, answers))
    given = unwrap(prediction or "").translate(SEMICOLONS).split(";", len(answers) - 1)
    right = [matches_any(one, golds) for one, golds in zip(given, answers, strict=False)]  # there may be fewer answers
    return sum(right) / len(answers)


# ---- answers in text -----------------------------------------------------------------------------------

SEMICOLONS = str.maketrans("；؛\u037e", ";;;")
# The opening of a box, another brace, or any escaped character: \{ opens nothing.
BRACE = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox|framebox)\s*\{)|\\.|(?P<opens>\{)|(?P<closes>\})", re.DOTALL)


def boxed(text: str) -> str | None:
    """The content of the closed, non-empty \\boxed{} that opens last in `text`, with its braces balanced; or None.

    `boxed(r"so \\boxed{a} or \\boxed{f{x}} \\boxed{} \\boxed{...} \\boxed{un")` is `"f{x}"`. A box that normalises to
    nothing is ignored: models repeat the instruction to use one. \\fbox{} and \\framebox{} count as boxes.
    This runs at every sampled token, so it looks at each brace only once.
    """
    opened, boxes = [], []
    for brace in BRACE.finditer(text):
        if brace.lastgroup in ("box", "opens"):
            opened.append(brace)
        elif brace.lastgroup == "closes" and opened:
            opening = opened.pop()
            if opening.lastgroup == "box":
                boxes.append((opening.start(), opening.end(), brace.start()))
    empty = []  # the spans of empty boxes: \boxed{\boxed{}} is empty, too, as they don't count as content
    for start, inside, end in sorted(boxes, reverse=True):
        parts, place = [], inside
        while empty and empty[-1][0] < end:
            parts.append(text[place : empty[-1][0]])
            place = empty.pop()[1]
        if normalize(unwrap(" ".join([*parts, text[place:end]]))):
            return text[inside:end]
        empty.append((start, end + 1))
    return None


# ---- exact match ---------------------------------------------------------------------------------------


def exact_match(prediction: str | None, answers: list[str]) -> bool:
    """Whether `prediction`, with LaTeX and HTML removed, matches one of `answers`; None never does."""
    return prediction is not None and matches_any(unwrap(prediction), answers)


def matches_any(text: str, answers: list[str]) -> bool:
    """Whether `text` has the same normal form as one of `answers`; an empty normal form matches nothing."""
    form = normalize(text)
    return form != "" and any(normalize(answer) == form for answer in answers)


# ---- the normal form -----------------------------------------------------------------------------------

# No-break, figure, thin and narrow spaces and apostrophes before three digits group thousands, as commas do.
GROUPS = re.compile("(?<=\\d)[\u00a0\u2007\u2009\u202f'’](?=\\d{3}(?!\\d))")
# Plain spaces group a number, or both ends of a range, only at the start of a text without other numbers: 1 500 km^2.
SPACED = re.compile(
    r"(\W*(?:\d{1,3}(?: \d{3})* ?- ?)?[1-9]\d{0,2}(?: \d{3})+)((?:\.\d+)?(?!\d)(?:[^\W\d_]\d+|\^-?\d+|\D)*)"
)
NUMBER = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![.,]?\d)|(?<![\w.,])(\.\d+)(?!\.?\d)")
MARKS = re.compile(
    r"""(?P<kept>
        [^\W\d_]\d*[+\#]+(?!\w)      # C++, C#, Google+, Ca2+
      | \b[^\W\d_]{1,2}\d*-(?!\w)    # O-, AB-; of longer words it is a hyphen or a dash
      | ^[+\#]+$
      | (?<=[\w)\]}])\^-?(?=\d)       # 10^2, but ^14C is 14C
      | (?<!\w)-(?=\d)               # -5, but U-235 has a hyphen
      | (?<=\d)\.(?=\d)
    ) | (?<=\d)(?P<joint>(?:[^\w\s]|_)+)(?=\d) | [^\w\s] | _""",
    re.VERBOSE,
)
ARTICLES = ("a", "an", "the")
INVERTED = re.compile(r"(?<=\w),\s+(?:a|an|the)\W*$")


@lru_cache(maxsize=4096)  # gold answers, and those of a group, recur
def normalize(text: str) -> str:
    """SQuAD's normal form (arXiv 1606.05250): no case, punctuation, articles or extra spaces, with three exceptions.

    Numbers stay distinct: 1,500 is 1500 and .5 is 0.5, but 1.5 isn't 15, 10-15 isn't 1015, 007 isn't 7. Final zeros
    count (3.10 isn't 3.1), but .0 is dropped if the number is grouped or begins the text: 1,500.0 is 1500, and Web 2.0
    isn't Web 2. Signs that end a word with a letter stay: C++ isn't C. A final article stays, as in Hepatitis A, except
    in an inverted name: "Kinks, The". Text is folded first, as in masking.
    """
    text = fold(GROUPS.sub(",", text))[0].strip()
    if not text.replace(" ", "").isalpha():
        text = INVERTED.sub("", _plain_numbers(text))
        text = MARKS.sub(_without_punctuation, text)
    words = text.split()
    return " ".join([word for word in words[:-1] if word not in ARTICLES] + words[-1:])


def _plain_numbers(text: str) -> str:
    """Folded text with each number in one form; ca^2+, so_4 and f^# lose their marks of super- and subscript."""
    if spaced := SPACED.fullmatch(text):
        text = re.sub(r"(?<=\d) (?=\d)", ",", spaced[1]) + spaced[2]
    text = NUMBER.sub(_plain_number, text)
    return re.sub(r"\^(?=\d*[+#-]+(?!\w))|(?<=[^\W\d_])_(?=\d)", "", text)


def _plain_number(number: re.Match) -> str:
    whole, decimals, below_one = number.groups()
    if below_one:
        return f"0{below_one}"
    begins = not re.search(r"\w", number.string[: number.start()])
    if not decimals or decimals.strip(".0") == "" and (begins or "," in whole):
        decimals = ""
    return whole.replace(",", "") + decimals


def _without_punctuation(mark: re.Match) -> str:
    """What is left of a sign: itself if it is part of a name or not punctuation, and "-" between two digits."""
    if mark["kept"]:
        return mark[0]
    no_marks = (c for c in mark[0] if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return "".join(no_marks) or ("-" if mark["joint"] else "")
