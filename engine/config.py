"""The settings of a run, read from flags and files."""

import math
import os
import re
import shlex
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
    """A dataclass field with its help text; `more` are further arguments for argparse."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, **more})


@dataclass
class Config:
    """All settings of a run. The defaults are for the tiny model; recipes/ has settings for real ones."""

    model: str = option(str(ROOT / "tiny/model"), "model folder or hub name")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights; bfloat16 training keeps float32 masters")
    lora: int = option(0, "rank of a LoRA adapter, trained instead of all weights (needs peft); 0: no adapter")
    seed: int = option(0, "seed of documents, sampling and everything else random")
    fast: bool = option(
        False, "sample and train faster, with the twins in fast/: the same results but for rounding and order of draws"
    )
    date: str | None = option(None, "date given to chat templates, such as 2026-07-31 (default: the run's first day)")
    explain: bool = option(False, "print one training step in full, and save nothing but caches")

    # The task
    task: Literal["memtrain", "longqa", "searchqa"] = option("memtrain", "masked documents, or questions with answers")
    questions: str = option(str(ROOT / "tiny/questions.jsonl"), "file of HotpotQA, 2Wiki, MuSiQue or FlashRAG records")
    eval_questions: str | None = option(None, "file to evaluate on (default: the part --eval-split of --questions)")
    eval_split: Literal["dev", "test"] = option("test", "part of --questions to evaluate on (dev: to choose settings)")
    objectives: int = option(2, "searchqa: questions asked as one (paper: 2)")
    searches: int = option(6, "searchqa: most searches in an episode (paper: 6)")
    result_tokens: int = option(192, "searchqa: most tokens of a search result (paper: 1024)")
    retriever: str = option("bm25", "searchqa: bm25 over --corpus, or the URL (http://...) of a Search-R1 server")

    # The text
    corpus: str | None = option(
        None,
        "a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set; an article's title is the field "
        "title, by which articles are held out; searchqa: one .jsonl file of "
        "{title, text} or {contents} (default: tiny/passages.jsonl, for searchqa tiny/passages_all.jsonl)",
    )
    corpus_config: str | None = option(None, "configuration of a hub data set, such as 20231101.en")
    text_field: str = option("text", "the corpus's field that holds the text")
    max_passages: int | None = option(None, "stop loading after this many passages (default: load all)")
    ner: str = option("rules", "what finds entities: 'rules', or an installed spaCy pipeline such as en_core_web_sm")
    heldout: float = option(0.2, "share of titles kept for evaluation: no pivot, answer or recall target in training")

    # A document, and the texts of an agent
    chunk_tokens: int = option(64, "most tokens of a chunk (paper: 5120)")
    chunks: int = option(4, "chunks of a training document; with --passages, the most it may have")
    passages: int | None = option(
        None, "passages of a training document (paper: 150; default: as many as fill --chunks chunks)"
    )
    related: int = option(2, "passages of a document that are related to its pivot (paper: 29)")
    keep_leaky: bool = option(False, "keep documents in which a part of the answer's name remains")
    memory_tokens: int = option(64, "most tokens of a memory, a thought before it included (paper: 1024)")
    answer_tokens: int = option(16, "most tokens of an answer, a thought before it included (paper: 1024)")
    rollout_tokens: int = option(24576, "most tokens of one generate batch, padding included")
    eval_documents: int = option(
        64, "held-out documents (of a task: test questions) per length in an evaluation; 0: no evaluation"
    )

    # Training: the rollout and its rewards
    out: str = option(
        "runs/tiny", "folder of this run; the same command resumes it until it is finished, another run is refused"
    )
    steps: int = option(22, "training steps; each reads its documents, then updates (paper: 300)")
    documents: int = option(8, "documents per step (paper: 32)")
    g1: int = option(8, "trajectories per document: a group")
    g2: int = option(4, "recall answers per trajectory: a group (paper: 8)")
    recall_weight: float = option(0.5, "lambda of Eq. 2: weight of recall in R^E")
    ablation: Literal["none", "end_to_end", "decoupled", "shuffled_rewards"] = option(
        "none",
        "end_to_end: no recall at all; decoupled: recall is trained but left out of R^E; shuffled_rewards, a control: "
        "rewards are permuted at random within each group",
    )
    shared_recall_draw: bool = option(False, "draw what to recall once for all trajectories of a document")

    # Training: the update
    lr: float = option(2e-4, "peak learning rate of AdamW (paper: 1e-6)")
    lr_warmup: int = option(2, "steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "cosine decays to zero over all steps")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    advantage: Literal["group_norm", "mean"] = option(
        "group_norm", "mean: reward minus the group's mean (Eq. 3, paper); group_norm: also divided by the group's std"
    )
    eps_low: float = option(0.2, "clip range of the ratio below 1")
    eps_high: float = option(0.2, "clip range of the ratio above 1")
    kl: float = option(0.0, "beta: weight of the KL to the starting model (paper: 1e-3); 0: no reference is loaded")
    update_batch: int | None = option(None, "documents per update (default: all of a step)")
    train_tokens: int = option(4096, "most padded tokens of a micro-batch; gradients are summed over micro-batches")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, slower")
    offload_optimizer: bool = option(False, "keep master weights and moments, 12 bytes per parameter, in CPU memory")
    offload_reference: bool = option(False, "keep the reference in CPU memory while it isn't used")
    shard_optimizer: bool = option(False, "with torchrun: shard master weights and moments over the processes")

    # Training: what is written, and when
    sample_every: int = option(10, "steps between samples, a line on the terminal and more in samples.jsonl")
    save_every: int = option(100, "steps between checkpoints; one is also written at the end")
    keep: int = option(2, "newest checkpoints to keep; older ones are deleted")

    @property
    def corpus_name(self) -> str:
        """--corpus, or the task's default in tiny/."""
        passages = "passages_all.jsonl" if self.task == "searchqa" else "passages.jsonl"
        return self.corpus or str(ROOT / "tiny" / passages)

    @property
    def asks_tiny(self) -> bool:
        """Whether --questions is the tiny default's file, also for a run made in another folder."""
        return Path(self.questions).match("tiny/questions.jsonl")

    @property
    def cache(self) -> Path:
        """The folder of cached entities, shared by all runs in the same parent folder."""
        return Path(self.out or "runs/none").parent / ".entities"

    @property
    def has_recall(self) -> bool:
        """Whether trajectories are asked to recall."""
        return self.task == "memtrain" and self.ablation != "end_to_end"

    @property
    def joint_weight(self) -> float:
        """Lambda of Eq. 2; 0 with --ablation decoupled, where recall is trained but left out of R^E."""
        return 0.0 if self.ablation == "decoupled" else self.recall_weight


# ---- flags ---------------------------------------------------------------------------------------------

OF_QUESTIONS = ("questions", "eval_questions", "eval_split")  # settings of the tasks that ask questions
OF_SEARCH = ("objectives", "searches", "result_tokens", "retriever")  # and of searchqa alone
IGNORED = {"memtrain": (*OF_QUESTIONS, *OF_SEARCH), "longqa": OF_SEARCH, "searchqa": ()}  # by task
# Whole numbers that may be 0; others are at least 1. Fractions are at least 0.
MAY_BE_ZERO = {"seed", "lora", "lr_warmup", "related", "eval_documents", "searches", "g2"}


def flag(name: str) -> str:
    """A setting as a command-line flag: "--chunk-tokens" for chunk_tokens."""
    return f"--{name.replace('_', '-')}"


def run_with_flags(main, flags: type, follow_model: bool = False) -> None:
    """Call `main` with the command line's settings; a user's mistake ends with one line and exit code 2."""
    errors.run_script(lambda: main(parse(flags, follow_model)))


def parse(flags: type, follow_model: bool = False, arguments: list[str] | None = None):
    """An instance of the dataclass `flags`, from `arguments` (default: the command line) and their `--config FILE`s.

    With `follow_model` the defaults are the settings of the run that wrote --model. Raises UserError.
    """
    arguments = with_files(flags, sys.argv[1:] if arguments is None else arguments)
    config = parse_with(flags, {}, arguments)
    if follow_model and config.model != Config.model:
        from engine.saved import saved_settings

        saved = saved_settings(config.model)
        config = parse_with(flags, saved, arguments)
        # The run's questions were for its own task.
        unused = IGNORED[config.task if config.task == saved.get("task") else "memtrain"]
        config = parse_with(flags, {name: value for name, value in saved.items() if name not in unused}, arguments)
    check_numbers(config)
    return config


def with_files(flags: type, arguments: list[str]) -> list[str]:
    """The words of each `--config FILE`, then all other arguments: the last value of a flag wins. Raises UserError."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--config", action="append", default=[])
    given, own = parser.parse_known_args(arguments)
    words = []
    for file in map(Path, given.config):
        if not file.is_file():
            raise UserError(f"--config {file}: no such file; those of the project are in recipes/")
        found = words_of(file)
        try:
            check_numbers(parse_with(flags, {}, found))  # now, so that a mistake is told with its file
        except UserError as error:
            raise UserError(f"--config {file}: {error}") from None
        words += found
    return [with_home(word) for word in words + own]


def with_home(word: str) -> str:
    """The word with the user's folder in place of ~ at its start, or after --flag=, where no shell puts it."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return name + equals + os.path.expanduser(value)


def words_of(file: Path) -> list[str]:
    """The words of a settings file: quotes, and comments from a word that begins with #. Raises UserError."""
    quoted_or_comment = r"""(?m)("[^"\n]*"|'[^'\n]*')|(?:^|(?<=\s))#.*"""
    try:  # not shlex's own comments: they begin within a word, too (runs/try#2)
        words = shlex.split(re.sub(quoted_or_comment, lambda found: found[1] or "", file.read_text("utf-8-sig")))
    except (OSError, ValueError) as error:  # not UTF-8, or a quotation without its end
        raise UserError(f"--config {file}: can't be read ({error}); save it as UTF-8 text, each quote closed") from None
    if words and not words[0].startswith("--"):
        raise UserError(f"--config {file}: begins with {words[0]!r}, not with a flag; write flags such as --steps 5")
    if any(word.split("=")[0] == "--config" for word in words):
        raise UserError(f"--config {file}: can't contain --config; give both files on the command line")
    return words


def parse_with(flags: type, defaults: dict, arguments: list[str]):
    """The settings in `arguments`; `defaults` replace those of the dataclass. Raises UserError."""
    epilog = (
        "--config FILE reads settings from a file of flags, in which # begins a comment; several may be given, and the "
        "command line overrides them."
    )
    about = sys.modules["__main__"].__doc__
    parser = HfArgumentParser([flags], description=about, epilog=epilog, formatter_class=Help, allow_abbrev=False)
    parser.error = refuse
    parser.set_defaults(**{f.name: defaults[f.name] for f in fields(flags) if f.name in defaults})
    config, rest = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        if rest[0].startswith("-"):
            raise UserError(f"unknown argument {rest[0]}; --help lists all of them")
        raise UserError(
            f"{rest[0]}: belongs to no flag; quote a path that has spaces, name a folder instead of several files, and "
            "put --config before each settings file"
        )
    return config


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The script's docstring unchanged, then each flag with its default, unless its text tells it."""

    def _get_help_string(self, action):
        return action.help if "(default:" in (action.help or "") else super()._get_help_string(action)


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists all arguments")


def check_numbers(config) -> None:
    """Raises UserError for a number that is too small for its setting, or not finite."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            least = 1 if isinstance(number, int) and name not in MAY_BE_ZERO else 0
            if not (least <= number and math.isfinite(number)):
                raise UserError(f"{flag(name)} {number}: must be a number of at least {least}")
    if not config.heldout < 1:
        raise UserError(f"--heldout {config.heldout}: is a share of the titles, so it must be less than 1")


# ---- what is missing ------------------------------------------------------------------------------------


# Versions of transformers on which the tests have run: fast/ uses private parts of it, the default does not.
TESTED = ("5.23", "5.24")


def check(config: Config) -> None:
    """Raises UserError for what is missing or can't work, before a model is loaded or a passage is streamed."""
    if config.fast and installed.rpartition(".")[0] not in TESTED:
        raise UserError(
            f"--fast True: tested with transformers {' and '.join(TESTED)}, but {installed} is installed; install one "
            "of these, or leave --fast out"
        )
    check_bfloat16(config.dtype)
    try:
        config.date = config.date and date.fromisoformat(config.date).isoformat()
    except ValueError:
        raise UserError(f"--date {config.date}: must be a date such as 2026-07-31") from None
    if config.g1 < 2 or (config.g2 < 2 and config.has_recall):
        raise UserError("--g1 and --g2 must be at least 2: an advantage compares the samples of a group")
    if config.lora:
        from engine.lora import check_peft

        check_peft(f"--lora {config.lora}:")
    if config.task != "searchqa":
        is_of_hub(config.corpus_name)  # raises unless it is a hub data set, or an existing file or folder
    check_of_task(config)
    if config.task == "memtrain":
        check_ner(config.ner)
    else:
        for name in ("questions", "eval_questions"):
            file = getattr(config, name)
            if file and not Path(file).is_file():
                raise UserError(f"{flag(name)} {file}: no such file")
    if config.task == "searchqa" and config.retriever == "bm25" and not Path(config.corpus_name).is_file():
        raise UserError(
            f"--corpus {config.corpus_name}: no such file; searchqa needs one .jsonl file of {{title, text}} or "
            "{contents}, not a folder or a hub data set"
        )


def check_of_task(config: Config) -> None:
    """Raises UserError for a setting of questions or searches that the task would ignore."""
    for name in IGNORED[config.task]:
        default = config.asks_tiny if name == "questions" else getattr(config, name) == getattr(Config, name)
        if not default:
            why = "doesn't search; add --task searchqa"
            if config.task == "memtrain":
                why = "asks no questions; add --task longqa or --task searchqa"
            raise UserError(f"{flag(name)}: --task {config.task} {why}")


def check_bfloat16(dtype: str) -> None:
    """Raises UserError if bfloat16 would run on the CPU because no GPU is found, or on a GPU that doesn't support it.

    torch itself calls it supported on every GPU. CUDA_VISIBLE_DEVICES="" hides the GPU on purpose: no error.
    """
    gpu = parallel.has_gpu()
    if dtype != "bfloat16":
        return
    if gpu and (capability := torch.cuda.get_device_capability()) < (8, 0):
        raise UserError(
            f"--dtype bfloat16: {torch.cuda.get_device_name()} doesn't support it (compute capability "
            f"{capability[0]}.{capability[1]}, needed: 8.0); use --dtype float32 with --lora, as "
            "`--config recipes/t4-16gb.args` does when given after a 24gb recipe"
        )
    if not gpu and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise UserError(
            f"--dtype bfloat16: torch is built for CUDA {torch.version.cuda} but finds no GPU: install or update the "
            "driver until `nvidia-smi` lists the GPU, give the container or job access to it, or run on the CPU with "
            "--dtype float32"
        )
