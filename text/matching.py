"""Which spans of a text are occurrences of an entity.

Whole words, in any case, Unicode-normalised: "Ulm" occurs twice in "Ulm and ULM, not Ulmer".
"""

import re
import unicodedata
from functools import lru_cache

MASK, TARGET = "[MASK]", "[TARGET]"
Span = tuple[int, int]  # character positions, the end excluded
# Curly quotes, dashes and the minus sign make no other name. One for one, so places stay.
ALIKE = str.maketrans(dict.fromkeys("’‘‚′", "'") | dict.fromkeys("“”„″«»", '"') | dict.fromkeys("‐‑‒–—−", "-"))


def fold(text: str) -> tuple[str, range | list[int]]:
    """(`text` in NFKC and caseless; the place in `text` of each folded character, and of the end).

    `fold("Ⅳ é")` (the é written as e and an accent) is `("iv é", [0, 0, 1, 2, 4])`.
    """
    return _fold_cached(text) if len(text) < 100_000 else _fold(text)


def _fold(text: str) -> tuple[str, range | list[int]]:
    folded = text.casefold()
    normal = unicodedata.is_normalized("NFKC", text) and unicodedata.is_normalized("NFKC", folded)
    if normal and len(folded) == len(text):
        return folded.translate(ALIKE), range(len(text) + 1)
    pieces, origin = [], []
    for run in re.finditer(r"[\x00-\x7f]+(?=[\x00-\x7f]|\Z)|[\x00-\x7f]?[^\x00-\x7f]+", text):
        if run[0].isascii():
            pieces.append(run[0].lower())
            origin += range(*run.span())
            continue
        start = run.start()
        for end in range(start + 1, run.end() + 1):
            if end < run.end() and merges(text[start:end], text[end]):
                continue
            piece = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[start:end]).casefold())
            pieces.append(piece)
            origin += [start] * len(piece)
            start = end
    return "".join(pieces).translate(ALIKE), [*origin, len(text)]


_fold_cached = lru_cache(maxsize=512)(_fold)  # names, passages and chunks are looked at many times


def merges(before: str, character: str) -> bool:
    """Whether normalising `before` and the next character together differs from normalising them apart."""
    if character.isascii():
        return False
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", character)
    return unicodedata.combining(character) > 0 or unicodedata.normalize("NFKC", before + character) != apart


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] has no word character beside it; 5 is not in 5.2 nor in 1,500, nor MASK in [MASK]."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    if _wordy(before[-1:]) or _wordy(after[:1]) or text[max(0, start - 1) : end + 1].upper() in (MASK, TARGET):
        return False
    number_before = re.fullmatch(r"\d[.,]", before) and text[start].isdigit()
    number_after = re.fullmatch(r"[.,]\d", after) and text[end - 1].isdigit()
    return not (number_before or number_after)


def _wordy(character: str) -> bool:
    """A letter, a digit, an underscore, or a mark that combines with the letter before it."""
    return character.isalnum() or character == "_" or character != "" and unicodedata.category(character)[0] == "M"


@lru_cache(maxsize=4096)
def _form(entity: str) -> re.Pattern:
    return re.compile(r"\s+".join(re.escape(word) for word in fold(entity)[0].split()))


def occurrences(text: str, entity: str) -> list[Span]:
    """Every form of `entity` in `text`: whole words, NFKC, any case, any white space between its words."""
    folded, origin = fold(text)
    found, place = [], 0
    # A name that folds to nothing has an empty pattern, and occurs nowhere.
    while _form(entity).pattern and (match := _form(entity).search(folded, place)):
        start, end = match.span()
        place = start + 1
        if is_whole(folded, start, end):
            place = end
            while origin[end] == origin[end - 1]:  # half of one character, as 1 in ½: masked with all of it
                end += 1
            if not found or origin[start] >= found[-1][1]:
                found.append((origin[start], origin[end]))
    return found


def name_words(entity: str) -> list[str]:
    """The words of a name that would give it away: capitalised, of four letters or more."""
    return [word for word in re.findall(r"[^\W\d_]{4,}", unicodedata.normalize("NFKC", entity)) if word[0].isupper()]


@lru_cache(maxsize=65536)
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", fold(name)[0]))


def _initials(name: str) -> str:
    return "".join(word[0] for word in re.findall(r"\w{2,}", name) if word[0].isupper())


def may_be_same_entity(one: str, other: str) -> bool:
    """Whether two names may mean the same: one is a part of the other or its initials, or they share a long word."""
    if shared := _words(one) & _words(other):
        long = any(len(word) >= 4 and word.isalpha() for word in shared)
        return bool(long or occurrences(one, other) or occurrences(other, one))
    return one.replace(".", "") == _initials(other) or other.replace(".", "") == _initials(one)
