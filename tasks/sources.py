"""The tasks of --task with real questions: where the questions come from, and which agent answers them."""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path

from engine.config import Config
from engine.errors import UserError
from rollout import read
from tasks.longqa import LongQA, measured
from tasks.questions import load_questions, load_search, split_questions, subject
from tasks.retrieval import open_retriever
from tasks.search import SearchQA, objectives, search
from text.corpus import load_text, tell


@contextmanager
def flag_named(flag: str):
    """A context whose UserErrors begin with the flag that named the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def load_questions_task(config: Config, tokenizer, left_out: Counter | None = None) -> tuple:
    """(source, agent): see eval.load_task. Raises UserError."""
    # In searchqa the split is by question: a file with FlashRAG's fields doesn't name the subjects.
    load, key = (load_questions, subject) if config.task == "longqa" else (load_search, itemgetter(0))
    other = None
    if config.eval_questions:
        with flag_named("--eval-questions"):
            other = load(config.eval_questions)
    with flag_named("--questions"):
        questions = split_questions(load(config.questions), other, key)
    if config.task == "longqa":
        needed, use = any(question.context is None for question in questions["train"]), "fills the texts"
    else:
        needed, use = config.retriever == "bm25", "is searched"
    if needed and not config.corpus and not config.asks_tiny:
        tell(f"--corpus: not given, so the tiny default's {Path(config.corpus_name).name} {use}")
    if config.task == "longqa":
        pool = measured([(passage.title, passage.text) for passage in load_text(config, left_out)], tokenizer)
        how = dict(seed=config.seed, chunk_tokens=config.chunk_tokens, chunks=config.chunks)
        source, agent = LongQA(questions, pool, tokenizer, **how), read
    else:
        questions = {name: objectives(items, config.objectives) for name, items in questions.items()}
        source = SearchQA(questions, config.seed)
        agent = partial(search, retriever=open_retriever(config.retriever, config.corpus_name))
    for name in ("train", config.eval_split):
        if not source.questions[name]:
            raise UserError(
                f"--questions {config.questions}: no question is left for the split {name!r}; use a larger file, or "
                "give --eval-questions"
            )
    return source, agent
