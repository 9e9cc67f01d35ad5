"""A first test on a GPU, in one command: are the fast twins right, how fast are they, how much memory do they take?

    python -m benchmarks.gpu | tee gpu.md      # about 8 minutes on one card, no download

Models have random weights in real shapes. On a CPU everything except the cold start runs, in tiny shapes: it shows that
the parts work, but its figures mean nothing. A part that fails gives the reason in its row, and the next one starts. A
figure outside its bounds is marked "out of range"; the last lines repeat these, and what failed or was
left out.
"""

import gc
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import product, zip_longest
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import grpo
import rollout
from benchmarks import hours
from benchmarks.step import Step, measure, model_config, now, peak_memory, write_random_model
from engine import lora, parallel
from engine.checks import ROUNDING
from engine.config import ROOT, Config, parse
from engine.errors import UserError, run_script
from fast import packing, sampling
from memtrain import make_optimizer, twins
from recipes import smollm2
from rollout import Budget, Turn

OUT = " **out of range**"
LAST_START = 7 * 60  # seconds after which no row is started
# Settings of recipes/smollm2-wiki.sh, except for a shorter cold start; the corpus is that of the tiny default.
BOTH = "--chunks 3 --related 2 --fast True --chunk-tokens 256 --memory-tokens 128 --answer-tokens 24 --documents 16"
COLD = "--lr 2e-4 --steps 40 --eval-documents 8"
RL = "--g1 8 --g2 4 --lr 1e-5 --advantage mean --kl 1e-3 --eval-documents 0 --steps 3"
SMALL = "--chunk-tokens 48 --memory-tokens 8 --answer-tokens 4"
# Shapes of benchmarks/step.py, numbers of rows and tokens, (shape, card, recipe) as in benchmarks/hours.py, settings.
CPU = SimpleNamespace(
    sampled="5m", trained="5m", rows=(8,), prompt=48, new=8, micro_batches=(128, 512),
    recipes=[("5m", "24gb", f"{SMALL} --rollout-tokens 2048 --train-tokens 512")],
    smollm2=f"{SMALL} --chunks 2 --documents 1 --g1 2 --g2 2",
)
GPU = SimpleNamespace(
    sampled="qwen2.5-0.5b", trained="qwen3-0.6b", rows=(64, 256), prompt=512, new=128,
    micro_batches=(4096, 8192, 16384), recipes=hours.MODELS,
    smollm2="--dtype bfloat16 --rollout-tokens 262144 --train-tokens 32768",
)


def main() -> None:
    if sys.argv[1:]:
        raise UserError(f"{sys.argv[1]}: benchmarks.gpu takes no argument")
    device = parallel.start()
    kind = "a CPU, so tiny shapes" if device == "cpu" else "real shapes"
    print(f"`python -m benchmarks.gpu`: {kind}, {machine(device)}")
    with TemporaryDirectory() as folder:
        bench = Bench(CPU if device == "cpu" else GPU, device, Path(folder))
        bench.tables()
    print("\n**Out of range, failed or left out**\n", *(bench.found or ["Nothing."]), sep="\n")


def machine(device: str) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cpu":
        return f"{torch.get_num_threads()} threads, {versions}"
    asked = "nvidia-smi --query-gpu=driver_version --format=csv,noheader || echo unknown"
    driver = subprocess.run(asked, shell=True, capture_output=True, text=True).stdout.split()[-1]
    card = torch.cuda.get_device_properties(device)
    size = f"compute capability {card.major}.{card.minor}, {card.total_memory / 1e9:.0f} GB"
    return f"{card.name}, {size}, driver {driver}, CUDA {torch.version.cuda}, {versions}"


class Bench:
    def __init__(self, size: SimpleNamespace, device: str, folder: Path):
        self.size, self.device, self.folder, self.cuda = size, device, folder, device != "cpu"
        self.began, self.found = time.monotonic(), []  # what is out of range, failed or was left out
        write_random_model("5m", "float32", str(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)  # a small vocabulary, but nothing reads the text

    def tables(self) -> None:
        size = self.size
        self.table("Plain against fast: dtype, rows a prompt | greedy tokens that agree | first to differ | drawn "
                   "tokens, standard errors off | log-probs in training, largest gap | mean gap",
                   self.compare, product(("float32", "bfloat16"), (1, 4)))
        self.table(f"Sampling, {size.sampled}, {size.prompt} + {size.new} tokens: rows, by | new tokens a second | "
                   "ms a token", self.sample, product(size.rows, WAYS))
        self.table(f"Update, {size.trained}, {2 * size.prompt} + {size.new} tokens a row: tokens of a micro-batch, "
                   "checkpointing | tokens a second (11,900: prime-rl, Qwen3-0.6B, H100) | peak GiB",
                   self.update, product(size.micro_batches, (False, True)))
        self.table("Memory, GB: model, card, more | micro-batch | rollout | estimate of benchmarks/hours.py | ratio",
                   self.memory, size.recipes)
        self.table("SmolLM2-135M, three steps: | seconds of rollout | of recall | of update | updates",
                   self.recipe, [()])

    def table(self, head: str, job, cases) -> None:
        """Print a row for each case: the job's cells, or the reason why there are none."""
        columns = head.split(" | ")
        print(f"\n| {head} |\n|{'---|' * len(columns)}")
        for case in cases:
            name = ", ".join(map(str, case))
            try:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                if time.monotonic() - self.began > LAST_START:
                    raise UserError("left out: no time left")
                with redirect_stdout(sys.stderr):  # other output would break the table
                    cells = job(*case)
                bad = [f"{column}: {cell}" for column, cell in zip(columns[1:], cells, strict=True) if OUT in cell]
            except Exception as error:
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                cells = bad = [" ".join(f"{kind}{error}".replace("|", "/").split())[:200]]
            self.found += [f"- {columns[0]} {name}: {what}" for what in bad]
            print(f"| {' | '.join([name, *cells])} |", flush=True)
            gc.collect()
            torch.cuda.empty_cache()  # nothing on a CPU

    def model(self, shape: str, dtype: str):
        """A model with random weights, larger than usual: with small ones it would repeat its last token."""
        torch.manual_seed(0)
        config = model_config(shape)
        config.initializer_range = 1.6 / config.hidden_size**0.5
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    # ---- the parts: each returns the cells of a row

    def compare(self, dtype: str, copies: int) -> list[str]:
        model, bound = self.model(self.size.sampled, dtype), ROUNDING[getattr(torch, dtype)]
        prompts = random_ids([self.size.prompt * n // 16 for n in range(1, 17, copies)], copies)
        given, budget = (model, self.tokenizer, prompts, self.size.new, None), Budget(10**6)
        plain, fast = rollout.generate(*given, True, budget), sampling.generate(*given, True, budget)
        same, firsts = [], []
        for turns in zip(plain, fast, strict=True):
            row = [one == other for one, other in zip_longest(*(turn.completion_ids for turn in turns))]
            same += row
            firsts += [] if all(row) else [row.index(False) + 1]
        drawn = sampling.generate(*given, False, budget)
        with torch.no_grad():
            logprobs, entropy, mask = grpo.token_logprobs(model, drawn, with_entropy=True)  # (turns, longest)
            packing.enable(model)
            gaps = (packing.token_logprobs(model, drawn)[0] - logprobs)[mask].abs()  # (tokens,)
        off = (logprobs + entropy)[mask]  # (tokens,); its mean is 0 if the sampler draws from this distribution
        exact = dtype == "float32"  # in bfloat16 rounding swaps tokens of nearly equal probability
        return [
            within(sum(same) / len(same), 0.99 if exact else 0, 1), f"{min(firsts, default='none')}",
            within((off.mean() / off.std() * len(off) ** 0.5).item(), -4, 4),
            within(gaps.max().item(), 0, bound if exact else 1e9), within(gaps.mean().item(), 0, bound),
        ]

    def sample(self, rows: int, way: str) -> list[str]:
        (generate, copies), size, model = WAYS[way], self.size, self.model(self.size.sampled, "bfloat16")
        prompts = random_ids([size.prompt] * (rows // copies), copies)
        for _ in range(2):  # the first warms up
            began, budget = now(self.device), Budget(rows * (size.prompt + size.new))
            turns = generate(model, self.tokenizer, prompts, size.new, None, False, budget)
            seconds = now(self.device) - began
        return [f"{sum(len(t.completion_ids) for t in turns) / seconds:.0f}", f"{1000 * seconds / size.new:.1f}"]

    def update(self, train_tokens: int, checkpointing: bool) -> list[str]:
        size, folder = self.size, str(self.folder / "trained")
        if not Path(folder).exists():
            write_random_model(size.trained, "bfloat16", folder)
        steps = measure(Step(
            model=folder, dtype="bfloat16", fast=True, unshared=True, steps=2, train_tokens=train_tokens,
            prompt_tokens=2 * size.prompt, new_tokens=size.new, rollout_tokens=64 * (2 * size.prompt + size.new),
            gradient_checkpointing=checkpointing,
        ), self.device)
        speeds = [step["tokens_per_second"] * step["seconds"] / step["seconds_update"] for step in steps]
        return [f"{max(speeds):.0f}", f"{max(step['peak_gib'] for step in steps):.1f}"]

    def memory(self, shape: str, card: str, more: str) -> list[str]:
        """A micro-batch and a rollout that fill their budgets. On a CPU the peaks are those of the whole process."""
        words = [f"wiki-{card}.args", *more.split()]
        words = [["--config", str(ROOT / "recipes" / w)] if w.endswith(".args") else [w] for w in words]
        config = parse(Config, arguments=sum(words, []))
        counted = hours.gpu_bytes(config, shape, 1)
        if config.shard_optimizer or (self.cuda and counted > torch.cuda.mem_get_info()[1]):
            raise UserError(f"left out: estimated at {counted / 1e9:.0f} GB" + " on one GPU" * config.shard_optimizer)
        policy = self.model(shape, config.dtype)
        if config.lora:
            lora.begin(policy, config)
        if config.gradient_checkpointing:
            policy.activation_checkpointing_enable()
        held = config.kl and not config.lora and not config.offload_reference
        reference = self.model(shape, config.dtype) if held else None
        generate, micro_batches, token_logprobs = twins(config, policy, reference)
        optimizer, new, budget = make_optimizer(policy, config), config.memory_tokens, Budget(config.rollout_tokens)
        width = max(kind.prompt for kind in hours.step_turns(config, 1)) + new
        rows = max(1, config.train_tokens // width)
        prompts, completions = random_ids([config.train_tokens // rows - new] * rows), random_ids([new] * rows)
        turns = [Turn(*ids, True, "", place=0, advantage=1.0) for ids in zip(prompts, completions, strict=True)]
        grpo.set_weights(turns)
        policy.train(config.gradient_checkpointing)
        for _ in range(2):  # the optimizer allocates its moments in its first step
            for batch in micro_batches(turns, config.train_tokens) * 2:  # the second adds to the first one's gradients
                grpo.batch_loss(policy, batch, config, token_logprobs)[0].backward()
            if config.offload_optimizer:
                optimizer.sums.clear()  # instead of a step in CPU memory
            else:
                optimizer.step(config.lr, config.grad_clip)
        policy.eval()
        peaks = [peak_memory(self.device) * 2**30]
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        prompts = random_ids([width - 4] * (config.rollout_tokens // width))
        generate(policy, self.tokenizer, prompts, 4, None, False, budget)
        peaks += [peak_memory(self.device) * 2**30, counted]
        if budget.tokens < config.rollout_tokens:
            raise UserError(f"out of memory in rollout: of {config.rollout_tokens} tokens {budget.tokens} fit")
        ratio = within(max(peaks[:2]) / counted, *((0.7, 1.1) if self.cuda else (0, 1e9)))
        return [*(f"{size / 1e9:.1f}" for size in peaks), ratio]

    def recipe(self) -> list[str]:
        """Three steps of SmolLM2's recipe after a short cold start, without which there is no reward to learn from."""
        if not smollm2.packaged():
            raise UserError(f"left out: needs {smollm2.INSTALL}")
        model, cold, out = (str(self.folder / name) for name in ("smollm2", "cold", "run"))
        own = self.size.smollm2  # on a CPU the cold start takes too long
        commands = [
            f"-m recipes.smollm2 {model}", f"-m recipes.cold_start --model {model} --out {cold} {BOTH} {COLD} {own}",
            f"memtrain.py --model {cold if self.cuda else model} --out {out} {BOTH} {RL} {own}",
        ]
        for command in commands if self.cuda else commands[::2]:
            done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{command.split()[1]}: {done.stderr.strip().splitlines()[-1]}")
        steps = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        lists = [", ".join(f"{s[f'seconds_{part}']:.1f}" for s in steps) for part in ("rollout", "recall", "update")]
        return [*lists, f"{sum(step['updates'] for step in steps)}"]


def within(value: float, low: float, high: float) -> str:
    """The value, marked if it is outside its bounds or not a number."""
    return f"{value:.3g}{OUT * (not low <= value <= high)}"


def random_ids(lengths: list[int], copies: int = 1) -> list[list[int]]:
    rng = Random(0)
    return [ids for length in lengths for ids in [rng.choices(range(2, 2048), k=length)] * copies]


def continuous(model, tokenizer, prompts: list[list[int]], new: int, done, greedy: bool, budget: Budget) -> list[Turn]:
    """transformers' continuous batching, with the arguments of rollout.generate."""
    how = GenerationConfig(do_sample=not greedy, max_new_tokens=new, eos_token_id=1, pad_token_id=0)
    pages = len(prompts) * (len(prompts[0]) // 256 + new // 256 + 2)  # by default it takes nearly all memory
    limits = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=max(256, budget.tokens // 8))
    found = list(model.generate_batch(prompts, how, limits, persistent_manager=True).values())  # keeps its CUDA graphs
    errors = [each.error for each in found if each.error] or ["rows are missing"] * (len(found) < len(prompts))
    if errors:
        raise RuntimeError(errors[0])
    return [Turn(each.prompt_ids, each.generated_tokens, True, "") for each in found]


WAYS = {"plain": (rollout.generate, 1), "fast": (sampling.generate, 1), "fast, 8 rows a prompt": (sampling.generate, 8),
        "transformers' generate_batch": (continuous, 1)}  # (function, rows of a prompt)


if __name__ == "__main__":
    run_script(main, __doc__)
