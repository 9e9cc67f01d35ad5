"""The task that --task names: where its questions come from, and which agent answers them."""

from collections import Counter
from functools import partial

from engine.config import Config
from engine.errors import UserError
from rollout import read
from tasks.longqa import LongQA, measured
from tasks.questions import load_questions, load_search, split_questions, subject
from tasks.retrieval import open_retriever
from tasks.search import SearchQA, objectives, search
from text.corpus import load_text


def load_questions_task(config: Config, tokenizer, left_out: Counter | None = None) -> tuple:
    """(source, agent): see eval.load_task. Raises UserError."""
    if config.task == "longqa":
        source, agent = load_longqa(config, tokenizer, left_out), read
    else:
        retriever = open_retriever(config.retriever, config.corpus_name)
        source, agent = load_searchqa(config), partial(search, retriever=retriever)
    for name in ("train", config.eval_split):
        if not source.questions[name]:
            raise UserError(
                f"--questions {config.questions}: no question is left for {name!r}; bring more, or --eval-questions"
            )
    return source, agent


def load_longqa(config: Config, tokenizer, left_out: Counter | None) -> LongQA:
    """Labelled questions, each with its paragraphs hidden among the passages of --corpus."""
    other = load_questions(config.eval_questions) if config.eval_questions else None
    questions = split_questions(load_questions(config.questions), other, subject)
    pool = measured([(passage.title, passage.text) for passage in load_text(config, left_out)], tokenizer)
    return LongQA(questions, pool, tokenizer, seed=config.seed, chunk_tokens=config.chunk_tokens, chunks=config.chunks)


def load_searchqa(config: Config) -> SearchQA:
    """Labelled questions without texts, several asked as one."""
    other = load_search(config.eval_questions) if config.eval_questions else None
    # The split is by question here: a file of FlashRAG's fields doesn't name its subjects.
    questions = split_questions(load_search(config.questions), other, lambda item: item[0])
    questions = {name: objectives(items, config.objectives) for name, items in questions.items()}
    return SearchQA(questions, config.seed)
