"""One whole GRPO step on random weights: generate, reference, loss, backward, update. Any model shape.

    python benchmarks/step.py                                        # 5 M parameters, 8 prompts x 8 samples, CPU
    python benchmarks/step.py --unshared                             # as many different prompts
    python benchmarks/step.py --shape qwen3-4b --dtype bfloat16 --prompt-tokens 6144 --new-tokens 1024 --kl 1e-3 \\
        --rollout-tokens 262144 --train-tokens 16384 --gradient-checkpointing --offload-optimizer
    python benchmarks/step.py --chunks 4 16 64                       # does cost grow linearly with a document's length?

Prints tokens a second (prompt and completion tokens of every conversation, shared or not), seconds per phase, peak
memory, and which share of this machine's own matrix-product rate the step reaches.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import lora  # noqa: E402
from engine.attention import enable_packing  # noqa: E402
from engine.config import Config  # noqa: E402
from engine.errors import run_script  # noqa: E402
from engine.models import load_model  # noqa: E402
from engine.optimizer import MasterAdamW  # noqa: E402
from engine.packing import by_prompt  # noqa: E402
from engine.sampling import Budget, generate  # noqa: E402
from grpo import group_advantages  # noqa: E402
from masking import draw_recall  # noqa: E402
from memtrain import store_reference_logprobs, update  # noqa: E402
from rollout import Turn, limits_of, read, recall, sampler  # noqa: E402
from tasks.sources import load_source  # noqa: E402

GROUP = 8  # samples
# hidden, intermediate, layers, heads, key-value heads, head size, vocabulary; the Qwen3 ones from their config.json
SHAPES = {
    "5m": (256, 768, 6, 4, 2, 64, 2048),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936),
}


def random_model(shape: str, dtype: str, device: str, seed: int = 0):
    """A model of random weights: one of SHAPES, or the shape of a folder with a config.json."""
    torch.manual_seed(seed)
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


def random_prompts(rows: int, tokens: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (rows, tokens), generator=generator).tolist()


class Clock:
    """Seconds per phase; on a GPU it waits for the work to end before it reads the time."""

    def __init__(self, device: str):
        self.device, self.seconds = device, {}
        self.last = self.now()

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self.now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def computed_tokens(turns) -> int:
    """Tokens of these turns, written at one time, where a shared prompt counts once: what sampling computes."""
    prompts = [turn.prompt_ids for turn in turns]
    written = sum(len(turn.completion_ids) for turn in turns)
    return sum(len(prompts[group[0]]) for group in by_prompt(prompts)) + written


def step(
    model, reference, optimizer, prompts: list[list[int]], samples: int, new_tokens: int, budget: Budget, config: Config
) -> dict:
    """One GRPO step, `samples` completions of each prompt, by the project's own functions: phases, tokens."""
    pack = enable_packing(model)
    if reference is not None:
        enable_packing(reference)
    clock, special = Clock(model.device.type), SimpleNamespace(pad_token_id=0, eos_token_id=1)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    completions = generate(model, special, asked, new_tokens, budget=budget)
    clock.lap("generate")
    rewards = torch.tensor([len(set(c.ids)) / len(c.ids) for c in completions]).view(-1, GROUP)  # shared prompts or not
    advantages = group_advantages(rewards, "mean")[0].flatten().tolist()
    turns = [
        Turn(prompt, c.ids, c.ended, "", place=n // GROUP, advantage=advantages[n])
        for n, (prompt, c) in enumerate(zip(asked, completions, strict=True))
    ]
    store_reference_logprobs(reference, turns, config, model.device.type)
    clock.lap("reference")
    update(model, optimizer, turns, config.lr, config)
    clock.lap("update")
    written = sum(len(turn.completion_ids) for turn in turns)
    tokens = sum(map(len, asked)) + written
    computed = computed_tokens(turns) if pack else tokens
    return {"seconds": clock.seconds, "tokens": tokens, "computed": computed, "written": written}


def matmul_rate(dtype: str, device: str, size: int) -> float:
    """Products of square matrices, in FLOP a second: the best of a few runs on this machine, now."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = 0.0
    for _ in range(8):
        clock = Clock(device)
        for _ in range(4):
            a @ a
        clock.lap("product")
        best = max(best, 4 * 2 * size**3 / clock.seconds["product"])
    return best


def peak_memory(device: str) -> float:
    """GiB: of the GPU since the last reset, or of this whole process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(arguments, device: str) -> list[dict]:
    model = random_model(arguments.shape, arguments.dtype, device)
    reference = random_model(arguments.shape, arguments.dtype, device) if arguments.kl and not arguments.lora else None
    if arguments.lora:
        lora.attach(model, arguments.lora, seed=0)
        reference = model if arguments.kl else None  # with its adapter off
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    config = Config(
        documents=arguments.prompts, kl=arguments.kl, lora=arguments.lora, lr=1e-6, train_tokens=arguments.train_tokens,
        gradient_checkpointing=arguments.gradient_checkpointing, offload_optimizer=arguments.offload_optimizer,
    )
    optimizer = MasterAdamW(model, config.lr, config.offload_optimizer)
    samples, prompts = (1, arguments.prompts * GROUP) if arguments.unshared else (GROUP, arguments.prompts)
    budget = Budget(arguments.rollout_tokens)
    # Matrix products only: the network once over every token for sampling, three times for training (twice where its
    # weights are frozen), once for the reference. Attention over the text comes on top and is not counted.
    head = model.get_output_embeddings().weight.numel()  # sees completions only; tied embeddings are only looked up
    body = sum(p.numel() for p in model.get_decoder().parameters()) - head
    passes = (3 if arguments.lora else 4) + (reference is not None)
    rate = matmul_rate(arguments.dtype, device, 2048 if device == "cpu" else 8192)
    found = []
    for repeat in range(arguments.steps + 1):  # the first one warms up
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        asked = random_prompts(prompts, arguments.prompt_tokens, model.config.vocab_size, seed=repeat)
        result = step(model, reference, optimizer, asked, samples, arguments.new_tokens, budget, config)
        seconds = sum(result["seconds"].values())
        flop = 2 * (body * result["computed"] + head * result["written"]) * passes
        row = {
            "tokens_per_second": result["tokens"] / seconds,
            **{f"seconds_{k}": v for k, v in result["seconds"].items()},
            "peak_gib": peak_memory(device), "share_of_matmul_rate": flop / seconds / rate,
        }
        if repeat:
            found.append(row)
    return found


def measure_chunks(chunks: int, number: int, device: str) -> list[float]:
    """One step of the tiny default's loop on 4 documents of so many chunks.

    -> tokens a second, those computed, those of rollout and of update, and GiB. Every turn is trained on, whatever its
    reward: how many groups carry a signal differs by length, and is not its cost.
    """
    for length in (4, chunks):  # the first one warms up
        config = Config(chunks=length, documents=4)
        model, tokenizer = load_model(config.model, device, config.dtype)
        enable_packing(model)
        with tempfile.TemporaryDirectory() as folder:
            corpus = load_source(config, model, tokenizer, Path(folder))
        optimizer, limits = MasterAdamW(model, config.lr), limits_of(config, tokenizer)
        sample = sampler(partial(generate, budget=Budget(config.rollout_tokens)), model, tokenizer)
        torch.manual_seed(number)
        clock = Clock(device)
        trajectories = read(sample, [corpus.document(4 * number + n) for n in range(4)], limits, samples=config.g1)
        targets = [draw_recall(t.document, np.random.default_rng([number, n])) for n, t in enumerate(trajectories)]
        answers = recall(sample, trajectories, targets, limits, samples=config.g2)
        clock.lap("rollout")
        turns = []
        for n, (trajectory, recalled) in enumerate(zip(trajectories, answers, strict=True)):
            signs = [(-1.0) ** n] * len(trajectory.turns) + [(-1.0) ** k for k in range(len(recalled))]
            for turn, sign in zip(trajectory.turns + recalled, signs, strict=True):
                turn.place, turn.advantage = n // config.g1, sign
                turns.append(turn)
        update(model, optimizer, turns, config.lr, config)
        clock.lap("update")
    tokens = sum(len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns)
    together = [*zip(*(t.turns for t in trajectories), strict=True), sum(answers, [])]  # what is written at one time
    seconds = sum(clock.seconds.values())
    speeds = [tokens / seconds, sum(map(computed_tokens, together)) / seconds]
    return speeds + [tokens / part for part in clock.seconds.values()] + [peak_memory(device)]


def compare_chunks(lengths: list[int], rounds: int) -> None:
    """Prints a table of measure_chunks: medians over rounds.

    A round is all lengths in turn, so that a slow minute of the machine meets all of them.
    """
    found: dict[int, list] = {chunks: [] for chunks in lengths}
    for number, chunks in tqdm([(number, chunks) for number in range(rounds) for chunks in lengths], desc="chunks"):
        # A process each, since a process remembers only its highest peak.
        command = [sys.executable, __file__, "--chunks", str(chunks), "--round", str(number)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(done.returncode)
        found[chunks].append(json.loads(done.stdout.splitlines()[-1]))
    print("| chunks | tokens a second | of them computed | in rollout | in update | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for chunks, rows in found.items():
        *speeds, memory = np.median(rows, axis=0)
        low, high = np.min(rows, axis=0)[1], np.max(rows, axis=0)[1]
        computed = f"{speeds[1]:.0f} ({low:.0f} to {high:.0f})"
        print(f"| {chunks} | {speeds[0]:.0f} | {computed} | {speeds[2]:.0f} | {speeds[3]:.0f} | {memory:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="5m", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=8, help=f"groups of {GROUP} samples")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--unshared", action="store_true", help="a different prompt for every sample")
    parser.add_argument("--kl", type=float, default=0.0, help="with a reference if not 0")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter that is trained instead (needs peft)")
    parser.add_argument("--rollout-tokens", type=int, default=Config.rollout_tokens)
    parser.add_argument("--train-tokens", type=int, default=Config.train_tokens)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--offload-optimizer", action="store_true")
    steps = "steps after a warm-up step, or rounds of --chunks; the median is shown"
    parser.add_argument("--steps", type=int, default=3, help=steps)
    chunks = "the tiny default's loop on documents of these lengths instead; of the other flags --steps alone counts"
    parser.add_argument("--chunks", type=int, nargs="+", help=chunks)
    parser.add_argument("--round", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the steps as JSON lines instead of a table")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.round is not None:
        return print(json.dumps(measure_chunks(arguments.chunks[0], arguments.round, device)))
    if arguments.chunks:
        return compare_chunks(arguments.chunks, arguments.steps)
    rows = measure(arguments, device)
    if arguments.json:
        print("\n".join(map(json.dumps, rows)))
        return
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tokens = f"{arguments.prompts} x {GROUP}, {arguments.prompt_tokens} + {arguments.new_tokens} tokens"
    print(f"{arguments.shape}, {arguments.dtype}, {name}, {tokens}")
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"| {key} | {np.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |")


if __name__ == "__main__":
    run_script(main)
