"""The task that --task names: where its documents come from, and which agent reads them."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path

from engine.config import Config, flag
from engine.errors import UserError
from engine.models import window_of
from masking import QUESTION, Corpus
from rollout import ANSWER_PROMPT, READ_PROMPT, RECALL_PROMPT, encode_prompt, fill, read
from tasks.longqa import LongQA, Pool
from tasks.questions import Question, load_questions, load_search, split_questions, subject
from tasks.retrieval import open_retriever
from tasks.search import SEARCH_PROMPT, SearchQA, objectives, search
from text.corpus import Passage, find_entities, load_passages


def load_task(
    config: Config, model, tokenizer, cache: Path, left_out: Counter | None = None, loaded: tuple | None = None
) -> tuple:
    """(source, agent): documents by source.document(index, split, chunks), and agent(sample, documents, limits, ...).

    `left_out` counts the passages that can't be used; `cache` is a folder. A task that is `loaded` is only checked
    against the window of this model. Raises UserError.
    """
    if loaded:
        check_window(config, model, tokenizer, longest_question(loaded[0]))
        return loaded
    retriever = None
    if config.task == "searchqa":
        retriever = open_retriever(config.retriever, config.corpus_name, config.encoder)
    # A tokenizer of its own: documents are built in another thread, and encoding changes a tokenizer's settings.
    source = load_source(config, model, copy.deepcopy(tokenizer), cache, left_out)
    return source, partial(search, retriever=retriever) if retriever else read


def load_source(config: Config, model, tokenizer, cache: Path, left_out: Counter | None = None):
    if config.task == "memtrain":
        return load_corpus(config, model, tokenizer, cache, left_out)
    load = load_questions if config.task == "longqa" else load_search
    train = load(config.questions)
    other = load(config.eval_questions) if config.eval_questions else None
    if config.task == "longqa":
        questions = split_questions(train, other, subject)
        pool = Pool([(passage.title, passage.text) for passage in load_text(config, left_out)], tokenizer)
        source = LongQA(questions, pool, seed=config.seed, chunk_tokens=config.chunk_tokens, chunks=config.chunks)
    else:
        # The split is by question here: a file of FlashRAG's fields doesn't name its subjects.
        questions = split_questions(train, other, lambda item: item[0])
        questions = {name: objectives(items, config.objectives) for name, items in questions.items()}
        source = SearchQA(questions, config.seed)
    for name in ("train", config.eval_split):
        if not source.questions[name]:
            raise UserError(
                f"--questions {config.questions}: no question is left for {name!r}; bring more, or --eval-questions"
            )
    check_window(config, model, tokenizer, longest_question(source))
    return source


def longest_question(source) -> str:
    """The longest question that a source asks; masked documents all ask the same."""
    if isinstance(source, Corpus):
        return QUESTION
    asked = (item for items in source.questions.values() for item in items)
    return max((item.question if isinstance(item, Question) else item[0] for item in asked), key=len)


def load_corpus(config: Config, model, tokenizer, cache: Path, left_out: Counter | None = None) -> Corpus:
    """The masked documents of the settings."""
    check_window(config, model, tokenizer)
    passages = load_text(config, left_out)
    find_entities(passages, config.ner, cache)
    return Corpus(
        passages, tokenizer, seed=config.seed, n_passages=config.passages, n_related=config.related,
        n_chunks=None if config.passages else config.chunks, chunk_tokens=config.chunk_tokens,
        max_chunks=config.chunks if config.passages else None, keep_leaky=config.keep_leaky, heldout=config.heldout,
    )


def load_text(config: Config, left_out: Counter | None) -> list[Passage]:
    """The passages of --corpus, as the settings beside it say."""
    return load_passages(
        config.corpus_name, config=config.corpus_config, split=config.corpus_split, text_field=config.text_field,
        max_passages=config.max_passages, left_out=left_out,
    )


def prompt_overhead(tokenizer) -> int:
    """Tokens of the longest prompt with all its slots empty: the instructions and the template."""
    slots = dict.fromkeys(("problem", "memory", "section", "query", "result", "left"), "")
    prompts = (READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT, SEARCH_PROMPT)
    return max(len(encode_prompt(tokenizer, fill(prompt, **slots))) for prompt in prompts)


def check_window(config: Config, model, tokenizer, question: str = QUESTION) -> None:
    """Raises UserError where a conversation about `question`, the longest, can't fit the model's window."""
    asked = prompt_overhead(tokenizer) + len(tokenizer(question)["input_ids"])
    if config.task == "searchqa":  # the last query, as long as a memory, stands beside its result
        shown, written = "result_tokens", config.memory_tokens + config.answer_tokens
        asked += config.memory_tokens
    else:
        shown, written = "chunk_tokens", max(config.memory_tokens, config.answer_tokens)
    needed = asked + getattr(config, shown) + config.memory_tokens + written
    if needed > (window := window_of(model)):
        raise UserError(
            f"{flag(shown)} {getattr(config, shown)}, --memory-tokens {config.memory_tokens} and "
            f"--answer-tokens {config.answer_tokens} need a window of {needed} tokens, {model.config.name_or_path} has "
            f"{window}; make them smaller"
        )
