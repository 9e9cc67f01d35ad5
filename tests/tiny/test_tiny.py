"""tiny/: the facts, what is made of them, and what the base model was taught with."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from rewards import boxed
from rollout import EMPTY_MEMORY, READ_PROMPT, encode_prompt
from tasks.search import SEARCH
from text.matching import MASK, TARGET, occurrences
from tiny.demonstrations import BRIEF, FOCUSED, LOOSE, MEMORY_TOKENS, SHARES, UNKNOWN, Demonstrations
from tiny.world import PATTERNS, encyclopedia, questions, sentences, split

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
    """150 subjects of four kinds, six attributes each, years are years, nobody dies before birth, titles differ."""
    subjects = encyclopedia()
    kinds = Counter(s["kind"] for s in subjects)
    titles = [s["title"] for s in subjects]
    assert len(subjects) >= 150 and set(kinds) == set(PATTERNS) and len(set(titles)) == len(titles)
    for s in subjects:
        assert len([a for a in s["facts"] if a in PATTERNS[s["kind"]]]) >= 6, s["title"]
        for attribute in ("born", "died", "year", "founded"):
            assert attribute not in s["facts"] or (len(s["facts"][attribute]) == 4 and int(s["facts"][attribute]))
        if s["kind"] == "person":
            assert 10 < int(s["facts"]["died"]) - int(s["facts"]["born"]) < 105
    for one in titles:
        assert not any(occurrences(other, one) for other in titles if other != one), one


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


def test_sentences_state_the_facts(known_and_unseen):
    """One sentence for each fact, with the subject's name and the value in it."""
    rng = random.Random(0)
    for s in encyclopedia():
        made = dict(sentences(s, rng))
        assert set(made) == {a for a in s["facts"] if a != "placed"}
        assert all(s["title"] in text and s["facts"][a] in text and text.endswith(".") for a, text in made.items())


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


def test_demonstrations_are_solvable_from_what_they_show(known_and_unseen, tokenizer):
    """Notes are copied paragraphs, each once, within the limit; answers stand in the memory, or recall says they don't.

    No unseen title occurs, though words of one may stand in an invented name.
    """
    known, unseen = known_and_unseen
    demonstrations = Demonstrations(known, unseen, tokenizer, seed=5)
    titles, unknown = [s["title"] for s in unseen if " " in s["title"]], 0
    for _ in range(150):
        prompt, notes = demonstrations.reading()
        style, *paragraphs = notes.split("\n\n")
        assert style in SHARES and len(tokenizer(notes)["input_ids"]) <= MEMORY_TOKENS
        shown_as_notes = re.sub(r"Document \d+: (.*)\n", r"\1: ", prompt)  # of a numbered document its subject is kept
        assert all(paragraph in shown_as_notes for paragraph in paragraphs) and len(set(paragraphs)) == len(paragraphs)
        recalled, entity = demonstrations.recalling()
        memory = recalled.split("<memory>")[1].split("</memory>")[0]
        assert TARGET in recalled
        if entity == f"\\boxed{{ {UNKNOWN}}}":
            unknown += 1
        else:
            assert occurrences(memory, boxed(entity)) and not occurrences(recalled.split("<section>")[1], boxed(entity))
        asked, answer = demonstrations.asked_answer()
        assert boxed(answer).strip() in asked.split("<memory>")[1]
        masked, hidden = demonstrations.masked_answer()
        assert MASK in masked.split("<memory>")[1] and not occurrences(masked.split("<memory>")[1], boxed(hidden))
        shown = [prompt, recalled, asked, masked, hidden, answer, *demonstrations.searching()]
        assert not any(t in text for t in titles for text in shown)
    assert 30 < unknown < 90


def test_note_takers_differ_as_they_should(known_and_unseen, tokenizer):
    """First notes come from each sort as often as SHARES says; only the focused keep every paragraph with [MASK]."""
    demonstrations = Demonstrations(*known_and_unseen, tokenizer, seed=6)
    first, kept, shown = Counter(), Counter(), Counter()
    for _ in range(2000):
        prompt, notes = demonstrations.reading()
        style = notes.split("\n\n")[0]
        first[style] += EMPTY_MEMORY in prompt
        section = prompt.split("<section>\n")[1].split("\n</section>")[0].strip().split("\n\n")
        clues = [paragraph for paragraph in section if MASK in paragraph]
        if len(clues) == 1 and EMPTY_MEMORY in prompt:
            shown[style] += 1
            kept[style] += clues[0] in notes
    for style, share in SHARES.items():
        assert abs(first[style] / first.total() - share) < 0.05, style
    assert kept[FOCUSED] == shown[FOCUSED] > 10
    assert kept[BRIEF] / shown[BRIEF] < 0.5 and kept[LOOSE] / shown[LOOSE] < 0.7


def test_searching_looks_up_what_the_question_leads_to(known_and_unseen, tokenizer):
    """A search names what the question or an earlier result names; an answer stands in the notes, or is unknown."""
    demonstrations = Demonstrations(*known_and_unseen, tokenizer, seed=7)
    searched = answered = 0
    for _ in range(300):
        prompt, completion = demonstrations.searching()
        if query := SEARCH.search(completion):
            searched += 1
            assert query[1].strip() in prompt or FOCUSED not in completion
            if "Searches left: 6." in prompt:
                assert query[1].strip() in prompt.split("</problem>")[0]
        else:
            notes, _, _ = completion.partition("\\boxed")
            found = [a for a in boxed(completion).split("; ") if a.strip() != UNKNOWN]
            answered += bool(found)
            assert all(a.strip() in notes for a in found)
    assert searched > 100 and answered > 20


def test_invented_worlds_know_words_of_the_unseen_but_none_of_them(known_and_unseen, tokenizer):
    """No subject or fact of 2,000 invented worlds is an unseen subject, though the words of their names all occur."""
    known, unseen = known_and_unseen
    titles, words = {s["title"] for s in unseen}, {w for s in unseen for w in s["title"].split() if w[0].isupper()}
    inventor = Demonstrations(known, unseen, tokenizer, seed=8).inventor
    named = [name for _ in range(2000) for s in inventor.fresh() for name in (s["title"], *s["facts"].values())]
    assert not titles & set(named)
    assert words <= {word for name in named for word in name.split()}


@pytest.mark.slow
def test_build_is_deterministic(tmp_path):
    """Two builds of two steps, with different string hashes, write the same bytes; passages are the repository's."""
    for name, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, TINY / "build.py", "--steps", "2", "--out", tmp_path / name]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""})
    texts = ["passages.jsonl", "passages_all.jsonl", "questions.jsonl"]
    for file in [*texts, "model/model.safetensors", "model/tokenizer.json"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
        if file.endswith("jsonl") or "tokenizer" in file:
            assert (tmp_path / "a" / file).read_bytes() == (TINY / file).read_bytes(), file
