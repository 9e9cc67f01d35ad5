"""Estimated, not measured: the tokens, seconds, hours, euros and memory of every recipe.

    python -m benchmarks.hours [SETTINGS ...]    # settings, such as --g1 4, take the place of the recipes' own

How it is estimated: completions fill half of their limit, and a batch is sampled until its longest row reaches the
limit. A prompt that samples share counts once in the seconds, each time in the tokens. Matrix products run at a quarter
of the card's peak, memory is read at 0.6 of its bandwidth in sampling, and no sampled token takes less than 0.8 ms a
layer, as `generate` starts kernels one by one. Every figure depends on these guesses; where a GPU is at hand,
benchmarks/step.py measures.
"""

import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

from engine.config import Config, parse
from engine.errors import run_script
from grpo import HEAD_TOKENS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILL, OF_PEAK, OF_BANDWIDTH, LAUNCH = 0.5, 0.25, 0.6, 0.8e-3
INSTRUCTIONS = 120  # tokens of a prompt beside its texts


class Card(NamedTuple):
    name: str
    flop: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second
    euros: float  # an hour, rented: a guess


class Shape(NamedTuple):
    """Of a model's config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = True

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's matrices."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        feed = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden), *feed]

    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * sum(n * m for n, m in self.linears())

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter."""
        return self.layers * sum(rank * (n + m) for n, m in self.linears())

    def cache(self) -> int:
        """Bytes of keys and values, a token."""
        return self.layers * 2 * self.kv_heads * self.head_size * 2


class Turns(NamedTuple):
    """Turns of a step of one kind: how many, of how many different prompts, and their tokens."""

    count: int
    prompts: int
    prompt: int
    limit: int

    def tokens(self, prompts: int) -> float:
        return prompts * self.prompt + self.count * self.limit * FILL


CARDS = {"24gb": Card("RTX 4090", 165e12, 1.0e12, 0.4), "80gb": Card("H100", 989e12, 3.35e12, 2.5)}
SHAPES = {
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 128, 151936),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, 128, 151936),
}
MODELS = [  # (shape, card, what is given after the task's file)
    ("qwen2.5-0.5b", "24gb", ""),
    ("qwen2.5-1.5b", "24gb", "qwen2.5-1.5b.args"),
    ("qwen3-4b", "24gb", "qwen3-4b-lora.args"),
    ("qwen3-4b", "80gb", ""),
    ("qwen2.5-7b", "80gb", "--model Qwen/Qwen2.5-7B-Instruct"),
    ("qwen2.5-7b", "80gb", "qwen2.5-7b-8gpus.args"),
]


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


def seconds(config: Config, shape: Shape, card: Card, step: list[Turns]) -> tuple[float, float]:
    """(sampling, reference and update) of one step."""
    sampling = training = 0.0
    several = (config.update_batch or config.documents) < config.documents  # then old log-probs are computed, too
    for kind in step:
        attention = 2 * shape.layers * shape.heads * shape.head_size * kind.prompt  # of one token, forward
        forward = (2 * shape.parameters() + attention) * kind.tokens(kind.prompts) / (card.flop * OF_PEAK)
        backward = forward * (1 if config.lora else 2)  # a frozen weight needs no gradient
        training += forward * (1 + config.gradient_checkpointing + bool(config.kl) + several) + backward
        batches = ceil((kind.prompts * kind.prompt + kind.count * kind.limit) / config.rollout_tokens)
        read = 2 * shape.parameters() + kind.count / batches * kind.prompt * shape.cache()  # bytes, a token of each row
        a_token = max(LAUNCH * shape.layers, read / (card.bandwidth * OF_BANDWIDTH))
        sampling += forward + batches * kind.limit * a_token
    return sampling, training


def gpu_bytes(config: Config, shape: Shape, gpus: int) -> float:
    """Bytes on a GPU at most: weights, what is trained, and the larger of sampling and training."""
    trained = shape.adapter(config.lora) if config.lora else shape.parameters()
    fixed = 2 * shape.parameters() * (2 if config.kl and not (config.lora or config.offload_reference) else 1)
    if not config.offload_optimizer:
        fixed += 12 * trained / (gpus if config.shard_optimizer else 1)  # master weights and two moments
    tokens = config.train_tokens
    kept = shape.layers if config.gradient_checkpointing else shape.layers * 12  # hidden states, each
    layer = 2 * tokens * (8 * shape.hidden + 4 * shape.intermediate)
    logits = HEAD_TOKENS * shape.vocabulary * 4 * 3
    training = 4 * trained + 2 * tokens * shape.hidden * kept + layer + logits  # float32 sums of the gradients
    sampling = config.rollout_tokens * shape.cache()
    whole = 4 * shape.vocabulary * shape.hidden if config.shard_optimizer else 0  # the largest, summed and gathered
    return fixed + max(training, sampling) + whole


def line(words: list[str], shape: Shape, card: Card, given: list[str]) -> str:
    """A row of the table: of the recipe's files and settings `words`, and of what is `given` over them."""
    arguments = [["--config", str(RECIPES / word)] if word.endswith(".args") else [word] for word in words]
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
    print("| recipe | GPUs | tokens a step | seconds a step, sampling + rest | steps | hours | euros | GB on a GPU |")
    print("|---|---|---|---|---|---|---|---|")
    for task in ("wiki", "longqa", "searchqa"):
        for shape, card, more in MODELS:
            words = [f"{task}-{card}.args", *more.split()]
            print(line(words, SHAPES[shape], CARDS[card], given=sys.argv[1:]))


if __name__ == "__main__":
    run_script(main, __doc__)
