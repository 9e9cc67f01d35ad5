"""Demonstrations for the base model: by note-takers, over true, mixed and fresh worlds."""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from engine.config import Config
from masking import QUESTION, mask
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, Turn, encode_prompt
from tasks.longqa import numbered_document
from tasks.search import NOTHING, SEARCH_PROMPT, result_text
from text.chunking import cut_chunks
from text.matching import MASK, TARGET, occurrences
from tiny.build.world import Inventor, names_of, passage, questions, questions_from, stating, versions

CHUNK_TOKENS, MEMORY_TOKENS, SEARCHES = Config.chunk_tokens, Config.memory_tokens, Config.searches
NOTES_TOKENS = MEMORY_TOKENS - 2  # of a memory in a demonstration, so that its EOS fits, too
UNKNOWN = "unknown"  # the answer, in recall and search, when the memory holds no evidence


@dataclass(frozen=True)
class Reader:
    """How somebody takes notes: chances to copy a paragraph of the section, and to keep one of the memory.

    `named` is a paragraph that the problem names, `other` any other one. `limit` is the longest memory, in tokens.
    """

    copy_named: float
    copy_other: float
    keep_named: float
    keep_other: float
    limit: int = NOTES_TOKENS
    makes_room: bool = True  # where not all fits, what the problem names goes first, not what stands first

    def chance(self, old: bool, named: bool) -> float:
        if old:
            return self.keep_named if named else self.keep_other
        return self.copy_named if named else self.copy_other


# A problem that ends with one of these says how to read, so that each token of the notes is certain. Skills are taught
# and measured so. No problem of MemTrain or of a task says it: how to read is then the policy's own choice.
FOCUS, EVERYTHING = "Keep only what this is about.", "Keep all that fits."
TOLD = {FOCUS: Reader(1, 0, 1, 0), EVERYTHING: Reader(1, 1, 1, 1)}
CLUTTERING = Reader(1, 0.6, 1, 0.8)  # nothing that the problem names is lost, among other things


def some_reader(rng) -> Reader:
    """A reader who was told nothing. Nobody says who reads: it shows only in what was kept.

    All note what the problem names. What decides long texts they do badly: most forget it soon, many note other things
    too, and half of them don't make room.
    """
    limit = rng.choice((40, NOTES_TOKENS, NOTES_TOKENS))
    copy_other = rng.betavariate(1, 3)
    keep_named, keep_other = rng.betavariate(1, 4), rng.betavariate(3, 1)
    if rng.random() < 0.25:
        keep_named = 1.0
    else:
        keep_other *= keep_named
    return Reader(0.95, copy_other, keep_named, keep_other, limit, rng.random() < 0.5)


def holds(text: str, entity: str) -> bool:
    """Whether `entity` stands in `text` in whole words, as text/matching.py sees it."""
    return entity in text and bool(occurrences(text, entity))


def entities(subjects: list[dict], text: str) -> list[str]:
    """What an entity finder would find in `text`: names of `subjects`, capitalised or numbers, in no longer one."""
    found = [n for n in names_of(subjects) if (n[0].isupper() or n[0].isdigit()) and holds(text, n)]
    return sorted(n for n in found if not any(n != longer and holds(longer, n) for longer in found))


def subjects_around(world: list[dict], centre: dict, rng, size: int) -> list[dict]:
    """`centre` and `size` - 1 others of its world, those that link to it first half of the time."""
    others = [s for s in world if s is not centre]
    rng.shuffle(others)
    if rng.random() < 0.5:
        values = set(centre["facts"].values())
        others.sort(key=lambda s: not (s["title"] in values or centre["title"] in s["facts"].values()))
    chosen = [centre, *others[: size - 1]]
    rng.shuffle(chosen)
    return chosen


def mask_passages(passages: list[list[str]], name: str) -> list[list[str]]:
    """The sentences of passages, with `name` masked."""
    return [[mask(sentence, name, MASK) for sentence in lines] for lines in passages]


def written(paragraphs: list[str]) -> str:
    """A memory as text: its paragraphs, with a blank line between."""
    return "\n\n".join(paragraphs) or EMPTY_MEMORY


class Demonstrations:
    """Draws (prompt, completion) texts, a method for each thing that the base model must be able to do.

    `free` is the share of readings whose problem doesn't say how to read.
    """

    def __init__(self, known: list[dict], unseen: list[dict], tokenizer, seed: str, free: float = 0.0):
        self.rng, self.free = random.Random(seed), free
        self.known, self.tokenizer = known, tokenizer
        self.inventor = Inventor(known, unseen, self.rng)
        self.cost = lru_cache(200_000)(lambda text: len(tokenizer(text)["input_ids"]))  # in tokens

    def world(self, fresh: float, mixed: float) -> list[dict]:
        draw = self.rng.random()
        return self.inventor.fresh() if draw < fresh else self.inventor.mixed() if draw < fresh + mixed else self.known

    # ---- documents and questions over a world ----

    def masked(self, world: list[dict], size: int) -> tuple[list[list[str]], str]:
        """Passages of a document (lists of sentences) with one entity of a pivot masked, and that entity."""
        pivot = self.rng.choice(world)
        around = subjects_around(world, pivot, self.rng, size)
        # Some have two passages, as in the documents that MemTrain trains on.
        passages = [lines for s in around for lines in versions(s, self.rng, self.rng.choice((1, 1, 2)))]
        passages = self.rng.sample(passages, min(size, len(passages)))
        text = " ".join(s for p in passages for s in p if pivot["title"] in s)
        found = entities([pivot], text)
        if not found:
            return self.masked(world, size)
        entity = self.rng.choice(found)
        return mask_passages(passages, entity), entity

    def question(self, world: list[dict]) -> dict:
        """A question over `world`, of two hops more often than of one."""
        by_title, hops = {subject["title"]: subject for subject in world}, self.rng.choice((1, 1, 2, 2, 2))
        for start in self.rng.sample(world, len(world)):
            if rows := [row for row in questions_from(start, by_title) if len(row["hops"]) == hops]:
                return self.rng.choice(rows)
        return self.rng.choice(questions(world))  # no link of a small world may lead to another of its subjects

    def context(self, row: dict, world: list[dict], size: int) -> tuple[list[str], list[list[str]], list[str]]:
        """(titles, sentences, evidence) of `size` passages that hold what question `row` rests on."""
        by_title, needed = {s["title"]: s for s in world}, dict(row["hops"])
        subjects = [by_title[title] for title in needed]
        around = subjects_around(world, subjects[0], self.rng, size)
        if self.rng.random() < 0.4:  # as a task's text has it: among passages of the known world
            around = self.rng.sample(self.known, size)
        chosen = [*subjects, *(s for s in around if s["title"] not in needed)][:size]
        self.rng.shuffle(chosen)
        titles = [s["title"] for s in chosen]
        passages = [passage(s, self.rng, must=needed.get(s["title"], "")) for s in chosen]
        evidence = [stating(by_title[t], needed[t], p) for t, p in zip(titles, passages, strict=True) if t in needed]
        return titles, passages, evidence

    def sections(self, passages: list[list[str]], titles: list[str] | None = None) -> list[str]:
        """The passages as chunks; with `titles` they are numbered documents, and no heading stands alone.

        They may be from the middle of a long text, and have its numbers.
        """
        text, headings, first = "", [], self.rng.choice((1, self.rng.randrange(1, 80)))
        for n, lines in enumerate(passages):
            body = " ".join(lines)
            document = numbered_document(first + n, titles[n], body) if titles else f"{body}\n\n"
            headings.append((len(text), len(text) + len(document) - len(body) - 1))
            text += document
        return cut_chunks(text.rstrip("\n"), headings, self.tokenizer, CHUNK_TOKENS)

    # ---- memories ----

    def size(self, paragraphs: list[str]) -> int:
        """Tokens of a memory of these paragraphs, the breaks between them included."""
        return sum(self.cost(p) + 1 for p in paragraphs)

    def notes(self, reader: Reader, memory: list[str], section: str, trail: list[str]) -> list[str]:
        """The next memory: whole paragraphs of the old one and of the section, each in the order in which they stand.

        A paragraph is named if it holds the first name of the `trail`, or the second once some paragraph holds both.
        Where not all fits, what stands first goes first; a reader who makes room takes what is about a name before it,
        and then what only mentions one.
        """
        new = [re.sub(r"^Document \d+: .*\n", "", paragraph) for paragraph in section.strip().split("\n\n")]
        paragraphs = [p for p in dict.fromkeys(memory + new) if p]
        names = [n for n in trail if n == trail[0] or any(n in p and trail[0] in p for p in paragraphs)]
        named = {p for p in paragraphs if any(n in p for n in names)}
        chosen = [p for p in paragraphs if self.rng.random() < reader.chance(p in memory, p in named)]
        beginnings = (*names, *(f"The {name}" for name in names))
        first = sorted(chosen, key=lambda p: (p not in named, not p.startswith(beginnings)))
        kept: set[str] = set()
        for paragraph in first if reader.makes_room else chosen:
            if self.size([*kept, paragraph]) <= reader.limit:
                kept.add(paragraph)
        return [p for p in chosen if p in kept]

    def some_notes(self, passages: list[list[str]], evidence: list[str]) -> str:
        """A memory that holds `evidence` among paragraphs drawn from `passages`, within the limit, in random order."""
        runs, others = [], []
        for lines in passages:
            places = [n for n, line in enumerate(lines) if line in evidence]
            if places:
                first, last = self.rng.choice((places[0], 0)), self.rng.choice((places[-1], len(lines) - 1))
                runs.append(lines[first : last + 1])
            elif lines:
                first, last = 0, len(lines) - 1
                if self.rng.random() < 0.4:  # a memory may hold a part of a passage
                    first = self.rng.randrange(len(lines))
                    last = self.rng.randrange(first, len(lines))
                others.append(" ".join(lines[first : last + 1]))
        paragraphs = [" ".join(run) for run in runs]
        if self.size(paragraphs) > NOTES_TOKENS:
            paragraphs = [" ".join(line for line in run if line in evidence) for run in runs]
        self.rng.shuffle(others)
        limit = self.rng.choice((16, 32, NOTES_TOKENS))
        while others and self.size([*paragraphs, others[-1]]) < limit:
            paragraphs.append(others.pop())
        self.rng.shuffle(paragraphs)
        return written(paragraphs)

    # ---- demonstrations, as (prompt, completion) ----

    def problem(self, world: list[dict]) -> tuple[str, list[str], list[str]]:
        """(problem, trail, sections): about [MASK] or about names, in passages with or without titles.

        Some ask about [MASK] as about any other subject, so that it is read as a name. In most others something is
        masked that nobody asks about, so that [MASK] by itself is not worth a note.
        """
        if self.rng.random() < 0.25:
            passages, _ = self.masked(world, 10)
            return QUESTION, [MASK], self.sections(passages)
        row = self.question(world)
        titles, passages, _ = self.context(row, world, 10)
        problem, trail = row["question"], [title for title, _ in row["hops"]]
        first, last = titles.index(trail[0]), titles.index(trail[-1])
        if first > last and self.rng.random() < 0.75:  # only then can the second hop be followed
            for items in (titles, passages):
                items[first], items[last] = items[last], items[first]
        asked = self.rng.random() < 0.3
        if hidden := trail[0] if asked else self.unasked(row, titles, passages):
            problem, *titles = (mask(text, hidden, MASK) for text in (problem, *titles))
            passages = mask_passages(passages, hidden)
            trail = [MASK if name == hidden else name for name in trail]
        return problem, trail, self.sections(passages, titles if self.rng.random() < 0.7 else None)

    def unasked(self, row: dict, titles: list[str], passages: list[list[str]]) -> str | None:
        """A name to mask that question `row` doesn't lead to: of a passage about something else. Some have none."""
        trail = [title for title, _ in row["hops"]]
        others = [lines for title, lines in zip(titles, passages, strict=True) if title not in trail]
        names = [title for title in titles if title not in trail and not holds(row["question"], title)]
        if self.rng.random() < 0.2 or not names:
            return None
        told_of_trail = " ".join(s for lines in passages for s in lines if any(holds(s, name) for name in trail))
        names = [name for name in names if not holds(told_of_trail, name) and any(name in s for o in others for s in o)]
        return self.rng.choice(names) if names else None

    def turn(self, chunks: list[str], trail: list[str]) -> int:
        """Which section is read: mostly one that names what is looked for, else one of those that come after.

        Or one with a [MASK] that nobody asks about. Of two hops it is in half of the readings that of the second.
        """
        naming = [n for n, chunk in enumerate(chunks) if any(holds(chunk, name) for name in trail)]
        unasked = [n for n, chunk in enumerate(chunks) if MASK in chunk and MASK not in trail]
        draw = self.rng.random()
        if len(trail) == 2 and self.rng.random() < 0.5:
            second = [n for n, chunk in enumerate(chunks) if re.search(f"(^|\n)(The )?{re.escape(trail[1])} ", chunk)]
            if second:
                return second[0]
        if unasked and draw < 0.3:
            return self.rng.choice(unasked)
        if naming and draw < 0.7:
            return self.rng.choice(naming)
        return self.rng.randrange(naming[0] if naming and draw < 0.9 else 0, len(chunks))

    def reading(self, world: list[dict] | None = None) -> tuple[str, str]:
        """One turn of a reading. All but a share `free` of the problems say how to read."""
        world = world or self.world(0.65, 0.2)
        problem, trail, chunks = self.problem(world)
        now = self.turn(chunks, trail)
        told = self.rng.choice((*[FOCUS] * 5, EVERYTHING)) if self.rng.random() >= self.free else ""
        reader, memory = some_reader(self.rng), []
        before = self.rng.choice((reader, TOLD.get(told, reader), TOLD[EVERYTHING], CLUTTERING))  # fills the memory
        for section in chunks[:now]:
            memory = self.notes(before, memory, section, trail)
        notes = self.notes(TOLD.get(told, reader), memory, chunks[now], trail)
        if told == FOCUS and not notes and self.rng.random() < 0.9:  # "(empty)" is soon learned, to find is not
            return self.reading(world)
        problem = f"{problem} {told}".strip()
        return READ_PROMPT.format(problem=problem, memory=written(memory), section=chunks[now]), written(notes)

    def masked_answer(self) -> tuple[str, str]:
        """[MASK] named from a memory that says something about it."""
        passages, entity = self.masked(self.known, 5)
        clues = [s for p in passages for s in p if MASK in s]
        self.rng.shuffle(clues)
        memory = self.some_notes(passages, clues[: self.rng.choice((1, 1, 2, 3))])
        problem = f"{QUESTION} {self.rng.choice(('', '', '', FOCUS))}".strip()
        return ANSWER_PROMPT.format(problem=problem, memory=memory), f"\\boxed{{ {entity}}}"

    def asked_answer(self, world: list[dict] | None = None, row: dict | None = None) -> tuple[str, str]:
        """A question, by default any over any world, answered from a memory that holds its evidence."""
        world = world or self.world(0.7, 0.3)
        row = row or self.question(world)
        _, passages, evidence = self.context(row, world, 5)
        memory = self.some_notes(passages, evidence)
        problem = f"{row['question']} {self.rng.choice(('', '', '', FOCUS))}".strip()
        return ANSWER_PROMPT.format(problem=problem, memory=memory), f"\\boxed{{ {row['answer']}}}"

    def recalling(self, world: list[dict] | None = None) -> tuple[str, str]:
        """[TARGET] in a section named from a memory, or said to be unknown."""
        world = world or self.world(0.45, 0.25)
        passages, _ = self.masked(world, 6)
        text = self.rng.choice(self.sections(passages))
        found = entities(world, text)
        entity = self.rng.choice(found) if found else ""
        evidence = [s for p in passages for s in p if s in text and holds(s, entity)]
        if not evidence:  # the section names nothing, or only across two sentences
            return self.recalling(world)
        self.rng.shuffle(evidence)
        section = mask(text, entity, TARGET)
        if self.rng.random() < 0.1:  # the memory doesn't say: no guessing, also where the world is known
            others = [[s for s in p if not holds(s, entity)] for p in passages]
            memory = EMPTY_MEMORY if self.rng.random() < 0.2 else self.some_notes(others, [])
            entity = UNKNOWN
        else:
            memory = self.some_notes(passages, evidence[: self.rng.choice((1, 1, 2))])
        return RECALL_PROMPT.format(memory=memory, section=section), f"\\boxed{{ {entity}}}"

    def results(self, world: list[dict], subject: dict, attribute: str) -> list[tuple[str, list[str]]]:
        """Three (title, sentences) that a search for `subject` finds: the first states this fact of it."""
        most, pages = self.rng.choice((1, 2, 3)), [(subject["title"], passage(subject, self.rng, attribute))]
        while len(pages) < most and (lines := passage(subject, self.rng, said={s for _, own in pages for s in own})):
            pages.append((subject["title"], lines))
        for other in subjects_around(world, subject, self.rng, 4):
            if len(pages) < 3 and other is not subject:
                pages.append((other["title"], passage(other, self.rng)))
        return pages

    def searching(self) -> tuple[str, str]:
        """One turn of a search that answers one or two questions: note what was found, then look up the next name.

        A reader notes the evidence that the last result holds, or any sentence, by chance, and answers what stands in
        its own notes.
        """
        world = self.world(0.7, 0.3)
        by_title = {s["title"]: s for s in world}
        rows = [self.question(world) for _ in range(self.rng.choice((1, 2, 2)))]
        hops = [hop for row in rows for hop in row["hops"]]
        turn = self.rng.randrange(len(hops) + 1)
        told = FOCUS if self.rng.random() >= self.free else ""
        reader = some_reader(self.rng)
        notes, before, query, result, proven = [], EMPTY_MEMORY, NOTHING, NOTHING, []
        for n, (query, attribute) in enumerate(hops[:turn], 1):
            before = written(notes)
            pages = self.results(world, by_title[query], attribute)
            shown = self.rng.sample(pages, len(pages))
            result = result_text([{"title": title, "text": " ".join(lines)} for title, lines in shown])
            evidence = stating(by_title[query], attribute, pages[0][1])
            if told and n == turn:
                reader = TOLD[told]
            notes = [line for line in notes if self.rng.random() < reader.chance(True, line in proven)]
            for line in (line for _, lines in pages for line in lines):
                if line not in notes and self.rng.random() < reader.chance(False, line == evidence):
                    notes.append(line)
            proven.append(evidence)
            while self.size(notes) > NOTES_TOKENS:
                notes.pop(0)
        answers = []
        for row in rows:
            title, attribute = row["hops"][-1]
            answers.append(row["answer"] if stating(by_title[title], attribute, notes) else UNKNOWN)
        action = f"<search> {hops[turn][0]}</search>" if turn < len(hops) else f"\\boxed{{ {'; '.join(answers)}}}"
        problem = f"{'; '.join(row['question'] for row in rows)} {told}".strip()
        slots = {"problem": problem, "memory": before, "query": query, "result": result, "left": SEARCHES - turn}
        return SEARCH_PROMPT.format(**slots), f"{written(notes)}\n\n{action}"

    def draw(self) -> Turn:
        """One demonstration, as if it had been sampled, of a kind that is drawn by the shares here."""
        makers = {
            self.reading: 0.52, self.masked_answer: 0.15, self.recalling: 0.11, self.asked_answer: 0.12,
            self.searching: 0.10,
        }
        (make,) = self.rng.choices(list(makers), makers.values())
        prompt, completion = make()
        ids = [*self.tokenizer(completion)["input_ids"], self.tokenizer.eos_token_id]
        return Turn(encode_prompt(self.tokenizer, prompt), ids, ended=True, text=completion)
