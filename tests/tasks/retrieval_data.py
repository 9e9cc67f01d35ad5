"""Passages, and an encoder small enough to compute by hand, for the tests of retrieval."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(50)]
VOCABULARY = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *WORDS])}


def lines(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def some_passages(n: int, seed: int = 0) -> list[dict]:
    """n passages of random words, with what text has: quotes, newlines, other scripts, empty titles, equal passages."""
    rng = random.Random(seed)
    words = [*(f"w{i}" for i in range(60)), "Zürich", "日本", '"', "a\nb", "don't", "_x_", "😀"]
    passages = []
    for _ in range(n):
        title = " ".join(rng.choices(words, k=rng.randrange(4))).replace("\n", " ")
        passages.append({"title": title, "text": " ".join(rng.choices(words, k=rng.randrange(1, 30)))})
    return passages + passages[:3]


def small_encoder(folder: Path) -> str:
    """A folder with a random two-layer BERT of width 16 for 32 tokens, and a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)
