"""A text cut into chunks at safe places, each within a token limit."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, chain

from engine.errors import UserError
from text.matching import BARE, MASK, Span, joined, merges

# White space, and the positions next to characters of scripts written without it.
GAP = re.compile(rf"\s+(?=\S)|(?={BARE.pattern})(?<=\S)|(?<={BARE.pattern})(?=\S)")
CLOSING = "\"'”’)]」』）】》\u200b\u200e\u200f\ufeff"  # and invisible characters after it
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "．", "｡")


def cut_chunks(text: str, keep: list[Span], tokenizer, limit: int) -> list[str]:
    """`text` in pieces of at most `limit` tokens, each tokenized by itself; joined they are `text`.

    A cut is between words, or between characters in scripts without spaces. In the second half of a chunk it prefers
    the end of a paragraph, then of a sentence, then a space. It never splits a [MASK], and splits a span of `keep`, a
    word or a character only if that is longer than a chunk. Raises UserError if even one letter is.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    within_mask = {m.start() + n for m in re.finditer(re.escape(MASK), text) for n in range(1, len(MASK))}
    inside = {place for start, end in keep for place in range(start + 1, end)} | within_mask
    places, ranks = [], []  # rank of a cut: 3 after a paragraph, 2 after a sentence, 1 at a space, 0 without a space
    for gap in GAP.finditer(text):
        place, space = gap.end(), gap[0]
        if place in inside or _splits_character(text, place) or not (space or _may_cut(text[place - 1], text[place])):
            continue
        before = text[max(0, gap.start() - 2) : gap.start()].rstrip(CLOSING)
        places.append(place)
        ranks.append(3 if "\n" in space else 2 if before.endswith(SENTENCE_ENDS) else int(space != ""))

    def last_resorts(first: int, last: int) -> Iterator[int]:
        """All other cuts, latest first: inside a word longer than a chunk, then such an entity, then anywhere."""
        places = range(last, first, -1)
        yield from (place for place in places if place not in inside and not _splits_character(text, place))
        yield from (place for place in places if text[place - 1].isspace() and not _splits_character(text, place))
        yield from (place for place in places if place not in within_mask and not _splits_character(text, place))
        yield from (place for place in places if place not in within_mask)  # an emoji can be a dozen code points

    chunks, start = [], 0
    while start < len(text):
        last = bisect_right(token_ends, start) + limit - 1  # the last token that fits, as tokenized within the text
        reach = max(token_ends[last], start + 1) if last < len(token_ends) - 1 else len(text)
        near, half = range(bisect_right(places, start), bisect_right(places, reach)), (start + reach) // 2
        best = sorted(near, key=lambda n: (ranks[n] if places[n] >= half else 0, places[n]), reverse=True)
        whole = [reach] if reach == len(text) else []
        ends = chain(whole, (places[n] for n in best), last_resorts(start, reach))
        for end in ends:  # a piece by itself may take more tokens than within the text
            if len(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]) <= limit:
                break
        else:
            word = text[start : start + 6]
            raise UserError(f"--chunk-tokens {limit}: too few for {word!r} with this tokenizer; make it larger")
        chunks.append(text[start:end])
        start = end
    return chunks


def _may_cut(before: str, after: str) -> bool:
    """Whether a line may end between two characters of a script without spaces: not before 。 or ー, nor after （."""
    kind = unicodedata.category(after)
    if kind in ("Pe", "Pf", "Po", "Pd", "Cf") or unicodedata.category(before) in ("Ps", "Pi"):
        return False
    return kind[0] not in "LMN" or not joined(before, after)


def _splits_character(text: str, place: int) -> bool:
    """Whether text[place] and the code point before it are one character to a reader."""
    before, after = text[place - 1], text[place : place + 1]
    if after.isascii():  # also true at the text's end
        return before + after == "\r\n"
    if "\U0001f1e6" <= after <= "\U0001f1ff":  # a flag is two of these: the second follows an odd number of them
        return len(re.search("[\U0001f1e6-\U0001f1ff]*\\Z", text[max(0, place - 50) : place])[0]) % 2 == 1
    if unicodedata.category(after)[0] == "M" or "\u200d" in (before, after) or "\U0001f3fb" <= after <= "\U0001f3ff":
        return True  # an accent, a joined emoji, a skin tone
    return merges(before, after)
