"""Small things that stand in for real ones in several test files."""

import random
import re

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def small_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: several tokens a word, and up to 18 an emoji."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    lines = [line for text in (random.__doc__, re.__doc__) for line in text.split("\n")]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def uncut(text: str, tokens: int) -> str:
    """A Limits.cut that leaves a text whole."""
    return text
