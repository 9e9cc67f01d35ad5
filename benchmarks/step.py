"""One whole GRPO step on random weights: generate, reference, loss, backward, update. Any model shape.

    python -m benchmarks.step                             # 5 M parameters, 8 prompts x 8 samples, CPU
    python -m benchmarks.step --unshared True             # as many different prompts
    python -m benchmarks.step --shape qwen3-4b --dtype bfloat16 --prompt-tokens 6144 --new-tokens 1024 --kl 1e-3 \\
        --rollout-tokens 262144 --train-tokens 16384 --gradient-checkpointing True --offload-optimizer True
    python -m benchmarks.step --lengths 4 16 64           # does cost grow linearly with a document's length?

Prints tokens a second (prompt and completion tokens of every conversation, shared or not), seconds per phase, peak
memory, and which share of this machine's own matrix-product rate the step reaches.
"""

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from engine import lora
from engine.config import Config, option, run_with_flags
from engine.models import as_reference, load_model
from engine.optimizer import MasterAdamW
from fast.attention import packs
from fast.packing import by_prompt
from grpo import batch_loss, fixed_logprobs, group_advantages, set_weights
from masking import draw_recall, load_corpus
from memtrain import twins
from rollout import Budget, Sampler, read, recall

GROUP = 8  # samples
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
    documents: int = option(8, f"groups of {GROUP} samples")
    prompt_tokens: int = option(512, "tokens of a prompt")
    new_tokens: int = option(64, "most tokens of a completion")
    unshared: bool = option(False, "a different prompt for every sample")
    steps: int = option(3, "steps after a warm-up step, or rounds of --lengths; the median is shown")
    lr: float = option(1e-6, "learning rate of AdamW")
    fast: bool = option(True, "the twins in fast/; False: the lesson's own code")
    lengths: list[int] | None = option(
        None, "the tiny default's loop on documents of these chunks instead; of the other flags --steps alone counts"
    )


def random_model(shape: str, dtype: str, device: str):
    """A model of random weights: one of SHAPES, or the shape of a folder with a config.json."""
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
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def now(device: str) -> float:
    """Seconds, read when the GPU's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def computed_tokens(turns) -> int:
    """Tokens of these turns, written at one time, where a shared prompt counts once: what sampling computes."""
    prompts = [turn.prompt_ids for turn in turns]
    written = sum(len(turn.completion_ids) for turn in turns)
    return sum(len(prompts[group[0]]) for group in by_prompt(prompts)) + written


def peak_memory(device: str) -> float:
    """GiB: of the GPU since the last reset, or of this whole process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(model, reference, optimizer, turns: list, config: Config, micro_batches, token_logprobs) -> tuple:
    """Reference log-probs, then one update, as in memtrain.py -> the time after each."""
    if reference is not None:
        with as_reference(reference, config, model.device.type):
            for turn, logprobs in fixed_logprobs(reference, turns, config, micro_batches, token_logprobs):
                turn.reference_logprobs = logprobs
    referred = now(model.device.type)
    model.train(config.gradient_checkpointing)
    set_weights(turns)
    for batch in micro_batches(turns, config.train_tokens):
        loss, _ = batch_loss(model, batch, config, token_logprobs)
        loss.backward()
    optimizer.step(config.lr, config.grad_clip)
    model.eval()
    return referred, now(model.device.type)


# ---- random shapes -----------------------------------------------------------------------------------------


def step(model, reference, optimizer, prompts: list[list[int]], new_tokens: int, config: Config) -> tuple:
    """One GRPO step, a completion of each prompt, by the project's own functions -> its turns, seconds by phase."""
    generate, *training = twins(config, model, reference)
    special = SimpleNamespace(
        pad_token_id=0, eos_token_id=1, decode=lambda *_, **__: "", batch_decode=lambda rows, **_: [""] * len(rows)
    )
    times = [now(model.device.type)]
    turns = generate(model, special, prompts, new_tokens, None, False, Budget(config.rollout_tokens))
    times.append(now(model.device.type))
    for start in range(0, len(turns), GROUP):  # shared prompts or not
        group = turns[start : start + GROUP]
        rewards = [len(set(turn.completion_ids)) / len(turn.completion_ids) for turn in group]
        for turn, advantage in zip(group, group_advantages(rewards, "mean"), strict=True):
            turn.place, turn.advantage = start // GROUP, advantage
    times += train(model, reference, optimizer, turns, config, *training)
    return turns, dict(zip(("generate", "reference", "update"), np.diff(times).tolist(), strict=True))


def matmul_rate(dtype: str, device: str, size: int) -> float:
    """Products of square matrices, in FLOP a second: the best of a second's on this machine, now."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=1.0).times)


def measure(config: Step, device: str) -> list[dict[str, float]]:
    """The figures of each step, without the first, which warms up."""
    if config.lora:
        lora.require_peft(f"--lora {config.lora}")
    model = random_model(config.shape, config.dtype, device)
    reference = random_model(config.shape, config.dtype, device) if config.kl and not config.lora else None
    if config.lora:
        lora.attach(model, config.lora, seed=0)
        reference = model if config.kl else None  # with its adapter off
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = MasterAdamW(model, config.lr, config.offload_optimizer)
    samples = 1 if config.unshared else GROUP
    # Matrix products only: the network once over every token for sampling, three times for training (twice where its
    # weights are frozen), once for the reference. Attention over the text comes on top and is left out.
    head = model.get_output_embeddings().weight.numel()  # sees completions only; tied embeddings are only looked up
    body = sum(p.numel() for p in model.get_decoder().parameters()) - head
    passes = (3 if config.lora else 4) + (reference is not None)
    rate = matmul_rate(config.dtype, device, 2048 if device == "cpu" else 8192)
    rows = []
    for repeat in range(config.steps + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        random = torch.Generator().manual_seed(repeat)
        size = (config.documents * GROUP // samples, config.prompt_tokens)
        prompts = torch.randint(2, model.config.vocab_size, size, generator=random).tolist()
        asked = [prompt for prompt in prompts for _ in range(samples)]
        turns, phases = step(model, reference, optimizer, asked, config.new_tokens, config)
        written = sum(len(turn.completion_ids) for turn in turns)
        tokens, seconds = sum(map(len, asked)) + written, sum(phases.values())
        computed = computed_tokens(turns) if packs(model) else tokens
        flop = 2 * (body * computed + head * written) * passes
        rows.append({
            "tokens_per_second": tokens / seconds, **{f"seconds_{phase}": value for phase, value in phases.items()},
            "peak_gib": peak_memory(device), "share_of_matmul_rate": flop / seconds / rate,
        })
    return rows[1:]


# ---- the tiny default's loop, by document length -------------------------------------------------------------


def measure_chunks(chunks: int, number: int) -> list[float]:
    """One step of the tiny default's loop on 4 documents of so many chunks.

    -> tokens a second, those computed, those of rollout and of update, and GiB. Every turn is trained on, whatever its
    reward: how many groups carry a signal differs by length, and is not its cost.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for length in (4, chunks):  # the first one warms up
        with tempfile.TemporaryDirectory() as folder:
            config = Config(chunks=length, documents=4, fast=True, out=f"{folder}/run")
            model, tokenizer = load_model(config.model, device, config.dtype)
            corpus = load_corpus(config, tokenizer)
        optimizer, (generate, *training) = MasterAdamW(model, config.lr), twins(config, model)
        sample = Sampler(generate, model, tokenizer, Budget(config.rollout_tokens))
        torch.manual_seed(number)
        began = now(device)
        trajectories = read(sample, [corpus.document(4 * number + n) for n in range(4)], config, samples=config.g1)
        for n, t in enumerate(trajectories):
            t.target = draw_recall(t.document, np.random.default_rng([number, n]))
        recall(sample, trajectories, config, samples=config.g2)
        sampled = now(device)
        for n, t in enumerate(trajectories):
            for turn in t.turns:
                turn.advantage = (-1.0) ** n
            for k, turn in enumerate(t.recalls):
                turn.advantage = (-1.0) ** k
            for turn in t.turns + t.recalls:
                turn.place = n // config.g1
        turns = [turn for t in trajectories for turn in t.turns + t.recalls]
        _, done = train(model, None, optimizer, turns, config, *training)
    tokens = sum(len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns)
    together = [*zip(*(t.turns for t in trajectories), strict=True)]  # what is written at one time
    together.append([turn for t in trajectories for turn in t.recalls])
    computed = sum(map(computed_tokens, together))
    whole, rollout, learning = done - began, sampled - began, done - sampled
    return [tokens / whole, computed / whole, tokens / rollout, tokens / learning, peak_memory(device)]


def compare_chunks(lengths: list[int], rounds: int) -> None:
    """Prints a table of measure_chunks: medians over rounds.

    A round is all lengths in turn, so that a slow minute of the machine meets all of them.
    """
    rows = []
    for number, chunks in tqdm([(number, chunks) for number in range(rounds) for chunks in lengths], desc="chunks"):
        # A process each, since a process remembers only its highest peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure_chunks, chunks, number).result())
    print("| chunks | tokens a second | of them computed | in rollout | in update | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for n, chunks in enumerate(lengths):
        own = np.array(rows[n :: len(lengths)])  # (rounds, 5)
        *speeds, memory = np.median(own, axis=0)
        low, high = own[:, 1].min(), own[:, 1].max()
        computed = f"{speeds[1]:.0f} ({low:.0f} to {high:.0f})"
        print(f"| {chunks} | {speeds[0]:.0f} | {computed} | {speeds[2]:.0f} | {speeds[3]:.0f} | {memory:.2f} |")


def main(config: Step) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.lengths:
        return compare_chunks(config.lengths, config.steps)
    rows = measure(config, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tokens = f"{config.documents} x {GROUP}, {config.prompt_tokens} + {config.new_tokens} tokens"
    print(f"{config.shape}, {config.dtype}, {name}, {tokens}\n| | median | lowest | highest |\n|---|---|---|---|")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"| {key} | {np.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |")


if __name__ == "__main__":
    run_with_flags(main, Step)
