"""Rollouts: the prompts, the sampler, and the agents that read and recall.

    generate       plain sampling, by Hugging Face's `generate`
    Sampler        sample(prompts, new_tokens, done) -> turns: the only way an agent uses a model
    read           the reading agent (paper 3.1)
    draw_targets   what to ask each trajectory: the intermediate-memory recall task (paper 3.3)
    recall         asks it

A Turn carries token ids from the sampler to the loss. Its decoded text is used for rewards and the next memory, and is
never encoded again for training. The prompts call a chunk a section.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria

from engine import parallel
from engine.chat import begins_in_thought, encode_prompt
from engine.models import end_ids
from masking import RECALL_DRAW, Document, RecallTarget, draw_recall
from rewards import boxed
from text.thoughts import listener

EMPTY_MEMORY = "(empty)"
HALF_CHARACTER = "\ufffd"  # what decoding makes of bytes that are not a complete character

READ_PROMPT = """You read a long text section by section to solve a problem. Between sections you keep nothing but \
your memory. Rewrite the memory: carry over what may still help, add what matters in the new section, and stay short.

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

ANSWER_PROMPT = """You have read a long text section by section. What you kept of it is in your memory. Use the \
memory to solve the problem, and put the final answer in \\boxed{{}}.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

Solve the problem now."""

RECALL_PROMPT = """You have read a long text section by section. What you kept of it is in your memory. Below is one \
section that you read earlier; a name, place, number or date in it now reads [TARGET]. Use the memory to say what \
stood there, and put it in \\boxed{{}}.

<memory>
{memory}
</memory>

<section>
{section}
</section>

Say what [TARGET] stands for."""

# The tags around the texts in all prompts; query and result are those of tasks/search.py.
SLOT_TAGS = re.compile(r"<(\s*/?\s*(?:problem|memory|section|query|result)\s*/?\s*)>", re.IGNORECASE)


def fill(prompt: str, **slots) -> str:
    """The prompt with its slots filled. Slot tags inside a text, such as </memory>, become (/memory)."""
    safe = {name: SLOT_TAGS.sub(r"(\1)", str(text)) for name, text in slots.items()}
    return prompt.format(**safe)


# ---- turns and trajectories ------------------------------------------------------------------------------


@dataclass
class Turn:
    """One prompt and the completion that was sampled for it (in the paper: a conversation)."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the EOS, if one was sampled
    ended: bool  # by an end token or `done`; False: cut at the token limit (for the metrics)
    text: str  # the decoded completion without special tokens, and without a thought before it
    thought: bool = False  # whether there was a thought
    # grpo.py sets the first three, the loop in memtrain.py the log-probs.
    place: int = -1  # of its document in the step
    advantage: float = 0.0  # Eq. 3
    weight: float = 0.0  # Eq. 4: 1 / (kept documents of the update, over all processes * kept turns of its document)
    old_logprobs: torch.Tensor | None = None  # (completion,), before the first of several updates
    reference_logprobs: torch.Tensor | None = None  # (completion,), if there is a KL


@dataclass
class Trajectory:
    """One reading of one document (in tasks/search.py: one episode of searches), and everything known about it."""

    document: Document
    turns: list[Turn] = field(default_factory=list)
    memories: list[str] = field(default_factory=list)  # m_1, m_2, ...
    prediction: str | None = None  # the boxed answer; None without a box
    searches: list[str] = field(default_factory=list)  # tasks/search.py
    target: RecallTarget | None = None  # what recall asks for; None: no recall
    recalls: list[Turn] = field(default_factory=list)  # its G2 answers
    em: float = 0.0  # exact match of the prediction
    recall_rewards: list[float] = field(default_factory=list)  # R^I of each of the recalls (Eq. 1)
    reward: float = 0.0  # R^E (Eq. 2)

    @property
    def memory(self) -> str:
        """The latest one."""
        return self.memories[-1] if self.memories else EMPTY_MEMORY


# ---- sampling ------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Most tokens of one batch of `generate`, padding included. The fast twin halves it when memory runs out."""

    tokens: int


class StopWhere(StoppingCriteria):
    """Ends a row once `done(its text)` is true: nothing reads what a model writes after its answer."""

    def __init__(self, done: Callable[[str], bool], hear: Callable, width: int):
        self.done, self.hear, self.width = done, hear, width

    def __call__(self, ids, scores, **more):
        said = [self.hear(row)[0] for row in ids[:, self.width :].tolist()]
        return torch.tensor([self.done(text) for text in said], device=ids.device)  # (rows,)


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, done: Callable[[str], bool] | None, greedy: bool,
    budget: Budget,
) -> list[Turn]:
    """One completion for each prompt of token ids, drawn from the model's own distribution, or greedy.

    A completion ends at the first end token, where `done(its text)` first holds, or after `new_tokens` tokens. Prompts
    are taken in slices of at most `budget` tokens, new tokens and padding included.
    """
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    hear = listener(tokenizer, ends, begins_in_thought(tokenizer))  # token ids -> (text, whether a thought led it)
    # Temperature 1 without top-p or top-k: the log-probs in training are those of the sampling distribution.
    how = {} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        do_sample=not greedy, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=pad, **how
    )
    rows = max(1, budget.tokens // (max(map(len, prompts)) + new_tokens))
    turns = []
    # model.generate would otherwise take penalties and forbidden words from the model folder's own config.
    saved, model.generation_config = model.generation_config, config
    try:
        for start in range(0, len(prompts), rows):
            some = prompts[start : start + rows]
            ids, mask = left_padded(some, pad, model.device)  # (rows, width)
            width = ids.shape[1]
            stop = [StopWhere(done, hear, width)] if done else []
            written = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stop
            )  # (rows, width + new)
            for prompt, row in zip(some, written[:, width:].tolist(), strict=True):
                turns.append(finished_turn(prompt, *until_end(row, ends, hear, done), hear))
    finally:
        model.generation_config = saved
    return turns


def left_padded(prompts: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask), each (rows, width). Left padding: a completion follows its prompt without a gap."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")  # (rows, width)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def pad_id(model, tokenizer) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids(model, tokenizer)[0]


def until_end(ids: list[int], ends: list[int], hear, done) -> tuple[list[int], bool]:
    """(token ids up to and including the completion's end, whether it has one). The rest of a row is padding."""
    for length, token in enumerate(ids, 1):
        if token in ends or (done and done(hear(ids[:length])[0])):
            return ids[:length], True
    return ids, False


def finished_turn(prompt: list[int], completion: list[int], ended: bool, hear) -> Turn:
    """The turn of a completion, with its text; a character that the token limit cut in half is left out."""
    text, thought = hear(completion)
    if not ended and text.endswith(HALF_CHARACTER):
        text = without_half_character(lambda ids: hear(ids)[0], completion)
    return Turn(prompt, completion, ended, text, thought)


def without_half_character(decode: Callable[[list[int]], str], ids: list[int]) -> str:
    """The text of these ids without an incomplete character at the end, which may take up to four tokens."""
    for length in range(len(ids), max(len(ids) - 4, -1), -1):
        text = decode(ids[:length])
        if not text.endswith(HALF_CHARACTER):
            return text
    return decode(ids).rstrip(HALF_CHARACTER)


@dataclass
class Sampler:
    """sample(prompts, new_tokens, done) -> turns, and sample.cut(text, tokens): the only way an agent uses a model."""

    generate: Callable  # the function above, or its fast twin, fast.sampling.generate
    model: torch.nn.Module
    tokenizer: object
    budget: Budget
    greedy: bool = False

    def __call__(self, prompts: list[str], new_tokens: int, done: Callable | None = None) -> list[Turn]:
        if not prompts:
            return []
        encoded = {prompt: encode_prompt(self.tokenizer, prompt) for prompt in dict.fromkeys(prompts)}  # each text once
        ids = [encoded[prompt] for prompt in prompts]
        return self.generate(self.model, self.tokenizer, ids, new_tokens, done, self.greedy, self.budget)

    def cut(self, text: str, max_tokens: int) -> str:
        """`text` shortened to its first `max_tokens` tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) <= max_tokens:
            return text
        return without_half_character(partial(self.tokenizer.decode, skip_special_tokens=True), ids[:max_tokens])


def prompt_overhead(tokenizer, *prompts: str) -> int:
    """Tokens of the longest of these prompts with all slots empty: the instructions and the chat template."""
    slots = dict.fromkeys(("problem", "memory", "section", "query", "result", "left"), "")
    return max(len(encode_prompt(tokenizer, fill(prompt, **slots))) for prompt in prompts)


# ---- the agents ----------------------------------------------------------------------------------------


def draw_documents(source, config, step: int) -> list[Document]:
    """This process's documents of a step: every parallel.count()-th, so no two processes read the same document."""
    documents = []
    for place in range(parallel.rank(), config.documents, parallel.count()):
        document = source.document(step * config.documents + place)
        document.place = place
        documents.append(document)
    return documents


def answered(text: str) -> bool:
    return boxed(text) is not None


def read(
    sample, documents: list[Document], config, samples: int = 1, empty_memory: bool = False, progress: str | None = None
) -> list[Trajectory]:
    """Read every document `samples` times -> trajectories, those of a document one after the other.

    One turn per chunk writes a memory, the only text passed on to the next turn; a last turn answers from the memory
    alone. `empty_memory` is a control for evaluations: it skips the chunks and answers without a memory.
    """
    trajectories = [Trajectory(document) for document in documents for _ in range(samples)]
    longest = 0 if empty_memory else max((len(document.chunks) for document in documents), default=0)
    for n in tqdm(range(longest), desc=progress, disable=progress is None, leave=False):
        readers = [t for t in trajectories if n < len(t.document.chunks)]
        prompts = [
            fill(READ_PROMPT, problem=t.document.question, memory=t.memory, section=t.document.chunks[n])
            for t in readers
        ]
        for trajectory, turn in zip(readers, sample(prompts, config.memory_tokens), strict=True):
            trajectory.turns.append(turn)
            # Encoded again, the decoded text may take more tokens than the limit, so it is cut.
            trajectory.memories.append(sample.cut(turn.text.strip(), config.memory_tokens) or EMPTY_MEMORY)
    turns = answer(sample, [t.document for t in trajectories], [t.memory for t in trajectories], config)
    for trajectory, turn in zip(trajectories, turns, strict=True):
        trajectory.turns.append(turn)
        trajectory.prediction = boxed(turn.text)
    return trajectories


def answer(sample, documents: list[Document], memories: list[str], config) -> list[Turn]:
    """The last turn alone: the answer to each document's question, from the text given as its memory."""
    prompts = [fill(ANSWER_PROMPT, problem=d.question, memory=m) for d, m in zip(documents, memories, strict=True)]
    return sample(prompts, config.answer_tokens, answered)


def draw_targets(trajectories: list[Trajectory], config, step: int) -> None:
    """Set t.target, (k, l, entity), of each trajectory. With --shared-recall-draw a document's G1 share one draw."""
    if not config.has_recall:
        return
    for n, trajectory in enumerate(trajectories):
        # One random stream per trajectory, numbered over all processes, so draws don't depend on their number.
        place = trajectory.document.place
        stream = place if config.shared_recall_draw else place * config.g1 + n % config.g1
        rng = np.random.default_rng([config.seed, step, stream, RECALL_DRAW])
        trajectory.target = draw_recall(trajectory.document, rng)


def recall(sample, trajectories: list[Trajectory], config, samples: int = 1, empty_memory: bool = False) -> None:
    """Ask each trajectory that has a target its recall question `samples` times; sets t.recalls.

    The model sees the memory m_k that the trajectory had after chunk k, and an earlier chunk with the entity masked.
    """
    asked = [t for t in trajectories if t.target]
    prompts = []
    for t in asked:
        memory = EMPTY_MEMORY if empty_memory else t.memories[t.target.memory_turn - 1]  # k counts from 1
        prompts += [fill(RECALL_PROMPT, memory=memory, section=t.target.masked_chunk)] * samples
    turns = sample(prompts, config.answer_tokens, answered)
    for n, t in enumerate(asked):
        t.recalls = turns[n * samples : (n + 1) * samples]
