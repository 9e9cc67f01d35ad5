"""The same GRPO step by this project and by TRL's GRPOTrainer, run alternately; prints seconds and their ratio.

    python -m venv .venv-trl
    .venv-trl/bin/pip install -r requirements.txt -r benchmarks/requirements.txt
    .venv-trl/bin/python -m benchmarks.vs_trl

Both sample 8 completions of up to 64 tokens for each of 8 prompts of 512 tokens and make one update, in float32, from
the same random weights of 5 M parameters; ours with the twins in fast/. `--unshared`: one completion for each of 64
different prompts; TRL, whose groups need at least two samples, gets 32 prompts twice, which costs it the same, since it
computes each row separately. Both sides split the 64 into the micro-batches of their defaults: 4,096 tokens here, 8
rows (4,608 tokens) in TRL. TRL's gradient checkpointing is switched off, since ours is off by default; with
`--checkpointing` it is on, as by TRL's default, and ours stays off.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

from benchmarks.step import Step, measure, random_prompts, write_random_model
from engine.errors import UserError, run_script


def ours(config: Step, checkpointing: bool) -> list[float]:
    """Seconds of each step."""
    return [row["seconds"] for row in measure(config, "cpu")]


def trl(config: Step, checkpointing: bool) -> list[float]:
    """Seconds of each step."""
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

    # TRL's groups need at least two samples: it gets half of the unshared prompts, each twice.
    group, rows = 2 if config.unshared else config.g1, config.documents * config.g1
    steps = config.steps + 1  # the first is a warm-up
    prompts = [prompt for number in range(steps) for prompt in random_prompts(config, number)[::group]]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    assert all(len(ids) == config.prompt_tokens for ids in tokenizer(prompts)["input_ids"])  # the same work as ours
    settings = GRPOConfig(
        output_dir=f"{config.model}/trl", per_device_train_batch_size=8, gradient_accumulation_steps=rows // 8,
        num_generations=group, max_steps=steps, max_completion_length=config.new_tokens,
        learning_rate=config.lr, bf16=False, gradient_checkpointing=checkpointing, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, shuffle_dataset=False, logging_strategy="no",
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model), reward_funcs=reward, args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[Timer()],
    ).train()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unshared", action="store_true", help="a different prompt for every sample")
    checkpointing = "TRL with gradient checkpointing, its default"
    parser.add_argument("--checkpointing", action="store_true", help=checkpointing)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the first is a warm-up (default: 3)")
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.rounds < 1:
        raise UserError("--steps must be at least 2, as the first is a warm-up, and --rounds at least 1")
    if importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed; run this in an environment of its own with benchmarks/requirements.txt")
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        write_random_model("5m", "float32", folder)
        config = Step(model=folder, fast=True, steps=arguments.steps - 1, unshared=arguments.unshared)
        for _ in range(arguments.rounds):
            for side in (ours, trl):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    latest = fresh.submit(side, config, arguments.checkpointing).result()
                seconds[side.__name__] += latest
                print(f"{side.__name__}: {', '.join(f'{s:.2f}' for s in latest)} s a step", flush=True)
    own, theirs = (statistics.median(values) for values in seconds.values())
    print(f"ours {own:.2f} s, TRL {theirs:.2f} s a step: {theirs / own:.2f} times as fast")


if __name__ == "__main__":
    run_script(main)
