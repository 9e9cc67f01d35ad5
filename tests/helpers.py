"""What several test files share: data, stand-ins, tiny models and turns, the scripts as commands, processes."""

import contextlib
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.distributed import TCPStore
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import memtrain
from engine.config import Config, run_with_flags
from engine.errors import UserError
from engine.lora import check_peft
from engine.models import as_reference
from engine.run import release_signals
from grpo import batch_loss, fixed_logprobs, set_weights, update_batches
from rollout import Turn


def needs_peft():
    """The module peft; a test skips where it is missing, or older than the installed transformers takes."""
    try:
        check_peft("this test")
    except UserError as error:
        pytest.skip(str(error), allow_module_level=True)
    return importlib.import_module("peft")


# ---- the shared data beside the repository; a test that asks for it skips where it is absent

SHARED = Path(__file__).parents[2] / "shared/data"


def shared(name: str = "") -> Path:
    """The path of a shared file or folder; of the whole folder without a name."""
    if not (SHARED / name).exists():
        pytest.skip("needs the shared data folder, which is not here")
    return SHARED / name


def records(name: str) -> list[dict]:
    """The rows of a shared .jsonl or .json."""
    text = shared(name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]


# ---- stand-ins

def small_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: several tokens a word, and up to 18 an emoji."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    lines = [line for text in (random.__doc__, re.__doc__) for line in text.split("\n")]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Scripted:
    """In rollout.Sampler's place: a test's function `sample(prompts, new_tokens, done)`; `cut` leaves texts whole."""

    def __init__(self, sample, cut=lambda text, tokens: text):
        self.sample, self.cut = sample, cut

    def __call__(self, prompts, new_tokens, done=None):
        return self.sample(prompts, new_tokens, done)


# ---- tiny random models and turns, and log-probs by a whole float64 pass

VOCABULARY = 61
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
EOS = 0  # also the id that padding gets, so that a mask taken from token values fails here
LENGTHS = [(5, 4), (1, 7), (9, 1), (3, 12), (12, 3), (6, 6), (2, 9)]


def tiny_model(config_class=Qwen3Config, seed=0, **settings):
    """A random model whose weights are wide enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
    )
    return AutoModelForCausalLM.from_config(config_class(**shape | settings)).eval()


class Ends:
    """The little of a tokenizer that sampling looks at without `done`."""

    pad_token_id = eos_token_id = EOS
    chat_template, added_tokens_decoder = None, {}

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def ending_model(config_class=Qwen3Config, **settings):
    """A tiny model whose completions end often."""
    model = tiny_model(config_class, **settings)
    with torch.no_grad():  # all logits but this one are 0 in the mean
        model.lm_head.weight[EOS] *= 2.5
    return model


def turn_of(prompt_ids: list[int], completion_ids: list[int]) -> Turn:
    return Turn(prompt_ids, completion_ids, True, "")


def random_turns(lengths, seed=0):
    """Turns of the given (prompt, completion) lengths; every completion of two tokens or more ends with EOS."""
    rng = np.random.default_rng(seed)
    draw = lambda count: rng.integers(0, VOCABULARY, count).tolist()  # noqa: E731
    turns = [turn_of(draw(p), draw(c)) for p, c in lengths]
    for turn in turns:
        turn.completion_ids[-1:] = [EOS] if len(turn.completion_ids) > 1 else turn.completion_ids
    return turns


def unpadded_logprobs(model, turn):
    """One unpadded sequence, all its logits, a float64 log-softmax: log-probs and entropies of the completion."""
    ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
    logits = model(input_ids=ids).logits[0].double()
    rows, first = [], len(turn.prompt_ids)
    for t, token in enumerate(turn.completion_ids):
        distribution = logits[first + t - 1] - logits[first + t - 1].logsumexp(0)
        rows.append((distribution[token], -(distribution.exp() * distribution).sum()))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def parameter_gradient(model):
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


def update(policy, optimizer, turns: list[Turn], lr: float, config: Config, reference=None) -> Counter:
    """The loop's fifth part, for tests of what stands below it -> sums of its stats, and the norms of its gradients."""
    _, micro_batches, token_logprobs = memtrain.twins(config, policy, reference)
    twins = micro_batches, token_logprobs
    if reference is not None:
        with as_reference(reference, config, "cpu"):
            for turn, logprobs in fixed_logprobs(reference, turns, config, *twins):
                turn.reference_logprobs = logprobs
    updates = update_batches(turns, config)
    if len(updates) > 1:
        for turn, logprobs in fixed_logprobs(policy, turns, config, *twins):
            turn.old_logprobs = logprobs
    policy.train(config.gradient_checkpointing)
    stats = Counter()
    for part in updates:
        if set_weights(part):
            for batch in micro_batches(part, config.train_tokens):
                loss, own = batch_loss(policy, batch, config, token_logprobs)
                loss.backward()
                stats.update({name: value.item() for name, value in own.items()})
            stats["grad_norm"] += optimizer.step(lr, config.grad_clip)
    policy.eval()
    return stats


# ---- a random model's folder

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


# ---- the scripts as commands, without the seconds that a new process spends on its imports

def command(*arguments, script="memtrain"):
    """`python {script}.py *arguments` in this process: its returncode, stdout and stderr, a traceback included."""
    module = importlib.import_module(script)
    flags, follow_model = (Config, False) if script == "memtrain" else (module.Evaluation, True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"{script}.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_with_flags(module.main, flags, follow_model)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            release_signals()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


# ---- processes, forked from a server that has all imports behind it: a second and not six

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["helpers"])


def serve() -> None:
    """Start the server, which then imports by itself; nothing where it runs already."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # it gets sys.path in no other way
        forkserver.ensure_running()


def start(function, *arguments, ranks: int = 1) -> list:
    """`function(*arguments)` in `ranks` new processes, joined as torchrun would join them if there are several."""
    environments: list[dict] = [{}]
    store = None
    if ranks > 1:
        # They meet in a store that is open here, as with torchrun: a free port may be taken before rank 0 binds it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
            "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        }
        environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    serve()
    started = [context.Process(target=begin, args=(each, function, arguments), daemon=True) for each in environments]
    for process in started:
        process.start()
        process.store = store  # so it lives as long as they are known
    return started


def begin(environment: dict, function, arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, file=sys.__stderr__)  # so a process that waits for ever says where
    function(*arguments)


def wait(started: list, seconds: float = 120) -> list[int | None]:
    """The exit codes of the processes, None for one that is still there after so many seconds: it is killed."""
    codes, end = [], time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
    return codes


def run(arguments: list, log: Path, deadly: str | None = None) -> None:
    """Run memtrain.py; rank 0 prints to `log`.

    "module.function:n" kills it at the n-th call of a function that is looked up in that module, in engine.checkpoints
    if none is named; "function:n:TERM" asks it to end, "function:n:INT" is Ctrl-C; of several processes the last.
    "anything:n" kills it at the n-th call of any function, Python's or C's; with n = 0 the number of all calls is
    printed in the end.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if deadly and rank == ranks - 1:
        name, n, *gently = deadly.split(":")
        sent = signal.Signals[f"SIG{gently[0] if gently else 'KILL'}"]
        calls = [0]

        def count() -> None:
            calls[0] += 1
            if calls[0] == int(n):
                os.kill(os.getpid(), sent)

        if name == "anything":
            sys.setprofile(lambda frame, event, _: event in ("call", "c_call") and count())
        else:
            place, _, function = name.rpartition(".")
            module = importlib.import_module(place or "engine.checkpoints")
            real = getattr(module, function)

            def counted(*more):
                count()
                return real(*more)

            setattr(module, function, counted)
    sys.argv = ["memtrain.py", *map(str, arguments)]
    if rank == 0:
        sys.stdout = sys.stderr = open(log, "w")
    run_with_flags(memtrain.main, Config)
    if deadly == "anything:0":
        sys.setprofile(None)
        print(f"{calls[0]} calls")
    sys.stdout.flush()

