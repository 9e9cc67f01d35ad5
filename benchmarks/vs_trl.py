"""The same GRPO step by this project and by TRL's GRPOTrainer, run alternately; prints seconds and their ratio.

    python -m venv .venv-trl
    .venv-trl/bin/pip install "$(grep ^torch requirements.txt)" -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl --trl-python .venv-trl/bin/python

Both sample 8 completions of up to 64 tokens for each of 8 prompts of 512 tokens and make one update, in float32, from
the same random weights of 5 M parameters. `--unshared`: one completion of each of 64 different prompts; TRL, whose
groups are of two or more, gets 32 prompts twice, which costs it the same since it computes each row by itself. Both
sides cut the 64 into the micro-batches of their defaults: 4,096 tokens here, 8 rows (4,608 tokens) in TRL. TRL's
gradient checkpointing is switched off, since ours is off by default; with `--checkpointing` it is on, as TRL's default
has it, and ours stays off.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
TOKENS, NEW, PROMPTS, GROUP = 512, 64, 8, 8


def write_inputs(folder: Path) -> None:
    """The model, and a tokenizer that reads "t7 t9" as the ids 7 and 9, so that both sides see the same prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.step import SHAPES, random_model

    random_model("5m", "float32", "cpu").save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, SHAPES["5m"][-1])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def step_prompts(step: int, group: int) -> list[list[int]]:
    """The different prompts of one step, of which a side samples `group` completions each."""
    draw = Random(step)
    return [[draw.randrange(2, 2048) for _ in range(TOKENS)] for _ in range(PROMPTS * GROUP // group)]


def ours(arguments) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.step import Config, MasterAdamW, step

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    config = Config(documents=PROMPTS, lr=1e-6, fast=True)
    optimizer = MasterAdamW(model, config.lr)
    group = 1 if arguments.unshared else GROUP
    seconds = []
    for n in range(arguments.steps):
        prompts = [prompt for prompt in step_prompts(n, group) for _ in range(group)]
        _, phases = step(model, None, optimizer, prompts, NEW, config)
        seconds.append(sum(phases.values()))
    return seconds


def trl(arguments) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *arguments, **more):
            seconds.append(-time.perf_counter())

        def on_step_end(self, *arguments, **more):
            seconds[-1] += time.perf_counter()

    def reward(completion_ids, **more):
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    # TRL's groups have at least two samples: of the unshared prompts it gets half, each twice.
    group = 2 if arguments.unshared else GROUP
    prompts = [ids for n in range(arguments.steps) for ids in step_prompts(n, group)]
    rows = [" ".join(f"t{i}" for i in ids) for ids in prompts]
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    assert all(len(ids) == TOKENS for ids in tokenizer(rows)["input_ids"])  # the same work on both sides
    config = GRPOConfig(
        output_dir=str(arguments.folder / "trl"), per_device_train_batch_size=8,
        gradient_accumulation_steps=PROMPTS * GROUP // 8, num_generations=group, max_steps=arguments.steps,
        max_completion_length=NEW, learning_rate=1e-6, bf16=False, gradient_checkpointing=arguments.checkpointing,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, shuffle_dataset=False,
        logging_strategy="no",
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.folder), reward_funcs=reward, args=config,
        train_dataset=Dataset.from_dict({"prompt": rows}), processing_class=tokenizer, callbacks=[Timer()],
    ).train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the interpreter of TRL's virtual environment")
    parser.add_argument("--unshared", action="store_true", help="a different prompt for every sample")
    checkpointing = "TRL with gradient checkpointing, as by its default"
    parser.add_argument("--checkpointing", action="store_true", help=checkpointing)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; its first warms up and is left out")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return print("SECONDS", json.dumps((ours if arguments.side == "ours" else trl)(arguments)))
    if arguments.steps < 2 or arguments.rounds < 1:
        parser.error("--steps: at least 2, the first one warms up; --rounds: at least 1")
    if not arguments.trl_python:
        parser.error("--trl-python: the interpreter of a virtual environment with benchmarks/requirements.txt")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        for _ in range(arguments.rounds):
            for side, python in (("ours", sys.executable), ("trl", arguments.trl_python)):
                command = [python, "-m", "benchmarks.vs_trl", "--side", side, "--folder", folder]
                command += ["--steps", str(arguments.steps)]
                command += ["--unshared"] * arguments.unshared + ["--checkpointing"] * arguments.checkpointing
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
                if done.returncode or not lines:
                    sys.exit(f"{side} failed:\n{done.stderr}")
                seconds[side] += json.loads(lines[-1].removeprefix("SECONDS"))[1:]
                latest = ", ".join(f"{s:.2f}" for s in seconds[side][1 - arguments.steps :])
                print(f"{side}: {latest} s a step", flush=True)
    own, theirs = (statistics.median(seconds[side]) for side in ("ours", "trl"))
    print(f"ours {own:.2f} s, TRL {theirs:.2f} s a step: {theirs / own:.2f} times as fast")


if __name__ == "__main__":
    main()
