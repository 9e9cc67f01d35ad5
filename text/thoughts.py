"""What a model said, apart from what it thought: thoughts stand in tags, or in channels as gpt-oss writes them.

A model thinks although its template is asked not to, or the template itself opens a thought. Only what follows the last
closed thought is a memory, an answer or a search.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

_WORD = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad)"
OPENING = re.compile(
    rf"(?i:<\s*(?:\w+:)?{_WORD}\s*>|<\|(?:(?:start|begin)_(?:of_)?)?{_WORD}(?:_start)?\|>)"
    r"|\[THINK\]|◁think▷|<\|inner_prefix\|>|<\|channel>"
)
CLOSING = re.compile(
    rf"(?i:<\s*/\s*(?:\w+:)?{_WORD}\s*>|<\|(?:/|end_(?:of_)?){_WORD}\|>|<\|{_WORD}_end\|>)"
    r"|\[/THINK\]|◁/think▷|<\|inner_suffix\|>|<channel\|>"
)
FINAL = re.compile(r"(?s)<\|channel\|>\s*final\b.*?<\|message\|>(.*?)(?=<\|(?:end|start|return|channel|call)\|>|\Z)")
CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")


def said(text: str, opened: bool = False) -> tuple[str, bool]:
    """(what follows the last thought in `text`, whether there is a thought). `opened`: the text begins inside one.

    Nothing is said before the thought is closed: `said("<think>Rome? No</think> Ulm")` is `(" Ulm", True)`, and
    `said("<think>Rome?")` is `("", True)`. Of channels the last one called final is what is said.
    """
    if CHANNELS[0] in text:
        finals = FINAL.findall(text)
        return finals[-1] if finals else "", True
    closed = max((mark.end() for mark in CLOSING.finditer(text)), default=0)
    if OPENING.search(text, closed) or opened and not closed:
        return "", True
    return text[closed:], closed > 0


def opens_thought(text: str) -> bool:
    """Whether `text`, what a template puts before a completion, leaves a thought open."""
    return said(text) == ("", True) and CHANNELS[0] not in text


@lru_cache(maxsize=4)
def special_marks(tokenizer) -> dict[int, str]:
    """The special tokens around thoughts and channels, by id: decoding would drop them with the other special ones."""
    tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    channels = CHANNELS if CHANNELS[0] in tokens.values() else ()

    def is_mark(token: str) -> bool:
        return token in channels or bool(OPENING.fullmatch(token) or CLOSING.fullmatch(token))

    return {i: token for i, token in tokens.items() if is_mark(token)}


def decode_with_marks(tokenizer, ids: list[int]) -> str:
    """The text of a completion without special tokens, but for the marks of thoughts and channels."""
    marks = special_marks(tokenizer)
    cuts = [n for n, i in enumerate(ids) if i in marks]
    if not cuts:
        return tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(ids[: cuts[0]], skip_special_tokens=True)
    for start, end in pairwise([*cuts, len(ids)]):
        text += marks[ids[start]] + tokenizer.decode(ids[start + 1 : end], skip_special_tokens=True)
    return text


def listener(tokenizer, ends: list[int], opened: bool) -> Callable[[list[int]], tuple[str, bool]]:
    """hear(token ids of a completion) -> (what it said, whether it thought). `ends` are the ids that end one."""
    def hear(ids: list[int]) -> tuple[str, bool]:
        spoken = ids[:-1] if ids and ids[-1] in ends else ids  # an end marker need not be a special token
        return said(decode_with_marks(tokenizer, spoken), opened)

    return hear
