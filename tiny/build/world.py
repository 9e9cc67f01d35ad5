"""The tiny encyclopedia as English: facts to sentences, sentences to passages, links to questions.

A *world* is a list of subjects, each `{"title", "kind", "facts": {attribute: value}}`. There are three
sorts: the true one (encyclopedia.jsonl), mixed ones (true titles, facts dealt out anew) and fresh ones
(invented titles and facts). The base learns names and facts from the first, and copying from the others.
"""

import json
import re
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

from tasks.questions import split_of

TINY = Path(__file__).resolve().parents[1]

# Sentences that state a fact, questions that ask for it, and links: phrases that lead from {x}, a title, to another
# subject, which makes a question of two hops. Every sentence names its subject, so that a memory may keep any of them
# and drop the rest. Most begin with the title or with the value, and so with [MASK] when that is what was masked.
ENGLISH = json.loads(Path(__file__).with_name("english.json").read_text())
PATTERNS, QUESTIONS, LINKS = (ENGLISH[name] for name in ("sentences", "questions", "links"))
WITH_THE = set(ENGLISH["with_the"])  # the names before which English says "the": the Louvre, the Eiffel Tower
ARTICLED = ("museum", "library", "orchestra", "festival", "theatre", "opera house")  # before all of these forms, too
ARTICLES = ("The", "La", "Le", "Las", "Les", "Il", "El", "Der", "Die", "Das")  # of a name's own: The Kiss, La Scala


def encyclopedia() -> list[dict]:
    """The true world: tiny/encyclopedia.jsonl, a list of subjects."""
    return [json.loads(line) for line in (TINY / "encyclopedia.jsonl").read_text().splitlines()]


def names_of(subjects: list[dict]) -> set[str]:
    """All that `subjects` name: their titles and the values of their facts."""
    return {name for s in subjects for name in (s["title"], *s["facts"].values())}


def words_of(subjects: list[dict]) -> list[str]:
    """The capitalised words in names and facts of `subjects`: what things are called, not what belongs to whom."""
    return sorted({word for word in " ".join(names_of(subjects)).split() if word[0].isupper()})


# ---- sentences and passages --------------------------------------------------------------------------


def with_the(name: str) -> str:
    return f"the {name}" if name in WITH_THE else name


def called(subject: dict) -> str:
    """What a sentence calls `subject`: "the Louvre", "La Scala", "Paris"."""
    title = subject["title"]
    if subject["facts"].get("form") in ARTICLED and title.split()[0] not in ARTICLES:
        return f"the {title}"
    return with_the(title)


def forms(subject: dict) -> dict[str, list[str]]:
    """attribute -> every sentence that states this fact of `subject`."""
    facts, found = subject["facts"], {}
    for attribute, patterns in PATTERNS[subject["kind"]].items():
        if value := facts.get(attribute):
            words = {"name": called(subject), "value": with_the(value)}
            words |= {key.capitalize(): word[0].upper() + word[1:] for key, word in words.items()}
            words["a"] = "an" if value[0] in "aeiou" and not value.startswith("uni") else "a"
            words["placed"] = facts.get("placed", "is found in")
            words["done"] = words["placed"].removesuffix(" in")
            found[attribute] = [pattern.format(**words) for pattern in patterns]
    return found


def stating(subject: dict, attribute: str, lines: list[str]) -> str | None:
    """The first of `lines` that states this fact of `subject`; a line of another fact may have the same value."""
    stated = forms(subject)[attribute]
    return next((line for line in lines if line in stated), None)


def passage(subject: dict, rng, must: str = "", said: set[str] = frozenset()) -> list[str]:
    """One to three sentences about `subject`, in random order, one of them on the attribute `must`, none of `said`.

    The first begins with the subject, as those of an encyclopedia do; [] where no such sentence is left.
    """
    left = {a: [line for line in stated if line not in said] for a, stated in forms(subject).items()}
    lines = [(a, rng.choice(stated)) for a, stated in left.items() if stated]
    rng.shuffle(lines)
    lines.sort(key=lambda line: line[0] != must)  # stable: the rest stays shuffled
    lines = lines[: rng.choice((2, 3))]
    rng.shuffle(lines)
    beginnings = (subject["title"], f"The {subject['title']}")
    opening = {a: [line for line in stated if line.startswith(beginnings)] for a, stated in left.items()}
    lines.sort(key=lambda line: not opening[line[0]])
    if not (lines and opening[lines[0][0]]):
        return []
    (attribute, first), *others = lines
    if not first.startswith(beginnings):
        first = rng.choice(opening[attribute])
    return [first, *(sentence for _, sentence in others)]


def versions(subject: dict, rng, most: int) -> list[list[str]]:
    """Up to `most` passages about `subject`, no sentence in two: a text that repeats itself teaches repetition."""
    found, said = [], set()
    for _ in range(most):
        if lines := passage(subject, rng, said=said):
            found.append(lines)
            said.update(lines)
    return found


def questions(world: list[dict]) -> list[dict]:
    """Every question of one and two hops: `{"question", "answer", "hops": [(title, attribute), ...]}`.

    A hop is a fact that the answer rests on: this attribute of the subject `title`.
    """
    by_title = {subject["title"]: subject for subject in world}
    return [row for subject in world for row in questions_from(subject, by_title)]


def questions_from(subject: dict, by_title: dict[str, dict]) -> list[dict]:
    """The questions that start at `subject`, as `questions` gives them."""
    title, name, found = subject["title"], called(subject), []
    asked = [(name, subject, [])]  # what a question calls its last subject, that subject, the hops that lead to it
    for link, phrase in LINKS.get(subject["kind"], {}).items():
        bridge = by_title.get(subject["facts"].get(link))
        if bridge not in (None, subject):
            asked.append((phrase.format(x=name), bridge, [(title, link)]))
    for name, last, hops in asked:
        for attribute, pattern in QUESTIONS[last["kind"]].items():
            value = last["facts"].get(attribute)
            if value and not (hops and value == title):  # two hops that come back ask for what they name
                whole = [*hops, (last["title"], attribute)]
                found.append({"question": pattern.format(x=name), "answer": value, "hops": whole})
    return found


# ---- the split: a third of the subjects stays unseen ------------------------------------------------

# How many of a kind's subjects in each split of the questions: of the few in dev most, to have enough to choose by.
UNSEEN = {"train": 0.27, "dev": 0.7, "test": 0.3}


def split(subjects: list[dict], rng) -> tuple[list[dict], list[dict]]:
    """(known, unseen): of each kind and in each split of the questions, those that the fewest facts mention are unseen.

    Known subjects lose the facts that name an unseen one, so that no demonstration names one.
    """
    mentions = Counter(value for s in subjects for value in s["facts"].values())
    unseen: set[str] = set()
    for kind, (name, share) in product(PATTERNS, UNSEEN.items()):
        titles = [s["title"] for s in subjects if s["kind"] == kind and split_of(s["title"]) == name]
        rng.shuffle(titles)
        titles.sort(key=lambda title: mentions[title])
        unseen.update(titles[: round(share * len(titles))])
    seen = [s for s in subjects if s["title"] not in unseen]
    known = [{**s, "facts": {a: v for a, v in s["facts"].items() if v not in unseen}} for s in seen]
    return known, [s for s in subjects if s["title"] in unseen]


def untested(subjects: list[dict]) -> list[dict]:
    """Those of `subjects` that no test question starts at: the others help to choose nothing."""
    return [s for s in subjects if split_of(s["title"]) != "test"]


# ---- invented worlds ---------------------------------------------------------------------------------

PEOPLE = ("author", "founder", "alumnus", "teacher", "spouse", "sibling", "collaborator")
YEARS = ("born", "died", "year", "founded")
KIND_OF_LINK = {"birthplace": "place", "deathplace": "place", "city": "place", "known_for": "work"}  # else a person


class Inventor:
    """Invents subjects.

    Names have the shape of real ones: "The Kiss" gives an article and a word, "War and Peace" two words around "and".
    The words are those of real names, and others that look like them: a chain over letter pairs. Of the `unseen` only
    shapes and words are taken, not what belongs to whom: no invented thing has the name of one.
    """

    def __init__(self, known: list[dict], unseen: list[dict], rng):
        self.rng, self.known = rng, known
        self.words = [word for word in words_of(known + unseen) if word not in ARTICLES]
        self.taken = {name for s in unseen for name in (s["title"], s["title"].removeprefix("The "))}
        self.shapes: dict[str, list[list[str]]] = defaultdict(list)  # kind -> titles, as words
        for s in known + unseen:
            self.shapes[s["kind"]].append(s["title"].split())
        self.after: dict[str, list[str]] = defaultdict(list)  # two letters -> all that come next; ^ and $ are the ends
        self.values: dict[tuple[str, str], list[str]] = defaultdict(list)  # (kind, attribute) -> as often as they occur
        for s in known:
            for word in re.findall(r"[a-z]+", " ".join([s["title"], *s["facts"].values()]).lower()):
                for i in range(len(word) + 1):
                    self.after[f"^^{word}"[i : i + 2]].append(f"{word}$"[i])
            for attribute, value in s["facts"].items():
                self.values[s["kind"], attribute].append(value)

    def word(self) -> str:
        """A made-up word of 3 to 9 letters; by chance it may be a real one, but no article."""
        while True:
            letters = "^^"
            while letters[-1] != "$":
                letters += self.rng.choice(self.after[letters[-2:]])
            if 3 <= len(letters) - 3 <= 9 and letters[2:-1].capitalize() not in ARTICLES:
                return letters[2:-1]

    def proper(self) -> str:
        return self.rng.choice(self.words) if self.rng.random() < 0.7 else self.word().capitalize()

    def name(self, kind: str) -> str:
        shape = self.rng.choice(self.shapes[kind])
        name = " ".join(word if word.islower() or word in ARTICLES else self.proper() for word in shape)
        return self.name(kind) if name in self.taken else name

    def value(self, kind: str, attribute: str) -> str:
        if attribute == "placed" or (attribute not in YEARS and self.rng.random() < 0.4):
            return self.rng.choice(self.values[kind, attribute])
        if attribute in YEARS:
            return str(self.rng.randint(1300, 1999))
        if attribute in PEOPLE:
            return self.name("person")
        if attribute in ("occupation", "form", "currency"):
            return self.word()
        if attribute == "about":
            return f"{self.rng.choice(('a', 'the'))} {self.word()} {self.word()}"
        return self.name("place")

    def fresh(self, size: int = 10) -> list[dict]:
        """A world of `size` invented subjects. Where it can, a link points into the world with chance 0.6."""
        kinds = [self.rng.choice(("person", "person", "work", "place", "institution")) for _ in range(size)]
        world = [{"title": t, "kind": k} for t, k in {self.name(kind): kind for kind in kinds}.items()]
        for s in world:
            attributes = sorted(attribute for kind, attribute in self.values if kind == s["kind"])
            s["facts"] = {a: self.value(s["kind"], a) for a in attributes if a not in PEOPLE or self.rng.random() < 0.7}
            for link in LINKS.get(s["kind"], {}):
                kind = KIND_OF_LINK.get(link, "person")
                others = [other["title"] for other in world if other["kind"] == kind and other is not s]
                if others and self.rng.random() < 0.6:
                    s["facts"][link] = self.rng.choice(others)
        return world

    def mixed(self) -> list[dict]:
        """The known titles with every attribute's values dealt out anew."""
        decks = {key: self.rng.sample(values, len(values)) for key, values in self.values.items()}
        return [{**s, "facts": {a: decks[s["kind"], a].pop() for a in s["facts"]}} for s in self.known]
