"""How good a memory is: end-to-end and recall accuracy by document length, on pivots held out from training.

For a task: exact match on its test questions.

    python eval.py --model runs/tiny/checkpoint
    python eval.py --report runs/tiny          # writes a run's page, report.html; evaluates nothing

The first prints a table and writes its rows as JSON. Next to each number is a control: the same question with an empty
memory, which shows how much can be answered without one.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

import rollout
from engine import metrics, models, parallel
from engine.config import Config, check, flag, option, run_with_flags
from engine.errors import UserError
from engine.files import check_writable
from engine.saved import run_of
from masking import HELDOUT_RECALL_DRAW, Document, draw_recall, load_corpus
from rewards import answer_reward, recall_reward
from rollout import ANSWER_PROMPT, READ_PROMPT, RECALL_PROMPT, Budget, Sampler, prompt_overhead, read, recall

# ---- also used by training -------------------------------------------------------------------------------


def load_task(config: Config, model, tokenizer, left_out: Counter | None = None) -> tuple:
    """(source, agent) of --task: source.document(i, split, chunks) -> Document, agent(sample, documents, config, ...).

    For --task memtrain: masking.Corpus, and rollout.read. `left_out` counts unusable passages by reason. Raises
    UserError.
    """
    if config.task == "memtrain":
        source, agent = load_corpus(config, tokenizer, left_out), read
    else:
        from tasks.sources import load_questions_task

        source, agent = load_questions_task(config, tokenizer, left_out)
    check_fits(config, model, tokenizer, source)
    return source, agent


def check_fits(config: Config, model, tokenizer, source) -> None:
    """Raises UserError if a turn about the task's longest question may not fit the model's context window."""
    memory, answer = config.memory_tokens, config.answer_tokens
    if config.task == "searchqa":
        from tasks.search import SEARCH_PROMPT

        prompts, setting = [SEARCH_PROMPT], "result_tokens"
        shown = memory + memory + config.result_tokens  # the notes; the last search, as long at most; its result
        written = memory + answer  # the new notes, and a search or an answer
    else:
        prompts, setting = [READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT], "chunk_tokens"
        shown = memory + config.chunk_tokens
        written = max(memory, answer)
    question = len(tokenizer(source.longest_question)["input_ids"])
    tokens = prompt_overhead(tokenizer, *prompts) + question + shown + written
    window = models.window_of(model)
    if tokens > window:
        raise UserError(
            f"{flag(setting)} {getattr(config, setting)}, --memory-tokens {memory} and --answer-tokens {answer} need a "
            f"window of {tokens} tokens, but {model.config.name_or_path} has {window}; make them smaller"
        )


def evaluate(
    sample: Sampler, agent, source, config: Config, when: str, lengths: list[int] | None = None,
    controls: tuple[str, ...] = ("empty",),
) -> list[dict]:
    """Greedy accuracy on the task's held-out documents by length in chunks -> rows of engine/metrics.py.

    Each process reads its share; all get all rows, labelled `when`. Default lengths: --chunks x 1/2, 1, 2, 4, 8.
    """
    greedy = replace(sample, greedy=True)
    n = config.chunks
    lengths = sorted(set(lengths or [max(1, n // 2), n, 2 * n, 4 * n, 8 * n]))
    if config.task != "memtrain":
        from tasks.evaluate import evaluate_questions

        return evaluate_questions(greedy, agent, source, config, when, lengths, controls)
    return evaluate_masked(greedy, agent, source, config, when, lengths)


def evaluate_masked(greedy: Sampler, agent, corpus, config: Config, when: str, lengths: list[int]) -> list[dict]:
    """A row per task (end_to_end, recall), length and memory (kept, or empty as a control).

    One score per document; for recall only if the document has a name to ask for. Rows of end_to_end with the memory
    kept also hold what was said.
    """
    documents = [document for chunks in lengths for document in heldout_documents(corpus, config, chunks)]
    progress = f"evaluation {when}" if parallel.rank() == 0 else None
    kept = agent(greedy, documents, config, progress=progress)
    empty = agent(greedy, documents, config, empty_memory=True)
    for t in kept:
        rng = np.random.default_rng([config.seed, len(t.document.chunks), t.document.index, HELDOUT_RECALL_DRAW])
        t.target = draw_recall(t.document, rng)
    found = []  # (task, chunks, memory), index of the document, score, what was said
    for memory, trajectories in (("kept", kept), ("empty", empty)):
        for t in trajectories:
            score = answer_reward(t.prediction, t.document.answers)
            said = metrics.said_row(t) if memory == "kept" else None
            found.append((("end_to_end", len(t.document.chunks), memory), t.document.index, score, said))
    for memory in ("kept", "empty"):
        recall(greedy, kept, config, empty_memory=memory == "empty")
        for t in kept:
            for turn in t.recalls:
                score = recall_reward(turn.text, t.target.entity)
                found.append((("recall", len(t.document.chunks), memory), t.document.index, score, None))
    scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    texts: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for key, index, score, said in chain(*parallel.gather(found)):
        scores[key][index] = score
        if said:
            texts[key][index] = said
    in_order = sorted(scores, key=lambda key: (key[:2], key[2] == "empty"))
    return [metrics.row(when, *key, scores[key], texts.get(key)) for key in in_order]


def heldout_documents(corpus, config: Config, chunks: int) -> list[Document]:
    """This process's documents of one length; an empty list on all processes if one of them can't build its own."""
    documents, reason = [], None
    try:
        for i in range(parallel.rank(), config.eval_documents, parallel.count()):
            documents.append(corpus.document(i, "heldout", chunks=chunks))
    except UserError as error:  # a small corpus can't fill the longest documents
        reason = str(error)
    reasons = [told for told in parallel.gather(reason) if told]
    if reasons and parallel.rank() == 0:
        print(f"evaluation at {chunks} chunks is skipped: {reasons[0]}")
    return [] if reasons else documents


# ---- the command line ------------------------------------------------------------------------------------


@dataclass
class Evaluation(Config):
    """The settings of a run, and those of an evaluation."""

    out: str | None = option(
        None, "JSON file for the rows (default: eval.json in the model's folder; for a hub model, in the current one)"
    )
    lengths: list[int] | None = option(None, "document lengths in chunks (default: --chunks x 1/2, 1, 2, 4, 8)")
    controls: list[str] = option(
        ["empty"], "what replaces the memory in a control: empty; in longqa also full (text), oracle (gold paragraphs)",
        choices=["empty", "full", "oracle"],
    )
    against: list[str] = option([], "further models, compared on the same questions by a paired bootstrap")
    report: str | None = option(None, "a run's folder: only write its page, report.html, and evaluate nothing")
    plot: str | None = option(None, "file for a plot of accuracy by length: .png, .svg or .pdf (needs matplotlib)")

    @property
    def cache(self) -> Path:
        """The folder of cached entities of the run that wrote the model; for other models, the one in runs/."""
        folder, _ = run_of(self.model)
        return (folder.parent if folder else Path("runs")) / ".entities"


def main(evaluation: Evaluation) -> None:
    from look import compare, page  # training needs neither

    if evaluation.report:
        return print(f"wrote {page.write(evaluation.report)}")
    check(evaluation)
    if evaluation.eval_documents < 1:
        raise UserError("--eval-documents 0: nothing to evaluate; ask for at least one")
    task, controls = evaluation.task, evaluation.controls
    if task != "longqa" and set(controls) != {"empty"}:
        raise UserError(f"--controls {' '.join(controls)}: --task {task} supports only the control empty")
    for name in evaluation.against:
        models.check_model(name, "--against")
    folder = Path(evaluation.model)
    out = Path(evaluation.out or (folder / "eval.json" if folder.is_dir() else "eval.json"))
    if evaluation.out and not out.suffix.strip(".0123456789") and not out.is_dir():  # a run may want that name
        raise UserError(f"--out {out}: name a .json file (in a recipe --out is the folder of a run; give another here)")
    check_writable(out)
    if evaluation.plot:
        compare.check_picture(evaluation.plot)
    source, rows = None, []
    for name in (evaluation.model, *evaluation.against):
        sample = load_sampler(name, evaluation, given="--against" if source else "--model")
        if source:  # the same documents for all models
            check_fits(evaluation, sample.model, sample.tokenizer, source)
        else:
            source, agent = load_task(evaluation, sample.model, sample.tokenizer)
        when = name if evaluation.against else "now"
        rows += evaluate(sample, agent, source, evaluation, when, evaluation.lengths, tuple(controls))
        if not rows:
            raise UserError("no document could be built at any length: use a larger corpus, or other --lengths")
        out.write_text(json.dumps(rows, indent=1))  # after each model, as a large one takes hours
    print(metrics.table(rows), *compare.differences(rows), f"95 % intervals; rows in {out}", sep="\n")
    if evaluation.plot:
        compare.plot(rows, evaluation.plot)


def load_sampler(name: str, config: Config, given: str = "--model") -> Sampler:
    """A sampler for a model folder or hub name, which the user gave by the flag `given`. Raises UserError."""
    device = "cuda" if parallel.has_gpu() else "cpu"
    model, tokenizer = models.load_model(name, device, config.dtype, given)
    tokenizer.day = config.date  # for engine/chat.py
    generate = rollout.generate
    if config.fast:
        from fast.sampling import generate
    return Sampler(generate, model, tokenizer, Budget(config.rollout_tokens))


if __name__ == "__main__":
    run_with_flags(main, Evaluation, follow_model=True)  # by default the settings of the run that wrote --model
