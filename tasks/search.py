"""Search QA: the searching agent (MEM1, arXiv 2506.15841; paper 4.3) and its questions."""

import re

from tqdm import tqdm

from masking import Document
from rewards import boxed
from rollout import EMPTY_MEMORY, Trajectory, answered, fill
from tasks.questions import draw

SEARCH_PROMPT = """You answer a question by searching. From turn to turn you keep nothing but your notes, your last \
search and its result. Think first: rewrite your notes so that they hold all you still need. Then do one of two \
things: search, as <search>words to look for</search>, or give the final answer in \\boxed{{}}. If several questions \
are asked, answer them in their order with a semicolon between.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

<query>
{query}
</query>

<result>
{result}
</result>

Searches left: {left}."""

NOTHING = "(none)"  # in the slots of a search that has not been made
SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)


def acted(text: str) -> bool:
    """Whether a searching agent has ended its turn, with a search or an answer."""
    return SEARCH.search(text) is not None or answered(text)


def result_text(passages: list[dict]) -> str:
    """The passages that a search found, as shown to the agent: each below its title."""
    return "\n\n".join(f"{passage['title']}\n{passage['text']}" for passage in passages)


def search(
    sample, documents: list[Document], config, samples: int = 1, progress: str | None = None, *, retriever,
    top: int = 3,
) -> list[Trajectory]:
    """Run `samples` episodes for each question -> trajectories, those of a question one after the other.

    A turn is notes, then one action: a search or a boxed answer. The next turn sees the question, these notes, this
    search and its `top` passages. Only text that the model generated is parsed. A turn without an action, or a search
    beyond --searches, ends the episode without an answer.
    """
    trajectories = [Trajectory(document) for document in documents for _ in range(samples)]
    results = [NOTHING] * len(trajectories)
    going = list(range(len(trajectories)))
    for turn_number in tqdm(range(config.searches + 1), desc=progress, disable=progress is None, leave=False):
        if not going:
            break
        left = config.searches - turn_number
        prompts = [search_prompt(trajectories[n], results[n], left) for n in going]
        asking = []
        for n, turn in zip(going, sample(prompts, config.memory_tokens + config.answer_tokens, acted), strict=True):
            trajectory = trajectories[n]
            trajectory.turns.append(turn)
            found = SEARCH.search(turn.text)
            if found and not answered(turn.text[: found.start()]):
                notes = turn.text[: found.start()].strip()
                trajectory.memories.append(sample.cut(notes, config.memory_tokens) or EMPTY_MEMORY)
                if left:
                    trajectory.searches.append(sample.cut(found[1].strip(), config.memory_tokens))
                    asking.append(n)
            else:
                trajectory.prediction = boxed(turn.text)
        passages = retriever.search([trajectories[n].searches[-1] for n in asking], top) if asking else []
        for n, found in zip(asking, passages, strict=True):
            results[n] = sample.cut(result_text(found), config.result_tokens) or "(nothing found)"
        going = asking
    return trajectories


def search_prompt(trajectory: Trajectory, result: str, left: int) -> str:
    query = trajectory.searches[-1] if trajectory.searches else NOTHING
    question = trajectory.document.question
    return fill(SEARCH_PROMPT, problem=question, memory=trajectory.memory, query=query, result=result, left=left)


def objectives(items: list[tuple[str, list[str]]], n: int = 2) -> list[tuple[str, list[list[str]]]]:
    """Every `n` consecutive questions as one, joined by "; ", with the answers to each in that order (MEM1).

    A remainder is dropped: objectives([(q1, a1), (q2, a2), (q3, a3)]) is [("q1; q2", [a1, a2])].
    """
    groups = [items[start : start + n] for start in range(0, len(items) - n + 1, n)]
    return [("; ".join(question for question, _ in group), [answers for _, answers in group]) for group in groups]


class SearchQA:
    """Search QA: questions of n objectives, without text; a document's `answers` has a list for each objective."""

    def __init__(self, questions: dict[str, list[tuple[str, list[list[str]]]]], seed: int):
        self.questions, self.seed = questions, seed

    @property
    def longest_question(self) -> str:
        return max((question for items in self.questions.values() for question, _ in items), key=len)

    def lengths(self, asked: list[int], split: str) -> list[int]:
        """Only the number of objectives, in place of a length in chunks."""
        return [len(self.questions[split][0][1])]

    def document(self, index: int, split: str = "train", chunks: int | None = None) -> Document:
        question, answers = draw(self.questions[split], index, self.seed)
        return Document(index, question, question, answers, [], [])
