"""Rollouts: the prompts, the sampler, and the agents that read and recall.

    generate  plain sampling, by one call of Hugging Face's `generate`
    sampler   binds generate, a model and its tokenizer into sample(prompts, new_tokens, done) -> turns
    read      the reading agent (paper 3.1)
    recall    the intermediate-memory task (paper 3.3)

The agents know a model only as `sample`, in training and evaluation alike. The loss uses the token ids that were
sampled; the decoded text is used for rewards and the next memory, and is never encoded again for training. In the
prompts a chunk is called a section, so that no word of ours means two things to the model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from masking import Document, Recall
from rewards import boxed

EMPTY_MEMORY = "(empty)"

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

SLOT_TAGS = re.compile(r"<(/?(?:problem|memory|section|query|result))>")  # the last two in tasks/search.py


def fill(prompt: str, **slots) -> str:
    """The prompt with its slots filled. A slot's tag inside a text, such as </memory>, becomes (/memory)."""
    safe = {name: SLOT_TAGS.sub(r"(\1)", str(text)) for name, text in slots.items()}
    return prompt.format(**safe)


# ---- turns and trajectories ------------------------------------------------------------------------------


@dataclass
class Turn:
    """A conversation of one prompt and the completion that was sampled for it."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the EOS, if one was sampled
    ended: bool  # by EOS or where it was done; False: cut at the token limit
    text: str  # of the completion
    padding: int = 0  # tokens beside the prompt in its batch; only for the metrics
    # Training sets these.
    place: int = -1  # of its document in the step
    advantage: float = 0.0
    weight: float = 0.0  # in Eq. 4: 1 / (kept documents of the update, of all processes * kept turns of its document)
    old_logprobs: torch.Tensor | None = None  # (completion,), before the first of several updates
    reference_logprobs: torch.Tensor | None = None  # (completion,), if there is a KL


@dataclass
class Trajectory:
    """One reading of one document (in tasks/search.py: one episode of searches)."""

    document: Document
    turns: list[Turn] = field(default_factory=list)
    memories: list[str] = field(default_factory=list)  # m_1, m_2, ...
    prediction: str | None = None  # the boxed answer; None without a box
    searches: list[str] = field(default_factory=list)

    @property
    def memory(self) -> str:
        """The latest one."""
        return self.memories[-1] if self.memories else EMPTY_MEMORY


@dataclass(frozen=True)
class Limits:
    """Maximum lengths in tokens; `cut(text, tokens)` keeps so many of a text."""

    memory_tokens: int
    answer_tokens: int
    result_tokens: int  # of a search
    searches: int  # how many an episode may have
    cut: Callable[[str, int], str]


def limits_of(config, tokenizer) -> Limits:
    """The limits that the settings name, with this tokenizer's tokens."""
    cut = partial(cut_text, tokenizer)
    return Limits(config.memory_tokens, config.answer_tokens, config.result_tokens, config.searches, cut)


# ---- sampling ------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    """One completion: its token ids, whether it ended by itself, and the padding beside its prompt."""

    ids: list[int]
    ended: bool
    padding: int


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a completion: chat models often have two."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def pad_id(model, tokenizer) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids(model, tokenizer)[0]


def left_padded(prompts: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each (rows, width). Left padding: a completion follows its prompt without a gap."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)  # (rows, width)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, done=None, greedy: bool = False
) -> list[Completion]:
    """One completion for each prompt of token ids, drawn from the model's own distribution, or greedy.

    A completion is cut at the first end token, or where `done(text)` first holds. All prompts are one batch.
    """
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    ids, mask = left_padded(prompts, pad, model.device)  # (rows, width)
    how = {} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        do_sample=not greedy, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=pad, **how
    )
    # model.generate would take penalties and forbidden words from the model folder's own config.
    saved, model.generation_config = model.generation_config, config
    try:
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # (rows, width + new)
    finally:
        model.generation_config = saved
    width = ids.shape[1]
    written = [until_end(row, ends, tokenizer, done) for row in rows[:, width:].tolist()]
    return [Completion(*own, width - len(prompt)) for own, prompt in zip(written, prompts, strict=True)]


def until_end(ids: list[int], ends: list[int], tokenizer, done) -> tuple[list[int], bool]:
    """(token ids up to the completion's end, whether it has one)."""
    for length, token in enumerate(ids, 1):
        if token in ends or (done and done(tokenizer.decode(ids[:length], skip_special_tokens=True))):
            return ids[:length], True
    return ids, False


def sampler(generate, model, tokenizer, greedy: bool = False):
    """sample(prompts, new_tokens, done) -> turns: all that an agent knows of a model.

    `generate` is the function above, or its fast twin, engine.sampling.generate.
    """

    def sample(prompts: list[str], new_tokens: int, done=None) -> list[Turn]:
        encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}  # each text once
        ids = [encoded[prompt] for prompt in prompts]
        completions = generate(model, tokenizer, ids, new_tokens, done, greedy) if ids else []
        texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        return [Turn(p, c.ids, c.ended, text, c.padding) for p, c, text in zip(ids, completions, texts, strict=True)]

    return sample


def encode_prompt(tokenizer, text: str) -> list[int]:
    """`text` as one user message of the model's chat template, or as plain text where it has none.

    A special token that is written out in the text, such as <|im_end|>, is encoded as plain text: only the template's
    special tokens open and close a message.
    """
    if tokenizer.chat_template is None:
        return tokenizer(text + "\n", split_special_tokens=True)["input_ids"]
    message = [{"role": "user", "content": "\0"}]  # stands for the text
    # A template without `enable_thinking` ignores it.
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    before, after = chat.split("\0")
    ids = []
    for part, is_text in ((before, False), (text.strip(), True), (after, False)):  # templates strip a message, too
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=is_text)["input_ids"]
    return ids


def cut_text(tokenizer, text: str, max_tokens: int) -> str:
    """`text` shortened to its first `max_tokens` tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)


# ---- the agents ----------------------------------------------------------------------------------------


def answered(text: str) -> bool:
    return boxed(text) is not None


def read(
    sample, documents: list[Document], limits: Limits, samples: int = 1, empty_memory: bool = False,
    progress: str | None = None,
) -> list[Trajectory]:
    """Read every document `samples` times -> trajectories, document by document.

    A turn per chunk writes a memory, and only this crosses to the next turn; a last turn answers from the memory alone.
    `empty_memory` is the control of an evaluation: it skips the chunks and answers without a memory.
    """
    trajectories = [Trajectory(document) for document in documents for _ in range(samples)]
    longest = 0 if empty_memory else max((len(document.chunks) for document in documents), default=0)
    for n in tqdm(range(longest), desc=progress, disable=progress is None, leave=False):
        readers = [t for t in trajectories if n < len(t.document.chunks)]
        prompts = [
            fill(READ_PROMPT, problem=t.document.question, memory=t.memory, section=t.document.chunks[n])
            for t in readers
        ]
        for trajectory, turn in zip(readers, sample(prompts, limits.memory_tokens), strict=True):
            trajectory.turns.append(turn)
            # A decoded text may have more tokens when it is encoded again, so it is cut again.
            trajectory.memories.append(limits.cut(turn.text.strip(), limits.memory_tokens) or EMPTY_MEMORY)
    turns = answer(sample, [t.document for t in trajectories], [t.memory for t in trajectories], limits)
    for trajectory, turn in zip(trajectories, turns, strict=True):
        trajectory.turns.append(turn)
        trajectory.prediction = boxed(turn.text)
    return trajectories


def answer(sample, documents: list[Document], memories: list[str], limits: Limits) -> list[Turn]:
    """The last turn alone: each document's question, answered from the text given as its memory."""
    prompts = [fill(ANSWER_PROMPT, problem=d.question, memory=m) for d, m in zip(documents, memories, strict=True)]
    return sample(prompts, limits.answer_tokens, answered)


def recall(
    sample, trajectories: list[Trajectory], targets: list[Recall | None], limits: Limits, samples: int = 1,
    empty_memory: bool = False,
) -> list[list[Turn]]:
    """Ask each trajectory its recall question `samples` times -> its answers; [] for a trajectory without a target.

    The model sees the memory m_k that the trajectory had after chunk k, and an earlier chunk with the entity masked.
    """
    prompts = []
    for trajectory, target in zip(trajectories, targets, strict=True):
        if target is not None:
            memory = EMPTY_MEMORY if empty_memory else trajectory.memories[target.memory_turn - 1]  # k counts from 1
            prompts += [fill(RECALL_PROMPT, memory=memory, section=target.section)] * samples
    turns = sample(prompts, limits.answer_tokens, answered)
    recalls, taken = [], 0
    for target in targets:
        count = 0 if target is None else samples
        recalls.append(turns[taken : taken + count])
        taken += count
    return recalls
