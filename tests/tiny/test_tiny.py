"""tiny/: the facts, what is made of them, and what the base model was taught with."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import start, wait
from safetensors import safe_open
from torch.nn.utils import parameters_to_vector
from transformers import AutoTokenizer

from engine import parallel
from rewards import boxed
from rollout import EMPTY_MEMORY, READ_PROMPT, Turn, encode_prompt
from tasks.questions import split_of
from tasks.search import SEARCH
from text.matching import MASK, TARGET, occurrences
from tiny.build.__main__ import build_model, imitate
from tiny.build.demonstrations import (
    EVERYTHING,
    FOCUS,
    MEMORY_TOKENS,
    TOLD,
    UNKNOWN,
    Demonstrations,
    Reader,
    some_reader,
    written,
)
from tiny.build.measure import Skills, slot
from tiny.build.world import ARTICLES, PATTERNS, Inventor, encyclopedia, forms, questions, split, versions

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tiny"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def known_and_unseen():
    return split(encyclopedia(), random.Random(0))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def test_the_encyclopedia_is_as_large_and_as_regular_as_promised():
    """330 subjects of four kinds, six attributes each, years are years, nobody dies before birth, titles differ."""
    subjects = encyclopedia()
    kinds = Counter(s["kind"] for s in subjects)
    titles = [s["title"] for s in subjects]
    assert len(subjects) >= 330 and set(kinds) == set(PATTERNS) and len(set(titles)) == len(titles)
    assert min(kinds.values()) >= 60 and json.dumps(subjects, ensure_ascii=False).isascii()
    for s in subjects:
        assert len([a for a in s["facts"] if a in PATTERNS[s["kind"]]]) >= 6, s["title"]
        for attribute in ("born", "died", "year", "founded"):
            assert attribute not in s["facts"] or (len(s["facts"][attribute]) == 4 and int(s["facts"][attribute]))
        if s["kind"] == "person":
            assert 10 < int(s["facts"]["died"]) - int(s["facts"]["born"]) < 105
    for one in titles:
        assert not any(occurrences(other, one) for other in titles if other != one), one


def test_names_have_every_shape(known_and_unseen):
    """One word, two, three and more, and an article of their own; each among the known and among the unseen."""
    for subjects in known_and_unseen:
        names = [s["title"].split() for s in subjects]
        lengths = Counter(min(len(name), 3) for name in names)
        assert min(lengths.values()) >= len(names) / 8 and set(lengths) == {1, 2, 3}
        assert sum(name[0] in ARTICLES for name in names) >= len(names) / 12
        assert max(len(name) for name in names) >= 4


def test_facts_that_mirror_each_other_agree():
    """Spouses and siblings are mutual, a work falls into its author's life, and nobody is known for another's work."""
    facts = {s["title"]: s for s in encyclopedia()}
    for s in facts.values():
        for attribute in ("spouse", "sibling"):
            if other := s["facts"].get(attribute):
                assert facts[other]["facts"][attribute] == s["title"]
        if s["kind"] == "work" and (author := facts.get(s["facts"]["author"])):
            life = author["facts"]
            assert int(life["born"]) < int(s["facts"]["year"]) <= int(life["died"]) + 2, s["title"]
    for s in facts.values():
        work = facts.get(s["facts"].get("known_for"))
        if s["kind"] == "person" and work and work["kind"] == "work":
            assert work["facts"]["author"] == s["title"]


def test_there_are_enough_unseen_subjects_to_choose_by_and_to_test_with(known_and_unseen):
    """Of every kind in each split of the questions; those that the fewest facts mention."""
    known, unseen = known_and_unseen
    assert len(known) >= 220 and {s["title"] for s in known + unseen} == {s["title"] for s in encyclopedia()}
    found = Counter((split_of(s["title"]), s["kind"]) for s in unseen)
    for name, least in (("dev", 24), ("test", 36), ("train", 42)):
        of_kind = [found[name, kind] for kind in PATTERNS]
        assert sum(of_kind) >= least and min(of_kind) >= 4, name
    mentions = Counter(value for s in encyclopedia() for value in s["facts"].values())
    for key in found:
        own, others = (
            [mentions[s["title"]] for s in some if (split_of(s["title"]), s["kind"]) == key] for some in (unseen, known)
        )
        assert max(own) <= min(others), key


def test_known_subjects_keep_enough_facts_and_name_no_unseen_one(known_and_unseen):
    """Five facts or more of each; an unseen title isn't a part of a known value either."""
    known, unseen = known_and_unseen
    for s in known:
        assert len([a for a in s["facts"] if a in PATTERNS[s["kind"]]]) >= 5, s["title"]
    values = "\n".join(value for s in known for value in s["facts"].values())
    assert not [s["title"] for s in unseen if occurrences(values, s["title"])]


def test_unseen_subjects_are_a_third_and_appear_in_no_training_passage(known_and_unseen):
    """Nothing the base or MemTrain reads by default names one of them."""
    known, unseen = known_and_unseen
    assert 0.3 < len(unseen) / (len(known) + len(unseen)) < 0.4
    passages = lines("passages.jsonl")
    text = "\n".join(p["text"] for p in passages)
    assert not [s["title"] for s in unseen if occurrences(text, s["title"])]
    assert {p["title"] for p in passages} == {s["title"] for s in known}
    searched = lines("passages_all.jsonl")
    assert searched[: len(passages)] == passages
    assert {p["title"] for p in searched[len(passages) :]} == {s["title"] for s in unseen}
    versions = Counter(p["title"] for p in passages)
    assert min(versions.values()) >= 3
    assert len({p["text"] for p in passages}) > 0.95 * len(passages)


def test_sentences_state_the_facts():
    """Every sentence about a fact has the subject's name and the value in it; each fact has two or three."""
    for s in encyclopedia():
        stated = forms(s)
        assert set(stated) == {a for a in s["facts"] if a != "placed"}
        for a, lines in stated.items():
            assert 2 <= len(lines) <= 3
            assert all(s["title"] in line and s["facts"][a] in line and line.endswith(".") for line in lines)


def test_passages_about_a_subject_never_say_the_same_twice():
    """Two or three sentences each, the first of which begins with the subject."""
    rng = random.Random(0)
    for s in encyclopedia():
        told = versions(s, rng, 6)
        lines = [line for lines in told for line in lines]
        assert len(told) >= 3 and len(set(lines)) == len(lines)
        assert all(len(passage) <= 3 and re.match(f"(The )?{re.escape(s['title'])}", passage[0]) for passage in told)


# What follows stands in this wording, by hand: the article of a name, or none, at the start and inside of a sentence.
SENTENCES = {
    "Louvre": ["Paris became the home of the Louvre.", "The Mona Lisa made the Louvre famous."],
    "Bodleian": ["The Bodleian is a library.", "Old Manuscripts brought the Bodleian fame."],
    "La Scala": ["La Scala is an opera house.", "Milan became the home of La Scala."],
    "La Fenice": ["La Fenice is an opera house.", "Giuseppe Verdi is a great name of La Fenice."],
    "Royal Opera House": ["The Royal Opera House is an opera house.", "John Rich founded the Royal Opera House."],
    "Uraniborg": ["Uraniborg is an observatory.", "Tycho Brahe founded Uraniborg."],
    "Carnegie Hall": ["Carnegie Hall was founded in 1891.", "Andrew Carnegie founded Carnegie Hall."],
    "Red Cross": ["The Red Cross is a relief movement.", "Henry Dunant founded the Red Cross."],
    "Le Monde": ["Le Monde is a newspaper.", "Paris became the home of Le Monde."],
    "Der Spiegel": ["Der Spiegel is a news magazine.", "1947 saw the founding of Der Spiegel."],
    "The Economist": ["The Economist is a news magazine.", "The Big Mac Index made The Economist famous."],
    "The Kiss": ["Gustav Klimt gave the world The Kiss.", "Vienna is where The Kiss is kept."],
    "Las Meninas": ["Las Meninas is a painting.", "1656 was the year of Las Meninas."],
    "Mona Lisa": ["The Mona Lisa is a painting.", "Italy is where the Mona Lisa comes from."],
    "Hamlet": ["Hamlet is a play.", "Elsinore is where Hamlet is set."],
    "La Boheme": ["La Boheme is an opera.", "Turin is where La Boheme premiered."],
    "The Hague": ["The Hague lies in the Netherlands.", "The Netherlands counts The Hague among its cities."],
    "Le Havre": ["Le Havre lies on the English Channel.", "French is spoken in Le Havre."],
    "Paris": ["Paris is known for the Eiffel Tower.", "The Eiffel Tower is a landmark of Paris."],
    "London": ["London is known for Tower Bridge.", "The United Kingdom has London as its capital."],
    "El Greco": ["El Greco was a painter.", "Spain counts El Greco among its great names."],
    "Baruch Spinoza": ["The Hague saw the last days of Baruch Spinoza.", "Baruch Spinoza died in The Hague."],
    "Gustav Klimt": ["Gustav Klimt is known for The Kiss.", "The Kiss made Gustav Klimt famous."],
    "Walter Gropius": ["Walter Gropius is known for the Bauhaus.", "The Bauhaus brought Walter Gropius fame."],
}
# Two articles, one before a name that takes none, none before a name that takes one.
WRONG = "[Tt]he (The|La|Le|Las|Les|El|Der|Die|Das|L'|Paris|Uraniborg)\\b|(?<![Tt]he )(Louvre|Netherlands|Eiffel Tower)"


def test_sentences_have_the_right_article():
    """A table by hand. At least one sentence of every fact begins with the subject."""
    facts = {s["title"]: s for s in encyclopedia()}
    for title, wanted in SENTENCES.items():
        stated = [sentence for found in forms(facts[title]).values() for sentence in found]
        assert set(wanted) <= set(stated), title
    for title, subject in facts.items():
        for attribute, found in forms(subject).items():
            assert 2 <= len(found) <= 3 and found[0].startswith((title, f"The {title}")), (title, attribute)
            assert not [sentence for sentence in found if re.search(WRONG, sentence)], (title, attribute)


def test_questions_have_the_right_article():
    """By hand: the subject of a question, and what leads on from it, are called as in a sentence."""
    asked = {row["question"]: row["answer"] for row in questions(encyclopedia())}
    assert asked["In what year was the Louvre founded?"] == "1793"
    assert asked["Whose work is The Kiss?"] == "Gustav Klimt"
    assert asked["What language is spoken in the home city of La Scala?"] == "Italian"
    assert asked["In what year was the founder of the Bayreuth Festival born?"] == "1813"
    assert asked["What is a landmark of the place where Baruch Spinoza died?"] == "Peace Palace"


def test_questions_have_their_evidence_and_start_at_unseen_subjects(known_and_unseen):
    """HotpotQA's layout; each supporting sentence exists, the last holds the answer; one and two hops."""
    _, unseen = known_and_unseen
    titles = {s["title"] for s in unseen}
    rows = lines("questions.jsonl")
    kinds = Counter(row["type"] for row in rows)
    assert kinds["single"] >= 100 and kinds["bridge"] >= 100
    for row in rows:
        paragraphs = dict(row["context"])
        evidence = [paragraphs[title][n] for title, n in row["supporting_facts"]]
        assert len(evidence) == (2 if row["type"] == "bridge" else 1)
        assert any(row["answer"] in sentence for sentence in evidence)
        assert any(occurrences(row["question"], title) for title in titles)
        assert not occurrences(row["question"], row["answer"])


def test_two_hop_answers_follow_the_links():
    """An independent walk over the facts gives the same answers."""
    facts = {s["title"]: s["facts"] for s in encyclopedia()}
    found = 0
    for row in questions(encyclopedia()):
        place = row["hops"][0][0]
        for title, attribute in row["hops"]:
            assert title == place
            place = facts[title][attribute]
        assert place == row["answer"]
        found += len(row["hops"]) == 2
    assert found > 200


def test_the_tokenizer_reads_any_text(tokenizer):
    """Bytes fall back: every script survives; prompts are short because their fixed pieces are one token each."""
    texts = ["Ulm", "na\u00efve \u4e2d\u6587 \U0001f600", "x{}\\boxed{1,5}", "two\nlines\n\nand more"]
    for text in [*texts, "[MASK] and [TARGET]."]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    assert len(encode_prompt(tokenizer, READ_PROMPT.format(problem="a", memory="b", section="c"))) < 10


def test_the_model_is_small_enough():
    """1 to 3 M parameters in at most 8 MiB of safetensors."""
    file = TINY / "model/model.safetensors"
    with safe_open(file, "pt") as tensors:
        size = sum(tensors.get_tensor(name).numel() for name in tensors.keys())
    assert 1_000_000 <= size <= 3_000_000 and file.stat().st_size <= 8 * 2**20


def paragraphs_of(text: str) -> list[str]:
    """Those of a memory or a section, without the headings of documents and without "(empty)"."""
    text = re.sub(r"^Document \d+: .*\n?", "", text.strip(), flags=re.MULTILINE)
    return [p.strip() for p in text.split("\n\n") if p.strip() and p.strip() != EMPTY_MEMORY]


def test_demonstrations_are_solvable_from_what_they_show(known_and_unseen, tokenizer):
    """Notes are copied paragraphs, each once, within the limit; answers stand in the memory, or recall says they don't.

    No unseen title occurs, though words of one may stand in an invented name.
    """
    known, unseen = known_and_unseen
    demonstrations = Demonstrations(known, unseen, tokenizer, seed="5", free=0.5)
    titles = [re.escape(s["title"]) + "(?! [A-Z])" for s in unseen if " " in s["title"]]
    unknown = 0
    for _ in range(150):
        prompt, notes = demonstrations.reading()
        paragraphs = paragraphs_of(notes)
        assert len(tokenizer(notes)["input_ids"]) <= MEMORY_TOKENS and len(set(paragraphs)) == len(paragraphs)
        assert set(paragraphs) <= {*paragraphs_of(slot(prompt, "memory")), *paragraphs_of(slot(prompt, "section"))}
        recalled, entity = demonstrations.recalling()
        memory = slot(recalled, "memory")
        assert TARGET in recalled
        if entity == f"\\boxed{{ {UNKNOWN}}}":
            unknown += 1
        else:
            assert occurrences(memory, boxed(entity)) and not occurrences(slot(recalled, "section"), boxed(entity))
        asked, answer = demonstrations.asked_answer()
        assert boxed(answer).strip() in slot(asked, "memory")
        masked, hidden = demonstrations.masked_answer()
        assert MASK in slot(masked, "memory") and not occurrences(slot(masked, "memory"), boxed(hidden))
        shown = [prompt, recalled, asked, masked, hidden, answer, *demonstrations.searching()]
        assert not any(re.search(title, text) for title in titles for text in shown)
    assert 3 < unknown < 40


def test_who_is_told_how_to_read_does_so(known_and_unseen, tokenizer):
    """In the first phase all are told: to focus, and then all that the problem names stays; or to keep what fits."""
    demonstrations, told = Demonstrations(*known_and_unseen, tokenizer, seed="6"), Counter()
    for _ in range(400):
        prompt, notes = demonstrations.reading()
        problem, kept = slot(prompt, "problem"), paragraphs_of(notes)
        shown = list(dict.fromkeys(paragraphs_of(slot(prompt, "memory")) + paragraphs_of(slot(prompt, "section"))))
        fits = len(tokenizer(written(shown))["input_ids"]) <= MEMORY_TOKENS - 2 - len(shown)
        if problem.endswith(EVERYTHING):
            told["everything"] += fits
            assert kept == shown or not fits
        else:
            assert problem.endswith(FOCUS)
            if MASK in problem:
                named = [paragraph for paragraph in shown if MASK in paragraph]
                told["[MASK]"] += len(named) == 1
                # A question of two hops may lead on from [MASK].
                assert set(kept) <= set(named) or "what does [MASK] stand for" not in problem
                assert set(named) <= set(kept) or not fits
            else:
                asked = {word for word in re.findall(r"\w+", problem.removesuffix(FOCUS))[1:] if word[0].isupper()}
                told["a name"] += bool(kept)
                # Where two paragraphs are kept, the second may be what the first leads to.
                assert not kept or any(asked & set(re.findall(r"\w+", paragraph)) for paragraph in kept)
    assert min(told.values()) > 20 and len(told) == 3


def test_untold_readers_note_what_is_named_and_most_forget_it(known_and_unseen, tokenizer):
    """Told nothing, all note what the problem names; few keep it, many note other things, half don't make room."""
    rng = random.Random(0)
    readers = [some_reader(rng) for _ in range(2000)]
    assert len(set(readers)) == len(readers) and len({reader.limit for reader in readers}) == 2
    assert all(r.copy_named == 0.95 and r.copy_named >= r.copy_other and r.keep_named >= r.keep_other for r in readers)
    assert 400 < sum(r.keep_named > 0.9 for r in readers) < 600 and sum(r.keep_named < 0.5 for r in readers) > 1300
    assert sum(r.copy_other > 0.25 for r in readers) > 700 and 900 < sum(r.makes_room for r in readers) < 1100
    demonstrations = Demonstrations(*known_and_unseen, tokenizer, seed="6", free=1.0)
    assert not any(slot(demonstrations.reading()[0], "problem").endswith(tuple(TOLD)) for _ in range(50))


def test_a_reader_keeps_by_its_chances_and_within_its_limit(known_and_unseen, tokenizer):
    """Of many notes on one section, each sort of paragraph is kept as often as the reader's chance says."""
    demonstrations, reader = Demonstrations(*known_and_unseen, tokenizer, seed="7"), Reader(0.9, 0.2, 0.7, 0.4)
    memory, section = ["[MASK] is old.", "Old other."], "Document 3: A\nNew other.\n\nDocument 4: B\n[MASK] is new.\n\n"
    notes = [demonstrations.notes(reader, memory, section, [MASK]) for _ in range(4000)]
    kept = Counter(paragraph for after in notes for paragraph in after)
    for paragraph, chance in zip(["[MASK] is new.", "New other.", *memory], (0.9, 0.2, 0.7, 0.4), strict=True):
        assert abs(kept[paragraph] / len(notes) - chance) < 0.03, paragraph
    order = [*memory, "New other.", "[MASK] is new."].index
    assert all(after == sorted(after, key=order) for after in notes)
    short = Reader(1, 1, 1, 1, limit=demonstrations.size(["[MASK] is old.", "[MASK] is new."]))
    assert demonstrations.notes(short, memory, section, [MASK]) == ["[MASK] is old.", "[MASK] is new."]


def test_searching_looks_up_what_the_question_leads_to(known_and_unseen, tokenizer):
    """A search names what the question or an earlier result names; an answer stands in the notes, or is unknown."""
    demonstrations = Demonstrations(*known_and_unseen, tokenizer, seed="7")
    searched = answered = 0
    for _ in range(300):
        prompt, completion = demonstrations.searching()
        if query := SEARCH.search(completion):
            searched += 1
            if "Searches left: 6." in prompt:
                assert query[1].strip() in slot(prompt, "problem")
        else:
            notes, _, _ = completion.partition("\\boxed")
            found = [a for a in boxed(completion).split("; ") if a.strip() != UNKNOWN]
            answered += bool(found)
            assert all(a.strip() in notes for a in found)
    assert searched > 100 and answered > 20


class Oracle:
    """Solves every prompt by rules of its own, from the worlds and the text, in the place of a model."""

    def __init__(self, worlds: list[list[dict]]):
        self.worlds = worlds
        self.answers = {row["question"]: row["answer"] for world in worlds for row in questions(world)}
        self.trails = {row["question"]: dict(row["hops"]) for world in worlds for row in questions(world)}

    def __call__(self, prompts, new_tokens):
        return [Turn([], [], True, self.solve(prompt)) for prompt in prompts]

    def solve(self, prompt: str) -> str:
        memory = slot(prompt, "memory")
        if TARGET in prompt:
            return f"\\boxed{{{self.target(memory, slot(prompt, 'section'))}}}"
        problem = slot(prompt, "problem").removesuffix(FOCUS).strip()
        if "<section>" not in prompt:
            return f"\\boxed{{{self.answers.get(problem) or self.stands_for_mask(memory)}}}"
        names = self.trails.get(problem, [MASK])
        shown = paragraphs_of(memory) + paragraphs_of(slot(prompt, "section"))
        return written([p for p in dict.fromkeys(shown) if any(name in p for name in names)])

    def target(self, memory: str, section: str) -> str:
        for sentence in re.split(r"(?<=\.)\s+", section.strip()):
            pattern = re.escape(sentence).replace(re.escape(TARGET), "([^.]+?)", 1).replace(re.escape(TARGET), r"\1")
            if TARGET in sentence and (found := re.search(pattern, memory)):
                return found[1]

    def stands_for_mask(self, memory: str) -> str:
        """The only name with which every sentence about [MASK] is a sentence of the known world."""
        true = {sentence for subject in self.worlds[0] for form in forms(subject).values() for sentence in form}
        names = {value for subject in self.worlds[0] for value in (subject["title"], *subject["facts"].values())}
        clues = [c for c in re.split(r"(?<=\.)\s+", memory) if MASK in c]
        (name,) = [name for name in names if all(c.replace(MASK, name) in true for c in clues)]
        return name


def test_skills_are_all_met_by_an_oracle_and_by_no_mute(known_and_unseen, tokenizer):
    """Whoever solves the prompts by rules of its own meets every bar; one who writes nothing repeats no
    sentence, notes no [MASK], and meets no other bar."""
    skills = Skills(SimpleNamespace(tokenizer=tokenizer), *known_and_unseen, n=40, seed="a")
    skills.sample = Oracle(list(skills.worlds.values()))
    for name, (least, hits) in skills.measure().items():
        assert least >= 0.85 and len(hits) >= 40 and sum(hits) / len(hits) >= least, name
    skills.sample = lambda prompts, new_tokens: [Turn([], [], True, EMPTY_MEMORY) for _ in prompts]
    for name, (_, hits) in skills.measure().items():
        assert sum(hits) == 0 or name.startswith(("memories that repeat no", "a [MASK] that nobody asks")), name


def test_invented_worlds_know_words_of_the_unseen_but_none_of_them(known_and_unseen, tokenizer):
    """No subject or fact of 2,000 invented worlds is an unseen subject, though the words of their names all occur."""
    known, unseen = known_and_unseen
    titles, words = {s["title"] for s in unseen}, {w for s in unseen for w in s["title"].split() if w[0].isupper()}
    inventor = Demonstrations(known, unseen, tokenizer, seed="8").inventor
    named = [name for _ in range(2000) for s in inventor.fresh() for name in (s["title"], *s["facts"].values())]
    assert not titles & set(named)
    assert words <= {word for name in named for word in name.split()}


def test_invented_names_have_the_shapes_of_real_ones(known_and_unseen):
    """Articles and small words stay where they are in some real title of the same kind."""
    known, unseen = known_and_unseen

    def shape(name: str) -> str:
        return " ".join(word if word.islower() or word in ARTICLES else "X" for word in name.split())

    shapes = {kind: {shape(s["title"]) for s in known + unseen if s["kind"] == kind} for kind in PATTERNS}
    inventor = Inventor(known, unseen, random.Random(0))
    for kind, real in shapes.items():
        assert {shape(inventor.name(kind)) for _ in range(2000)} == real


@pytest.mark.slow
def test_build_is_deterministic_and_goes_on_where_it_was_stopped(tmp_path):
    """Two builds, one of them stopped after its first pool, write the same bytes; passages are the repository's."""
    small = "import sys, tiny.build.__main__ as build; build.POOL = 256; "
    stopped = "build.Skills.measure = lambda self: sys.exit(9); "  # in the second pool, before it is saved
    for name, first, status in (("a", "", 0), ("b", stopped, 9), ("b", "", 0)):
        command = [sys.executable, "-c", f"{small}{first}build.main()", "--pools", "1", "1", "--out", tmp_path / name]
        done = subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": str(ord(name)), "PATH": ""})
        assert done.returncode == status
    texts = ["passages.jsonl", "passages_all.jsonl", "questions.jsonl"]
    for file in [*texts, "model/model.safetensors", "model/tokenizer.json"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
        if file.endswith("jsonl") or "tokenizer" in file:
            assert (tmp_path / "a" / file).read_bytes() == (TINY / file).read_bytes(), file


def imitate_own(batches: list[list[Turn]], file: Path) -> None:
    """One step of the build in which each process imitates its own batch; rank 0 saves how far it moved."""
    parallel.start()
    model = build_model(AutoTokenizer.from_pretrained(TINY / "model"))
    before = parameters_to_vector(model.parameters()).detach().clone()
    imitate(model, [torch.optim.SGD(model.parameters())], batches[parallel.rank()], done=0.5)
    moved = parameters_to_vector(model.parameters()).detach() - before
    assert all(torch.equal(moved, other) for other in parallel.gather(moved))
    if parallel.rank() == 0:
        torch.save(moved, file)
    parallel.stop()


def test_two_processes_imitate_as_one(tokenizer, tmp_path):
    """They move by the mean of their gradients, clipped to 1, at the peak rate, as plain forward passes say."""
    texts = [[("Where is it?", "Ulm."), ("What?", "A long answer, of several words.")], [("Who was that?", "Nokia")]]
    pairs = [[tuple(tokenizer(text)["input_ids"] for text in pair) for pair in own] for own in texts]
    batches = [[Turn(prompt, completion, True, "") for prompt, completion in own] for own in pairs]
    assert wait(start(imitate_own, batches, tmp_path / "moved.pt", ranks=2)) == [0, 0]
    moved = torch.load(tmp_path / "moved.pt")
    model = build_model(tokenizer)
    for own in pairs:
        logprobs = []
        for prompt, completion in own:
            predicted = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)  # (tokens, vocabulary)
            logprobs.append(predicted[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]))
        (-torch.cat(logprobs).mean() / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wanted = -2e-3 * parameters_to_vector([p.grad for p in model.parameters()])
    assert (moved - wanted).norm() < 0.05 * wanted.norm()  # the build computes in bfloat16
