"""Removes LaTeX and HTML from an answer, leaving its text."""

import html
import re
import unicodedata
from html.entities import html5

THIN_SPACE = "\u2009"
# What follows an accent's backslash -> its combining character.
ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "d": "\u0323", "c": "\u0327", "k": "\u0328",
    "b": "\u0331", "grave": "\u0300", "acute": "\u0301", "hat": "\u0302", "tilde": "\u0303", "bar": "\u0304",
    "breve": "\u0306", "dot": "\u0307", "ddot": "\u0308", "mathring": "\u030a", "check": "\u030c",
}
# Commands for a character, Greek letters first. Other commands without an argument are looked up among HTML's character
# names, as \times, or dropped.
CHARACTERS = {name[:-1]: letter for name, letter in html5.items() if name[-1] == ";" and "Α" <= letter[0] <= "ϵ"}
CHARACTERS |= {
    "ss": "ß", "SS": "SS", "o": "ø", "O": "Ø", "aa": "å", "AA": "Å", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ",
    "l": "ł", "L": "Ł", "i": "ı", "j": "ȷ", "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "dj": "đ", "DJ": "Đ",
    "ng": "ŋ", "NG": "Ŋ", "circ": "°", "degree": "°", "textdegree": "°", "cdot": "·", "infty": "∞", "euro": "€",
    "texteuro": "€", "pounds": "£", "textsterling": "£", "copyright": "©", "textcopyright": "©", "textregistered": "®",
    "texttrademark": "™", "to": "→", "neq": "≠", "sim": "~", "textendash": "–", "textemdash": "—",
    "thinspace": THIN_SPACE, "sc": "", "it": "", "therefore": "",
} | dict.fromkeys(
    "quad qquad enspace enskip space nobreakspace medspace thickspace newline linebreak par hfill".split(), " "
)
# What a backslash and a sign mean; those not listed mean nothing: \! \( \] \- \{.
SIGNS = {"~": " ", "\\,": THIN_SPACE}
SIGNS |= {f"\\{sign}": " " for sign in "\\:;> \n\t"} | {f"\\{sign}": sign for sign in "%$&#_"}
# Commands whose first argument is not text; for some, and at the start of a table, neither is the second.
NO_TEXT = set(
    "color textcolor colorbox pagecolor href hyperlink hypertarget phantom hphantom vphantom label begin end parbox "
    "raisebox scalebox rotatebox tag ref eqref pageref cite citep citet footnote includegraphics index".split()
)
TWICE_NO_TEXT = {"fcolorbox", "rule", "fontsize", "resizebox"}
TABLES = {"array", "tabular", "longtable", "minipage"}
DEEPEST = 50  # rounds: content nested deeper only loses its braces

# Quotes escaped as in a string: \"Emma\", \'Emma\'; apostrophes of Emma\'s, don\'t, O\'Neill.
QUOTED = re.compile(r"""\\(?<!\w\\)(['"])((?:(?!\\\1).)*)\\\1(?![\w\\{])""", re.DOTALL)
APOSTROPHE = re.compile(r"\\'(?<=[\w}]..)(?=(?:[sdmt]|re|ll|ve)(?![\w\\{])|[A-Z][a-z])")
TOKEN = re.compile(
    r"""\\(?: (?P<space>[hvm]space\*?\s*\{[^{}]*\}|(?:[hvm]skip|m?kern)\s*-?[\d.]+\s*[a-z]{2})
            | (?P<name>[a-zA-Z]+)\*?(?:\{\}|\s*)
            | [^a-zA-Z`'^"~=.] )
      | [$~](?<!\\.)""",
    re.VERBOSE,
)
ACCENT = re.compile(
    rf"""\\(?:([`'^"~=.])|({'|'.join(name for name in ACCENTS if name.isalpha())})(?![a-zA-Z])\s*)"""
    r"(?:\s*\{\s*([^\W\d_])\s*\}|([^\W\d_]))"
)
FRACTION = re.compile(r"\\(?:[dtcs]|nice)?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
GROUP = re.compile(
    r"\\(?!(?:[dtcs]|nice)?frac)([a-zA-Z]+)\*?\s*(?:\[[^\[\]{}]*\]\s*)?\{([^{}]*)\}|\{(?<![a-zA-Z}\]].)([^{}]*)\}"
)
COMMAND = re.compile(r"\\([a-zA-Z]+)\*?\s*|\\.|[{}]", re.DOTALL)
TAG = re.compile(
    r"<(/?)(br|p|div|li|sup|sub|b|i|u|em|strong|span|small|font|code)(?:\s[^<>=]*=[^<>]*)?\s*/?>", re.IGNORECASE
)


def unwrap(text: str) -> str:
    r"""`text` without its LaTeX, then without HTML's tags and escapes.

    A command becomes its content, an accent the accented letter, a spacing command a space:
    `unwrap(r"$\text{Z\"urich}$,~1{,}500 \& \frac{1}{2}")` is "Zürich, 1,500 & 1/2".
    """
    if any(sign in text for sign in "\\$~{}"):
        text = QUOTED.sub(r"\1\2\1", text)
        text = APOSTROPHE.sub("'", text)
        text = TOKEN.sub(_token, text)
        for _ in range(DEEPEST):  # from the inside out
            before = text
            text = ACCENT.sub(_accented, text)
            text = FRACTION.sub(_fraction, text)
            text = GROUP.sub(_content, text)
            if text == before or "\\" not in text:
                break
        text = COMMAND.sub(_left_over, text)
    if "<" in text:
        text = TAG.sub(_tag, text)
    return html.unescape(text)


def _token(found: re.Match) -> str:
    """The replacement of a sign, a space or a command without an argument; a command with one is left unchanged."""
    whole, name = found[0], found["name"]
    if found["space"]:
        return " "
    if name is None:
        return SIGNS.get(whole, "")
    before, after = found.string[found.start() - 1 : found.start()], found.string[found.end() : found.end() + 1]
    has_argument = after in ("{", "[") and name not in CHARACTERS and not whole.endswith("{}")
    if has_argument or name in ACCENTS or name.endswith("frac"):
        return whole
    character = CHARACTERS.get(name, html5.get(f"{name};", ""))
    between_spaces = before.isspace() and whole[-1].isspace()
    return character + " " * (between_spaces and unicodedata.category(character[:1] or " ") == "Sm")  # 3 \times 5


def _accented(found: re.Match) -> str:
    """The letter with its accent; if no such letter exists, as for \\'B, it is an escaped quote."""
    accent, letter = found[1] or found[2], found[3] or found[4]
    accented = unicodedata.normalize("NFC", {"ı": "i", "ȷ": "j"}.get(letter, letter) + ACCENTS[accent])
    return accent + letter if len(accented) > 1 and found[4] and accent in "'\"" else accented


def _fraction(found: re.Match) -> str:
    """1/2, with a space before it after a digit: 1 1/2 is not 11/2."""
    above, below = (part for part in found.groups() if part is not None)
    before = found.string[found.start() - 1 : found.start()]
    return f"{' ' if before.isdecimal() else ''}{above}/{below}"


def _content(found: re.Match) -> str:
    """What is left of a command with an argument, or of a group without a command."""
    command, argument, group = found.groups()
    if command is None:
        return group
    if command in TWICE_NO_TEXT or command == "begin" and argument in TABLES:
        return "\\color "  # which drops the next argument
    if command in NO_TEXT or not argument.strip() and command == "sqrt":
        return ""
    return {"sqrt": "√", "textsuperscript": "^"}.get(command, "") + argument


def _left_over(found: re.Match) -> str:
    sign = found[0][1:]
    return sign if sign in ("'", '"') else html5.get(f"{found[1]};", "")


def _tag(found: re.Match) -> str:
    closing, name = found[1], found[2].lower()
    if name == "sup" and not closing:
        return "^"
    return " " if name in ("br", "p", "div", "li") else ""
