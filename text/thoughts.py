"""Separates a model's text from its thoughts, which are in tags, or in channels as gpt-oss writes them.

A model may think even with thinking switched off, or its template may open a thought. Only the text after the last
closed thought is a memory, an answer or a search.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

# think, reasoning, chain_of_thought, seed:think, longcat_think, reasoning_content, ...
_NAME = r"(?:\w+[:_])?(?:think(?:ing)?|reasoning|monologue)(?:_content)?"
# Words that other tags may use, too: they open a thought only at the start of a text.
_WORD = r"(?:\w+[:_])?(?:thoughts?|reason|reflection|scratch_?pad|analysis)"
_BOTH = f"(?:{_NAME}|{_WORD})"
OPENING = re.compile(
    rf"(?i:<\s*{_NAME}\s*>|<\|(?:(?:start|begin)_(?:of_)?)?{_BOTH}(?:_start)?\|>)"
    r"|\[(?:THINK|REASON)(?:ING)?\]|◁think▷|<\|inner_prefix\|>|<\|channel>thought|<unused94>"
)
FIRST = re.compile(rf"(?i:\s*<\s*{_WORD}\s*>)")
CLOSING = re.compile(
    rf"(?i:<\s*/\s*{_BOTH}\s*>|<\|(?:/|end_(?:of_)?){_BOTH}\|>|<\|{_BOTH}_end\|>)"
    r"|\[/(?:THINK|REASON)(?:ING)?\]|◁/think▷|<\|inner_suffix\|>|<channel\|>|<unused95>"
)
# Tags that some models put around their text.
WRAPPED = re.compile(r"(?s)\s*<(answer|response|output)>((?:(?!</\1>).)*)(?:</\1>\s*)?")
CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")
FINAL = re.compile(r"(?s)<\|channel\|>\s*final\b.*?<\|message\|>(.*?)(?=<\|(?:end|start|return|channel|call)\|>|\Z)")
OTHER_CHANNEL = re.compile(r"<\|channel\|>\s*(?!final\b)\w+[^<]*<\|message\|>\s*\Z")


def said(text: str, opened: bool = False) -> tuple[str, bool]:
    """(the text after the last thought in `text`, whether there is a thought). `opened`: `text` begins inside one.

    An unclosed thought leaves no text: `said("<think>Rome? No</think> Ulm")` is `(" Ulm", True)`, and
    `said("<think>Rome?")` is `("", True)`. With channels, it is the text of the last one called final.
    """
    if CHANNELS[0] in text:
        finals = FINAL.findall(text)
        return finals[-1] if finals else "", True
    closed = _closed(text)
    if OPENING.search(text, closed) or FIRST.match(text, closed) or opened and not closed:
        return "", True
    if not closed:
        return text, False
    wrapped = WRAPPED.fullmatch(text, closed)
    return (wrapped[2] if wrapped else text[closed:]), True


def opens_thought(text: str) -> bool:
    """Whether `text`, the template's text before a completion, ends inside a thought."""
    opening = list(OPENING.finditer(text, _closed(text)))
    return bool(OTHER_CHANNEL.search(text) or opening and not text[opening[-1].end() :].strip())


def _closed(text: str) -> int:
    """The position after the last closed thought in `text`; 0 if there is none."""
    return max((mark.end() for mark in CLOSING.finditer(text)), default=0)


@lru_cache(maxsize=4)
def special_marks(tokenizer) -> dict[int, str]:
    """The special tokens around thoughts and channels, by id: decoding would drop them like other special tokens."""
    tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    channels = CHANNELS if CHANNELS[0] in tokens.values() else ()

    def is_mark(token: str) -> bool:
        forms = (OPENING.fullmatch, FIRST.fullmatch, CLOSING.fullmatch)
        return token in channels or token == "<|channel>" or any(form(token) for form in forms)

    return {i: token for i, token in tokens.items() if is_mark(token)}


def decode_with_marks(tokenizer, ids: list[int]) -> str:
    """The text of a completion without special tokens, except those that mark thoughts and channels."""
    marks = special_marks(tokenizer)
    cuts = [n for n, i in enumerate(ids) if i in marks]
    if not cuts:
        return tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(ids[: cuts[0]], skip_special_tokens=True)
    for start, end in pairwise([*cuts, len(ids)]):
        text += marks[ids[start]] + tokenizer.decode(ids[start + 1 : end], skip_special_tokens=True)
    return text


def listener(tokenizer, ends: list[int], opened: bool) -> Callable[[list[int]], tuple[str, bool]]:
    """A function: token ids of a completion -> (its text, whether it has a thought). `ends` are the end tokens' ids."""
    def hear(ids: list[int]) -> tuple[str, bool]:
        spoken = ids[:-1] if ids and ids[-1] in ends else ids  # an end marker need not be a special token
        return said(decode_with_marks(tokenizer, spoken), opened)

    return hear
