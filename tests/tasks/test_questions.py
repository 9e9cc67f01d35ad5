"""tasks/questions.py: published files of questions in one form, and their splits."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import records, shared

from engine.errors import UserError
from masking import is_heldout
from tasks.questions import Question, draw, load_questions, load_search, split_of, split_questions, subject

ROOT = Path(__file__).parents[2]
TINY = load_questions(ROOT / "tiny/questions.jsonl")


def folded(text):
    return " ".join(text.split())


# ---- records with paragraphs ---------------------------------------------------------------------------


ASKED = "Where was the author of Emil born?"
EMIL = ("Emil", "Emil was written by Kästner.")
KAESTNER = ("Kästner", "Erich Kästner was a writer. He was born in Dresden.")
ULM = ("Ulm", "Ulm is\u2028a city.")
HOTPOT = {
    "_id": "q", "question": ASKED, "answer": "Dresden", "supporting_facts": [["Emil", 0], ["Kästner", 1]],
    "context": [
        ["Kästner", ["Erich Kästner was a writer.", " He was born in Dresden."]], ["Ulm", ["Ulm is\u2028a city."]],
        ["Emil", ["Emil was written by Kästner."]],
    ],
}
TWOWIKI = HOTPOT | {"context": [[title, [s.strip() for s in sentences]] for title, sentences in HOTPOT["context"]]}
MUSIQUE = {
    "id": "q", "question": ASKED, "answer": "Dresden", "answer_aliases": ["Dresden", "Elbflorenz"],
    "paragraphs": [
        {"idx": n, "title": title, "paragraph_text": text, "is_supporting": title != "Ulm"}
        for n, (title, text) in enumerate([EMIL, ULM, KAESTNER])
    ],
}


@pytest.mark.parametrize(
    "record, answers", [(HOTPOT, ["Dresden"]), (TWOWIKI, ["Dresden"]), (MUSIQUE, ["Dresden", "Elbflorenz"])]
)
@pytest.mark.parametrize("whole", [True, False])
def test_every_layout_gives_one_form(tmp_path, record, answers, whole):
    """HotpotQA's, 2WikiMultihopQA's and MuSiQue's record of one question, as a list or as lines, are one Question."""
    file = tmp_path / "x.json"
    lines = 2 * (json.dumps(record, ensure_ascii=False) + "\r\n")
    file.write_text(json.dumps([record, record], indent=1) if whole else "\ufeff" + lines, encoding="utf-8", newline="")
    expected = Question("q", ASKED, answers, [EMIL, KAESTNER], [ULM])
    assert load_questions(file) == [expected, expected]


def test_artefacts_of_real_records(tmp_path):
    """CSV quotes are undone; of a title that stands twice both texts are kept where they differ, gold as well."""
    more = [["Emil ", ["Emil is a film."]], ["Ulm", ["Another Ulm."]], ["Bonn", []]]
    context = [*HOTPOT["context"], HOTPOT["context"][1], *more]
    record = HOTPOT | {"context": context, "question": '"Who wrote ""Emil""?"'}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    (question,) = load_questions(tmp_path / "x.json")
    assert question.question == 'Who wrote "Emil"?'
    assert question.gold == [EMIL, ("Emil", "Emil is a film."), KAESTNER]
    assert question.other == [ULM, ("Ulm", "Another Ulm.")]


@pytest.mark.parametrize(
    "name",
    [
        "hotpotqa_dev_distractor_200.jsonl", "hotpotqa_train_100.json", "2wikimultihopqa_dev_164.json",
        "musique_ans_dev_200.jsonl", "musique_train_100.json",
    ],
)
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
            expected = {(folded(title), folded(text)) for title, text, label in labelled if label is side}
            assert {(title, folded(text)) for title, text in paragraphs} == expected
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
        ([HOTPOT, [1]], ["record 2", "not a JSON object"]),
        ([HOTPOT, {"question": "Q?", "answer": "A"}], ["record 2", "'context'", "question, answer"]),
        ([HOTPOT | {"question": " "}], ["record 1", "'question'"]),
        ([{k: v for k, v in HOTPOT.items() if k != "question"}], ["record 1", "no text in field 'question'"]),
        ([HOTPOT | {"answer": None}], ["record 1", "'answer'"]),
        ([HOTPOT | {"supporting_facts": []}], ["record 1", "'supporting_facts'"]),
        ([HOTPOT | {"supporting_facts": [["Rome", 0]]}], ["record 1", "'Rome'"]),
        ([HOTPOT | {"supporting_facts": [["Emil"]]}], ["record 1", "'supporting_facts'"]),
        ([HOTPOT | {"context": [["Emil"]]}], ["record 1", "'context'"]),
        ([HOTPOT | {"context": [["Emil", [3]]]}], ["record 1", "'context'"]),
        ([MUSIQUE | {"paragraphs": [{"title": "Emil"}]}], ["record 1", "'paragraph_text'"]),
        ([MUSIQUE | {"paragraphs": MUSIQUE["paragraphs"][1:2]}], ["record 1", "'is_supporting'"]),
        ([MUSIQUE | {"paragraphs": [MUSIQUE["paragraphs"][0] | {"paragraph_text": " "}]}], ["record 1", "'Emil'"]),
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


def test_splits_are_by_subject_or_by_file():
    """One file is split by split_of, in its order; with another for evaluation all of the first is to train on."""
    questions = split_questions(TINY, None, subject)
    assert all(questions.values()) and sorted(q.id for part in questions.values() for q in part) == [q.id for q in TINY]
    for name, part in questions.items():
        assert part == [q for q in TINY if split_of(subject(q)) == name]
    assert {subject(q) for q in questions["train"]}.isdisjoint(subject(q) for q in questions["test"])
    assert split_questions([1, 2], [3], None) == {"train": [1, 2], "dev": [3], "test": [3]}


def test_drawing_goes_through_all_questions_again_and_again():
    """Every epoch holds each question once, in another order; another seed has other orders."""
    items = list("abcdefg")
    epochs = [[draw(items, i, seed=3) for i in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(epoch) == items for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert [draw(items, i, seed=4) for i in range(21)] != sum(epochs, [])


def test_shares_of_the_splits():
    """0.6, 0.1 and 0.3 of many keys, and the same among those titles that masking keeps held out."""
    keys = [f"key {n}" for n in range(20000)]
    for some in (keys, [key for key in keys if is_heldout(key, 0.2)]):
        shares = Counter(map(split_of, some))
        for name, share in (("train", 0.6), ("dev", 0.1), ("test", 0.3)):
            assert abs(shares[name] / len(some) - share) < 4 * (share * (1 - share) / len(some)) ** 0.5


@pytest.mark.parametrize(
    "row, words",
    [
        ({"input": "Q?", "answers": ["A"]}, ["record 1", "'context'"]),
        ({"input": "Q?", "answers": [], "context": "C"}, ["record 1", "'answers'"]),
        ({"context": "C", "reward_model": {"ground_truth": "A"}}, ["record 1", "extra_info", "'question'"]),
        ({"context": "C", "extra_info": {"question": "Q?"}}, ["record 1", "ground_truth"]),
    ],
)
def test_a_malformed_file_of_memagents(tmp_path, row, words):
    """The error names the record and what it lacks; a .parquet file that is none is named too."""
    (tmp_path / "x.json").write_text(json.dumps([row]))
    with pytest.raises(UserError) as caught:
        load_questions(tmp_path / "x.json")
    assert all(word in str(caught.value) for word in ["x.json", *words]), caught.value
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet: is not a readable"):
        load_questions(tmp_path / "x.parquet")


@pytest.mark.parametrize("lines", [False, True])
def test_half_a_surrogate_pair_is_replaced(tmp_path, lines):
    """JSON can spell it, tokenizers refuse it; whole pairs stay what they are."""
    record = '{"id": "1", "question": "Who \\ud83d is \\ud83d\\ude00 Ada?", "answer": "Ada", "type": "x", '
    record += '"level": "y", "supporting_facts": [["A", 0]], "context": [["A", ["Ada \\uD83D was."]]]}'
    file = tmp_path / "questions.json"
    file.write_text(record if lines else f"[{record}]")
    (question,) = load_questions(file)
    assert question.question == "Who ? is \N{GRINNING FACE} Ada?" and question.gold[0][1] == "Ada ? was."


# ---- questions without text ----------------------------------------------------------------------------


def read_csv(text):
    """The one field of a line of CSV, if `text` can only be that: in quotes, with doubled quotes inside."""
    fields = next(csv.reader([text]))
    quoted = '"' + fields[0].replace('"', '""') + '"'
    return fields[0] if len(fields) == 1 and text == quoted and '"' in fields[0] else text


@pytest.mark.parametrize(
    "name, field",
    [
        ("bamboogle_125.jsonl", "golden_answers"), ("popqa_1000.jsonl", "golden_answers"),
        ("triviaqa_1000.jsonl", "golden_answers"), ("nq_open_dev_3610.jsonl", "answer"),
        ("hotpotqa_dev_first500_pooled_retrieval.jsonl", "answer"),
    ],
)
def test_search_sets(name, field):
    """Every question of the shared sets with its answers, CSV quotes undone and nothing else changed."""
    rows, items = records(f"qa/{name}"), load_search(shared(f"qa/{name}"))
    for row, (question, answers) in zip(rows, items, strict=True):
        golds = row[field] if isinstance(row[field], list) else [row[field]]
        golds, asked = [read_csv(gold.strip()) for gold in golds], read_csv(row["question"].strip())
        assert question == asked and set(answers) == set(golds) and len(answers) == len(set(answers))


# ---- answers and layouts as they are published -----------------------------------------------------------


ANSWERS = [  # (record without its question, answers)
    ({"answer": "['Ulm', 'U']"}, ["Ulm", "U"]),
    ({"answers": '["Ulm", "It\'s \\"U\\""]'}, ["Ulm", 'It\'s "U"']),
    ({"golden_answers": "[\"Ada's\", 'Byron']"}, ["Ada's", "Byron"]),
    ({"answer": ["['Ulm']", "U"]}, ["Ulm", "U"]),
    ({"possible_answers": '["politician", "political leader"]'}, ["politician", "political leader"]),
    ({"answer": "['1879', 1880]"}, ["1879", "1880"]),
    ({"answer": [1879, "in 1879", 1.5]}, ["1879", "in 1879", "1.5"]),
    ({"answer": 7}, ["7"]), ({"answer": 0}, ["0"]), ({"answers": [None, "Ulm", " "]}, ["Ulm"]),
    ({"answer": {"value": "Ulm", "aliases": ["Ulm", "Ulma"], "normalized_value": "ulm", "type": "WikipediaEntity"}},
     ["Ulm", "Ulma"]),
    ({"answer": {"value": "Ulm", "aliases": "['Ulma']"}}, ["Ulm", "Ulma"]),
    ({"answers": {"text": ["Ulm", "in Ulm"], "answer_start": [3, 0]}}, ["Ulm", "in Ulm"]),
    ({"answers": [{"value": "Ulm", "aliases": []}]}, ["Ulm"]),
    ({"answer": "[[1, 2]] is not a list of texts"}, ["[[1, 2]] is not a list of texts"]),
    ({"answer": "[MASK]"}, ["[MASK]"]), ({"answer": "['Ulm' and more"}, ["['Ulm' and more"]),
    ({"answer": "[citation]"}, ["[citation]"]), ({"answer": "false"}, ["false"]),
    ({"answer": "{'a': 1}"}, ["{'a': 1}"]),
    ({"answer": "[['Ulm', 'U'], ['Ulma']]"}, ["Ulm", "U", "Ulma"]), ({"answer": "[1, 'a', null]"}, ["[1, 'a', null]"]),
    ({"answer": '[1.5, null, "Ulm", -3]'}, ["1.5", "Ulm", "-3"]), ({"answer": "('Ulm', 'U')"}, ["Ulm", "U"]),
    ({"answer": '{"aliases": ["U"], "value": "Ulm"}'}, ["Ulm", "U"]), ({"answer": "(0, 255, 0)"}, ["(0, 255, 0)"]),
    ({"answer": "(7)"}, ["(7)"]), ({"golden_answers": [], "answer": "Ulm"}, ["Ulm"]),
    ({"answer": float("nan"), "answers": "U"}, ["U"]),
    ({"Answer": {"Value": "Ulm", "Aliases": ["U"]}}, ["Ulm", "U"]), ({"answer": "Ulm", "aliases": ["U"]}, ["Ulm", "U"]),
    ({"answer": "['\\ud83d']"}, ["?"]),
    ({"answer": "[7, 8.5]"}, ["7", "8.5"]), ({"answer": "[7, eight]"}, ["[7, eight]"]),
]


@pytest.mark.parametrize("record, answers", ANSWERS)
def test_answers_are_read_as_they_are_published(tmp_path, record, answers):
    """A list that was saved as a text is the list; numbers and texts are kept; TriviaQA's and SQuAD's records too."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Where?"} | record))
    assert load_search(tmp_path / "x.jsonl") == [("Where?", answers)]


@pytest.mark.parametrize("record, words", [
    ({"answer": "['Ulm' 'U']"}, "looks like a list"), ({"answer": "['Ulm'\n 'U']"}, "looks like a list"),
    ({"answer": "['a', " + "-" * 50_000 + "1]"}, "looks like a list"),
    ({"answer": float("inf")}, "not a text, a number or a list"),
    ({"answer": "['Ulm\n', 'U' 'V']"}, "looks like a list"),
    ({"answer": "['Ulm', U, 'V']"}, "looks like a list"), ({"answer": "['Ulm'', 'V']"}, "looks like a list"),
    ({"answer": True}, "not a text, a number or a list"),
    ({"answer": [["Ulm", False]]}, "not a text, a number or a list"),
    ({"answer": {"name": "Ulm"}}, "not a text, a number or a list"), ({"answer": []}, "no answer in field"),
    ({"answer": "[]"}, "no answer in field"), ({"answer": {"value": ""}}, "no answer in field"),
    ({"answer": "['']"}, "no answer in field"), ({}, "no answer in field"),
])
def test_answers_that_cannot_be_read_are_named(tmp_path, record, words):
    """The second record is bad: the line says which it is."""
    rows = [{"question": "Where?", "answer": "Ulm"}, {"question": "Where?"} | record]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=words) as caught:
        load_search(tmp_path / "x.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'x.jsonl'}: line 2: ") and "\n" not in str(caught.value)


def as_columns(record: dict) -> dict:
    """The record as the hub has it: a dict of columns in the place of a list of pairs."""
    titles, sentences = zip(*record["context"], strict=True)
    facts, numbers = zip(*record["supporting_facts"], strict=True)
    context = {"title": list(titles), "sentences": list(sentences)}
    return record | {"context": context, "supporting_facts": {"title": list(facts), "sent_id": list(numbers)}}


def in_metadata(record: dict) -> dict:
    """The record as FlashRAG has it."""
    columns = as_columns(record)
    names = ("context", "supporting_facts")
    rest = {name: value for name, value in columns.items() if name not in names}
    return rest | {"metadata": {name: columns[name] for name in names}}


def as_text(record: dict, write=json.dumps) -> dict:
    return record | {name: write(record[name]) for name in ("context", "supporting_facts")}


def as_records(record: dict) -> dict:
    context = [{"sentences": sentences, "title": title} for title, sentences in record["context"]]
    facts = [{"title": title, "sent_id": number} for title, number in record["supporting_facts"]]
    return record | {"context": context, "supporting_facts": facts}


def as_one_text(record: dict) -> dict:
    return record | {"context": [[title, "".join(sentences)] for title, sentences in record["context"]]}


def flags_as_text(record: dict) -> dict:
    paragraphs = [one | {"is_supporting": str(one["is_supporting"])} for one in record["paragraphs"]]
    return record | {"paragraphs": paragraphs, "answerable": "True"}


@pytest.mark.parametrize("record", [
    as_columns(HOTPOT), as_columns(TWOWIKI), in_metadata(HOTPOT), as_text(HOTPOT), as_text(HOTPOT, repr),
    as_text(as_columns(HOTPOT)), as_records(HOTPOT), as_one_text(HOTPOT), flags_as_text(MUSIQUE),
    MUSIQUE | {"context": None}, MUSIQUE | {"paragraphs": json.dumps(MUSIQUE["paragraphs"])},
    MUSIQUE | {"paragraphs": {name: [one[name] for one in MUSIQUE["paragraphs"]] for name in MUSIQUE["paragraphs"][0]}},
    {"question": ASKED, "metadata": json.dumps(HOTPOT)},
    MUSIQUE | {"paragraphs": [one | {"is_supporting": int(one["is_supporting"])} for one in MUSIQUE["paragraphs"]]},
])
def test_the_layouts_of_the_hub_give_one_form(tmp_path, record):
    (tmp_path / "x.jsonl").write_text(json.dumps(record | {"answer": "Dresden"}))
    (found,) = load_questions(tmp_path / "x.jsonl")
    assert (found.gold, found.other, found.answers[0]) == ([EMIL, KAESTNER], [ULM], "Dresden")


@pytest.mark.parametrize("record, words", [
    (MUSIQUE | {"answerable": "false"}, "is marked unanswerable"),
    (MUSIQUE | {"answerable": "No"}, "is marked unanswerable"),
    (MUSIQUE | {"answerable": 0}, "is marked unanswerable"),
    (MUSIQUE | {"answerable": "maybe"}, "neither true nor false"),
    (HOTPOT | {"context": {"title": ["Emil"], "sentences": []}}, "lacks HotpotQA's"),
    (HOTPOT | {"context": [[1, 2]]}, "lacks HotpotQA's"), (HOTPOT | {"context": "[" * 100_000}, "lacks HotpotQA's"),
    (HOTPOT | {"context": {"title": ["Emil"]}}, "lacks HotpotQA's"),
    (HOTPOT | {"context": "no JSON"}, "lacks HotpotQA's"),
    (MUSIQUE | {"paragraphs": [one | {"is_supporting": "false"} for one in MUSIQUE["paragraphs"]]}, "marks as gold"),
])
def test_layouts_that_cannot_be_read_are_named(tmp_path, record, words):
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=words) as caught:
        load_questions(tmp_path / "x.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'x.jsonl'}: line 1") and "\n" not in str(caught.value)
