"""qa.py: official records in one form, long texts that hide their gold paragraphs, questions asked together."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from errors import UserError
from masking import is_heldout
from qa import (
    LongQA, Pool, Question, load_questions, load_search, long_document, long_documents, objectives, split_of, subject,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
TINY = load_questions(ROOT / "tiny/questions.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def pool(tokenizer):
    rows = map(json.loads, (ROOT / "tiny/passages.jsonl").read_text().splitlines())
    return Pool(((row["title"], row["text"]) for row in rows), tokenizer)


@pytest.fixture(scope="module")
def qwen():
    folder = SHARED / "tokenizers/qwen3-4b-instruct-2507"
    if not folder.exists():
        pytest.skip("needs the shared data folder, which is not here")
    return AutoTokenizer.from_pretrained(folder)


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip("needs the shared data folder, which is not here")
    return SHARED / name


def records(name):
    text = shared(name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]


def squeezed(text):
    return "".join(text.split())


def opened(document):
    """(title, text) of each numbered document, read back from the chunks; the numbers must be 1, 2, 3, ..."""
    parts = re.split(r"^Document (\d+): (.*)\n", "".join(document.chunks), flags=re.M)
    assert parts[0] == "" and [int(n) for n in parts[1::3]] == list(range(1, len(parts) // 3 + 1))
    return list(zip(parts[2::3], (text.strip() for text in parts[3::3]), strict=True))


def tokens(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

# ---- records -----------------------------------------------------------------------------------------


HOTPOT = {
    "_id": "q", "question": "Where was the author of Emil born?", "answer": "Dresden",
    "supporting_facts": [["Emil", 0], ["Kästner", 1]],
    "context": [["Kästner", ["Erich Kästner was a writer.", " He was born in Dresden."]], ["Ulm", ["Ulm is\u2028a city."]],
                ["Emil", ["Emil was written by Kästner."]]],
}  # fmt: skip
TWOWIKI = HOTPOT | {"context": [[title, [s.strip() for s in sentences]] for title, sentences in HOTPOT["context"]]}
MUSIQUE = {
    "id": "q", "question": "Where was the author of Emil born?", "answer": "Dresden", "answer_aliases": ["Dresden", "Elbflorenz"],
    "paragraphs": [
        {"idx": 0, "title": "Emil", "paragraph_text": "Emil was written by Kästner.", "is_supporting": True},
        {"idx": 1, "title": "Ulm", "paragraph_text": "Ulm is\u2028a city.", "is_supporting": False},
        {"idx": 2, "title": "Kästner", "paragraph_text": "Erich Kästner was a writer. He was born in Dresden.", "is_supporting": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize("record, answers", [(HOTPOT, ["Dresden"]), (TWOWIKI, ["Dresden"]), (MUSIQUE, ["Dresden", "Elbflorenz"])])
@pytest.mark.parametrize("whole", [True, False])
def test_every_layout_gives_one_form(tmp_path, record, answers, whole):
    """HotpotQA's, 2WikiMultihopQA's and MuSiQue's record of one question, as a list or as lines, are the same Question."""
    file = tmp_path / "x.json"
    lines = 2 * (json.dumps(record, ensure_ascii=False) + "\r\n")
    file.write_text(json.dumps([record, record], indent=1) if whole else "\ufeff" + lines, encoding="utf-8", newline="")
    gold = [("Emil", "Emil was written by Kästner."), ("Kästner", "Erich Kästner was a writer. He was born in Dresden.")]
    expected = Question("q", "Where was the author of Emil born?", answers, gold, [("Ulm", "Ulm is\u2028a city.")])
    assert load_questions(file) == [expected, expected]


def test_artefacts_of_real_records(tmp_path):
    """CSV quotes are undone; a title that stands twice is kept once, and both its texts where they differ, gold as well."""
    context = HOTPOT["context"] + [HOTPOT["context"][1], ["Emil ", ["Emil is a film."]], ["Ulm", ["Another Ulm."]], ["Bonn", []]]
    record = HOTPOT | {"context": context, "question": '"Who wrote ""Emil""?"'}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    (question,) = load_questions(tmp_path / "x.json")
    assert question.question == 'Who wrote "Emil"?'
    assert [text for _, text in question.gold] == [
        "Emil was written by Kästner.", "Emil is a film.", "Erich Kästner was a writer. He was born in Dresden."
    ]  # fmt: skip
    assert question.other == [("Ulm", "Ulm is\u2028a city."), ("Ulm", "Another Ulm.")]


@pytest.mark.parametrize(
    "name",
    ["hotpotqa_dev_distractor_200.jsonl", "hotpotqa_train_100.json", "2wikimultihopqa_dev_164.json",
     "musique_ans_dev_200.jsonl", "musique_train_100.json"],
)  # fmt: skip
def test_the_official_files(name):
    """Every record loads, with exactly the gold and the other paragraphs of its labels, but for the width of spaces."""
    rows = records(f"qa/{name}")
    for row, question in zip(rows, load_questions(shared(f"qa/{name}")), strict=True):
        if "paragraphs" in row:
            labelled = [(p["title"], p["paragraph_text"], p["is_supporting"]) for p in row["paragraphs"]]
        else:
            facts = {title for title, _ in row["supporting_facts"]}
            labelled = [(title, " ".join(sentences), title in facts) for title, sentences in row["context"]]
        for side, paragraphs in ((True, question.gold), (False, question.other)):
            expected = {(" ".join(title.split()), " ".join(text.split())) for title, text, label in labelled if label is side}
            assert {(title, " ".join(text.split())) for title, text in paragraphs} == expected
            assert len(set(paragraphs)) == len(paragraphs)
        assert question.answers[0] == row["answer"].strip() and question.id == row.get("_id", row.get("id"))


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["can't be read"]),
        (b"\xff\xfe", ["UTF-8"]),
        (b"", ["no record"]),
        (b"[]", ["no record"]),
        (b'[{"question": ', ["not JSON"]),
        (json.dumps(HOTPOT).encode() + b"\n{oops\n", ["line 2", "not JSON"]),
        ([HOTPOT, [1]], ["record 2", "list"]),
        ([HOTPOT, {"question": "Q?", "answer": "A"}], ["record 2", "'context'", "question, answer"]),
        ([HOTPOT | {"question": " "}], ["record 1", "'question'"]),
        ([{k: v for k, v in HOTPOT.items() if k != "question"}], ["record 1", "no field 'question'"]),
        ([HOTPOT | {"answer": None}], ["record 1", "'answer'"]),
        ([HOTPOT | {"supporting_facts": []}], ["record 1", "'supporting_facts'"]),
        ([HOTPOT | {"supporting_facts": [["Rome", 0]]}], ["record 1", "'Rome'"]),
        ([HOTPOT | {"supporting_facts": [["Emil"]]}], ["record 1", "'supporting_facts'"]),
        ([HOTPOT | {"context": [["Emil"]]}], ["record 1", "'context'"]),
        ([HOTPOT | {"context": [["Emil", [3]]]}], ["record 1", "'context'"]),
        ([MUSIQUE | {"paragraphs": [{"title": "Emil"}]}], ["record 1", "'paragraph_text'"]),
        ([MUSIQUE | {"paragraphs": MUSIQUE["paragraphs"][1:2]}], ["record 1", "'is_supporting'"]),
        ([MUSIQUE | {"answerable": False}], ["record 1", "unanswerable"]),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, words):
    """One line with the file, the record or line, and what is missing."""
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as caught:
        load_questions(file)
    message = str(caught.value)
    assert all(word in message for word in ["bad.json", *words]) and "\n" not in message, message


def test_a_subject_is_in_one_split_only():
    """A tiny question's subject is the one title that it names, so what is trained on is never what is tested."""
    assert all(sum(title in q.question for title, _ in q.gold) == 1 and subject(q) in q.question for q in TINY)
    by_split = {name: {subject(q) for q in TINY if split_of(subject(q)) == name} for name in ("train", "dev", "test")}
    assert sum(map(len, by_split.values())) == len({subject(q) for q in TINY}) and all(by_split.values())
    named = {title for q in TINY if split_of(subject(q)) == "test" for title, _ in q.gold if title in q.question}
    assert named == by_split["test"] and not named & by_split["train"]
    assert subject(Question("id", "Who?", ["A"], [("Title", "text")], [])) == "id"


def test_shares_of_the_splits():
    """0.6, 0.1 and 0.3 of many keys, and the same among those titles that masking keeps held out."""
    keys = [f"key {n}" for n in range(20000)]
    for some in (keys, [key for key in keys if is_heldout(key, 0.2)]):
        shares = Counter(map(split_of, some))
        for name, share in (("train", 0.6), ("dev", 0.1), ("test", 0.3)):
            assert abs(shares[name] / len(some) - share) < 4 * (share * (1 - share) / len(some)) ** 0.5

# ---- long texts --------------------------------------------------------------------------------------


def test_long_hotpotqa(qwen):
    """At 7k to 56k tokens: length, chunks, every gold paragraph once, nothing twice, no gold title but the gold's own."""
    rows = {row["_id"]: row for row in records("qa/hotpotqa_dev_distractor_200.jsonl")}
    questions = load_questions(shared("qa/hotpotqa_dev_distractor_200.jsonl"))
    filler = Pool(((row["title"], row["text"]) for row in records("wiki/hotpot_pool.jsonl")), qwen)
    short = next(n for n, q in enumerate(questions) if not q.other)  # its record has two paragraphs instead of ten
    for target, sample in ((7000, 24), (14000, 12), (28000, 8), (56000, 4)):
        places = set()
        for n in {*random.Random(target).sample(range(len(questions)), sample), short}:
            document = long_document(questions[n], n, filler, seed=0, chunk_tokens=5120, target_tokens=target)
            text, row, parts = "".join(document.chunks), rows[document.title], opened(document)
            assert abs(tokens(text, qwen) - target) <= 0.05 * target
            assert max(tokens(chunk, qwen) for chunk in document.chunks) <= 5120
            assert document.recall == [[] for _ in document.chunks] and document.index == n
            assert (document.question, document.answers) == (row["question"].strip(), [row["answer"]])
            titles, texts = [title.casefold() for title, _ in parts], [squeezed(text) for _, text in parts]
            assert len(set(titles)) == len(titles) and len(set(texts)) == len(texts)
            gold = {title for title, _ in row["supporting_facts"]}
            for title, sentences in row["context"]:
                body = squeezed("".join(sentences))
                assert squeezed(text).count(body) == 1 and (title, body) in zip([t for t, _ in parts], texts, strict=True)
                assert (body in squeezed(document.gold)) is (title in gold)
            places.add(tuple(n for n, (title, _) in enumerate(parts) if title in gold))
            assert len(next(iter(places))) == 2
        assert len(places) > sample * 0.8  # 50 documents have 1225 pairs of places, and more have more


def test_numbers_of_documents(qwen):
    """50 documents are about 7k tokens and 200 about 28k, MemAgent's lengths."""
    questions = load_questions(shared("qa/hotpotqa_dev_distractor_200.jsonl"))
    filler = Pool(((row["title"], row["text"]) for row in records("wiki/hotpot_pool.jsonl")), qwen)
    for documents, about, sample in ((50, 7000, 20), (200, 28000, 5)):
        made = long_documents(questions[:sample], filler, seed=0, chunk_tokens=5120, documents=documents)
        assert [len(opened(d)) for d in made] == [documents] * sample
        assert abs(sum(tokens("".join(d.chunks), qwen) for d in made) / sample - about) < 0.1 * about


def test_places_are_uniform_and_each_questions_own(pool):
    """Over many questions the gold stands at the front, in the middle and at the end equally often."""
    made = long_documents(TINY[:600], pool, seed=0, chunk_tokens=64, documents=12)
    places = [n for q, d in zip(TINY, made) for n, (title, _) in enumerate(opened(d)) if title == q.gold[0][0]]
    counts = Counter(places)
    assert len(places) == 600 and sum((counts[n] - 50) ** 2 / 50 for n in range(12)) < 31.3  # chi square, p = 0.001


def test_pure_function_of_seed_and_index(pool):
    """The same text whatever was made before it and in another process; another seed or index gives another."""
    how = dict(chunk_tokens=64, target_tokens=512)
    texts = ["".join(d.chunks) for d in long_documents(TINY[:5], pool, seed=3, **how)]
    assert "".join(long_document(TINY[4], 4, pool, seed=3, **how).chunks) == texts[4]
    assert len({*texts, "".join(long_document(TINY[4], 5, pool, seed=3, **how).chunks)}) == 6
    assert "".join(long_document(TINY[4], 4, pool, seed=4, **how).chunks) != texts[4]
    program = (
        "import json; from transformers import AutoTokenizer; from qa import *\n"
        "rows = map(json.loads, open('tiny/passages.jsonl', encoding='utf-8'))\n"
        "pool = Pool([(r['title'], r['text']) for r in rows], AutoTokenizer.from_pretrained('tiny/model'))\n"
        "question = load_questions('tiny/questions.jsonl')[4]\n"
        "print(json.dumps(long_document(question, 4, pool, seed=3, chunk_tokens=64, target_tokens=512).chunks))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert "".join(json.loads(done.stdout)) == texts[4]


def test_a_longer_text_keeps_the_order_of_a_shorter_one(pool):
    """With one seed and index two lengths differ by filler alone: what both hold stands in the same order."""
    for index, question in enumerate(TINY[:30]):
        short, long = (opened(long_document(question, index, pool, seed=0, chunk_tokens=64, documents=n)) for n in (15, 60))
        assert set(short) < set(long) and [part for part in long if part in short] == short


def test_filler_repeats_nothing(tokenizer):
    """A pool with gold titles in other spellings, gold texts under other titles and its own repeats adds none of them."""
    question = Question(
        "q", "Who?", ["A"], [("The Golden Ass", "It is a novel."), ("U.S. Route 1", "It is a road.")],
        [("Ulm", "Ulm is a city."), ("Golden Ass", "A distractor that came with the question.")],
    )  # fmt: skip
    bad = [
        ("golden ass", "A second passage."), ("US Route 1", "A second one."), ("Ｕ.Ｓ. Route 1", "A wide one."),
        ("Novels", "It is  a novel."), ("Ulm", "Ulm is a\ncity."), ("Empty", " "),
    ]  # fmt: skip
    good = [("Ulm", "A different text on it."), ("Bonn", "Bonn is a city."), ("Rome", "Rome is a city.")]
    document = long_document(question, 0, Pool(bad + good + good, tokenizer), seed=0, chunk_tokens=64, documents=7)
    assert sorted(opened(document)) == sorted(question.gold + question.other + good)
    assert document.gold == "The Golden Ass\nIt is a novel.\n\nU.S. Route 1\nIt is a road."
    with pytest.raises(UserError, match=r"question q: 8 documents wanted, .* make 7 documents, \d+ tokens; bring a larger pool"):
        long_document(question, 0, Pool(bad + good, tokenizer), seed=0, chunk_tokens=64, documents=8)


def test_own_distractors_come_first(pool):
    """The filler is the question's own until that is used up."""
    for index, question in enumerate(TINY[:20]):
        size = len(question.gold) + len(question.other)
        made = [opened(long_document(question, index, pool, seed=0, chunk_tokens=64, documents=n)) for n in (size - 3, size + 5)]
        assert set(made[0]) < set(question.gold + question.other) < set(made[1])


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(target_tokens=200_000), ["200000 tokens wanted", "bring a larger pool"]),
        (dict(target_tokens=20), ["20 tokens wanted", "ask for a longer text"]),
        (dict(documents=1), ["1 documents wanted", "2 gold paragraphs", "ask for a longer text"]),
    ],
)
def test_texts_that_cannot_be_made(pool, how, words):
    """The error tells the question, how many tokens were reached, and what to do."""
    question = next(q for q in TINY if len(q.gold) == 2)
    with pytest.raises(UserError) as caught:
        long_document(question, 0, pool, seed=0, chunk_tokens=64, **how)
    message = str(caught.value)
    assert all(word in message for word in [question.id, *words]), message
    reached = int(re.search(r"documents, (\d+) tokens", message)[1])
    everything = sum(p.tokens for p in pool.passages)
    assert reached > 0.9 * everything if "target_tokens" in how and how["target_tokens"] > everything else 20 < reached < 200


def test_short_texts_close_their_last_gap(pool):
    """320 tokens out of passages of 30 to 60: each text within 16 of it, although no passage is as small as that."""
    for index, question in enumerate(TINY[::4]):
        document = long_document(question, index, pool, seed=0, chunk_tokens=64, target_tokens=320)
        assert abs(tokens("".join(document.chunks), pool.tokenizer) - 320) <= 16


def test_a_chunk_never_ends_with_a_heading(pool):
    """A title stays with the beginning of its text, however the chunks fall."""
    for index, question in enumerate(TINY[:60]):
        for limit in (40, 64, 100):
            chunks = long_document(question, index, pool, seed=0, chunk_tokens=limit, documents=15).chunks
            assert len(chunks) >= 5 and max(tokens(chunk, pool.tokenizer) for chunk in chunks) <= limit
            assert not any(re.search(r"Document \d+:[^\n]*\n?\Z", chunk) for chunk in chunks)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_memagents_files(tmp_path, tokenizer, kind):
    """Its evaluation .json and its training .parquet give the same documents, their text untouched."""
    texts = [f" Document 1:\nNumber {n} is a number.\n\n" * (n + 2) for n in range(3)]
    file = tmp_path / f"x.{kind}"
    if kind == "json":
        rows = [{"context": t, "input": f"Q{n}?", "answers": ["A", f"{n}"], "num_docs": n + 2, "index": 7 * n} for n, t in enumerate(texts)]
        file.write_text(json.dumps(rows))
        (tmp_path / "bare.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "index"} for row in rows]))
        assert [q.id for q in load_questions(tmp_path / "bare.json")] == ["0", "1", "2"]
    else:
        rows = [
            {"data_source": "hotpotqa", "prompt": [{"role": "user", "content": f"Q{n}?"}], "ability": "memory", "context": t,
             "reward_model": {"ground_truth": ["A", f"{n}"], "style": "rule"}, "extra_info": {"index": 7 * n, "question": f"Q{n}?"}}
            for n, t in enumerate(texts)
        ]  # fmt: skip
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    source = LongQA({"test": load_questions(file)}, Pool([], tokenizer), seed=0, chunk_tokens=32, chunks=4)
    made = sorted((source.document(i, "test", 99) for i in range(3)), key=lambda d: int(d.title))
    assert source.lengths([2, 4], "test") == [len(source.document(0, "test").chunks)]
    assert ["".join(d.chunks) for d in made] == texts and sorted(d.index for d in made) == [0, 1, 2]
    assert [(d.title, d.question, d.answers) for d in made] == [(str(7 * n), f"Q{n}?", ["A", f"{n}"]) for n in range(3)]
    assert all(len(d.recall) == len(d.chunks) > 1 and tokens(c, tokenizer) <= 32 for d in made for c in d.chunks)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"input": "Q?", "answers": ["A"]}, ["record 1", "'context'"]),
        ({"input": "Q?", "answers": [], "context": "C"}, ["record 1", "'answers'"]),
        ({"context": "C", "reward_model": {"ground_truth": "A"}}, ["record 1", "extra_info", "'question'"]),
        ({"context": "C", "extra_info": {"question": "Q?"}}, ["record 1", "ground_truth"]),
    ],
)
def test_a_malformed_file_of_memagents(tmp_path, tokenizer, row, words):
    """The error names the record and what it lacks; a .parquet file that is none is named too."""
    (tmp_path / "x.json").write_text(json.dumps([row]))
    with pytest.raises(UserError) as caught:
        load_questions(tmp_path / "x.json")
    assert all(word in str(caught.value) for word in ["x.json", *words]), caught.value
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet: is no readable"):
        load_questions(tmp_path / "x.parquet")

# ---- questions without text --------------------------------------------------------------------------


def read_csv(text):
    """The one field of a line of CSV, if `text` can only be that: in quotes, with doubled quotes inside."""
    fields = next(csv.reader([text]))
    return fields[0] if len(fields) == 1 and text == '"' + fields[0].replace('"', '""') + '"' and '"' in fields[0] else text


@pytest.mark.parametrize(
    "name, field",
    [("bamboogle_125.jsonl", "golden_answers"), ("popqa_1000.jsonl", "golden_answers"), ("triviaqa_1000.jsonl", "golden_answers"),
     ("nq_open_dev_3610.jsonl", "answer"), ("hotpotqa_dev_first500_pooled_retrieval.jsonl", "answer")],
)  # fmt: skip
def test_search_sets(name, field):
    """Every question of the shared sets with its answers, CSV quotes undone and nothing else changed."""
    rows, items = records(f"qa/{name}"), load_search(shared(f"qa/{name}"))
    for row, (question, answers) in zip(rows, items, strict=True):
        golds = row[field] if isinstance(row[field], list) else [row[field]]
        golds, asked = [read_csv(gold.strip()) for gold in golds], read_csv(row["question"].strip())
        assert question == asked and set(answers) == set(golds) and len(answers) == len(set(answers))


def test_objectives():
    """Consecutive questions as one, answers in order, the remainder dropped; taken apart they are what went in."""
    items = [(f"Question {n}?", [f"a{n}", f"b{n}"]) for n in range(7)]
    assert objectives(items)[1] == ("Question 2?; Question 3?", [["a2", "b2"], ["a3", "b3"]])
    for n, groups in ((1, 7), (2, 3), (3, 2), (8, 0)):
        made = objectives(items, n)
        assert len(made) == groups
        assert [pair for question, answers in made for pair in zip(question.split("; "), answers, strict=True)] == items[: groups * n]


@pytest.mark.parametrize("lines", [False, True])
def test_half_a_surrogate_pair_is_replaced(tmp_path, lines):
    """JSON can spell it, tokenizers refuse it; whole pairs stay what they are."""
    record = '{"id": "1", "question": "Who \\ud83d is \\ud83d\\ude00 Ada?", "answer": "Ada", "supporting_facts": [["A", 0]], \
"context": [["A", ["Ada \\uD83D was."]]], "type": "x", "level": "y"}'
    file = tmp_path / "questions.json"
    file.write_text(record if lines else f"[{record}]")
    (question,) = load_questions(file)
    assert question.question == "Who ? is \N{GRINNING FACE} Ada?" and question.gold[0][1] == "Ada ? was."
