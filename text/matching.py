"""Which spans of a text are occurrences of an entity.

Whole words, in any case, Unicode-normalised: "Ulm" occurs twice in "Ulm and ULM, not Ulmer".
"""

import re
import unicodedata
from functools import lru_cache
from itertools import groupby

MASK, TARGET = "[MASK]", "[TARGET]"
Span = tuple[int, int]  # character positions, the end excluded
# Superscripts that make a power: 10², m⁻¹; not the charge of Ca²⁺, nor the 14 of ¹⁴C.
POWER = re.compile(r"(?<=[\w)\]}\u0300-\u036f])(?<![⁰¹²³⁴-⁹⁺⁻])⁻?[⁰¹²³⁴-⁹]+(?![⁰¹²³⁴-⁹⁺⁻])")
# Invisible characters outside Unicode's category Cf: variation selectors and fillers.
IGNORED = re.compile("[\u034f\u115f\u1160\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


class _Alike(dict):
    """A table for str.translate, filled as characters are looked up.

    Dashes and digits of every script become ASCII; zero-width characters, soft hyphens, direction marks and IGNORED
    characters are removed. All others stay.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character) == "Cf" or IGNORED.match(character):
            character = ""
        elif unicodedata.category(character) == "Pd":
            character = "-"
        elif character.isdecimal():
            character = str(unicodedata.decimal(character))
        self[code] = character
        return character


# Signs that don't change a name; the last two are the Arabic thousands separator and the Braille blank.
ALIKE = _Alike(str.maketrans("−⁄∕♯٬\u2800", "-//#, "))
ALIKE |= str.maketrans(dict.fromkeys("’‘‚‛′´ʹʻʼʽʾʿꞌ", "'") | dict.fromkeys("“”„‟″«»‹›", '"'))

INVISIBLE = "\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # the common ones, for use in a pattern
# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, Bopomofo, Han, and their punctuation.
BARE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff"
    "\uaa60-\uaa7f\uf900-\ufaff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
# Their letters that never begin a word (small kana, n, vowels written after), and those that never end one.
NEVER_FIRST = "ぁぃぅぇぉっゃゅょゎんァィゥェォッャュョヮンヵヶะาำๅະາຳ"
NEVER_LAST = "เแโใไເແໂໃໄ\u1039\u17d2"
# 1,500.0, .763, 10^2, 1'500, 1 1/2, and 1 500 000: groups of three digits (folding makes all such spaces plain).
NUMBER = re.compile(
    r"(?=[\d.^])(?:(?<!\w)\d{1,3}(?:(?: \d{3})+(?!\d)| \d\d?/\d\d?(?![\w/]))|(?:\^-?)?\d+|(?<![\w.])\.\d+)"
    r"(?:[.,]\d+|'\d{3}(?!\d))*(?:\^-?\d+)?"
)
# Signs that make the letters before them a different name: C++, Disney+; after one letter (or ab) also C#, O-; after
# one or two m^2, km^2.
SIGN = re.compile(
    r"(?<=[^\W\d_])\+(?:\+|(?!\w))|(?<=\+)\+|(?:(?<=\b[^\W\d_])|(?<=\bab))(?:-(?![\w-])|#(?!\w))"
    r"|(?:(?<=\b[^\W\d_])|(?<=\b[^\W\d_]{2}))\^(?=-?\d)"
)
PARTICLES = re.compile(
    "(?:은|는|이|가|을|를|의|에|에서|에게|에게서|께|께서|한테|와|과|하고|이랑|도|만|로|으로|로서|으로서|로써|으로써|부터|까지|처럼|보다|"
    "마다|조차|마저|밖에|이나|이다|입니다|이며|이고|이었다|였다|이었던|였던|이라는|라는|이라고|라고|뿐만|들|씨"
    r"){1,2}(?!\w)"
)


def fold(text: str) -> tuple[str, range | list[int]]:
    """(`text` in NFKC and caseless, the position in `text` of each folded character and of the end).

    `fold("Ⅳ é")` (the é written as e and an accent) is `("iv é", [0, 0, 1, 2, 4])`. Invisible characters are removed.
    CO₂ becomes co2 and Na⁺ na+, but 10² becomes 10^2 and 1½ becomes 1 1/2, so numbers keep their value.
    """
    return _fold_cached(text) if len(text) < 100_000 else _fold(text)


def _fold(text: str) -> tuple[str, range | list[int]]:
    if text.isascii():
        return text.lower(), range(len(text) + 1)
    folded = text.casefold()
    normal = unicodedata.is_normalized("NFKC", text) and unicodedata.is_normalized("NFKC", folded)
    if normal and len(folded) == len(text):
        folded = folded.translate(ALIKE)
        if len(folded) == len(text):
            return folded, range(len(text) + 1)
    whole, text = text, text.translate(ALIKE)  # before NFKC, which turns ´ into a space and an accent
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
            spelling = unicodedata.decomposition(text[start])
            if spelling.startswith("<super>") and POWER.match(text, start):
                piece = "^" + piece
            elif spelling.startswith("<fraction>"):
                piece = " " + piece
            elif spelling.startswith("<square>") and spelling.endswith(("00B2", "00B3")):  # one character for m²
                piece = f"{piece[:-1]}^{piece[-1]}"
            pieces.append(piece)
            origin += [start] * len(piece)
            start = end
    origin.append(len(text))
    if len(text) < len(whole):
        places = [place for place, character in enumerate(whole) if ALIKE[ord(character)]]
        origin = [places[n] if n < len(places) else len(whole) for n in origin]
    return "".join(pieces).translate(ALIKE), origin


_fold_cached = lru_cache(maxsize=512)(_fold)  # names, passages and chunks are folded many times


def merges(before: str, character: str) -> bool:
    """Whether normalising `before` and the next character together differs from normalising them apart."""
    if character.isascii():
        return False
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", character)
    return unicodedata.combining(character) > 0 or unicodedata.normalize("NFKC", before + character) != apart


def without_spaces(text: str) -> bool:
    """Whether more than half of a text is in scripts written without spaces."""
    return not text.isascii() and 2 * len(BARE.findall(text)) > sum(map(str.isalpha, text))


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether folded text[start:end] is at word boundaries, and not inside a number or a name such as C++ or [MASK].

    A Korean particle may follow, as 's may in English.
    """
    if text[max(0, start - 1) : end + 1].upper() in (MASK, TARGET) or SIGN.match(text, end):
        return False
    if (text[start].isdigit() or text[end - 1].isdigit()) and not _inside_numbers(text).isdisjoint((start, end)):
        return False
    short = end - start == 1  # one character of Han, kana or Thai is not a word between others
    if start and _wordy(text[start - 1]) and joined(text[start - 1], text[start], short):
        return False
    if end == len(text) or not _wordy(text[end]) or not joined(text[end - 1], text[end], short):
        return True
    return _script(text[end - 1]) == "HANGUL" and PARTICLES.match(text, end) is not None


@lru_cache(maxsize=512)
def _inside_numbers(text: str) -> frozenset[int]:
    """The positions in a text that are inside a number."""
    return frozenset(place for number in NUMBER.finditer(text) for place in range(number.start() + 1, number.end()))


def joined(before: str, after: str, short: bool = False) -> bool:
    """Whether no word can end between these two characters, one of which is a letter, mark or digit.

    A word can end where the script changes, and nearly everywhere in scripts without spaces.
    """
    if before.isascii() and after.isascii() or unicodedata.category(after) in ("Lm", "Mc", "Me", "Mn"):
        return True
    one, other, bare = _script(before), _script(after), BARE.match(before) or BARE.match(after)
    if one == other:
        return short or not bare or before in NEVER_LAST or after in NEVER_FIRST
    return not (bare or one and other or "HANGUL" in (one, other))


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    """The first word of a letter's Unicode name: LATIN, HANGUL, CJK; "" for characters of no script or of many."""
    name = "CJK" if character in "ヵヶ" else unicodedata.name(character, "")  # used among Han, as in 関ヶ原
    script = re.match(r"\w*", name)[0].replace("IDEOGRAPHIC", "CJK")
    return script if unicodedata.category(character)[0] in "LM" and script not in ("COMBINING", "MODIFIER") else ""


def _wordy(character: str) -> bool:
    """Whether it is a letter, a digit, an underscore, or a mark that combines with the letter before it."""
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


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
        if is_whole(folded, start, end) and not text.startswith(("⁺", "⁻"), origin[end]):
            place = end
            while origin[end] == origin[end - 1]:  # half of one character, as the 1 in ½: mask the whole character
                end += 1
            first, last = origin[start], origin[end]
            while unicodedata.category(text[last - 1]) == "Cf":  # invisible characters after a form aren't part of it
                last -= 1
            if not found or first >= found[-1][1]:
                found.append((first, last))
    return found


@lru_cache(maxsize=4096)
def name_words(entity: str) -> list[str]:
    """The giveaway words of a name: parts from which the whole can be guessed.

    Words of four letters or more, capitalised or in a script without case; katakana of two letters or more; of a Han or
    Hangul word the first two and the last two characters: "東京大学" gives 東京 and 大学.
    """
    name = "".join(c for c in unicodedata.normalize("NFKC", entity) if ALIKE[ord(c)])
    found = []
    for script, run in groupby(name, _script):
        word = "".join(run)
        if script in ("CJK", "HANGUL") and len(word) > 1:
            found += dict.fromkeys((word[:2], word[-2:]))
        elif script and len(word) >= _telling(script) and word[0] == word[0].title():
            found.append(word)
    return found


def _telling(script: str) -> int:
    """How many letters a word in this script needs to give a name away."""
    return 2 if script in ("CJK", "HANGUL", "KATAKANA") else 4


@lru_cache(maxsize=65536)
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", fold(name)[0]))


def _initials(name: str) -> str:
    return "".join(word[0] for word in re.findall(r"\w{2,}", name) if word[0].isupper())


def may_be_same_entity(one: str, other: str) -> bool:
    """Whether two names may mean one entity: one is part or initials of the other, or they share a long word."""
    shared = _words(one) & _words(other)
    if shared or not (one.isascii() or other.isascii()):  # in scripts without spaces, a part isn't a separate word
        long = any(len(word) >= _telling(_script(word[0])) and word.isalpha() for word in shared)
        if long or occurrences(one, other) or occurrences(other, one):
            return True
    return not shared and (one.replace(".", "") == _initials(other) or other.replace(".", "") == _initials(one))
