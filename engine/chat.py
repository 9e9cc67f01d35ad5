"""Prompts encoded by the model's own chat template, token for token."""

import re
import string
from datetime import date, datetime, time
from functools import lru_cache

from tokenizers.models import Unigram, WordLevel

from engine.errors import UserError, reason_of
from text.thoughts import CHANNELS, opens_thought

PROBE = "\0"  # no template changes it, and no prompt holds it


def apply_template(tokenizer, messages: list[dict], **more):
    """tokenizer.apply_chat_template of these messages, without thinking if the template can switch it off.

    Some templates print the date (Llama 3.2, gpt-oss): it is `tokenizer.day`, which a run sets, or else today.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        first = re.sub(r"\A[ \t]+(?=\{[%#])", "", template)  # Jinja strips blanks before a block at a line's start
        template = day_macro(getattr(tokenizer, "day", None) or date.today().isoformat()) + first
    # A template without `enable_thinking` ignores it.
    return tokenizer.apply_chat_template(messages, chat_template=template, enable_thinking=False, **more)


def day_macro(day: str) -> str:
    """A template's definition of strftime_now for a fixed day: each directive is replaced by its value."""
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters] + ["%%"]
    noon = datetime.combine(date.fromisoformat(day), time(12))
    values = [(code, noon.strftime(code)) for code in codes]
    return (
        "{% macro strftime_now(format) %}{% set told = namespace(text=format) %}"
        f"{{% for code, value in {values} %}}{{% set told.text = told.text.replace(code, value) %}}{{% endfor %}}"
        # The last expression keeps a line break at the template's start, which Jinja would strip after a block.
        "{{ told.text }}{% endmacro %}{{ '' }}"
    )


def render_probe(tokenizer) -> str:
    """The template's text of a prompt whose user message is PROBE."""
    message = {"role": "user", "content": PROBE}
    return apply_template(tokenizer, [message], add_generation_prompt=True, tokenize=False)


def begins_in_thought(tokenizer) -> bool:
    """Whether the template opens a thought, so that a completion begins inside it."""
    return tokenizer.chat_template is not None and opens_thought(render_probe(tokenizer).rpartition(PROBE)[2])


def check_template(tokenizer, name: str, given: str) -> None:
    """Raises UserError for a chat template that can't render one user message. `given` is the flag that named it."""
    try:
        rendered = render_probe(tokenizer)
    except Exception as error:  # a template is a program of the model's authors; jinja2 may be missing, too
        raise UserError(
            f"{given} {name}: its chat template can't be rendered with one user message ({reason_of(error)})"
        ) from None
    if rendered.count(PROBE) != 1:
        raise UserError(
            f"{given} {name}: its chat template doesn't show the text of a user message exactly once, like those of "
            "some image models; use a text model"
        )


def end_marker(tokenizer) -> int | None:
    """The id of the token with which the template closes an assistant's message; None if there is no such token.

    For example <|im_end|>: base models and fine-tunes may have another token as their eos.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
    try:
        rendered = apply_template(tokenizer, messages[:2], tokenize=False)
        closing = rendered.rpartition(PROBE)[2].lstrip()
        if not closing:  # some close a message only if another follows
            closing = apply_template(tokenizer, messages, tokenize=False).split(PROBE)[2].lstrip()
    except Exception:  # a template may refuse an assistant's message, so the token stays unknown
        return None
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"] if closing else []
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    # With channels, the token also ends the thought, before the answer.
    return ids[0] if token and closing.startswith(token.content) and CHANNELS[0] not in rendered else None


def encode_prompt(tokenizer, text: str) -> list[int]:
    """The token ids of `text` as one user message in the model's chat template, or as plain text without a template.

    Special tokens written out in the text, such as <|im_end|>, are encoded as plain text, so only the template's own
    open and close a message. All other ids are those of the template.
    """
    control = [token for token in control_tokens(tokenizer, tokenizer.chat_template) if token in text]
    if control and isinstance(tokenizer.backend_tokenizer.model, Unigram | WordLevel):  # these match them in any text
        for token in control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        control = []
    if tokenizer.chat_template is None:
        ids = tokenizer(text + "\n", split_special_tokens=True)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append it to every text
    message = {"role": "user", "content": text}
    return apply_template(
        tokenizer, [message], add_generation_prompt=True, return_dict=False, sanitize_control_tokens=bool(control)
    )


@lru_cache(maxsize=4)
def control_tokens(tokenizer, template) -> list[str]:
    """The tokens that must mean nothing in a text: special ones, and others in the template, such as <think>."""
    added = tokenizer.added_tokens_decoder.values()
    return [t.content for t in added if t.special or t.content in str(template) and not t.content.isspace()]
