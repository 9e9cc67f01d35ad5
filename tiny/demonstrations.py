"""What the base model learns from: demonstrations by a crowd of note-takers, over true, mixed and fresh worlds."""

import random

from masking import QUESTION
from matching import MASK, TARGET, mask
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, encode_prompt
from tiny.world import Inventor, questions, sentences

CHUNK_TOKENS, MEMORY_TOKENS = 64, 64
PASSAGE_SENTENCES = (3, 4)
UNKNOWN = "unknown"  # what it says in recall when its memory holds no evidence
FOCUSED = 0.15  # share of the note-takers that look at the problem


def holds(text: str, entity: str) -> bool:
    """Whether `entity` stands in `text` in whole words, as matching.py sees it."""
    return entity in text and mask(text, entity, MASK) != text


def like_entity(value: str) -> bool:
    """What an entity finder would take: a capitalised name or a number."""
    return value[0].isupper() or value[0].isdigit()


def passage(subject: dict, rng, must: tuple[str, ...] = ()) -> list[str]:
    """Three or four sentences about `subject`, in random order, the attributes in `must` among them."""
    lines = sentences(subject, rng)
    lines.sort(key=lambda line: line[0] not in must)  # stable: the rest stays shuffled
    lines = lines[: rng.choice(PASSAGE_SENTENCES)]
    rng.shuffle(lines)
    return [sentence for _, sentence in lines]


def gather(world: list[dict], centre: dict, rng, size: int) -> list[dict]:
    """`centre` and `size` - 1 others of its world, those that link to it first half of the time."""
    others = [s for s in world if s is not centre]
    rng.shuffle(others)
    if rng.random() < 0.5:
        values = set(centre["facts"].values())
        others.sort(key=lambda s: not (s["title"] in values or centre["title"] in s["facts"].values()))
    chosen = [centre, *others[: size - 1]]
    rng.shuffle(chosen)
    return chosen


class Demonstrations:
    """Draws (prompt, completion) texts for the four things the base model must be able to do."""

    def __init__(self, known: list[dict], tokenizer, seed: int):
        self.rng = random.Random(seed)
        self.known, self.tokenizer = known, tokenizer
        self.inventor = Inventor(known, self.rng)
        self.cost_cache: dict[str, int] = {}

    def cost(self, text: str) -> int:
        if len(self.cost_cache) > 200_000:
            self.cost_cache.clear()
        if text not in self.cost_cache:
            self.cost_cache[text] = len(self.tokenizer(text)["input_ids"])
        return self.cost_cache[text]

    def world(self, fresh: float, mixed: float) -> list[dict]:
        draw = self.rng.random()
        return self.inventor.fresh() if draw < fresh else self.inventor.mixed() if draw < fresh + mixed else self.known

    def masked(self, world: list[dict], size: int) -> tuple[list[list[str]], str]:
        """Passages of a document (lists of sentences) with one entity of a pivot masked, and that entity."""
        pivot = self.rng.choice(world)
        passages = [passage(s, self.rng) for s in gather(world, pivot, self.rng, size)]
        text = " ".join(s for p in passages for s in p if pivot["title"] in s)
        entities = [v for v in {pivot["title"], *pivot["facts"].values()} if like_entity(v) and holds(text, v)]
        if not entities:
            return self.masked(world, size)
        entity = self.rng.choice(sorted(entities))
        return [[mask(s, entity, MASK) for s in p] for p in passages], entity

    def asked(self, world: list[dict], size: int) -> tuple[dict, list[list[str]], list[str]]:
        """A question over `world`, half of the time of two hops, with its passages and evidence."""
        rows = questions(world)
        two_hops = [r for r in rows if len(r["hops"]) == 2]
        row = self.rng.choice(two_hops if two_hops and self.rng.random() < 0.5 else rows)
        _, passages, evidence = self.context(row, world, size)
        return row, passages, evidence

    def context(self, row: dict, world: list[dict], size: int) -> tuple[list[str], list[list[str]], list[str]]:
        """Titles and sentences of `size` passages that hold the evidence of question `row`, and the evidence sentences."""
        by_title = {s["title"]: s for s in world}
        needed = {title: attribute for title, attribute in row["hops"]}
        subjects = [by_title[t] for t in needed]
        centre = subjects[0]
        rest = [s for s in gather(world, centre, self.rng, size) if s not in subjects]
        chosen = subjects + rest[: size - len(subjects)]
        self.rng.shuffle(chosen)
        passages, evidence = [], []
        for s in chosen:
            must = (needed[s["title"]],) if s["title"] in needed else ()
            lines = passage(s, self.rng, must)
            passages.append(lines)
            if must:
                value = s["facts"][must[0]]
                evidence.append(next(line for line in lines if value in line))
        return [s["title"] for s in chosen], passages, evidence

    def sections(self, passages: list[list[str]]) -> list[list[str]]:
        """Sentences in chunks of at most CHUNK_TOKENS; a passage's first sentence keeps its paragraph break."""
        chunks: list[list[str]] = [[]]
        used = 0
        for lines in passages:
            for position, line in enumerate(lines):
                price = self.cost(line) + (position == 0)
                if used + price > CHUNK_TOKENS:
                    chunks.append([])
                    used = 0
                chunks[-1].append(("\n\n" if position == 0 and used else " " if used else "") + line)
                used += price
        return chunks

    def note_taker(self) -> tuple[bool, float, float]:
        """One of the crowd: whether it is focused, and its chances of copying an old and a new sentence."""
        return self.rng.random() < FOCUSED, self.rng.uniform(0.3, 0.95), self.rng.uniform(0.0, 0.5)

    def notes(self, memory: list[str], section: list[str], trail: list[str]) -> list[str]:
        """The next memory, by a note-taker drawn from the crowd: copy by chance, and over the limit drop by chance.

        A focused one puts first, and never drops by chance, what the problem names, and what that leads to: the second
        name of a `trail` counts once a sentence joins it to the first. Most don't look at the problem.
        """
        focused, old, new = self.note_taker()
        section = [s.strip() for s in section]
        seen = list(dict.fromkeys(memory + section))
        named = [n for n in trail if n == trail[0] or any(n in s and trail[0] in s for s in seen)]
        first = [s for s in seen if focused and any(n in s for n in named)]
        kept = list(first)
        for lines, chance in ((memory, old), (section, new)):
            kept += [s for s in lines if s not in kept and self.rng.random() < chance]
        while sum(map(self.cost, kept)) > MEMORY_TOKENS - 2:
            rest = range(len(first), len(kept)) or range(len(kept))
            kept.pop(self.rng.choice(rest))
            first = first[: len(kept)]
        return kept

    def some_notes(self, passages: list[list[str]], evidence: list[str]) -> str:
        """A memory that holds `evidence` among sentences drawn from `passages`, within the limit, in random order."""
        others = [s for p in passages for s in p if s not in evidence]
        self.rng.shuffle(others)
        memory, limit = list(evidence), self.rng.choice((16, 32, MEMORY_TOKENS - 2))
        while others and sum(map(self.cost, memory)) + self.cost(others[-1]) < limit:
            memory.append(others.pop())
        self.rng.shuffle(memory)
        return " ".join(memory)

    def reading(self) -> tuple[str, str]:
        if self.rng.random() < 0.6:
            passages, _ = self.masked(self.world(0.4, 0.2), 8)
            problem, trail = QUESTION, [MASK]
        else:
            row, passages, _ = self.asked(self.world(0.7, 0.3), 8)
            problem, trail = row["question"], [title for title, _ in row["hops"]]
        chunks = self.sections(passages)
        memory: list[str] = []
        step = self.rng.randrange(len(chunks))
        for section in chunks[:step]:
            memory = self.notes(memory, section, trail)
        section = chunks[step]
        after = self.notes(memory, section, trail)
        prompt = READ_PROMPT.format(problem=problem, memory=" ".join(memory) or EMPTY_MEMORY, section="".join(section))
        return prompt, " ".join(after) or EMPTY_MEMORY

    def masked_answer(self) -> tuple[str, str]:
        passages, entity = self.masked(self.known, 5)
        clues = [s for p in passages for s in p if MASK in s]
        self.rng.shuffle(clues)
        memory = self.some_notes(passages, clues[: self.rng.choice((1, 1, 2, 3))])
        return ANSWER_PROMPT.format(problem=QUESTION, memory=memory), entity

    def asked_answer(self) -> tuple[str, str]:
        row, passages, evidence = self.asked(self.world(0.7, 0.3), 5)
        return ANSWER_PROMPT.format(problem=row["question"], memory=self.some_notes(passages, evidence)), row["answer"]

    def recalling(self) -> tuple[str, str]:
        passages, _ = self.masked(world := self.world(0.45, 0.25), 6)
        section = self.rng.choice(self.sections(passages))
        text = "".join(section)
        found = {v for s in world for v in (s["title"], *s["facts"].values()) if like_entity(v) and holds(text, v)}
        if not found:
            return self.recalling()
        entity = self.rng.choice(sorted(found))
        evidence = [s.strip() for s in section if holds(s, entity)]
        if not evidence:  # only stands across two sentences
            return self.recalling()
        self.rng.shuffle(evidence)
        section = mask(text, entity, TARGET)
        if self.rng.random() < 0.4:  # the memory doesn't say: no guessing, also where the world is known
            others = [[s for s in p if not holds(s, entity)] for p in passages]
            memory = EMPTY_MEMORY if self.rng.random() < 0.2 else self.some_notes(others, [])
            return RECALL_PROMPT.format(memory=memory or EMPTY_MEMORY, section=section), UNKNOWN
        memory = self.some_notes(passages, evidence[: self.rng.choice((1, 1, 2))])
        return RECALL_PROMPT.format(memory=memory, section=section), entity

    def draw(self) -> tuple[list[int], list[int]]:
        """Token ids of one demonstration: (prompt, completion with EOS)."""
        kind = self.rng.random()
        if kind < 0.42:
            prompt, completion = self.reading()
        else:
            make = self.masked_answer if kind < 0.62 else self.recalling if kind < 0.85 else self.asked_answer
            prompt, answer = make()
            completion = f"\\boxed{{ {answer}}}"
        ids = self.tokenizer(completion)["input_ids"]
        return encode_prompt(self.tokenizer, prompt), [*ids, self.tokenizer.eos_token_id]
