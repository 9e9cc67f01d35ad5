"""How well an agent answers real questions: exact match, F1 and substring match, with controls without a memory."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import chain, product

from engine import parallel
from engine.config import Config
from engine.errors import UserError
from engine.metrics import row, said_row
from engine.models import window_of
from rewards import answer_reward, boxed, normalize, unwrap
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, answer, prompt_overhead


def evaluate_questions(
    sample, agent, source, config: Config, when: str, lengths: list[int], controls: tuple[str, ...] = ("empty",)
) -> list[dict]:
    """Accuracy on up to --eval-documents questions -> a row per length (searchqa: only one) and control.

    "kept" is the agent itself. The controls answer in one step: from an "empty" memory (searchqa: with no search left),
    from as much of the "full" text as fits, or from "oracle", the gold paragraphs. `scores` are by question number,
    the same for every model and length. Raises UserError if a question has no gold paragraphs for "oracle".
    """
    verbose = parallel.rank() == 0
    by_length = documents_by_length(source, config, source.lengths(lengths, config.eval_split), verbose)
    places = [length for length, own in by_length.items() for _ in own]
    documents = list(chain(*by_length.values()))
    if "oracle" in controls and (lacking := next((d for d in documents if not d.gold), None)):
        raise UserError(f"--controls oracle: question {lacking.title} has no gold paragraphs; leave oracle out")
    measures = {"exact": answer_reward}
    if config.task == "longqa":
        measures |= {"f1": f1_score, "substring": substring_match}
    found = []  # (length, control, measure), question, score
    said = []  # length, question, what was said
    for control in ("kept", *controls):
        if control == "kept" or config.task == "searchqa":  # all lengths together, so batches are full
            allowed = config if control == "kept" else replace(config, searches=0)
            shown = f"evaluation {when}" if verbose else None
            trajectories = agent(sample, documents, allowed, progress=shown)
            predictions = [t.prediction for t in trajectories]
            if control == "kept":
                said = [(length, t.document.index, said_row(t)) for length, t in zip(places, trajectories, strict=True)]
        else:
            memories = [control_memory(control, document, sample, config) for document in documents]
            predictions = [boxed(turn.text) for turn in answer(sample, documents, memories, config)]
        for length, prediction, document in zip(places, predictions, documents, strict=True):
            for name, score in measures.items():
                found.append(((length, control, name), document.index, float(score(prediction, document.answers))))
    scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    for key, question, score in sorted(chain(*parallel.gather(found))):  # sorted, so sums don't depend on processes
        scores[key][question] = score
    texts: dict[int, dict[int, dict]] = defaultdict(dict)
    for length, question, text in chain(*parallel.gather(said)):
        texts[length][question] = text
    rows = []
    for length, control in product(by_length, ("kept", *controls)):
        own = {name: scores[length, control, name] for name in measures}
        exact = own.pop("exact")
        means = {name: sum(values.values()) / len(values) for name, values in own.items()}
        shown = texts[length] if control == "kept" else None
        rows.append(row(when, config.task, length, control, exact, shown, **means))
    return rows


def documents_by_length(source, config: Config, lengths: list[int], verbose: bool) -> dict[int, list]:
    """{length: this process's documents}: of the first questions that reach all lengths, the same at every length.

    Each process builds its share. Skip a length that more than a tenth of the first 20 questions can't reach: without
    those questions it would be another task. Print it if `verbose`. Returns {} if no question is left.
    """
    total = len(source.questions[config.eval_split])
    first = range(min(20, total))
    reached = []
    for length in lengths:
        _, own = build(source, config, first, [length])
        reasons = list(chain(*parallel.gather(own)))
        if len(reasons) <= len(first) / 10:
            reached.append(length)
        elif verbose:
            lost = f"{len(reasons)} of {len(first)} questions can't reach it"
            print(f"evaluation at {length} chunks is skipped, {lost}: {reasons[0]}")
    taken: list[list] = []  # for each of this process's questions that reach all lengths, its documents
    start, count = 0, 0
    while reached and start < total and count < config.eval_documents:
        block = range(start, min(total, start + config.eval_documents - count))
        own, _ = build(source, config, block, reached)
        taken += own
        count, start = count + sum(parallel.gather(len(own))), block.stop
    return {length: [one[n] for one in taken] for n, length in enumerate(reached)} if count else {}


def build(source, config: Config, questions: range, lengths: list[int]) -> tuple[list[list], list[str]]:
    """(documents at every length, for this process's share of the questions; why others can't be built)."""
    built, reasons = [], []
    for i in questions[parallel.rank() :: parallel.count()]:
        try:
            built.append([source.document(i, config.eval_split, length) for length in lengths])
        except UserError as error:
            reasons.append(str(error))
    return built, reasons


def control_memory(control: str, document, sample, config: Config) -> str:
    """The text that replaces the memory in a control that doesn't read."""
    if control == "full":
        return full_text(document, sample, config)
    if control == "oracle":
        return "\n\n".join(f"{title}\n{text}" for title, text in document.gold)
    return EMPTY_MEMORY


def full_text(document, sample, config: Config) -> str:
    """As much of a document's text as fits the model's context window together with question and answer."""
    question = len(sample.tokenizer(document.question)["input_ids"])
    overhead = prompt_overhead(sample.tokenizer, ANSWER_PROMPT)
    room = window_of(sample.model) - overhead - question - config.answer_tokens
    return sample.cut("".join(document.chunks), min(room, 1 << 30))  # a window may be infinite


def f1_score(prediction: str | None, answers: list[str]) -> float:
    """SQuAD's word F1 (arXiv 1606.05250), the best over `answers`: 0 to 1, and 0 for None or an empty prediction."""
    predicted = Counter(normalize(unwrap(prediction or "")).split())
    best = 0.0
    for gold_answer in answers:
        gold = Counter(normalize(gold_answer).split())
        if common := (predicted & gold).total():
            best = max(best, 2 * common / (predicted.total() + gold.total()))
    return best


def substring_match(prediction: str | None, answers: list[str]) -> bool:
    """Whether `prediction` contains the normalised words of one of `answers` in a row; not the other way round."""
    golds = [normalize(answer) for answer in answers]
    predicted = normalize(unwrap(prediction or ""))
    return any(gold and f" {gold} " in f" {predicted} " for gold in golds)
