"""Rollouts: the prompts and the agents.

`read` is the reading agent (paper 3.1): one independent conversation per chunk, of which only the
memory it writes crosses to the next, then one that answers from the memory alone. `recall` is the
intermediate-memory task (paper 3.3), `search` the searching agent. Training and evaluation call the same functions.

The token ids of a `Turn` travel from the sampler to the loss. Its text is decoded for the reward and
for the next memory, and is never encoded again for training.
"""

import re
from dataclasses import dataclass, field

from tqdm import tqdm

from masking import Document, Recall
from rewards import boxed
from sampling import Limits, generate

EMPTY_MEMORY = "(empty)"

READ_PROMPT = """You read a long text section by section to solve a problem. Between sections you keep nothing but your memory. Rewrite the memory: carry over what may still help, add what matters in the new section, and stay short.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

<section>
{section}
</section>

Write the new memory and nothing else."""

ANSWER_PROMPT = """You have read a long text section by section. What you kept of it is in your memory. Use the memory to solve the problem, and put the final answer in \\boxed{{}}.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

Solve the problem now."""

RECALL_PROMPT = """You have read a long text section by section. What you kept of it is in your memory. Below is one section that you read earlier; a name, place, number or date in it now reads [TARGET]. Use the memory to say what stood there, and put it in \\boxed{{}}.

<memory>
{memory}
</memory>

<section>
{section}
</section>

Say what [TARGET] stands for."""


SEARCH_PROMPT = """You answer a question by searching. From turn to turn you keep nothing but your notes, your last search and its result. Think first: rewrite your notes so that they hold all you still need. Then do one of two things: search, as <search>words to look for</search>, or give the final answer in \\boxed{{}}. If several questions are asked, answer them in their order with a semicolon between.

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
SLOT_TAGS = re.compile(r"<(/?(?:problem|memory|section|query|result))>")


def fill(prompt: str, **slots) -> str:
    """The prompt with its slots filled. What stands in a slot is data: it can't close the slot, nor open another."""
    return prompt.format(**{name: SLOT_TAGS.sub(r"(\1)", str(text)) for name, text in slots.items()})


@dataclass
class Turn:
    """One conversation: its prompt and one sampled completion, as token ids, EOS included if it came.

    `document` is a position in the step, never looked up by text (equal prompts exist).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    ended: bool  # with EOS or a closed box; False: cut at the token limit
    text: str
    padding: int = 0  # of the prompt, in the batch that computed it
    document: int = -1
    advantage: float = 0.0


@dataclass
class Trajectory:
    """One reading of one document, or one episode of searching: its turns, the memory after each, the boxed answer or None."""

    document: Document
    turns: list[Turn] = field(default_factory=list)
    memories: list[str] = field(default_factory=list)
    prediction: str | None = None
    searches: list[str] = field(default_factory=list)


def encode_prompt(tokenizer, text: str) -> list[int]:
    """`text` as one user message of the model's chat template, or as plain text where it has none.

    A special token that is written out in the text, such as <|im_end|>, is encoded as plain text: only the template's
    own open and close a turn.
    """
    if tokenizer.chat_template is None:
        return tokenizer(text + "\n", split_special_tokens=True)["input_ids"]
    # Templates that know no `enable_thinking` ignore it.
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    before, after = chat.split("\0")
    parts = [(before, False), (text.strip(), True), (after, False)]  # templates strip a message; so it is done here
    return [i for part, plain in parts for i in tokenizer(part, add_special_tokens=False, split_special_tokens=plain)["input_ids"]]


def prompt_overhead(tokenizer) -> int:
    """Tokens of the longest prompt with all its slots empty: what the instructions and the template take."""
    slots = dict.fromkeys(("problem", "memory", "section", "query", "result", "left"), "")
    prompts = (READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT, SEARCH_PROMPT)
    return max(len(encode_prompt(tokenizer, fill(prompt, **slots))) for prompt in prompts)


def cut(tokenizer, text: str, max_tokens: int) -> str:
    """`text` shortened to its first `max_tokens` tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)


def answered(text: str) -> bool:
    return boxed(text) is not None


def acted(text: str) -> bool:
    """Whether a searching agent has ended its turn: with a search or an answer."""
    return SEARCH.search(text) is not None or answered(text)


def converse(
    model, tokenizer, texts: list[str], new_tokens: int, limits: Limits, greedy: bool, done=None
) -> list[Turn]:
    """Sample one completion for each prompt text."""
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    completions = generate(model, tokenizer, prompts, new_tokens, limits, greedy, done)
    return [
        Turn(prompt, ids, ended, tokenizer.decode(ids, skip_special_tokens=True), padding)
        for prompt, (ids, ended, padding) in zip(prompts, completions, strict=True)
    ]


def read(
    model, tokenizer, documents: list[Document], limits: Limits,
    samples: int = 1, greedy: bool = False, empty_memory: bool = False, progress: str | None = None,
) -> list[Trajectory]:  # fmt: skip
    """Read every document `samples` times; trajectories come document by document.

    `empty_memory` is the control: it skips the reading and answers without a memory.
    """
    trajectories = [Trajectory(document) for document in documents for _ in range(samples)]
    longest = 0 if empty_memory else max((len(document.chunks) for document in documents), default=0)
    for step in tqdm(range(longest), desc=progress, disable=progress is None, leave=False):
        readers = [t for t in trajectories if step < len(t.document.chunks)]
        texts = [
            fill(
                READ_PROMPT,
                problem=t.document.question,
                memory=t.memories[-1] if t.memories else EMPTY_MEMORY,
                section=t.document.chunks[step],
            )
            for t in readers
        ]
        turns = converse(model, tokenizer, texts, limits.memory_tokens, limits, greedy)
        for trajectory, turn in zip(readers, turns, strict=True):
            trajectory.turns.append(turn)
            # Decoding and encoding again may lengthen a text, so the cap holds here too.
            trajectory.memories.append(cut(tokenizer, turn.text.strip(), limits.memory_tokens) or EMPTY_MEMORY)
    memories = [t.memories[-1] if t.memories else EMPTY_MEMORY for t in trajectories]
    turns = answer(model, tokenizer, [t.document for t in trajectories], memories, limits, greedy)
    for trajectory, turn in zip(trajectories, turns, strict=True):
        trajectory.turns.append(turn)
        trajectory.prediction = boxed(turn.text)
    return trajectories


def answer(model, tokenizer, documents: list[Document], memories: list[str], limits: Limits, greedy: bool = False) -> list[Turn]:
    """The last step alone: the question of each document, answered from the text given as its memory."""
    texts = [fill(ANSWER_PROMPT, problem=d.question, memory=m) for d, m in zip(documents, memories, strict=True)]
    return converse(model, tokenizer, texts, limits.answer_tokens, limits, greedy, answered)


def recall(
    model, tokenizer, draws: list[tuple[Trajectory, Recall]], limits: Limits,
    samples: int = 1, greedy: bool = False, empty_memory: bool = False,
) -> list[list[Turn]]:  # fmt: skip
    """`samples` answers for each (trajectory, what to recall): which entity stood at [TARGET] in an earlier chunk?"""
    texts = [
        fill(
            RECALL_PROMPT, memory=EMPTY_MEMORY if empty_memory else trajectory.memories[draw.memory_step - 1], section=draw.section
        )
        for trajectory, draw in draws
        for _ in range(samples)
    ]
    turns = converse(model, tokenizer, texts, limits.answer_tokens, limits, greedy, answered)
    return [turns[i * samples : (i + 1) * samples] for i in range(len(draws))]


def result_text(passages: list[dict]) -> str:
    """What a search found, as the agent reads it: each passage below its title."""
    return "\n\n".join(f"{passage['title']}\n{passage['text']}" for passage in passages)


def search(
    model, tokenizer, documents: list[Document], retriever, limits: Limits,
    samples: int = 1, greedy: bool = False, top: int = 3, progress: str | None = None,
) -> list[Trajectory]:  # fmt: skip
    """The searching agent (MEM1, arXiv 2506.15841): `samples` episodes for each question; they come question by question.

    A turn is notes and then one action, a search or a boxed answer. The next turn sees the question, these notes, this
    search and its `top` passages. Only what the model generated is parsed. No action, or a search beyond the last one
    allowed, ends the episode without an answer.
    """
    trajectories = [Trajectory(document) for document in documents for _ in range(samples)]
    results = [NOTHING] * len(trajectories)
    going = list(range(len(trajectories)))
    for turn_number in tqdm(range(limits.searches + 1), desc=progress, disable=progress is None, leave=False):
        texts = [
            fill(
                SEARCH_PROMPT, problem=t.document.question, memory=t.memories[-1] if t.memories else EMPTY_MEMORY,
                query=t.searches[-1] if t.searches else NOTHING, result=results[n], left=limits.searches - turn_number,
            )  # fmt: skip
            for n in going
            for t in (trajectories[n],)
        ]
        turns = converse(model, tokenizer, texts, limits.memory_tokens + limits.answer_tokens, limits, greedy, acted) if going else []
        asking = []
        for n, turn in zip(going, turns, strict=True):
            trajectory = trajectories[n]
            trajectory.turns.append(turn)
            found = SEARCH.search(turn.text)
            if found and not answered(turn.text[: found.start()]):
                trajectory.memories.append(cut(tokenizer, turn.text[: found.start()].strip(), limits.memory_tokens) or EMPTY_MEMORY)
                if turn_number < limits.searches:
                    trajectory.searches.append(cut(tokenizer, found[1].strip(), limits.memory_tokens))
                    asking.append(n)
            else:
                trajectory.prediction = boxed(turn.text)
        passages = retriever.search([trajectories[n].searches[-1] for n in asking], top) if asking else []
        for n, found in zip(asking, passages, strict=True):
            results[n] = cut(tokenizer, result_text(found), limits.result_tokens) or "(nothing found)"
        going = asking
    return trajectories
