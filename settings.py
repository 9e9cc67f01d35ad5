"""What is read, how, and by which model: the settings that training and evaluation share, and what is loaded by them."""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from corpus import Passage, find_entities, load_passages
from errors import UserError
from masking import QUESTION, Corpus
from qa import LongQA, Pool, SearchQA, load_questions, load_search, objectives, split_questions, subject
from rollout import prompt_overhead
from sampling import Limits, end_ids

HERE = Path(__file__).parent


def option(default, help: str, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Setting:
    """What is read, how, and by which model. Training and evaluation share it."""

    model: str = option(str(HERE / "tiny/model"), "model folder or hub name")
    dtype: str = option("float32", "float32, or bfloat16 (training then keeps float32 master weights)", choices=["float32", "bfloat16"])
    seed: int = option(0, "documents, sampling and everything else random follow from it")

    task: str = option("memtrain", "memtrain (masked documents), longqa (questions in long texts) or searchqa", choices=["memtrain", "longqa", "searchqa"])
    questions: str = option(str(HERE / "tiny/questions.jsonl"), "longqa, searchqa: questions to train on, in the layout of HotpotQA, 2Wiki, MuSiQue or FlashRAG")
    eval_questions: str | None = option(None, "questions to evaluate on (default: those of --questions whose subject's hash says test)")
    eval_split: str = option("test", "without --eval-questions: test, or dev to choose settings by", choices=["dev", "test"])
    objectives: int = option(2, "searchqa: questions asked as one (paper: 2)")
    searches: int = option(6, "searchqa: most searches of an episode (paper: 6)")
    result_tokens: int = option(192, "searchqa: tokens of a search result (paper: 1024)")
    retriever: str = option("bm25", "searchqa: bm25 or dense over the corpus, or the http://... of a Search-R1 server")
    encoder: str | None = option(None, "searchqa: model of the dense retriever")

    corpus: str | None = option(None, "a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set (default: tiny/passages.jsonl, "
                                "to search in tiny/passages_all.jsonl)")  # fmt: skip
    corpus_config: str | None = option(None, "configuration of a hub data set, such as 20231101.en")
    corpus_split: str = option("train", "split of a hub data set")
    text_field: str = option("text", "field that holds the text")
    max_passages: int | None = option(None, "stop loading after this many passages")
    ner: str = option("rules", "'rules', or an installed spaCy pipeline such as en_core_web_sm")
    heldout: float = option(0.2, "share of the titles kept for evaluation: never a pivot, an answer or a recall target in training")

    chunk_tokens: int = option(64, "tokens of a chunk (paper: 5120)")
    chunks: int = option(4, "chunks of a training document, filled with passages to that length; with --passages the most it may have")
    passages: int | None = option(None, "passages of a training document instead of --chunks (paper: 150)")
    related: int = option(2, "passages of a document that are related to its pivot (paper: 29)")
    keep_leaky: bool = option(False, "keep documents in which a part of the answer's name remains")
    memory_tokens: int = option(64, "tokens of a memory (paper: 1024)")
    answer_tokens: int = option(16, "tokens of an answer (paper: 1024)")
    rollout_tokens: int = option(24576, "tokens of one generate batch, with padding; a prompt that rows share counts once")
    eval_documents: int = option(64, "held-out documents of each length in an evaluation; 0 leaves it out")

    @property
    def text(self) -> str:
        """--corpus, or else the tiny default that belongs to the task."""
        return self.corpus or str(HERE / "tiny" / ("passages_all.jsonl" if self.task == "searchqa" else "passages.jsonl"))


# Whatever is smaller is a mistake; numbers that are not here may be anything.
LEAST = dict.fromkeys(
    "lengths chunk_tokens chunks passages memory_tokens answer_tokens result_tokens rollout_tokens train_tokens max_passages objectives "
    "steps documents g1 update_batch sample_every save_every keep max_bad_steps".split(), 1
) | dict.fromkeys("seed related heldout eval_documents searches recall_weight lr lr_warmup grad_clip eps_low eps_high kl".split(), 0)  # fmt: skip


def parse(*dataclasses, saved: dict | None = None):
    """Instances of `dataclasses` from the command line, `--config FILE`s and, behind both, the values of `saved`."""
    for n, argument in enumerate(sys.argv):
        name = argument.partition("=")[2] or "".join(sys.argv[n + 1 : n + 2])
        if argument.split("=")[0] == "--config" and not Path(name).is_file():
            raise UserError(f"--config {name}: no such file; recipes/ holds those that come with the project")
    parser = HfArgumentParser(dataclasses)
    if {"-h", "--help"} & set(sys.argv[1:]):  # here, as the flag for files has a parser of its own that knows no other
        parser.print_help()
        sys.exit(0)
    parser.error = refuse
    parser.set_defaults(**{f.name: saved[f.name] for d in dataclasses for f in fields(d) if saved and f.name in saved})
    *parsed, rest = parser.parse_args_into_dataclasses(
        args_file_flag="--config", look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        raise UserError(f"unknown argument {rest[0]}; --help lists all of them")
    for values in parsed:
        for name, value in vars(values).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not (LEAST.get(name, -math.inf) <= number and math.isfinite(number)):
                    raise UserError(f"--{name.replace('_', '-')} {number}: must be a number of at least {LEAST.get(name, 0)}")
    if not parsed[0].heldout < 1:
        raise UserError(f"--heldout {parsed[0].heldout}: is a share, less than 1")
    return parsed


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists what can be given")


def check_model(name: str, given: str) -> None:
    """Raises UserError where `name`, given by this argument, can be no model's."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{given} {name}: holds no config.json, so it is no model folder")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{given} {name}: no such folder (a model of the hub is called OWNER/NAME)")


def load_model(name: str, device: str, dtype: str = "float32", given: str = "--model"):
    """(model in eval mode, tokenizer) of a folder or hub name, `given` by this argument. Raises UserError where it isn't one."""
    check_model(name, given)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the config, the weights, the tokenizer, a package that it needs: each fails in its own ways
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"{given} {name}: not a causal language model with its tokenizer ({type(error).__name__}: {why})") from None
    if not tokenizer.is_fast or not tokenizer("Ada")["input_ids"]:
        raise UserError(f"{given} {name}: its tokenizer is no fast one (tokenizer.json), or has no words; bring one that fits the model")
    if not end_ids(model, tokenizer):
        raise UserError(f"{given} {name}: neither its generation_config.json nor its tokenizer names a token that ends a text; name one")
    # Dropout stays off in train mode too, also what is read from the config: the ratio compares passes of one network.
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in attribute or "jitter" in attribute):
                setattr(holder, attribute, 0.0)
    return model.to(device).eval(), tokenizer


def load_text(setting: Setting, left_out: Counter | None) -> list[Passage]:
    """The passages of --corpus, as the settings beside it say; `left_out` counts those that can't be used."""
    return load_passages(
        setting.text, config=setting.corpus_config, split=setting.corpus_split, text_field=setting.text_field,
        max_passages=setting.max_passages, left_out=left_out,
    )  # fmt: skip


def load_corpus(setting: Setting, model, tokenizer, cache: Path, left_out: Counter | None = None) -> Corpus:
    """The masked documents of `setting`; `left_out` counts the passages that can't be used."""
    check_window(setting, model, tokenizer)
    passages = load_text(setting, left_out)
    find_entities(passages, setting.ner, cache)
    return Corpus(
        passages, tokenizer, seed=setting.seed, n_passages=setting.passages, n_related=setting.related,
        n_chunks=None if setting.passages else setting.chunks, chunk_tokens=setting.chunk_tokens,
        max_chunks=setting.chunks if setting.passages else None, keep_leaky=setting.keep_leaky, heldout=setting.heldout,
    )  # fmt: skip


def check_window(setting: Setting, model, tokenizer, question: str = QUESTION) -> None:
    """Raises UserError where a conversation about `question`, the longest, can't fit the model's window."""
    if setting.task == "searchqa":  # the last query stands beside its result
        shown, written = ("result_tokens", "memory_tokens"), setting.memory_tokens + setting.answer_tokens
    else:
        shown, written = ("chunk_tokens",), max(setting.memory_tokens, setting.answer_tokens)
    asked = prompt_overhead(tokenizer) + len(tokenizer(question)["input_ids"])
    needed = asked + sum(getattr(setting, name) for name in shown) + setting.memory_tokens + written
    config = model.config.get_text_config()
    window, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if window and rope.get("rope_type") in ("longrope", "dynamic"):  # beyond this a row's positions depend on its batch
        window = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or window
    if window and needed > window:
        raise UserError(
            f"--{shown[0].replace('_', '-')} {getattr(setting, shown[0])}, --memory-tokens {setting.memory_tokens} and --answer-tokens "
            f"{setting.answer_tokens} need a window of {needed} tokens, {model.config.name_or_path} has {window}; make them smaller"
        )


def load_source(setting: Setting, model, tokenizer, cache: Path, left_out: Counter | None = None):
    """What `--task` trains and evaluates on, as something with `document(index, split, chunks)`."""
    if setting.task == "memtrain":
        return load_corpus(setting, model, tokenizer, cache, left_out)
    if setting.task == "longqa":
        train = load_questions(setting.questions)
        other = load_questions(setting.eval_questions) if setting.eval_questions else None
        questions = split_questions(train, other, subject)
        asked = [question.question for part in questions.values() for question in part]
        passages = load_text(setting, left_out)
        pool = Pool([(passage.title, passage.text) for passage in passages], tokenizer)
        source = LongQA(questions, pool, seed=setting.seed, chunk_tokens=setting.chunk_tokens, chunks=setting.chunks)
    else:
        train = load_search(setting.questions)
        other = load_search(setting.eval_questions) if setting.eval_questions else None
        # The split is by question here: a file of FlashRAG's fields doesn't name its subjects.
        questions = split_questions(train, other, lambda item: item[0])
        questions = {name: objectives(items, setting.objectives) for name, items in questions.items()}
        asked = [question for part in questions.values() for question, _ in part]
        source = SearchQA(questions, setting.seed)
    for name in ("train", setting.eval_split):
        if not source.questions[name]:
            raise UserError(f"--questions {setting.questions}: no question is left for {name!r}; bring more, or --eval-questions")
    check_window(setting, model, tokenizer, max(asked, key=len))
    return source


def limits(setting: Setting) -> Limits:
    return Limits(setting.memory_tokens, setting.answer_tokens, setting.rollout_tokens, setting.result_tokens, setting.searches)
