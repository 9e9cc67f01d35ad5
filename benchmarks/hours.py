"""Estimates, not measurements, of the tokens, seconds, hours, euros and memory of every recipe.

    python -m benchmarks.hours [SETTINGS ...]    # settings, such as --g1 4, override those of the recipes

Assumptions: completions fill half of their limit, and a batch is sampled until its longest row reaches the limit. A
prompt that samples share counts once in the seconds, each time in the tokens. Matrix products run at a quarter of the
card's peak, memory is read at 0.6 of its bandwidth in sampling, and a sampled token takes at least 0.8 ms per layer, as
`generate` launches kernels one by one. Every figure depends on these guesses; on a GPU, benchmarks/step.py measures.
"""

import sys
from functools import cache
from math import ceil
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.step import model_config
from engine.config import ROOT, Config, parse
from engine.errors import run_script
from grpo import HEAD_TOKENS

FILL, OF_PEAK, OF_BANDWIDTH, LAUNCH = 0.5, 0.25, 0.6, 0.8e-3
INSTRUCTIONS = 120  # tokens of a prompt besides its texts


class Card(NamedTuple):
    name: str
    flop: float  # per second, dense, in the recipe's dtype
    bandwidth: float  # bytes per second
    euros: float  # per hour, rented: a guess


class Turns(NamedTuple):
    """A step's turns of one kind: their number, that of different prompts, tokens of a prompt, completion limit."""

    count: int
    prompts: int
    prompt: int
    limit: int

    def tokens(self, prompts: int) -> float:
        return prompts * self.prompt + self.count * self.limit * FILL


CARDS = {  # by the task's file, or by a file after it for another card
    "24gb": Card("RTX 4090", 165e12, 1.0e12, 0.4),
    "80gb": Card("H100", 989e12, 3.35e12, 2.5),
    "t4-16gb.args": Card("T4", 8.1e12, 0.32e12, 0.0),
}
MODELS = [  # (one of benchmarks/step.py's SHAPES, the card of the task's file, what follows it on the command line)
    ("qwen2.5-0.5b", "24gb", ""),
    ("qwen2.5-0.5b", "24gb", "t4-16gb.args"),
    ("qwen2.5-1.5b", "24gb", "qwen2.5-1.5b.args"),
    ("qwen3-4b", "24gb", "qwen3-4b-lora.args"),
    ("qwen3-4b", "80gb", ""),
    ("qwen2.5-7b", "80gb", "--model Qwen/Qwen2.5-7B-Instruct"),
    ("qwen2.5-7b", "80gb", "qwen2.5-7b-8gpus.args"),
]


@cache
def parameters(shape: str, rank: int = 0) -> int:
    """Parameters of a model's matrices (all but 0.1 %); with a rank, those of a LoRA adapter on its layers."""
    with torch.device("meta"):  # sizes without memory
        model = AutoModelForCausalLM.from_config(model_config(shape))
    if rank:
        return sum(rank * sum(p.shape) for p in model.model.layers.parameters() if p.dim() == 2)
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def width(config: Config) -> int:
    """Bytes per number."""
    return 4 if config.dtype == "float32" else 2


def cache_bytes(config: Config, model: PretrainedConfig) -> int:
    """Bytes of keys and values per token."""
    return model.num_hidden_layers * 2 * model.num_key_value_heads * model.head_dim * width(config)


def layer_bytes(config: Config, model: PretrainedConfig) -> int:
    """Bytes per token that the backward pass of one layer needs, within a tenth of what autograd keeps."""
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    return width(config) * (4 * model.hidden_size + 5 * heads + 4 * model.intermediate_size)


def step_turns(config: Config, documents: int) -> list[Turns]:
    """The turns of one process's documents, one entry per turn of the rollout."""
    rows, memory = documents * config.g1, int(config.memory_tokens * FILL)
    if config.task == "searchqa":
        prompt = INSTRUCTIONS + memory + config.result_tokens
        return [Turns(rows, rows, prompt, config.memory_tokens + config.answer_tokens)] * (config.searches + 1)
    reading = INSTRUCTIONS + memory + config.chunk_tokens
    found = [Turns(rows, rows if n else documents, reading, config.memory_tokens) for n in range(config.chunks)]
    found.append(Turns(rows, rows, INSTRUCTIONS + memory, config.answer_tokens))
    if config.has_recall:
        found.append(Turns(rows * config.g2, rows, reading, config.answer_tokens))
    return found


def seconds(config: Config, shape: str, card: Card, step: list[Turns]) -> tuple[float, float]:
    """(sampling, reference and update) of one step, in seconds."""
    sampling = training = 0.0
    size, model = parameters(shape), model_config(shape)
    layers = model.num_hidden_layers
    several = (config.update_batch or config.documents) < config.documents  # then old log-probs are computed too
    for kind in step:
        attention = 2 * layers * model.num_attention_heads * model.head_dim * kind.prompt  # per token, forward
        forward = (2 * size + attention) * kind.tokens(kind.prompts) / (card.flop * OF_PEAK)
        backward = forward * (1 if config.lora else 2)  # a frozen weight needs no gradient
        training += forward * (1 + config.gradient_checkpointing + bool(config.kl) + several) + backward
        batches = ceil((kind.prompts * kind.prompt + kind.count * kind.limit) / config.rollout_tokens)
        read = width(config) * size  # bytes, for one token of every row
        read += kind.count / batches * kind.prompt * cache_bytes(config, model)
        a_token = max(LAUNCH * layers, read / (card.bandwidth * OF_BANDWIDTH))
        sampling += forward + batches * kind.limit * a_token
    return sampling, training


def gpu_bytes(config: Config, shape: str, gpus: int) -> float:
    """Peak bytes on a GPU: weights, optimizer, and the larger of sampling and training."""
    size, trained, model = parameters(shape), parameters(shape, config.lora), model_config(shape)
    fixed = width(config) * size * (2 if config.kl and not (config.lora or config.offload_reference) else 1)
    if not config.offload_optimizer:
        fixed += 12 * trained / (gpus if config.shard_optimizer else 1)  # master weights and two moments
    layer, layers = layer_bytes(config, model), model.num_hidden_layers
    kept = layers * layer
    if config.gradient_checkpointing:  # each layer's input, and one layer in full
        kept = layers * width(config) * model.hidden_size + layer
    logits = HEAD_TOKENS * model.vocab_size * 4 * 3
    training = 4 * trained + config.train_tokens * kept + logits  # float32 sums of the gradients
    sampling = config.rollout_tokens * cache_bytes(config, model) * 9 / 8  # an eighth: prompts while they are computed
    # The largest matrix, while it is summed or gathered.
    whole = 4 * model.vocab_size * model.hidden_size if config.shard_optimizer else 0
    return fixed + max(training, sampling) + whole


def line(words: list[str], shape: str, card: Card, given: list[str]) -> str:
    """A row of the table, for the recipe's files and settings `words`; the settings `given` override them."""
    arguments = [["--config", str(ROOT / "recipes" / word)] if word.endswith(".args") else [word] for word in words]
    config = parse(Config, arguments=sum(arguments, []) + given)
    gpus = 8 if config.shard_optimizer else 1
    step = step_turns(config, ceil(config.documents / gpus))
    sampling, training = seconds(config, shape, card, step)
    tokens = gpus * sum(kind.tokens(kind.count) for kind in step) / 1e6
    hours = config.steps * (sampling + training) / 3600
    cells = [
        " ".join(words), f"{gpus} x {card.name}", f"{tokens:.1f} M", f"{sampling:.0f} + {training:.0f}",
        f"{config.steps}", f"{hours:.1f}", f"{hours * gpus * card.euros:.0f}",
        f"{gpu_bytes(config, shape, gpus) / 1e9:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    rows = []
    for task in ("wiki", "longqa", "searchqa"):
        for shape, card, more in MODELS:
            words = [f"{task}-{card}.args", *more.split()]
            rows.append(line(words, shape, CARDS.get(more, CARDS[card]), given=sys.argv[1:]))
    print("| recipe | GPUs | tokens a step | seconds a step, sampling + rest | steps | hours | euros | GB on a GPU |")
    print("|---|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
