"""What the base model learns from: demonstrations by three sorts of note-takers, over true, mixed and fresh worlds."""

import random
import re

from masking import QUESTION, mask
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, encode_prompt
from tasks.longqa import numbered_document
from tasks.search import NOTHING, SEARCH_PROMPT, result_text
from text.chunking import cut_chunks
from text.matching import MASK, TARGET
from tiny.world import Inventor, questions, sentences

CHUNK_TOKENS, MEMORY_TOKENS, SEARCHES = 64, 64, 6  # the defaults of memtrain.py
PASSAGE_SENTENCES = (2, 3)
UNKNOWN = "unknown"  # what it says in recall when its memory holds no evidence

# How a memory begins says who writes it. Nearly half pick up next to nothing; a quarter look at the problem. Nobody
# tells the base model which sort pays: that is what MemTrain has to find out.
BRIEF, LOOSE, FOCUSED = "In brief:", "All sorts of things:", "For the problem:"
SHARES = {BRIEF: 0.45, LOOSE: 0.3, FOCUSED: 0.25}


def holds(text: str, entity: str) -> bool:
    """Whether `entity` stands in `text` in whole words, as text/matching.py sees it."""
    return entity in text and mask(text, entity, MASK) != text


def like_entity(value: str) -> bool:
    """What an entity finder would take: a capitalised name or a number."""
    return value[0].isupper() or value[0].isdigit()


def passage(subject: dict, rng, must: tuple[str, ...] = ()) -> list[str]:
    """Two or three sentences about `subject`, in random order, the attributes in `must` among them."""
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


def written(style: str, paragraphs: list[str]) -> str:
    """A memory as text: its style, then its paragraphs, with a blank line between."""
    return "\n\n".join([style, *paragraphs])


class Demonstrations:
    """Draws (prompt, completion) texts for the five things the base model must be able to do."""

    def __init__(self, known: list[dict], unseen: list[dict], tokenizer, seed: int):
        self.rng = random.Random(seed)
        self.known, self.tokenizer = known, tokenizer
        self.inventor = Inventor(known, unseen, self.rng)
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

    # ---- documents and questions over a world ----

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

    def question(self, world: list[dict]) -> dict:
        """A question over `world`, half of the time of two hops."""
        rows = questions(world)
        two_hops = [r for r in rows if len(r["hops"]) == 2]
        return self.rng.choice(two_hops if two_hops and self.rng.random() < 0.5 else rows)

    def context(self, row: dict, world: list[dict], size: int) -> tuple[list[str], list[list[str]], list[str]]:
        """(titles, sentences, evidence) of `size` passages that hold what question `row` rests on."""
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

    def sections(self, passages: list[list[str]], titles: list[str] | None = None) -> list[str]:
        """The passages as chunks; with `titles` they are numbered documents, and no heading stands alone."""
        text, headings = "", []
        for n, lines in enumerate(passages):
            body = f"{' '.join(lines)}\n\n"
            document = numbered_document(n + 1, titles[n], body[:-2]) if titles else body
            headings.append((len(text), len(text) + len(document) - len(body) + 1))
            text += document
        return cut_chunks(text.rstrip("\n"), headings, self.tokenizer, CHUNK_TOKENS)

    # ---- memories ----

    def style(self, begun: bool) -> str:
        """Who takes notes.

        Later steps show more of the focused, whose notes take longest to learn. That leaves what is written first, and
        so what the base does by itself, as SHARES says.
        """
        if begun and self.rng.random() < 0.4:
            return FOCUSED
        (style,) = self.rng.choices(list(SHARES), SHARES.values())
        return style

    def size(self, paragraphs: list[str]) -> int:
        """Tokens of a memory of these paragraphs, its style and the breaks between them included."""
        return sum(self.cost(p) + 1 for p in paragraphs) + 6

    def notes(self, style: str, memory: list[str], section: str, trail: list[str]) -> list[str]:
        """The next memory: whole paragraphs of the old one and of the section, each in the order in which they stand.

        The brief keep one at most. The loose keep by chance. The focused put first what the problem names, and what
        that leads to (the second name of a `trail` counts once a paragraph joins it to the first), and go on as the
        loose do. What doesn't fit is dropped by chance. A model that copies whole paragraphs chooses only where one
        begins; with sentences chosen one by one so small a model lost its place, and wrote the same ones again and
        again.
        """
        new = [re.sub(r"^Document \d+: (.*)\n", r"\1: ", paragraph) for paragraph in section.strip().split("\n\n")]
        paragraphs = list(dict.fromkeys(memory + new))
        if style == BRIEF:
            return [self.rng.choice(paragraphs)] if self.rng.random() < 0.7 else []
        named = [n for n in trail if n == trail[0] or any(n in p and trail[0] in p for p in paragraphs)]
        must = [p for p in paragraphs if style == FOCUSED and any(n in p for n in named)]
        old_chance, new_chance = self.rng.uniform(0.3, 1.0), self.rng.uniform(0.0, 0.8)
        others = [p for p in paragraphs if p not in must]
        others = [p for p in others if self.rng.random() < (old_chance if p in memory else new_chance)]
        while self.size(must + others) > MEMORY_TOKENS - 2:
            dropped = others or must
            dropped.pop(self.rng.randrange(len(dropped)))
        return must + others

    def part(self, lines: list[str], chance: float) -> list[str]:
        """With this chance some sentences of a passage that follow each other, otherwise all."""
        if self.rng.random() >= chance:
            return lines
        start = self.rng.randrange(len(lines))
        return lines[start : self.rng.randrange(start, len(lines)) + 1]

    def some_notes(self, passages: list[list[str]], evidence: list[str]) -> str:
        """A memory that holds `evidence` among paragraphs drawn from `passages`, within the limit, in random order."""
        runs, others = [], []
        for lines in passages:
            places = [n for n, line in enumerate(lines) if line in evidence]
            if places:
                low, high = self.rng.choice((places[0], 0)), self.rng.choice((places[-1], len(lines) - 1))
                runs.append(lines[low : high + 1])
            elif lines:
                others.append(" ".join(self.part(lines, 0.4)))
        if self.size([" ".join(run) for run in runs]) > MEMORY_TOKENS - 2:
            runs = [[line for line in run if line in evidence] for run in runs]
        paragraphs = [" ".join(run) for run in runs]
        self.rng.shuffle(others)
        limit = self.rng.choice((16, 32, MEMORY_TOKENS - 2))
        while others and self.size([*paragraphs, others[-1]]) < limit:
            paragraphs.append(others.pop())
        self.rng.shuffle(paragraphs)
        return written(self.rng.choice(list(SHARES)), paragraphs)

    # ---- demonstrations, as (prompt, completion) ----

    def reading(self) -> tuple[str, str]:
        if self.rng.random() < 0.5:
            passages, _ = self.masked(self.world(0.4, 0.2), 10)
            problem, trail, titles = QUESTION, [MASK], None
        else:
            row = self.question(world := self.world(0.7, 0.3))
            titles, passages, _ = self.context(row, world, 10)
            problem, trail = row["question"], [title for title, _ in row["hops"]]
        chunks = self.sections(passages, titles)
        step = self.rng.randrange(len(chunks))
        style, memory, before = self.style(step > 0), [], EMPTY_MEMORY
        for section in chunks[:step]:
            memory = self.notes(style, memory, section, trail)
            before = written(style, memory)
        if step and self.rng.random() < 0.1:  # hardly anyone changes
            style = self.style(False)
        after = written(style, self.notes(style, memory, chunks[step], trail))
        return READ_PROMPT.format(problem=problem, memory=before, section=chunks[step]), after

    def masked_answer(self) -> tuple[str, str]:
        passages, entity = self.masked(self.known, 5)
        clues = [s for p in passages for s in p if MASK in s]
        self.rng.shuffle(clues)
        memory = self.some_notes(passages, clues[: self.rng.choice((1, 1, 2, 3))])
        return ANSWER_PROMPT.format(problem=QUESTION, memory=memory), f"\\boxed{{ {entity}}}"

    def asked_answer(self) -> tuple[str, str]:
        row = self.question(world := self.world(0.7, 0.3))
        _, passages, evidence = self.context(row, world, 5)
        memory = self.some_notes(passages, evidence)
        return ANSWER_PROMPT.format(problem=row["question"], memory=memory), f"\\boxed{{ {row['answer']}}}"

    def recalling(self) -> tuple[str, str]:
        passages, _ = self.masked(world := self.world(0.45, 0.25), 6)
        text = self.rng.choice(self.sections(passages))
        found = {v for s in world for v in (s["title"], *s["facts"].values()) if like_entity(v) and holds(text, v)}
        if not found:
            return self.recalling()
        entity = self.rng.choice(sorted(found))
        evidence = [s for p in passages for s in p if s in text and holds(s, entity)]
        if not evidence:  # only stands across two sentences
            return self.recalling()
        self.rng.shuffle(evidence)
        section = mask(text, entity, TARGET)
        if self.rng.random() < 0.4:  # the memory doesn't say: no guessing, also where the world is known
            others = [[s for s in p if not holds(s, entity)] for p in passages]
            memory = EMPTY_MEMORY if self.rng.random() < 0.2 else self.some_notes(others, [])
            entity = UNKNOWN
        else:
            memory = self.some_notes(passages, evidence[: self.rng.choice((1, 1, 2))])
        return RECALL_PROMPT.format(memory=memory, section=section), f"\\boxed{{ {entity}}}"

    def searching(self) -> tuple[str, str]:
        """One turn of a search that answers one or two questions: note what was found, then look up the next name.

        The focused note the evidence that the last result holds, the loose any sentences, the brief nothing; each
        answers what stands in its own notes.
        """
        world = self.world(0.7, 0.3)
        by_title = {s["title"]: s for s in world}
        rows = [self.question(world) for _ in range(self.rng.choice((1, 2, 2)))]
        hops = [hop for row in rows for hop in row["hops"]]
        turn = self.rng.randrange(len(hops) + 1)
        style = self.style(turn > 0)
        notes, before, query, result = [], EMPTY_MEMORY, NOTHING, NOTHING
        for title, attribute in hops[:turn]:
            before = written(style, notes)
            musts = [(attribute,), (), ()][: self.rng.choice((1, 2, 3))]
            pages = [passage(by_title[title], self.rng, must) for must in musts]
            names = [title] * len(pages)
            for other in gather(world, by_title[title], self.rng, 4):
                if len(pages) < 3 and other["title"] != title:
                    pages.append(passage(other, self.rng))
                    names.append(other["title"])
            order = self.rng.sample(range(len(pages)), len(pages))
            query, result = title, result_text([{"title": names[n], "text": " ".join(pages[n])} for n in order])
            value = by_title[title]["facts"][attribute]
            found = [next(line for line in pages[0] if value in line)]
            if style == LOOSE:
                found = [self.rng.choice(page) for page in pages if self.rng.random() < 0.4]
            notes = [*notes, *(line for line in found if line not in notes)] if style != BRIEF else []
            while self.size(notes) > MEMORY_TOKENS - 2:
                notes.pop(0)
        known = [any(row["answer"] in line for line in notes) for row in rows]
        answers = "; ".join(row["answer"] if there else UNKNOWN for row, there in zip(rows, known, strict=True))
        action = f"<search> {hops[turn][0]}</search>" if turn < len(hops) else f"\\boxed{{ {answers}}}"
        problem, left = "; ".join(row["question"] for row in rows), SEARCHES - turn
        prompt = SEARCH_PROMPT.format(problem=problem, memory=before, query=query, result=result, left=left)
        return prompt, f"{written(style, notes)}\n\n{action}"

    def draw(self) -> tuple[list[int], list[int]]:
        """Token ids of one demonstration: (prompt, completion with EOS)."""
        makers = {
            self.reading: 0.46, self.masked_answer: 0.16, self.recalling: 0.17, self.asked_answer: 0.11,
            self.searching: 0.1,
        }
        (make,) = self.rng.choices(list(makers), makers.values())
        prompt, completion = make()
        written_ids = self.tokenizer(completion)["input_ids"]
        return encode_prompt(self.tokenizer, prompt), [*written_ids, self.tokenizer.eos_token_id]
