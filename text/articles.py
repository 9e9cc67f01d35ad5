"""The text of an encyclopedia article: where it ends, and how it is split."""

import re

from text.chunking import CLOSING, SENTENCE_ENDS

# A heading after which the article's own text has ended, alone on a line; also "Notes and references", "== Notes =="
# and KILT's "Section::::Notes.".
_LAST = (
    "(?:see also|references|(?:foot|end)?notes|citations|works cited|sources|bibliography|further reading|external "
    "links)"
)
LAST_SECTION = re.compile(rf"[\W\d_]*(?:section\W+)?{_LAST}(?:\W+(?:and\W+)?{_LAST})*[\W_]*", re.IGNORECASE)
MEANINGS = re.compile(r".*\b(?:may|can|could|might)\s+(?:\w+\s+){0,2}refer\s+to(?:\b[^.]*)?:", re.IGNORECASE)


def lines_of(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def is_disambiguation(title: str, text: str) -> bool:
    """Whether an article lists the meanings of a name, with "Ulm may refer to:" in its first three lines."""
    return title.endswith("(disambiguation)") or any(
        line.endswith(":") and MEANINGS.fullmatch(line) for line in lines_of(text)[:3]
    )


def without_references(text: str) -> str:
    """`text` up to the first heading of references and the like, but at least its first line."""
    lines = lines_of(text)
    last = (n for n, line in enumerate(lines) if n and len(line) < 100 and LAST_SECTION.fullmatch(line))
    return "\n".join(lines[: next(last, None)])


def split_paragraphs(text: str, words: int) -> list[str]:
    """`text` in pieces of about `words` words, cut only at line breaks; a heading stays with the text below it."""
    pieces, size, few = [], 0, words // 8  # a line of at most `few` words may be a heading
    for paragraph in lines_of(text):
        length = count_words([paragraph])
        if not pieces or (size + length > words and size > few):
            pieces.append(take_headings(pieces[-1], few) if pieces else [])
            size = count_words(pieces[-1])
        pieces[-1].append(paragraph)
        size += length
    return ["\n".join(piece) for piece in pieces]


def take_headings(piece: list[str], few: int) -> list[str]:
    """Remove and return the last lines of `piece` that don't end a sentence, at most `few` words in all."""
    n = len(piece)
    while n and count_words(piece[n - 1 :]) <= few and not piece[n - 1].rstrip(CLOSING).endswith(SENTENCE_ENDS):
        n -= 1
    headings = piece[n:]
    del piece[n:]
    return headings


def count_words(lines: list[str]) -> int:
    return sum(len(line.split()) for line in lines)
