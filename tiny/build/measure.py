"""What the base model can do: its skills, and its success when it samples. Tables in markdown.

    python -m tiny.build.measure [MODEL]

Skills, greedy, each by itself, beside the least that it should reach; then those of reading, told nothing. Whole
readings, greedy: told to focus, which is the ceiling of what a policy can reach from here, and told nothing. Then,
sampled, what decides whether GRPO has anything to learn from: end-to-end and recall on training documents, and
questions of tiny/questions.jsonl, of one hop and two, each answered by reading its ten paragraphs. Last, some memories.
"""

import random
import re
import sys
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import torch

from engine.config import Config
from engine.errors import UserError, run_script
from engine.metrics import sample_text, share
from eval import load_sampler
from masking import Document, draw_recall, load_corpus, mask
from rewards import answer_reward, boxed, exact_match, recall_reward
from rollout import EMPTY_MEMORY, READ_PROMPT, Sampler, fill, read, recall
from tasks.longqa import LongQA, LongText, measured
from tasks.questions import load_questions, split_of, subject
from text.matching import MASK
from tiny.build.demonstrations import (
    FOCUS,
    MEMORY_TOKENS,
    NOTES_TOKENS,
    UNKNOWN,
    Demonstrations,
    mask_passages,
    written,
)
from tiny.build.world import TINY, encyclopedia, forms, names_of, split, untested

DOCUMENTS, SAMPLES = 60, 4
WHOLE, LENGTHS = 100, (4, 8, 16, 32)  # whole readings of a kind, chunks of each

# ---- skills --------------------------------------------------------------------------------------------


def split_sentences(memory: str) -> list[str]:
    """The sentences of a memory or a section, without headings and "(empty)"; a piece that was cut off is one, too."""
    text = re.sub(r"^Document \d+: .*$", "", memory, flags=re.MULTILINE)
    return [s for s in re.split(r"(?<=\.)\s+|\n+", text.strip()) if s and s != EMPTY_MEMORY]


def slot(prompt: str, name: str) -> str:
    return prompt.split(f"<{name}>\n")[1].split(f"\n</{name}>")[0]


class Skills:
    """Asks a model `n` questions of each skill, answered by `sample`, greedily.

    A memory holds what was read, whole and once; an answer holds what the memory says. [MASK] is asked about known
    subjects, and noting is measured on known ones, too. All else is held out: subjects that no demonstration is about,
    and newly invented ones. Searching is not measured.
    """

    def __init__(self, sample: Sampler, known: list[dict], unseen: list[dict], n: int, seed: str):
        self.sample, self.n, self.seed = sample, n, seed
        self.demonstrations = Demonstrations(known, unseen, sample.tokenizer, seed, free=1.0)
        self.worlds = {"known": known, "unseen": unseen, "invented": self.demonstrations.inventor.fresh(60)}

    def measure(self) -> dict[str, tuple[float, list[bool]]]:
        """skill -> (the least share of hits that it should reach, its hits). Each call asks the same."""
        self.demonstrations.rng.seed(self.seed)
        known, unseen, invented = self.worlds.values()
        faithful, once = self.faithful()
        left_out = [MASK not in memory for _, memory in self.ask(self.ignoring(), MEMORY_TOKENS)]
        return {
            "sentences that stand word for word in the old memory or the section": (0.97, faithful),
            "memories that repeat no sentence": (0.98, once),
            "the asked paragraph is noted, known subjects": (0.95, self.noted(self.noting(known))),
            "the asked paragraph is noted, unseen subjects": (0.95, self.noted(self.noting(unseen))),
            "the asked paragraph is noted, invented subjects": (0.95, self.noted(self.noting(invented))),
            "..., at a full memory, unseen subjects": (0.9, self.noted(self.noting(unseen, full=True))),
            "..., at a full memory, invented subjects": (0.9, self.noted(self.noting(invented, full=True))),
            "..., told nothing, unseen subjects": (0.85, self.noted(self.noting(unseen, told=""))),
            "the second hop's paragraph is noted": (0.85, self.noted(self.following())),
            "the asked paragraph is kept": (0.99, self.noted(self.keeping())),
            "a [MASK] that nobody asks about is left out": (0.95, left_out),
            "answer, one hop": (0.95, self.right(self.answering(1))),
            "answer, two hops": (0.85, self.right(self.answering(2))),
            "answer, [MASK]": (0.9, self.right(self.naming())),
            "recall": (0.9, self.right(self.recalling())),
        }

    def told_nothing(self) -> dict[str, list[bool]]:
        """skill -> its hits, where the problem doesn't say how to read: what a policy can change. Held-out subjects."""
        self.demonstrations.rng.seed(self.seed)
        unseen = self.worlds["unseen"]
        return {
            "the asked paragraph is noted": self.noted(self.noting(unseen, told="")),
            "..., at a full memory": self.noted(self.noting(unseen, told="", full=True)),
            "the second hop's paragraph is noted": self.noted(self.following(told="")),
            "the asked paragraph is kept": self.noted(self.keeping(told="")),
        }

    def noted(self, drawn) -> list[bool]:
        """Whether all the sentences that are wanted stand in the memory."""
        return [wanted <= set(split_sentences(memory)) for wanted, memory in self.ask(drawn, MEMORY_TOKENS)]

    def ask(self, drawn, new_tokens: int) -> list[tuple]:
        """(what is wanted, one greedy completion) of the first `n` that are drawn as (prompt, what is wanted)."""
        some = list(islice(drawn, self.n))
        turns = self.sample([prompt for prompt, _ in some], new_tokens)
        return [(wanted, turn.text.strip()) for (_, wanted), turn in zip(some, turns, strict=True)]

    def right(self, drawn) -> list[bool]:
        """Whether each boxed answer is that of the demonstration that was drawn."""
        asked = self.ask(drawn, Config.answer_tokens)
        return [exact_match(boxed(text), [boxed(completion)]) for completion, text in asked]

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

    def noting(self, world: list[dict], told: str = FOCUS, full: bool = False):
        """All that the section says about what is asked is to be noted, from an empty memory or one full of others.

        Half of the questions are of two hops; then it is the paragraph about the first.
        """
        for row, titles, passages in self.contexts(cycle([world])):
            asked = titles.index(row["hops"][0][0])
            section = self.section_of(titles, passages, asked)
            memory = self.others(row, titles, passages, section) if full else []
            wanted = {sentence for sentence in passages[asked] if sentence in section}
            yield self.reading(f"{row['question']} {told}".strip(), memory, section), wanted

    def following(self, told: str = FOCUS):
        """The paragraph about the second of two hops is to be noted, once the first stands in the memory."""
        for row, titles, passages in self.contexts(self.heldout()):
            if len(row["hops"]) == 2:
                first, second = (titles.index(title) for title, _ in row["hops"])
                section, memory = self.section_of(titles, passages, second), [" ".join(passages[first])]
                wanted = {sentence for sentence in passages[second] if sentence in section}
                if memory[0] not in section and self.demonstrations.size([*memory, *wanted]) <= NOTES_TOKENS:
                    yield self.reading(f"{row['question']} {told}".strip(), memory, section), wanted

    def keeping(self, told: str = FOCUS):
        """A noted paragraph about what is asked is to stand in the next memory."""
        rng = self.demonstrations.rng
        for row, titles, passages in self.contexts(self.heldout()):
            asked = passages[titles.index(row["hops"][0][0])]
            others = self.others(row, titles, passages, "")
            memory, unread = [" ".join(asked), *others[: rng.randrange(len(others) + 1)]], others[-2:]
            unread = [other for other in unread if other not in memory]
            if unread and self.demonstrations.size(memory) <= NOTES_TOKENS:
                rng.shuffle(memory)
                section = rng.choice(self.demonstrations.sections([[other] for other in unread]))
                yield self.reading(f"{row['question']} {told}".strip(), memory, section), set(asked)

    def ignoring(self):
        """A section tells of a [MASK] that the problem doesn't ask about; the memory holds what is asked or nothing."""
        rng = self.demonstrations.rng
        for row, titles, passages in self.contexts(self.heldout()):
            if hidden := self.demonstrations.unasked(row, titles, passages):
                titles = [mask(title, hidden, MASK) for title in titles]
                passages = mask_passages(passages, hidden)
                section = self.section_of(titles, passages, titles.index(MASK))
                asked = " ".join(passages[titles.index(row["hops"][0][0])])
                memory = [asked] if asked not in section and rng.random() < 0.5 else []
                yield self.reading(f"{row['question']} {FOCUS}", memory, section), None

    def contexts(self, worlds):
        """(question, titles, passages) over each of the worlds."""
        for world in worlds:
            row = self.demonstrations.question(world)
            titles, passages, _ = self.demonstrations.context(row, world, 10)
            yield row, titles, passages

    def section_of(self, titles: list[str], passages: list[list[str]], asked: int) -> str:
        """The section of this passage, among the numbered documents of a text."""
        sections = self.demonstrations.sections(passages, titles)
        return next(section for section in sections if f": {titles[asked]}\n" in section)

    def others(self, row: dict, titles: list[str], passages: list[list[str]], section: str) -> list[str]:
        """Paragraphs that name nothing that is asked and don't stand in the section, as many as a memory holds."""
        trail, found = [title for title, _ in row["hops"]], []
        for paragraph in map(" ".join, passages):
            fits = self.demonstrations.size([*found, paragraph]) <= NOTES_TOKENS
            if fits and paragraph not in section and not any(name in paragraph for name in trail):
                found.append(paragraph)
        return found

    def reading(self, problem: str, memory: list[str], section: str) -> str:
        return fill(READ_PROMPT, problem=problem, memory=written(memory), section=section)

    def answering(self, hops: int):
        """A question is to be answered from a memory that holds its evidence."""
        for world in self.heldout():
            row = self.demonstrations.question(world)
            if len(row["hops"]) == hops:
                yield self.demonstrations.asked_answer(world, row)

    def naming(self):
        """[MASK] is to be named from a memory whose sentences are true of one name of the known world only."""
        known = self.worlds["known"]
        truths = {sentence for subject in known for stated in forms(subject).values() for sentence in stated}
        names = names_of(known)
        while True:
            prompt, completion = self.demonstrations.masked_answer()
            clues = [sentence for sentence in split_sentences(slot(prompt, "memory")) if MASK in sentence]
            if sum(all(clue.replace(MASK, name) in truths for clue in clues) for name in names) == 1:
                yield prompt, completion

    def recalling(self):
        """[TARGET] is to be recalled from a memory that holds a sentence with it."""
        for world in self.heldout():
            prompt, completion = self.demonstrations.recalling(world)
            if boxed(completion).strip() != UNKNOWN:
                yield prompt, completion


def asked(hops: int) -> list:
    """The questions of so many hops, but those of the test."""
    questions = load_questions(TINY / "questions.jsonl")
    return [q for q in questions if len(q.gold) == hops and split_of(subject(q)) != "test"]


# ---- whole readings ---------------------------------------------------------------------------------------


def print_whole(sample: Sampler, corpus, config: Config) -> None:
    """How many documents of each length are answered right: masked ones, and questions whose subject is in no test."""
    pool = measured([(passage.title, passage.text) for passage in corpus.passages], sample.tokenizer)
    sources = {"[MASK]": lambda n, chunks: corpus.document(n, "heldout", chunks=chunks)}
    for hops, name in ((1, "one hop"), (2, "two hops")):
        own = asked(hops)
        own = own[:: max(1, len(own) // WHOLE)][:WHOLE]
        how = dict(seed=0, chunk_tokens=config.chunk_tokens, chunks=config.chunks)
        source = LongQA({"dev": own}, pool, sample.tokenizer, **how)
        sources[name] = lambda n, chunks, source=source: source.document(n, "dev", chunks)
    print("\n| whole readings, greedy |", *(f"{n} chunks |" for n in LENGTHS), "n |")
    print("|---|", "---|" * (len(LENGTHS) + 1))
    for name, document in sources.items():
        for told in (FOCUS, ""):
            cells = [f"{name}, {'told to focus' if told else 'told nothing'}"]
            for chunks in LENGTHS:
                documents = [document(n, chunks) for n in range(WHOLE)]
                documents = [replace(d, question=f"{d.question} {told}".strip()) for d in documents]
                read_by = read(sample, documents, config, progress=f"{name}, {chunks} chunks")
                hits = [answer_reward(t.prediction, t.document.answers) for t in read_by]
                cells.append(share(sum(hits), WHOLE))
            print("|", " | ".join([*cells, str(WHOLE)]), "|")


# ---- success ----------------------------------------------------------------------------------------------


def question_documents(tokenizer, config: Config, hops: int) -> list[Document]:
    """Questions about unseen subjects, of so many hops, each with its own ten paragraphs to read."""
    questions = asked(hops)
    some = questions[:: len(questions) // DOCUMENTS][:DOCUMENTS]
    texts = [LongText(q, n, [], tokenizer, seed=0, chunk_tokens=config.chunk_tokens) for n, q in enumerate(some)]
    return [text.document(text.draw(10)) for text in texts]


def print_row(cells: list[str], hits: list[bool]) -> None:
    print("|", " | ".join([*cells, share(sum(hits), len(hits)), str(len(hits))]), "|")


def print_answers(name: str, trajectories: list) -> None:
    """The row of how many answers are right, which also becomes the reward of each."""
    for t in trajectories:
        t.reward = answer_reward(t.prediction, t.document.answers)
    print_row([name], [t.reward == 1 for t in trajectories])


def main() -> None:
    if len(sys.argv) > 2:
        raise UserError("give one model at most: python -m tiny.build.measure [MODEL]")
    model = sys.argv[1] if sys.argv[1:] else Config.model
    config = Config(model=model, out=str(TINY / "measured"), fast=True)
    torch.manual_seed(0)
    sample = load_sampler(model, config)
    known, unseen = split(encyclopedia(), random.Random(0))
    unseen = untested(unseen)
    print("| skill, greedy | at least | measured | n |\n|---|---|---|---|")
    skills = Skills(replace(sample, greedy=True), known, unseen, n=200, seed="to report")
    for name, (least, hits) in skills.measure().items():
        print_row([name, str(least)], hits)

    print("\n| told nothing, greedy | measured | n |\n|---|---|---|")
    for name, hits in skills.told_nothing().items():
        print_row([name], hits)
    corpus = load_corpus(config, sample.tokenizer)
    print_whole(skills.sample, corpus, config)
    print("\n| sampled at temperature 1 | success | n |\n|---|---|---|")
    documents = [corpus.document(i) for i in range(DOCUMENTS)]
    trajectories = read(sample, documents, config, samples=SAMPLES, progress="end-to-end")
    print_answers("end-to-end", trajectories)
    rng = np.random.default_rng(0)
    for t in trajectories:
        t.target = draw_recall(t.document, rng)
    recall(sample, trajectories, config)
    print_row(["recall"], [recall_reward(turn.text, t.target.entity) == 1 for t in trajectories for turn in t.recalls])
    shown = trajectories[:: 6 * SAMPLES]
    for hops in (1, 2):
        documents = question_documents(sample.tokenizer, config, hops)
        for name, empty in (("", False), (", empty memory", True)):
            trajectories = read(sample, documents, config, SAMPLES, empty_memory=empty, progress="questions")
            print_answers(f"question of {hops} hop{'s' * (hops > 1)}{name}", trajectories)
            if not empty:
                shown += trajectories[:: 20 * SAMPLES]
    print("", *(sample_text(t, name="EM") for t in shown), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
