"""One whole GRPO step: sampling, reference, loss, backward, update. On random prompts and weights, or on documents.

    python -m benchmarks.step                                # 5 M parameters, 8 prompts x 8 samples, CPU
    python -m benchmarks.step --fast True                    # by the twins in fast/
    python -m benchmarks.step --fast True --unshared True    # as many different prompts
    python -m benchmarks.step --shape qwen3-4b --dtype bfloat16 --prompt-tokens 6144 --new-tokens 1024 --kl 1e-3 \\
        --rollout-tokens 262144 --train-tokens 16384 --gradient-checkpointing True --offload-optimizer True --fast True
    python -m benchmarks.step --lengths 4 16 64 --documents 4 --fast True    # cost by a document's length

Prints medians: tokens a second (prompt and completion tokens of every conversation; "computed" counts a prompt that is
packed once), seconds per phase, peak memory, and the share of this machine's own matrix-product rate that is reached.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from engine.config import Config, check, option, run_with_flags
from engine.models import as_reference, load_policy, load_reference
from fast.attention import packs
from fast.packing import by_prompt
from grpo import batch_loss, fixed_logprobs, group_advantages, set_weights, turn_tokens
from masking import load_corpus
from memtrain import make_optimizer, twins
from rollout import Budget, Sampler, Turn, draw_documents, draw_targets, read, recall

# hidden, intermediate, layers, heads, key-value heads, head size, vocabulary; the Qwen3 ones from their config.json
SHAPES = {
    "5m": (256, 768, 6, 4, 2, 64, 2048),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936),
}


@dataclass
class Step(Config):
    """The settings of a run, of which those of the model and of memory count, and what is measured."""

    shape: str = option("5m", f"{', '.join(SHAPES)}, or a folder with a config.json")
    prompt_tokens: int = option(512, "tokens of a prompt")
    new_tokens: int = option(64, "most tokens of a completion")
    unshared: bool = option(False, "a different prompt for every sample")
    steps: int = option(3, "steps after a warm-up step")
    lr: float = option(1e-6, "learning rate of AdamW")
    lengths: list[int] | None = option(
        None, "instead of random prompts, memtrain.py's step by --model on masked documents of so many chunks"
    )


def main(config: Step) -> None:
    check(config)
    columns = {}
    for chunks in config.lengths or [0]:
        name = f"{chunks} chunks" if chunks else f"{config.shape}, {config.prompt_tokens} + {config.new_tokens} tokens"
        # A process each, since a process remembers only its highest peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            columns[name] = fresh.submit(measure, config, chunks).result()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{config.documents} x {config.g1}, {config.dtype}, {device}; median (lowest to highest)\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key in next(iter(columns.values()))[0]:
        values = [[row[key] for row in rows] for rows in columns.values()]
        cells = [f"{np.median(own):.3g} ({min(own):.3g} to {max(own):.3g})" for own in values]
        print(f"| {key} | {' | '.join(cells)} |")


def measure(config: Step, chunks: int) -> list[dict[str, float]]:
    """The figures of each step, without the first, which warms up; `chunks` is 0 for random prompts and weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if not chunks:
            write_random_model(config.shape, config.dtype, folder)
        config = replace(config, chunks=chunks) if chunks else replace(config, model=folder)
        policy, tokenizer = load_policy(config, device)
        reference = load_reference(config, policy, device)
    corpus = load_corpus(config, tokenizer) if chunks else None
    generate, *others = twins(config, policy, reference)
    sample = Sampler(generate, policy, tokenizer, Budget(config.rollout_tokens))
    optimizer = make_optimizer(policy, config)
    # Matrix products only: the network once over every token for sampling, three times for training (twice where its
    # weights are frozen), once for the reference. Attention over the text comes on top and is left out.
    head = policy.get_output_embeddings().weight.numel()  # sees completions only; tied embeddings are only looked up
    body = sum(p.numel() for p in policy.get_decoder().parameters()) - head
    passes = (3 if config.lora else 4) + (reference is not None)
    rate = matmul_rate(config.dtype, device, 2048 if device == "cpu" else 8192)
    rows = []
    for number in range(config.steps + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if chunks:
            sampled = partial(read_documents, sample, corpus, config, number)
        else:
            sampled = partial(complete, sample, random_prompts(config, number), config)
        turns, phases = step(sampled, policy, reference, optimizer, config, *others)
        tokens, seconds = sum(map(turn_tokens, turns)), sum(phases.values())
        computed = computed_tokens(turns) if config.fast and packs(policy) else tokens
        written = sum(len(turn.completion_ids) for turn in turns)
        flop = 2 * (body * computed + head * written) * passes
        rows.append({
            "tokens_per_second": tokens / seconds, "computed_per_second": computed / seconds, **phases,
            "peak_gib": peak_memory(device), "share_of_matmul_rate": flop / seconds / rate,
        })
    return rows[1:]


# ---- a step ------------------------------------------------------------------------------------------------


def step(
    sampled: Callable[[], list[Turn]], policy, reference, optimizer, config: Config, micro_batches, token_logprobs
) -> tuple[list[Turn], dict[str, float]]:
    """sampled(), then memtrain.py's fifth part in one update -> turns, seconds by phase."""
    device = policy.device.type
    times = [now(device)]
    turns = sampled()
    times.append(now(device))
    if reference is not None:
        with as_reference(reference, config, device):
            for turn, logprobs in fixed_logprobs(reference, turns, config, micro_batches, token_logprobs):
                turn.reference_logprobs = logprobs
    times.append(now(device))
    policy.train(config.gradient_checkpointing)
    set_weights(turns)
    for batch in micro_batches(turns, config.train_tokens):
        loss, _ = batch_loss(policy, batch, config, token_logprobs)
        loss.backward()
    optimizer.step(config.lr, config.grad_clip)
    policy.eval()
    times.append(now(device))
    names = "seconds_sampling", "seconds_reference", "seconds_update"
    return turns, dict(zip(names, np.diff(times).tolist(), strict=True))


def complete(sample: Sampler, prompts: list[str], config: Step) -> list[Turn]:
    """A completion of each prompt; the reward, compared in groups of --g1, is its share of different tokens."""
    turns = sample(prompts, config.new_tokens)
    for place in range(config.documents):
        group = turns[place * config.g1 : (place + 1) * config.g1]
        rewards = [len(set(turn.completion_ids)) / len(turn.completion_ids) for turn in group]
        for turn, advantage in zip(group, group_advantages(rewards, "mean"), strict=True):
            turn.place, turn.advantage = place, advantage
    return turns


def read_documents(sample: Sampler, corpus, config: Step, number: int) -> list[Turn]:
    """All turns of a step. Each is trained on: how many groups carry a signal differs by length, and isn't its cost."""
    trajectories = read(sample, draw_documents(corpus, config, number), config, samples=config.g1)
    draw_targets(trajectories, config, number)
    recall(sample, trajectories, config, samples=config.g2)
    turns = []
    for t in trajectories:
        for n, turn in enumerate(t.turns + t.recalls):
            turn.place, turn.advantage = t.document.place, (-1.0) ** n
            turns.append(turn)
    return turns


# ---- random weights and prompts ------------------------------------------------------------------------------


def write_random_model(shape: str, dtype: str, folder: str) -> None:
    """A model folder: one of SHAPES, or the shape of a folder with a config.json. Its tokenizer reads "t7 t9" as 7, 9."""
    torch.manual_seed(0)
    if shape in SHAPES:
        hidden, intermediate, layers, heads, kv_heads, head, vocabulary = SHAPES[shape]
        config = Qwen3Config(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=head, vocab_size=vocabulary, tie_word_embeddings=True,
            max_position_embeddings=40960, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )
    else:
        config = AutoConfig.from_pretrained(shape)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def random_prompts(config: Step, number: int) -> list[str]:
    """A prompt for each sample of a step: those of a group are the same, or none with --unshared."""
    rng, samples = Random(number), 1 if config.unshared else config.g1
    prompts = [
        " ".join(f"t{rng.randrange(2, 2048)}" for _ in range(config.prompt_tokens))
        for _ in range(config.documents * config.g1 // samples)
    ]
    return [prompt for prompt in prompts for _ in range(samples)]


# ---- what is counted ---------------------------------------------------------------------------------------


def computed_tokens(turns: list[Turn]) -> int:
    """Tokens of these turns, where a shared prompt counts once."""
    prompts = [turn.prompt_ids for turn in turns]
    written = sum(len(turn.completion_ids) for turn in turns)
    return sum(len(prompts[group[0]]) for group in by_prompt(prompts)) + written


def matmul_rate(dtype: str, device: str, size: int) -> float:
    """Products of square matrices, in FLOP a second: the best of a second's on this machine, now."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=1.0).times)


def now(device: str) -> float:
    """Seconds, read when the GPU's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """GiB: of the GPU since the last reset, or of this whole process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    run_with_flags(main, Step)
