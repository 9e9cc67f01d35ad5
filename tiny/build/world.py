"""The tiny encyclopedia as English: facts to sentences, sentences to passages, links to questions.

A *world* is a list of subjects, each `{"title", "kind", "facts": {attribute: value}}`. There are three
sorts: the true one (encyclopedia.jsonl), mixed ones (true titles, facts dealt out anew) and fresh ones
(invented titles and facts). The base learns names and facts from the first, and copying from the others.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

TINY = Path(__file__).resolve().parents[1]

# Sentences that state a fact, questions that ask for it, and links: phrases that lead from {x}, a title, to another
# subject, which makes a question of two hops. Every sentence names its subject, so that a memory may keep any of them
# and drop the rest. Most begin with the title or with the value, and so with [MASK] when that is what was masked.
ENGLISH = json.loads(Path(__file__).with_name("english.json").read_text())
PATTERNS, QUESTIONS, LINKS = (ENGLISH[name] for name in ("sentences", "questions", "links"))
PLURALS = ("States", "Kingdom", "Netherlands", "Empire", "Union", "Republic", "Philippines", "Emirates")
ARTICLED = ("museum", "gallery", "library", "observatory", "orchestra", "academy", "school", "theatre", "opera house")


def encyclopedia() -> list[dict]:
    """The true world: tiny/encyclopedia.jsonl, a list of subjects."""
    return [json.loads(line) for line in (TINY / "encyclopedia.jsonl").read_text().splitlines()]


def names_of(subjects: list[dict]) -> set[str]:
    """All that `subjects` name: their titles and the values of their facts."""
    return {name for s in subjects for name in (s["title"], *s["facts"].values())}


def words_of(subjects: list[dict]) -> list[str]:
    """The capitalised words in names and facts of `subjects`: what things are called, not what belongs to whom."""
    return sorted({word for word in re.findall(r"\w+", " ".join(names_of(subjects))) if word[0].isupper()})


# ---- sentences and passages --------------------------------------------------------------------------


def forms(subject: dict) -> dict[str, list[str]]:
    """attribute -> every sentence that states this fact of `subject`."""
    facts, title = subject["facts"], subject["title"]
    definite = subject["kind"] == "institution" and facts["form"] in ARTICLED
    found = {}
    for attribute, patterns in PATTERNS[subject["kind"]].items():
        if value := facts.get(attribute):
            words = {
                "name": f"the {title}" if definite else title, "value": value,
                "the": f"the {value}" if value.endswith(PLURALS) else value,
            }
            words |= {key.capitalize(): word[0].upper() + word[1:] for key, word in words.items()}
            words["a"] = "an" if value[0] in "aeiou" and not value.startswith("uni") else "a"
            words["placed"] = facts.get("placed", "belongs to")
            found[attribute] = [pattern.format(**words) for pattern in patterns]
    return found


def stating(subject: dict, attribute: str, lines: list[str]) -> str | None:
    """The first of `lines` that states this fact of `subject`; a line of another fact may have the same value."""
    stated = forms(subject)[attribute]
    return next((line for line in lines if line in stated), None)


def sentences(subject: dict, rng) -> list[tuple[str, str]]:
    """(attribute, sentence) for every fact of `subject`, in random order, each in one of its forms."""
    lines = [(attribute, rng.choice(stated)) for attribute, stated in forms(subject).items()]
    rng.shuffle(lines)
    return lines


def passage(subject: dict, rng, must: str = "") -> list[str]:
    """Two or three sentences about `subject`, in random order, one of them on the attribute `must`.

    The first begins with the subject, as those of an encyclopedia do.
    """
    lines = sentences(subject, rng)
    lines.sort(key=lambda line: line[0] != must)  # stable: the rest stays shuffled
    lines = lines[: rng.choice((2, 3))]
    rng.shuffle(lines)
    (attribute, first), *others = lines
    beginnings = (subject["title"], f"The {subject['title']}")
    if not first.startswith(beginnings):
        first = rng.choice([form for form in forms(subject)[attribute] if form.startswith(beginnings)])
    return [first, *(sentence for _, sentence in others)]


def questions(world: list[dict]) -> list[dict]:
    """Every question of one and two hops: `{"question", "answer", "hops": [(title, attribute), ...]}`.

    A hop is a fact that the answer rests on: this attribute of the subject `title`.
    """
    by_title = {subject["title"]: subject for subject in world}
    found = []
    for subject in world:
        title = subject["title"]
        asked = [(title, subject, [])]  # what a question calls its last subject, that subject, the hops that lead to it
        for link, phrase in LINKS.get(subject["kind"], {}).items():
            bridge = by_title.get(subject["facts"].get(link))
            if bridge not in (None, subject):
                asked.append((phrase.format(x=title), bridge, [(title, link)]))
        for name, last, hops in asked:
            for attribute, pattern in QUESTIONS[last["kind"]].items():
                value = last["facts"].get(attribute)
                if value and not (hops and value == title):  # two hops that come back ask for what they name
                    whole = [*hops, (last["title"], attribute)]
                    found.append({"question": pattern.format(x=name), "answer": value, "hops": whole})
    return found


# ---- the split: a third of the subjects stays unseen ------------------------------------------------


def split(subjects: list[dict], rng) -> tuple[list[dict], list[dict]]:
    """(known, unseen): a third of each kind is unseen, those that the fewest facts mention.

    Known subjects lose the facts that name an unseen one, so that no demonstration names one.
    """
    mentions = Counter(value for s in subjects for value in s["facts"].values())
    unseen: set[str] = set()
    for kind in PATTERNS:
        titles = [s["title"] for s in subjects if s["kind"] == kind]
        rng.shuffle(titles)
        titles.sort(key=lambda title: mentions[title])
        unseen.update(titles[: len(titles) // 3 + 1])
    seen = [s for s in subjects if s["title"] not in unseen]
    known = [{**s, "facts": {a: v for a, v in s["facts"].items() if v not in unseen}} for s in seen]
    return known, [s for s in subjects if s["title"] in unseen]


# ---- invented worlds ---------------------------------------------------------------------------------

PEOPLE = ("author", "founder", "alumnus", "teacher", "spouse", "sibling", "collaborator")
YEARS = ("born", "died", "year", "founded")
KIND_OF_LINK = {"birthplace": "place", "deathplace": "place", "city": "place", "known_for": "work"}  # else a person


class Inventor:
    """Invents subjects.

    Names are made of the words of real ones, and of others that look like them: a chain over letter pairs. Of the
    `unseen` only words are taken, not what belongs to whom: no invented thing has the name of one.
    """

    def __init__(self, known: list[dict], unseen: list[dict], rng):
        self.rng, self.known = rng, known
        self.words, self.taken = words_of(known + unseen), {s["title"] for s in unseen}
        self.after: dict[str, list[str]] = defaultdict(list)  # two letters -> all that come next; ^ and $ are the ends
        self.values: dict[tuple[str, str], list[str]] = defaultdict(list)  # (kind, attribute) -> as often as they occur
        for s in known:
            for word in re.findall(r"[a-z]+", " ".join([s["title"], *s["facts"].values()]).lower()):
                for i in range(len(word) + 1):
                    self.after[f"^^{word}"[i : i + 2]].append(f"{word}$"[i])
            for attribute, value in s["facts"].items():
                self.values[s["kind"], attribute].append(value)

    def word(self) -> str:
        """A made-up word of 3 to 9 letters; by chance it may be a real one."""
        while True:
            letters = "^^"
            while letters[-1] != "$":
                letters += self.rng.choice(self.after[letters[-2:]])
            if 3 <= len(letters) - 3 <= 9:
                return letters[2:-1]

    def proper(self) -> str:
        return self.rng.choice(self.words) if self.rng.random() < 0.7 else self.word().capitalize()

    def name(self, kind: str) -> str:
        name = " ".join(self.proper() for _ in range({"person": 2, "place": 1}.get(kind) or self.rng.choice((1, 2))))
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
