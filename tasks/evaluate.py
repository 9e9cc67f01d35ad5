"""How well an agent answers real questions: exact match, F1 and substring match, beside controls without a memory."""

from dataclasses import replace

from engine import parallel
from engine.config import Config
from engine.errors import UserError
from engine.models import check_model, window_of
from engine.report import row
from rewards import answer_reward, boxed, f1_score, substring_match
from rollout import EMPTY_MEMORY, Limits, answer
from tasks.sources import prompt_overhead


def check(evaluation) -> None:
    """Raises UserError for controls that the task doesn't have, nothing to evaluate, and models that can be none."""
    task, controls = evaluation.task, evaluation.controls
    if bad := [control for control in controls if control not in ("empty", "full", "oracle")]:
        raise UserError(f"--controls {bad[0]}: choose from empty, full and oracle")
    if task == "memtrain" and controls != ["empty"]:
        raise UserError(f"--controls {' '.join(controls)}: masked documents have the control empty only")
    if task == "searchqa" and {"full", "oracle"} & set(controls):
        raise UserError(f"--controls {' '.join(controls)}: search questions come without a text; use empty")
    if evaluation.eval_documents < 1:
        raise UserError("--eval-documents 0: nothing to evaluate; ask for at least one")
    for name in evaluation.against:
        check_model(name, "--against")


def evaluate_questions(
    sample, agent, source, limits: Limits, config: Config, lengths: list[int], when: str,
    controls: tuple[str, ...] = ("empty",), full=None,
) -> list[dict]:
    """Accuracy on up to `eval_documents` questions: longqa at each length, searchqa once; a row each, and by control.

    "kept" is the agent itself. The controls answer in one step: from "empty" memory (searchqa: with no search left),
    from the "full" text, full(document), or from "oracle", the gold paragraphs. `scores` are by question, which has
    the same number for every model and length.
    """
    found: dict[tuple, dict[int, tuple]] = {}
    verbose = parallel.rank() == 0
    shown = f"evaluation {when}" if verbose else None
    mine = documents_by_length(source, config, source.lengths(lengths, config.eval_split), verbose)
    places = [length for length, documents in mine.items() for _ in documents]
    documents = [document for own in mine.values() for document in own]
    if "oracle" in controls and (lacking := next((d for d in documents if not d.gold), None)):
        raise UserError(f"--controls oracle: question {lacking.title} comes without gold paragraphs; leave it out")
    for control in ("kept", *controls):
        if control == "kept" or config.task == "searchqa":  # all lengths together: short documents fill the batches
            allowed = limits if control == "kept" else replace(limits, searches=0)
            predictions = [t.prediction for t in agent(sample, documents, allowed, progress=shown)]
        else:
            memories = [control_memory(control, document, full) for document in documents]
            predictions = [boxed(turn.text) for turn in answer(sample, documents, memories, limits)]
        for length, prediction, document in zip(places, predictions, documents, strict=True):
            scores = measures(config.task, prediction, document.answers)
            found.setdefault((length, control), {})[document.index] = scores
    parts, rows = parallel.gather(found), []
    for length, control in ((length, control) for length in mine for control in ("kept", *controls)):
        scores = dict(sorted(item for part in parts for item in part.get((length, control), {}).items()))
        _, *others = zip(*scores.values(), strict=True)
        more = {name: sum(values) / len(values) for name, values in zip(("f1", "substring"), others)}
        exact = {i: own[0] for i, own in scores.items()}
        rows.append(row(when, config.task, length, control, exact, **more))
    return rows


def measures(task: str, prediction: str | None, answers: list) -> tuple[float, ...]:
    """Exact match; in longqa F1 and substring match, too."""
    exact = answer_reward(prediction, answers)
    if task != "longqa":
        return (exact,)
    return exact, f1_score(prediction, answers), float(substring_match(prediction, answers))


def documents_by_length(source, config: Config, lengths: list[int], verbose: bool) -> dict[int, list]:
    """{length: this process's documents}: of the first questions that reach all lengths, the same at every length.

    Each process builds its share. Skip a length that more than a tenth of the first 20 questions can't reach: without
    those questions it would be another task. Print it if `verbose`. {} where no question is left.
    """
    total = len(source.questions[config.eval_split])
    first = range(min(20, total))
    for length in list(lengths):
        built = [one for part in parallel.gather(build(source, config, first, [length])) for one in part.values()]
        reasons = [one for one in built if isinstance(one, str)]
        if len(reasons) > len(first) / 10:
            lengths = [other for other in lengths if other != length]
            if verbose:
                lost = f"{len(reasons)} of {len(first)} questions can't be brought to it"
                print(f"evaluation at {length} chunks is left out, {lost}: {reasons[0]}")
    taken: dict[int, list] = {}  # this process's questions that reach all lengths
    start, count = 0, 0
    while lengths and start < total and count < config.eval_documents:
        block = range(start, min(total, start + config.eval_documents - count))
        own = {i: one for i, one in build(source, config, block, lengths).items() if not isinstance(one, str)}
        taken |= own
        count, start = count + sum(parallel.gather(len(own))), block.stop
    return {length: [one[n] for one in taken.values()] for n, length in enumerate(lengths)} if count else {}


def build(source, config: Config, questions: range, lengths: list[int]) -> dict[int, list | str]:
    """This process's share of the questions, each with its document at every length, or with why it has none."""
    built: dict[int, list | str] = {}
    for i in questions[parallel.rank() :: parallel.count()]:
        try:
            built[i] = [source.document(i, config.eval_split, length) for length in lengths]
        except UserError as error:
            built[i] = str(error)
    return built


def control_memory(control: str, document, full) -> str:
    """The text that stands in for the memory in a control that doesn't read."""
    return {"empty": lambda: EMPTY_MEMORY, "oracle": lambda: document.gold, "full": lambda: full(document)}[control]()


def full_text(model, tokenizer, limits: Limits, document) -> str:
    """As much of a document's text as fits the model's window beside the question and the answer."""
    question = len(tokenizer(document.question)["input_ids"])
    room = window_of(model) - prompt_overhead(tokenizer) - question - limits.answer_tokens
    return limits.cut("".join(document.chunks), min(room, 1 << 30))
