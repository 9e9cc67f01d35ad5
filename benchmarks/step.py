"""One whole GRPO step on random prompts and weights: sampling, reference, loss, backward, update. Any model shape.

    python -m benchmarks.step                                # 5 M parameters, 8 prompts x 8 samples, CPU
    python -m benchmarks.step --fast True                    # with the twins in fast/
    python -m benchmarks.step --fast True --unshared True    # 64 different prompts
    python -m benchmarks.step --shape qwen3-4b --dtype bfloat16 --prompt-tokens 6144 --new-tokens 1024 --kl 1e-3 \\
        --rollout-tokens 262144 --train-tokens 16384 --gradient-checkpointing True --offload-optimizer True --fast True

Prints tokens per second (prompt and completion tokens of every turn, shared or not), seconds per phase and peak memory.
For the cost by document length, run memtrain.py with several --chunks and compare their metrics.jsonl.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine import parallel
from engine.config import Config, check, option, run_with_flags
from engine.models import as_reference, load_policy, load_reference
from grpo import batch_loss, fixed_logprobs, group_advantages, set_weights, turn_tokens
from memtrain import make_optimizer, twins
from rollout import Budget, Sampler

# From config.json: kind, hidden, intermediate, layers, heads, key-value heads, head size, vocabulary, tied embeddings.
SHAPES = {
    "5m": ("qwen3", 256, 768, 6, 4, 2, 64, 2048, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
}


@dataclass
class Step(Config):
    """The settings of a run (those of the model, the batch, the update and GPU memory count), and the benchmark's."""

    shape: str = option("5m", f"shape of the model: {', '.join(SHAPES)}, or a folder with a config.json")
    prompt_tokens: int = option(512, "tokens of a prompt")
    new_tokens: int = option(64, "most tokens of a completion")
    unshared: bool = option(False, "a different prompt for every sample, instead of for every --g1 samples")
    steps: int = option(3, "measured steps, after one warm-up step")
    lr: float = option(1e-6, "learning rate of AdamW")


def main(config: Step) -> None:
    check(config)
    device = "cuda" if parallel.has_gpu() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config.shape, config.dtype, folder)
        rows = measure(replace(config, model=folder), device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tokens = f"{config.documents} x {config.g1}, {config.prompt_tokens} + {config.new_tokens} tokens"
    print(f"{config.shape}, {config.dtype}, {name}, {tokens}\n| | median | lowest | highest |\n|---|---|---|---|")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"| {key} | {np.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |")


def measure(config: Step, device: str) -> list[dict[str, float]]:
    """The figures of each step of the model in config.model, without the first, which is a warm-up.

    A step is that of memtrain.py, with one completion per prompt in place of its turns. The reward is a completion's
    share of distinct tokens, compared in groups of --g1.
    """
    torch.manual_seed(0)
    policy, tokenizer = load_policy(config, device)
    reference = load_reference(config, policy, device)
    generate, micro_batches, token_logprobs = twins(config, policy, reference)
    sample = Sampler(generate, policy, tokenizer, Budget(config.rollout_tokens))
    optimizer, rows = make_optimizer(policy, config), []
    for number in range(config.steps + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prompts = random_prompts(config, number)
        times = [now(device)]
        turns = sample(prompts, config.new_tokens)
        for place in range(config.documents):
            group = turns[place * config.g1 : (place + 1) * config.g1]
            rewards = [len(set(turn.completion_ids)) / len(turn.completion_ids) for turn in group]
            for turn, advantage in zip(group, group_advantages(rewards, "mean"), strict=True):
                turn.place, turn.advantage = place, advantage
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
        phases = dict(zip(("seconds_sampling", "seconds_reference", "seconds_update"), np.diff(times), strict=True))
        seconds = times[-1] - times[0]
        speed = {"tokens_per_second": sum(map(turn_tokens, turns)) / seconds, "seconds": seconds}
        rows.append(speed | phases | {"peak_gib": peak_memory(device)})
    return rows[1:]


def now(device: str) -> float:
    """The time in seconds, once the GPU's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """Peak memory in GiB: of the GPU since the last reset, or of this process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- random weights and prompts ------------------------------------------------------------------------------


def model_config(shape: str):
    """The model config of one of SHAPES, or of a folder."""
    if shape not in SHAPES:
        return AutoConfig.from_pretrained(shape)
    kind, hidden, intermediate, layers, heads, kv_heads, head_size, vocabulary, tied = SHAPES[shape]
    return AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_size, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=40960, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )


def write_random_model(shape: str, dtype: str, folder: str) -> None:
    """Write a model folder of this shape. Its tokenizer encodes "t7 t9" as the ids 7, 9."""
    torch.manual_seed(0)
    config = model_config(shape)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def random_prompts(config: Step, number: int) -> list[str]:
    """A prompt for each sample of a step: the same within a group, or with --unshared all different."""
    rng, samples = Random(number), 1 if config.unshared else config.g1
    prompts = [
        " ".join(f"t{rng.randrange(2, 2048)}" for _ in range(config.prompt_tokens))
        for _ in range(config.documents * config.g1 // samples)
    ]
    return [prompt for prompt in prompts for _ in range(samples)]


if __name__ == "__main__":
    run_with_flags(main, Step)
