"""A model that is small and random, for what a run does and not for what it learns."""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def random_qwen(folder: Path, tokenizer) -> Path:
    """A folder with a random Qwen3-shaped model of width 32 and this tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
