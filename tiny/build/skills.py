"""The skills that the base model needs, each measured greedily by itself.

A memory holds what was read, whole and once; an answer holds what the memory says. [MASK] is asked about known
subjects, and noting is measured on known ones, too. All else is held out: subjects that no demonstration is about, and
newly invented ones. Searching is not measured.
"""

import re
from itertools import cycle, islice

from engine.config import Config
from masking import QUESTION
from rewards import boxed, exact_match
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, Sampler, fill
from text.matching import MASK
from tiny.build.demonstrations import FOCUS, MEMORY_TOKENS, NOTES_TOKENS, UNKNOWN, Demonstrations, written
from tiny.build.world import forms

BARS = {
    "sentences that stand word for word in the old memory or the section": 0.97,
    "memories that repeat no sentence": 0.98,
    "the asked paragraph is noted, known subjects": 0.95,
    "the asked paragraph is noted, unseen subjects": 0.9,
    "the asked paragraph is noted, invented subjects": 0.9,
    "the asked paragraph is kept": 0.98,
    "answer, one hop": 0.95,
    "answer, two hops": 0.85,
    "answer, [MASK]": 0.9,
    "recall": 0.9,
}


def split_sentences(memory: str) -> list[str]:
    """The sentences of a memory or a section, without headings and "(empty)"; a piece that was cut off is one, too."""
    text = re.sub(r"^Document \d+: .*$", "", memory, flags=re.MULTILINE)
    return [s for s in re.split(r"(?<=\.)\s+|\n+", text.strip()) if s and s != EMPTY_MEMORY]


def slot(prompt: str, name: str) -> str:
    return prompt.split(f"<{name}>\n")[1].split(f"\n</{name}>")[0]


class Skills:
    """Measures a model: `measure()` gives the hits of each skill in BARS, as bools, of `n` questions each.

    `sample` is greedy. Each call asks the same; another `seed` asks something else.
    """

    def __init__(self, sample: Sampler, known: list[dict], unseen: list[dict], n: int, seed: str):
        self.sample, self.n, self.seed = sample, n, seed
        self.demonstrations = Demonstrations(known, unseen, sample.tokenizer, seed, free=1.0)
        self.worlds = {"known": known, "unseen": unseen, "invented": self.demonstrations.inventor.fresh(60)}

    def measure(self) -> dict[str, list[bool]]:
        self.demonstrations.rng.seed(self.seed)
        faithful, once = self.faithful()
        measured = {
            "sentences that stand word for word in the old memory or the section": faithful,
            "memories that repeat no sentence": once,
            "the asked paragraph is kept": [
                paragraph in memory for paragraph, memory in self.ask(self.keeping(), MEMORY_TOKENS)
            ],
            "answer, one hop": self.right(self.answering(1)),
            "answer, two hops": self.right(self.answering(2)),
            "answer, [MASK]": self.right(self.naming()),
            "recall": self.right(self.recalling()),
        }
        for name, world in self.worlds.items():
            measured[f"the asked paragraph is noted, {name} subjects"] = [
                lines <= set(split_sentences(memory)) for lines, memory in self.ask(self.noting(world), MEMORY_TOKENS)
            ]
        return {name: measured[name] for name in BARS}

    def ask(self, drawn, new_tokens: int) -> list[tuple]:
        """(what is wanted, one greedy completion) of the first `n` that are drawn as (prompt, what is wanted)."""
        some = list(islice(drawn, self.n))
        turns = self.sample([prompt for prompt, _ in some], new_tokens)
        return [(wanted, turn.text.strip()) for (_, wanted), turn in zip(some, turns, strict=True)]

    def right(self, drawn) -> list[bool]:
        """Whether each answer that is asked for is the one that is boxed."""
        return [exact_match(boxed(text), [answer]) for answer, text in self.ask(drawn, Config.answer_tokens)]

    def heldout(self):
        """The unseen subjects and newly invented ones, in turn."""
        return cycle((self.worlds["unseen"], self.worlds["invented"]))

    def faithful(self) -> tuple[list[bool], list[bool]]:
        """(of each sentence, whether it was read; of each memory, whether it repeats none), told nothing."""
        prompts = (self.demonstrations.reading(world)[0] for world in self.heldout())
        sentences, once = [], []
        for prompt, memory in self.ask(((prompt, prompt) for prompt in prompts), MEMORY_TOKENS):
            written_down = split_sentences(memory)
            read = split_sentences(slot(prompt, "memory")) + split_sentences(slot(prompt, "section"))
            sentences += [sentence in read for sentence in written_down]
            once.append(len(set(written_down)) == len(written_down))
        return sentences, once

    # ---- what is asked, without end: (prompt, what is wanted) ----

    def noting(self, world: list[dict]):
        """All that the section says about what is asked is to be noted, told to focus.

        Half of the questions are of two hops; then it is the paragraph about the first.
        """
        while True:
            row = self.demonstrations.question(world)
            titles, passages, _ = self.demonstrations.context(row, world, 10)
            asked = titles.index(row["hops"][0][0])
            sections = self.demonstrations.sections(passages, titles)
            section = next(s for s in sections if f"Document {asked + 1}:" in s)
            problem = f"{row['question']} {FOCUS}"
            prompt = fill(READ_PROMPT, problem=problem, memory=EMPTY_MEMORY, section=section)
            yield prompt, {sentence for sentence in passages[asked] if sentence in section}

    def keeping(self):
        """A noted paragraph about what is asked is to stand in the next memory, told to focus."""
        rng = self.demonstrations.rng
        for world in self.heldout():
            row = self.demonstrations.question(world)
            titles, passages, _ = self.demonstrations.context(row, world, 10)
            asked, paragraphs = titles.index(row["hops"][0][0]), [" ".join(lines) for lines in passages]
            about = [title for title, _ in row["hops"]]
            others = [p for title, p in zip(titles, paragraphs, strict=True) if title not in about]
            sections = self.demonstrations.sections([[p] for p in others])
            memory = [paragraphs[asked], *rng.sample(others, rng.randrange(3))]
            if self.demonstrations.size(memory) > NOTES_TOKENS:
                continue
            rng.shuffle(memory)
            problem, section = f"{row['question']} {FOCUS}", rng.choice(sections)
            yield fill(READ_PROMPT, problem=problem, memory=written(memory), section=section), paragraphs[asked]

    def answering(self, hops: int):
        """A question is to be answered from a memory that holds its evidence."""
        for world in self.heldout():
            row = self.demonstrations.question(world)
            if len(row["hops"]) == hops:
                _, passages, evidence = self.demonstrations.context(row, world, 5)
                memory = self.demonstrations.some_notes(passages, evidence)
                yield fill(ANSWER_PROMPT, problem=row["question"], memory=memory), row["answer"]

    def naming(self):
        """[MASK] is to be named from a memory whose sentences are true of one name of the known world only."""
        known = self.worlds["known"]
        truths = {sentence for subject in known for stated in forms(subject).values() for sentence in stated}
        names = {name for subject in known for name in (subject["title"], *subject["facts"].values())}
        while True:
            memory, entity = self.demonstrations.masked_memory(known)
            clues = [sentence for sentence in split_sentences(memory) if MASK in sentence]
            if sum(all(clue.replace(MASK, name) in truths for clue in clues) for name in names) == 1:
                yield fill(ANSWER_PROMPT, problem=QUESTION, memory=memory), entity

    def recalling(self):
        """[TARGET] is to be recalled from a memory that holds a sentence with it."""
        for world in self.heldout():
            prompt, completion = self.demonstrations.recalling(world)
            if (entity := boxed(completion).strip()) != UNKNOWN:
                yield prompt, entity
