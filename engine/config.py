"""The settings of a run, read from flags and files."""

import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser
from transformers import __version__ as installed

from engine import errors, parallel
from engine.errors import UserError
from text.corpus import is_of_hub
from text.rules import check_ner

ROOT = Path(__file__).parents[1]


def option(default, help: str, **more):
    """A field with its help text; `more` are argparse's."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, **more})


@dataclass
class Config:
    """All settings of a run. The defaults are those of the tiny model; recipes/ has those of real ones."""

    model: str = option(str(ROOT / "tiny/model"), "model folder or hub name")
    dtype: Literal["float32", "bfloat16"] = option("float32", "training in bfloat16 keeps float32 master weights")
    lora: int = option(0, "rank of a LoRA adapter, trained instead of all weights (needs peft)")
    seed: int = option(0, "documents, sampling and everything else random follow from it")
    fast: bool = option(False, "sample and train by the twins in fast/: the same results, several times as fast")
    date: str | None = option(None, "day that chat templates are told, 2026-07-31 (default: that of the run's start)")
    explain: bool = option(False, "print one training step in full, and save nothing")

    # The task
    task: Literal["memtrain", "longqa", "searchqa"] = option("memtrain", "masked documents, or questions with answers")
    questions: str = option(str(ROOT / "tiny/questions.jsonl"), "as HotpotQA, 2Wiki, MuSiQue or FlashRAG have them")
    eval_questions: str | None = option(None, "questions to evaluate on (default: --eval-split of --questions)")
    eval_split: Literal["dev", "test"] = option("test", "which part of --questions: dev to choose settings by")
    objectives: int = option(2, "searchqa: questions asked as one (paper: 2)")
    searches: int = option(6, "searchqa: most searches of an episode (paper: 6)")
    result_tokens: int = option(192, "searchqa: tokens of a search result (paper: 1024)")
    retriever: str = option("bm25", "searchqa: bm25 over the corpus, or the http://... of a Search-R1 server")

    # The text
    corpus: str | None = option(
        None,
        "a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set; searchqa: one file, lines of "
        "{title, text} or {contents} (default: tiny/passages.jsonl, for searchqa tiny/passages_all.jsonl)",
    )
    corpus_config: str | None = option(None, "configuration of a hub data set, such as 20231101.en")
    text_field: str = option("text", "field that holds the text")
    max_passages: int | None = option(None, "stop loading after this many passages")
    ner: str = option("rules", "'rules', or an installed spaCy pipeline such as en_core_web_sm")
    heldout: float = option(0.2, "share of titles kept for evaluation: no pivot, answer or recall target of training")

    # A document, and the texts of an agent
    chunk_tokens: int = option(64, "tokens of a chunk (paper: 5120)")
    chunks: int = option(4, "chunks of a training document; with --passages the most it may have")
    passages: int | None = option(None, "passages of a training document instead of --chunks (paper: 150)")
    related: int = option(2, "passages of a document that are related to its pivot (paper: 29)")
    keep_leaky: bool = option(False, "keep documents in which a part of the answer's name remains")
    memory_tokens: int = option(64, "tokens of a memory, and of a thought before it, if the model thinks (paper: 1024)")
    answer_tokens: int = option(16, "tokens of an answer, and of a thought before it (paper: 1024)")
    rollout_tokens: int = option(24576, "tokens of one generate batch, padding included")
    eval_documents: int = option(64, "held-out documents of each length in an evaluation; 0 leaves it out")

    # Training: the rollout and its rewards
    out: str = option("runs/tiny", "folder of this run; the same command again resumes it, another run is refused")
    steps: int = option(22, "training steps; each reads its documents, then updates (paper: 300)")
    documents: int = option(8, "documents a step (paper: 32)")
    g1: int = option(8, "trajectories a document, a group")
    g2: int = option(4, "recall answers a trajectory, a group (paper: 8)")
    recall_weight: float = option(0.5, "lambda of Eq. 2")
    ablation: Literal["none", "end_to_end", "decoupled", "shuffled_rewards"] = option(
        "none",
        "end_to_end: no recall at all; decoupled: recall stays out of R^E; shuffled_rewards, a control: each group's "
        "rewards, dealt out to its samples at random",
    )
    shared_recall_draw: bool = option(False, "one draw of what to recall for all trajectories of a document")

    # Training: the update
    lr: float = option(2e-4, "peak learning rate of AdamW (paper: 1e-6)")
    lr_warmup: int = option(2, "steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "cosine goes down to zero")
    grad_clip: float = option(1.0, "largest gradient norm; 0 clips nothing")
    advantage: Literal["group_norm", "mean"] = option("group_norm", "of Eq. 3 (paper: mean)")
    eps_low: float = option(0.2, "clip range below 1")
    eps_high: float = option(0.2, "clip range above 1")
    kl: float = option(0.0, "beta, KL to the model that training started from (paper: 1e-3); 0 loads no reference")
    update_batch: int | None = option(None, "documents an update (default: all of a step's)")
    train_tokens: int = option(4096, "padded tokens of one forward and backward; gradients add up over them")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, slower")
    offload_optimizer: bool = option(False, "master weights and moments, 12 bytes a parameter, in CPU memory")
    offload_reference: bool = option(False, "the reference in CPU memory while it isn't used")
    shard_optimizer: bool = option(False, "torchrun: the processes share out master weights and moments")

    # Training: what is written, and when
    sample_every: int = option(10, "show a decoded trajectory every so many steps")
    save_every: int = option(100, "write a checkpoint every so many steps, and at the end")
    keep: int = option(2, "checkpoints to keep")

    @property
    def corpus_name(self) -> str:
        """--corpus, or else the tiny default that belongs to the task."""
        passages = "passages_all.jsonl" if self.task == "searchqa" else "passages.jsonl"
        return self.corpus or str(ROOT / "tiny" / passages)

    @property
    def cache(self) -> Path:
        """The folder of the entities that were found, shared by the runs beside each other."""
        return Path(self.out or "runs/none").parent / ".entities"

    @property
    def has_recall(self) -> bool:
        """Whether trajectories are asked to recall."""
        return self.task == "memtrain" and self.ablation != "end_to_end"

    @property
    def joint_weight(self) -> float:
        """Lambda of Eq. 2; decoupled, recall is trained but weighs 0 in the trajectory's reward."""
        return 0.0 if self.ablation == "decoupled" else self.recall_weight


# ---- flags ---------------------------------------------------------------------------------------------

# Whole numbers that may be 0; others are at least 1. Fractions are at least 0.
MAY_BE_ZERO = {"seed", "lora", "related", "eval_documents", "searches", "g2"}


def flag(name: str) -> str:
    """How the command line spells a setting: "--chunk-tokens" for chunk_tokens."""
    return f"--{name.replace('_', '-')}"


def run_with_flags(main, flags: type, follow_model: bool = False) -> None:
    """Call `main` with the command line's settings; a user's mistake ends as one line and exit code 2."""
    errors.run_script(lambda: main(parse(flags, follow_model)))


def parse(flags: type, follow_model: bool = False, arguments: list[str] | None = None):
    """An instance of the dataclass `flags`, from `arguments` (default: the command line's) and their `--config FILE`s.

    With `follow_model` the defaults are the settings of the run that wrote --model. Raises UserError.
    """
    arguments = with_files(sys.argv[1:] if arguments is None else arguments)
    config = parse_with(flags, {}, arguments)
    if follow_model:
        from engine.saved import saved_settings

        config = parse_with(flags, saved_settings(config.model), arguments)
    for name, value in vars(config).items():
        for number in value if isinstance(value, list) else [value]:
            check_number(name, number)
    if not config.heldout < 1:
        raise UserError(f"--heldout {config.heldout}: must be a share, less than 1")
    return config


def with_files(arguments: list[str]) -> list[str]:
    """The words of each `--config FILE`, then all other arguments: the last one of a flag counts. Raises UserError."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--config", action="append", default=[])
    given, own = parser.parse_known_args(arguments)
    words = []
    for file in map(Path, given.config):
        if not file.is_file():
            raise UserError(f"--config {file}: no such file; recipes/ holds those that come with the project")
        words += file.read_text().split()
    return words + own


def parse_with(flags: type, defaults: dict, arguments: list[str]):
    """The settings, with other `defaults` than those of the dataclass. Raises UserError."""
    epilog = "--config FILE reads settings from a file; several may be given, and the command line wins."
    about = sys.modules["__main__"].__doc__
    parser = HfArgumentParser([flags], description=about, epilog=epilog, formatter_class=Help)
    parser.error = refuse
    parser.set_defaults(**{f.name: defaults[f.name] for f in fields(flags) if f.name in defaults})
    config, rest = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        raise UserError(f"unknown argument {rest[0]}; --help lists all of them")
    return config


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The script's docstring as it stands, then each flag with its default."""


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists all arguments")


def check_number(name: str, number) -> None:
    """Raises UserError for a number that is too small for its setting, or not finite. Other values pass."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return
    least = 1 if isinstance(number, int) and name not in MAY_BE_ZERO else 0
    if not (least <= number and math.isfinite(number)):
        raise UserError(f"{flag(name)} {number}: must be a number of at least {least}")


# ---- what is missing ------------------------------------------------------------------------------------


# Versions of transformers on which the suite has run: fast/ stands on private parts of it, the default does not.
TESTED = ("5.23", "5.24")


def check(config: Config) -> None:
    """Raises UserError for what is missing or can't work, before a model is loaded or a passage is streamed."""
    if config.fast and installed.rpartition(".")[0] not in TESTED:
        raise UserError(
            f"--fast True: tested with transformers {' and '.join(TESTED)}, {installed} is installed; install one of "
            "these, or leave --fast out"
        )
    check_bfloat16(config.dtype)
    try:
        config.date = config.date and date.fromisoformat(config.date).isoformat()
    except ValueError:
        raise UserError(f"--date {config.date}: must be a day, as 2026-07-31") from None
    if config.g1 < 2 or (config.g2 < 2 and config.has_recall):
        raise UserError("--g1 and --g2 must be at least 2: an advantage compares the samples of a group")
    if config.lora:
        from engine.lora import check_peft

        check_peft(f"--lora {config.lora}:")
    if config.task != "searchqa":
        is_of_hub(config.corpus_name)  # or else there must be such a file or folder
    if config.task == "memtrain":
        check_ner(config.ner)
    else:
        for name in ("questions", "eval_questions"):
            file = getattr(config, name)
            if file and not Path(file).is_file():
                raise UserError(f"{flag(name)} {file}: no such file")
    if config.task == "searchqa" and config.retriever == "bm25" and not Path(config.corpus_name).is_file():
        raise UserError(
            f"--corpus {config.corpus_name}: no such file; searchqa takes one file of lines {{title, text}} or "
            "{contents}, no folder and no hub data set"
        )


def check_bfloat16(dtype: str) -> None:
    """Raises UserError where bfloat16 would run on a CPU since the GPU isn't found, or on a GPU that can't compute it.

    torch itself calls it supported on every GPU. A GPU that is hidden by CUDA_VISIBLE_DEVICES="" isn't missed.
    """
    gpu = parallel.has_gpu()
    if dtype != "bfloat16":
        return
    if gpu and (capability := torch.cuda.get_device_capability()) < (8, 0):
        raise UserError(
            f"--dtype bfloat16: {torch.cuda.get_device_name()} can't compute in it (compute capability "
            f"{capability[0]}.{capability[1]}, needed: 8.0); use --dtype float32 with --lora, as "
            "`--config recipes/t4-16gb.args` does after a recipe of 24 GB"
        )
    if not gpu and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise UserError(
            f"--dtype bfloat16: torch is built for CUDA {torch.version.cuda} but finds no GPU: install or update its "
            "driver until `nvidia-smi` lists it, let the container or job have it, or give --dtype float32 to run on "
            "the CPU"
        )
