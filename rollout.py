"""Rollouts: prompts, batched sampling, and the agents.

`read` is the reading agent (paper 3.1): one independent conversation per chunk, of which only the
memory it writes crosses to the next, then one that answers from the memory alone. `recall` is the
intermediate-memory task (paper 3.3). Training and evaluation call the same two functions.

The token ids of a `Turn` travel from the sampler to the loss. Its text is decoded for the reward and
for the next memory, and is never encoded again for training.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from attention import can_share_prompts, prefill
from batching import by_length
from masking import Document, Recall
from retrieval import UserError
from rewards import boxed

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
class Limits:
    """Token budgets of one conversation and of one batch."""

    memory_tokens: int = 1024  # a memory, when it is written and again when it is read
    answer_tokens: int = 1024  # an answer
    rollout_tokens: int = 65536  # a `generate` batch: rows x (longest prompt + new tokens)
    result_tokens: int = 1024  # what a search shows
    searches: int = 6  # of one episode


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


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a completion: chat models often have two."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def answered(text: str) -> bool:
    return boxed(text) is not None


def acted(text: str) -> bool:
    """Whether a searching agent has ended its turn: with a search or an answer."""
    return SEARCH.search(text) is not None or answered(text)


@lru_cache(maxsize=4)
def closing_tokens(tokenizer) -> list[int]:
    """Ids of the tokens that hold the end of a box or a tag: only after these is a text looked at."""
    special = set(tokenizer.all_special_ids)  # some look like <|this|>, and come in every padded row
    return sorted(i for token, i in tokenizer.get_vocab().items() if ("}" in token or ">" in token) and i not in special)


class Draw(LogitsProcessor):
    """Leaves of each row's scores (rows, vocabulary) one token, drawn from their distribution, for an argmax to find.

    torch.multinomial takes a random number for every word of the vocabulary, one after the other on a CPU: a quarter of
    the tiny model's sampling. This takes one a row. Sums in float64, since tokens of 1e-7 count too.
    """

    finite = True  # or a tensor, False once a score was nan: asked for at the end, so that no token waits for the answer

    def __call__(self, ids, scores):
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)  # (rows, vocabulary)
        at = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]  # (rows, 1)
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[1] - 1)  # (rows, 1): the first above `at`
        self.finite = cumulative[:, -1].isfinite().all() & self.finite
        return scores.fill_(-torch.inf).scatter_(1, drawn, 0.0)  # generate's own copy, which can be large


class Stop(StoppingCriteria):
    """Ends each row where `done(text)` first holds: what a model says after its answer is not read by anyone.

    `lengths` (rows,) are the new tokens up to there or up to an end token, 0 where neither came; behind them generate
    only pads. Where no more than `few` rows go on, all are ended: `generate_batch` then goes on without the rest.
    """

    def __init__(self, done, tokenizer, ends: list[int], rows: int, width: int, few: int, device):
        self.done, self.tokenizer, self.width, self.few = done, tokenizer, width, few
        self.closing = torch.tensor(closing_tokens(tokenizer) if done else [], dtype=torch.long, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def __call__(self, ids, scores, **more):
        going = self.lengths == 0  # (rows,)
        self.lengths[going & torch.isin(ids[:, -1], self.ends)] = ids.shape[1] - self.width
        if self.done:
            closed = going & torch.isin(ids[:, -1], self.closing)  # (rows,)
            for row in closed.nonzero().flatten().tolist():
                new = ids[row, self.width :]
                if self.done(self.tokenizer.decode(new, skip_special_tokens=True)):
                    self.lengths[row] = len(new)
        going = self.lengths == 0
        return ~going | (going.sum() <= self.few)


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, limits: Limits, greedy: bool = False, done=None
) -> list[tuple[list[int], bool, int]]:
    """One completion per prompt, as (token ids, ended by itself, padding of the prompt), in the order of `prompts`.

    Sampling is from the model's own distribution: temperature 1, no top-p, top-k or repetition penalty,
    so that the log-probs of training are of what was sampled. `done(text)`, if given, ends a completion early.
    """
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
    draw = None if greedy else Draw()
    fill = 0.5 if can_share_prompts(model) else 0.875  # prompts that are computed apart needn't be of similar length to write
    completions: list = [None] * len(prompts)
    while waiting := [i for i, completion in enumerate(completions) if completion is None]:
        full = False
        try:
            for places in by_length([len(prompts[i]) + new_tokens for i in waiting], limits.rollout_tokens, fill):
                batch = [waiting[n] for n in places]
                found = generate_batch(model, tokenizer, [prompts[i] for i in batch], new_tokens, limits.rollout_tokens // 8, config, draw, done)
                for i, completion in zip(batch, found, strict=True):
                    completions[i] = completion
        except torch.OutOfMemoryError:
            full = True
        if full:  # here and not above: while it is handled, an exception keeps alive what its frames hold
            if len(batch) == 1:
                raise UserError(f"out of memory for a single prompt of {len(prompts[batch[0]])} tokens: make --chunk-tokens smaller, "
                                "or see README on what can be held in CPU memory")  # fmt: skip
            torch.cuda.empty_cache()
            failed = len(batch) * (max(len(prompts[i]) for i in batch) + new_tokens)  # far less than the budget, maybe
            limits.rollout_tokens = min(limits.rollout_tokens, failed) // 2
            print(f"out of memory in rollout: going on with --rollout-tokens {limits.rollout_tokens}", flush=True)
    if draw and not draw.finite:
        raise UserError("--model: its logits are not finite, so nothing can be sampled; look at its weights, or try another --dtype")
    return completions


def generate_batch(
    model, tokenizer, prompts: list[list[int]], new_tokens: int, prefill_tokens: int, config: GenerationConfig, draw: Draw | None, done=None
) -> list[tuple[list[int], bool, int]]:
    """One batch of `generate`: Hugging Face's generate, called anew with the rows that go on once half of them have ended."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)  # (rows, width)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # left padding: the completion follows the prompt without a gap
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache, shared, padding = None, None, [width - len(prompt) for prompt in prompts]
    if can_share_prompts(model):
        cache, shared, padding = prefill(model, prompts, prefill_tokens)
    config.max_length = width + new_tokens
    completions: list = [None] * len(prompts)
    going = list(range(len(prompts)))  # the prompt of each row
    # What `config` leaves open generate would take from the model folder's: penalties, least lengths, words not to be used.
    own, model.generation_config = model.generation_config, config
    try:
        while going:
            few = len(going) // 2 if cache is not None and len(going) > 8 else 0
            stop = Stop(done, tokenizer, config.eos_token_id, len(going), width, few, ids.device)
            with shared.used_by(model) if shared else nullcontext():
                ids = model.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config,
                    logits_processor=[draw] if draw else [], stopping_criteria=[stop],
                )  # fmt: skip
            new = ids[:, width:].tolist()
            rows = []  # that go on
            for row, (i, length) in enumerate(zip(going, stop.lengths.tolist(), strict=True)):
                if length or len(new[row]) == new_tokens:
                    completions[i] = (new[row][: length or None], length > 0, padding[i])
                else:
                    rows.append(row)
            going = [going[row] for row in rows]
            if going:
                chosen = torch.tensor(rows, device=ids.device)
                ids = ids[chosen]
                mask = torch.cat([mask[chosen], mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], 1)
                shared.keep(chosen) if shared else cache.batch_select_indices(chosen)
    finally:
        model.generation_config = own
    return completions


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
