"""How good a memory is: end-to-end and recall accuracy by document length, on pivots held out of training.

    python eval.py --model runs/tiny/checkpoint

prints a table and writes the same rows as JSON. Each number stands beside its control: the same
question with an empty memory, which tells what the model knows, or what the text gives away, without
having remembered anything.
"""

import errno
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from corpus import find_entities, load_passages
from masking import QUESTION, Corpus, draw_recall
from parallel import gather
from qa import LongQA, Pool, SearchQA, load_questions, load_search, objectives, split_questions, subject
from retrieval import UserError, open_retriever
from rewards import boxed, exact_match, f1_score, objective_scores, substring_match
from rollout import EMPTY_MEMORY, Limits, answer, cut, prompt_overhead, read, recall, search

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

    corpus: str = option(str(HERE / "tiny/passages.jsonl"), "a .jsonl, .json, .parquet or .txt file, a folder of them, or a hub data set")
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
    rollout_tokens: int = option(24576, "padded tokens of one generate batch")
    eval_documents: int = option(64, "held-out documents of each length in an evaluation; 0 leaves it out")


# Whatever is smaller is a mistake; numbers that are not here may be anything.
LEAST = dict.fromkeys(
    "lengths chunk_tokens chunks passages memory_tokens answer_tokens result_tokens rollout_tokens train_tokens max_passages objectives "
    "steps documents g1 update_batch sample_every save_every keep max_bad_steps".split(), 1
) | dict.fromkeys("seed related heldout eval_documents searches recall_weight lr lr_warmup grad_clip eps_low eps_high kl".split(), 0)  # fmt: skip


@dataclass
class Evaluation:
    lengths: list[int] | None = field(default=None, metadata={"help": "numbers of chunks (default: trained length x 1/2, 1, 2, 4, 8)"})
    controls: list[str] = field(default_factory=lambda: ["empty"], metadata={"help": "longqa: any of empty, full, oracle; the other tasks: empty"})
    against: list[str] = field(default_factory=list, metadata={"help": "further models, on the same questions: differences with a paired bootstrap"})
    plot: str | None = option(None, "where to write a plot of accuracy by length (needs matplotlib)")
    out: str | None = option(None, "where the rows go as JSON (default: eval.json in the model's folder if that is local)")


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
                if isinstance(number, int | float) and not LEAST.get(name, -math.inf) <= number <= math.inf:  # nor NaN
                    raise UserError(f"--{name.replace('_', '-')} {number}: must be a number of at least {LEAST.get(name, 0)}")
    if not parsed[0].heldout < 1:
        raise UserError(f"--heldout {parsed[0].heldout}: is a share, less than 1")
    return parsed


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists what can be given")


def run(main) -> None:
    """Call `main`; a user's mistake is one line and exit code 2, anything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({error}): free some space and run the same command again", file=sys.stderr)
        sys.exit(2)


def load_model(name: str, device: str, dtype: str = "float32"):
    """(model in eval mode, tokenizer) of a folder or hub name. Raises UserError where it isn't one."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: holds no config.json, so it is no model folder")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model {name}: no such folder (a model of the hub is called OWNER/NAME)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: not a causal language model with its tokenizer ({str(error).splitlines()[0]})") from None
    for module in model.modules():  # dropout stays off in train mode too: the ratio compares passes of one network
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.generation_config.cache_implementation = None  # rollout.py brings its own
    return model.to(device).eval(), tokenizer


def load_corpus(setting: Setting, model, tokenizer, cache: Path, left_out: Counter | None = None) -> Corpus:
    """The masked documents of `setting`; `left_out` counts the passages that can't be used."""
    check_window(setting, model, tokenizer)
    passages = load_passages(
        setting.corpus, config=setting.corpus_config, split=setting.corpus_split, text_field=setting.text_field,
        max_passages=setting.max_passages, left_out=left_out,
    )  # fmt: skip
    find_entities(passages, setting.ner, cache)
    return Corpus(
        passages, tokenizer, seed=setting.seed, n_passages=setting.passages, n_related=setting.related,
        n_chunks=None if setting.passages else setting.chunks, chunk_tokens=setting.chunk_tokens,
        max_chunks=setting.chunks if setting.passages else None, keep_leaky=setting.keep_leaky, heldout=setting.heldout,
    )  # fmt: skip


def check_window(setting: Setting, model, tokenizer) -> None:
    """Raises UserError where a conversation can't fit the model's window."""
    question = len(tokenizer(QUESTION)["input_ids"])
    if setting.task == "searchqa":  # the last query stands beside its result
        shown, written = setting.result_tokens + setting.memory_tokens, setting.memory_tokens + setting.answer_tokens
    else:
        shown, written = setting.chunk_tokens, max(setting.memory_tokens, setting.answer_tokens)
    needed = prompt_overhead(tokenizer) + question + shown + setting.memory_tokens + written
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and needed > window:
        raise UserError(
            f"--chunk-tokens {setting.chunk_tokens}, --memory-tokens {setting.memory_tokens} and --answer-tokens "
            f"{setting.answer_tokens} need a window of {needed} tokens, {setting.model} has {window}; make them smaller"
        )


def load_source(setting: Setting, model, tokenizer, cache: Path, left_out: Counter | None = None):
    """What `--task` trains and evaluates on, as something with `document(index, split, chunks)`."""
    if setting.task == "memtrain":
        return load_corpus(setting, model, tokenizer, cache, left_out)
    check_window(setting, model, tokenizer)
    if setting.task == "longqa":
        train = load_questions(setting.questions)
        other = load_questions(setting.eval_questions) if setting.eval_questions else None
        questions = split_questions(train, other, subject)
        passages = load_passages(setting.corpus, config=setting.corpus_config, split=setting.corpus_split, text_field=setting.text_field,
                                 max_passages=setting.max_passages, left_out=left_out)  # fmt: skip
        pool = Pool([(passage.title, passage.text) for passage in passages], tokenizer)
        source = LongQA(questions, pool, seed=setting.seed, chunk_tokens=setting.chunk_tokens, chunks=setting.chunks)
    else:
        train = load_search(setting.questions)
        other = load_search(setting.eval_questions) if setting.eval_questions else None
        # The split is by question here: a file of FlashRAG's fields doesn't name its subjects.
        questions = split_questions(train, other, lambda item: item[0])
        source = SearchQA({name: objectives(items, setting.objectives) for name, items in questions.items()}, setting.seed)
    for name in ("train", setting.eval_split):
        if not source.questions[name]:
            raise UserError(f"--questions {setting.questions}: no question is left for {name!r}; bring more, or --eval-questions")
    return source


def limits(setting: Setting) -> Limits:
    return Limits(setting.memory_tokens, setting.answer_tokens, setting.rollout_tokens, setting.result_tokens, setting.searches)


def score(prediction: str | None, document) -> float:
    """Exact match, 0 or 1; of several objectives their mean."""
    several = bool(document.answers) and isinstance(document.answers[0], list)
    return objective_scores(prediction, document.answers) if several else float(exact_match(prediction, document.answers))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927), which stays inside 0..1 and is sound for small n."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # rounding may step outside


def evaluate(
    model, tokenizer, corpus: Corpus, setting: Setting, lengths: list[int], when: str, rank: int = 0, processes: int = 1
) -> list[dict]:
    """Greedy accuracy on `eval_documents` held-out documents of each number of chunks in `lengths`.

    One row per length, task (end_to_end, recall) and memory (kept, empty): when, task, chunks, memory, n,
    accuracy, low, high, and scores, one a document in an order that is the same for every model. Several processes share
    the documents, and all get all rows.
    """
    documents, budget = [], limits(setting)
    for chunks in lengths:
        try:
            documents += [corpus.document(i, "heldout", chunks=chunks) for i in range(setting.eval_documents)]
        except UserError as error:  # a small corpus can't fill the longest documents
            if rank == 0:
                print(f"evaluation at {chunks} chunks is left out: {error}")
    documents = documents[rank::processes]
    shown = f"evaluation {when}" if rank == 0 else None
    trajectories = read(model, tokenizer, documents, budget, greedy=True, progress=shown)
    draws = []
    for t in trajectories:
        rng = np.random.default_rng([setting.seed, len(t.document.chunks), t.document.index])
        if draw := draw_recall(t.document, rng):
            draws.append((t, draw))
    right: dict[tuple, list[bool]] = {}
    for memory in ("kept", "empty"):
        empty = memory == "empty"
        answered = read(model, tokenizer, documents, budget, greedy=True, empty_memory=True) if empty else trajectories
        for t in answered:
            key = (len(t.document.chunks), "end_to_end", memory)
            right.setdefault(key, []).append(exact_match(t.prediction, t.document.answers))
        recalled = recall(model, tokenizer, draws, budget, greedy=True, empty_memory=empty)
        for (t, draw), (turn,) in zip(draws, recalled, strict=True):
            key = (len(t.document.chunks), "recall", memory)
            right.setdefault(key, []).append(exact_match(boxed(turn.text), [draw.entity]))
    parts, right = gather(right), {}
    for part in parts:
        for key, hits in part.items():
            right.setdefault(key, []).extend(hits)
    rows = []
    for (chunks, task, memory), hits in sorted(right.items(), key=lambda item: (item[0][1], item[0][0], item[0][2] != "kept")):
        low, high = wilson(sum(hits), len(hits))
        rows.append(
            {"when": when, "task": task, "chunks": chunks, "memory": memory, "n": len(hits),
             "accuracy": sum(hits) / len(hits), "low": low, "high": high, "scores": [float(hit) for hit in hits]}
        )  # fmt: skip
    return rows


def evaluate_questions(
    model, tokenizer, source, setting: Setting, lengths: list[int], when: str, rank: int = 0, processes: int = 1,
    retriever=None, controls: tuple[str, ...] = ("kept", "empty"),
) -> list[dict]:  # fmt: skip
    """Greedy exact match, F1 and substring match on `eval_documents` questions: longqa at each length, searchqa once.

    controls: "kept" is the agent itself; the others answer in one step, from "empty" memory, from the "full" text as far
    as the window allows, from the "oracle" memory, which is the gold paragraphs. One row each; `scores` are per question,
    in an order that is the same for every model.
    """
    indices, found, budget = range(setting.eval_documents)[rank::processes], {}, limits(setting)
    shown = f"evaluation {when}" if rank == 0 else None
    lengths = lengths if setting.task == "longqa" else [setting.objectives]
    places = [(length, i) for length in lengths for i in indices]
    documents = [source.document(i, setting.eval_split, length) for length, i in places]
    for control in controls:
        if control == "kept" and setting.task == "searchqa":
            predictions = [t.prediction for t in search(model, tokenizer, documents, retriever, budget, greedy=True, progress=shown)]
        elif control == "kept":  # all lengths together: short documents fill the batches of the long ones
            predictions = [t.prediction for t in read(model, tokenizer, documents, budget, greedy=True, progress=shown)]
        else:
            memories = [control_memory(control, document, model, tokenizer, setting) for document in documents]
            predictions = [boxed(turn.text) for turn in answer(model, tokenizer, documents, memories, budget, greedy=True)]
        for (length, i), p, d in zip(places, predictions, documents, strict=True):
            more = (f1_score(p, d.answers), substring_match(p, d.answers)) if setting.task == "longqa" else (0.0, 0.0)
            found.setdefault((length, control), {})[i] = score(p, d), *more
    parts, rows = gather(found), []
    for length, control in ((length, control) for length in lengths for control in controls):
        scores = [value for _, value in sorted(item for part in parts for item in part.get((length, control), {}).items())]
        exact, f1, substring = np.mean(scores, axis=0).tolist()
        low, high = wilson(exact * len(scores), len(scores))
        more = {"f1": f1, "substring": substring} if setting.task == "longqa" else {}
        rows.append(
            {"when": when, "task": setting.task, "chunks": length, "memory": control, "n": len(scores), "accuracy": exact, "low": low,
             "high": high, **more, "scores": [one[0] for one in scores]}
        )  # fmt: skip
    return rows


def control_memory(control: str, document, model, tokenizer, setting: Setting) -> str:
    """What stands in for the memory in a control that doesn't read."""
    if control == "empty":
        return EMPTY_MEMORY
    if setting.task == "searchqa":
        raise UserError(f"--controls {control}: search questions come without a text; use empty")
    if control == "oracle":
        return document.gold or EMPTY_MEMORY
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    question = len(tokenizer(document.question)["input_ids"])
    return cut(tokenizer, "".join(document.chunks), window - prompt_overhead(tokenizer) - question - setting.answer_tokens)


def paired_bootstrap(first: list[float], second: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(mean of second - first, 95 % interval) on the same questions, by drawing the questions again (Efron 1979)."""
    difference = np.asarray(second) - np.asarray(first)  # (questions,)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(1)  # (draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def table(rows: list[dict]) -> str:
    """The rows as a markdown table: a line per task and memory, a column per number of chunks."""
    lengths = sorted({row["chunks"] for row in rows})
    if not rows:
        return "no document could be built, so nothing was evaluated"
    unit = "objectives" if rows[0]["task"] == "searchqa" else "chunks"
    lines = ["| | memory | " + " | ".join(f"{c} {unit}" for c in lengths) + " |", "|---|---|" + "---|" * len(lengths)]
    for key in dict.fromkeys((row["task"], row["when"], row["memory"]) for row in rows):
        task, when, memory = key
        cells = []
        for chunks in lengths:
            row = next((r for r in rows if (r["task"], r["when"], r["memory"]) == key and r["chunks"] == chunks), None)
            cells.append(f"{row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row else "-")
        lines.append(f"| {task}, {when} | {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def default_lengths(trained: int) -> list[int]:
    """Trained length x 1/2, 1, 2, 4, 8."""
    return sorted({max(1, trained // 2), trained, 2 * trained, 4 * trained, 8 * trained})


def load_pyplot():
    """matplotlib's pyplot, drawing to files only; None where it isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(rows: list[dict], file: str) -> None:
    """Accuracy by number of chunks, a line per model, task and memory, with its 95 % interval."""
    if not (pyplot := load_pyplot()):
        raise UserError("--plot: matplotlib is not installed; run `pip install matplotlib`, or leave --plot out")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in dict.fromkeys((row["when"], row["task"], row["memory"]) for row in rows):
        mine = sorted((row for row in rows if (row["when"], row["task"], row["memory"]) == key), key=lambda row: row["chunks"])
        x, y = [row["chunks"] for row in mine], [row["accuracy"] for row in mine]
        spread = [[row["accuracy"] - row["low"] for row in mine], [row["high"] - row["accuracy"] for row in mine]]
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=2, label=" ".join(key), linestyle="-" if key[2] == "kept" else "--")
    axes.set(xscale="log", ylim=(0, 1), xlabel="chunks", ylabel="accuracy, greedy")
    axes.set_xticks(x, labels=map(str, x))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    setting, _ = parse(Setting, Evaluation)
    saved: dict = {}  # of the run that wrote this checkpoint, runs/NAME/checkpoint or runs/NAME/checkpoints/step-N
    if trained := next((file for folder in Path(setting.model).parents[:2] if (file := folder / "config.json").is_file()), None):
        saved = {name: value for name, value in json.loads(trained.read_text()).items() if name not in ("model", "out")}
    setting, evaluation = parse(Setting, Evaluation, saved=saved)
    if bad := [control for control in evaluation.controls if control not in ("empty", "full", "oracle")]:
        raise UserError(f"--controls {bad[0]}: choose from empty, full and oracle")
    if setting.task == "memtrain" and evaluation.controls != ["empty"]:
        raise UserError(f"--controls {' '.join(evaluation.controls)}: masked documents have the control empty only")
    if setting.eval_documents < 1:
        raise UserError("--eval-documents 0: nothing to evaluate; ask for at least one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(setting.model)
    out = Path(evaluation.out) if evaluation.out else folder / "eval.json" if folder.is_dir() else Path("eval.json")
    retriever = open_retriever(setting.retriever, setting.corpus, setting.encoder) if setting.task == "searchqa" else None
    lengths, rows = evaluation.lengths or default_lengths(setting.chunks), []
    for name in (setting.model, *evaluation.against):
        model, tokenizer = load_model(name, device, setting.dtype)
        source = load_source(setting, model, tokenizer, out.parent / ".entities")
        when = name if evaluation.against else "now"
        if setting.task == "memtrain":
            rows += evaluate(model, tokenizer, source, setting, lengths, when)
        else:
            controls = ("kept", *evaluation.controls)
            rows += evaluate_questions(model, tokenizer, source, setting, lengths, when, retriever=retriever, controls=controls)
    print(table(rows))
    for row in rows:
        first = next(r for r in rows if all(r[k] == row[k] for k in ("task", "chunks", "memory")))
        if first is not row and "scores" in row:
            mean, low, high = paired_bootstrap(first["scores"], row["scores"])
            print(f"{row['when']} - {first['when']}, {row['memory']}, {row['chunks']}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"95 % intervals; n = {setting.eval_documents} a length; rows in {out}")
    out.write_text(json.dumps(rows, indent=1))
    if evaluation.plot:
        plot(rows, evaluation.plot)


if __name__ == "__main__":
    run(main)
