"""LaTeX and HTML taken off an answer, so that its text is left."""

import html
import re
import unicodedata
from html.entities import html5

THIN_SPACE = "\u2009"
# What stands behind an accent's backslash -> its combining character.
ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "d": "\u0323", "c": "\u0327", "k": "\u0328",
    "b": "\u0331", "grave": "\u0300", "acute": "\u0301", "hat": "\u0302", "tilde": "\u0303", "bar": "\u0304",
    "breve": "\u0306", "dot": "\u0307", "ddot": "\u0308", "mathring": "\u030a", "check": "\u030c",
}
# Commands that stand for a character. Others have the name that HTML gives the character, as \alpha, or are dropped.
CHARACTERS = {
    "ss": "ß", "SS": "SS", "o": "ø", "O": "Ø", "aa": "å", "AA": "Å", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ",
    "l": "ł", "L": "Ł", "i": "ı", "j": "ȷ", "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "dj": "đ", "DJ": "Đ",
    "ng": "ŋ", "NG": "Ŋ", "circ": "°", "degree": "°", "textdegree": "°", "cdot": "·", "infty": "∞", "euro": "€",
    "texteuro": "€", "pounds": "£", "textendash": "–", "textemdash": "—", "sc": "", "it": "",
    "thinspace": THIN_SPACE,
} | dict.fromkeys(
    "quad qquad enspace enskip space nobreakspace medspace thickspace newline linebreak par hfill hskip".split(), " "
)
# What a backslash and a sign stand for; nothing where they aren't listed: \! \( \] \- \{.
SIGNS = {"~": " ", "\\,": THIN_SPACE}
SIGNS |= {f"\\{sign}": " " for sign in "\\:;> \n\t"} | {f"\\{sign}": sign for sign in "%$&#_"}
# Commands whose first argument is not text.
NO_TEXT = set("color textcolor colorbox href hspace vspace phantom hphantom vphantom label begin end".split())

SIGN = re.compile(r"""\\[^a-zA-Z`'^"~=.]|(?<!\\)[$~]""")
CHARACTER = re.compile(rf"\\({'|'.join(CHARACTERS)})(?![a-zA-Z])(?:\{{\}}|\s+)?")
ACCENT = re.compile(
    rf"""\\([`'^"~=.]|(?:{'|'.join(name for name in ACCENTS if name.isalpha())})(?![a-zA-Z]))"""
    r"\s*(?:\{\s*(\w)\s*\}|(\w))"
)
FRACTION = re.compile(r"(?<=(\d))?\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
GROUP = re.compile(r"\\(?![dtc]?frac)([a-zA-Z]+)\*?\s*(?:\[[^\[\]{}]*\])?\s*\{([^{}]*)\}|(?<![a-zA-Z}\]])\{([^{}]*)\}")
COMMAND = re.compile(r"\\([a-zA-Z]+)\*?\s*|\\.|[{}]", re.DOTALL)


def unwrap(text: str) -> str:
    r"""`text` without its LaTeX, then without HTML's escapes.

    A command gives way to its content, an accent to the letter that has it, a spacing command to a space:
    `unwrap(r"$\text{Z\"urich}$,~1{,}500 \& \frac{1}{2}")` is "Zürich, 1,500 & 1/2".
    """
    if any(sign in text for sign in "\\$~{}"):
        text = SIGN.sub(lambda found: SIGNS.get(found[0], ""), text)
        text = CHARACTER.sub(lambda found: CHARACTERS[found[1]], text)
        before = None
        while before != text:  # from the inside out
            before = text
            text = ACCENT.sub(_accented, text)
            text = FRACTION.sub(_fraction, text)
            text = GROUP.sub(_content, text)
        text = COMMAND.sub(lambda found: html5.get(f"{found[1]};", ""), text)
    return html.unescape(text)


def _accented(found: re.Match) -> str:
    letter = found[2] or found[3]
    return unicodedata.normalize("NFC", {"ı": "i", "ȷ": "j"}.get(letter, letter) + ACCENTS[found[1]])


def _fraction(found: re.Match) -> str:
    """1/2; behind a digit with a space before it, since a whole number and a half are not eleven halves."""
    digit_before, *parts = found.groups()
    above, below = (part for part in parts if part is not None)
    return f"{' ' if digit_before else ''}{above}/{below}"


def _content(found: re.Match) -> str:
    """What a command with an argument, or a group without a command, leaves."""
    command, argument, group = found.groups()
    if command is None:
        return group
    if command in NO_TEXT:
        return ""
    return {"sqrt": "√", "textsuperscript": "^"}.get(command, "") + argument
