"""tasks/longqa.py: long texts that hide the gold paragraphs of a question."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import records, shared
from transformers import AutoTokenizer

from engine.errors import UserError
from masking import draw_recall
from tasks import longqa
from tasks.longqa import LongQA, LongText, measured, shuffled
from tasks.questions import Question, load_questions, split_questions, subject
from text.chunking import cut_chunks

ROOT = Path(__file__).parents[2]
TINY = load_questions(ROOT / "tiny/questions.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


@pytest.fixture(scope="module")
def pool(tokenizer):
    """The tiny passages, measured, and the tokenizer that did it."""
    rows = map(json.loads, (ROOT / "tiny/passages.jsonl").read_text().splitlines())
    return measured([(row["title"], row["text"]) for row in rows], tokenizer), tokenizer


@pytest.fixture(scope="module")
def qwen():
    return AutoTokenizer.from_pretrained(shared("tokenizers/qwen3-4b-instruct-2507"))


@pytest.fixture(scope="module")
def hotpot(qwen):
    """(HotpotQA's questions, (a pool of passages of its articles, the tokenizer))."""
    passages = [(row["title"], row["text"]) for row in records("wiki/hotpot_pool.jsonl")]
    return load_questions(shared("qa/hotpotqa_dev_distractor_200.jsonl")), (measured(passages, qwen), qwen)


def long_document(question, index, pool, *, documents, seed=0, chunk_tokens=64):
    """The question's gold paragraphs among so many numbered documents."""
    text = LongText(question, index, *pool, seed, chunk_tokens)
    assert text.draw(documents) == documents
    return text.document(documents)


def gold_text(document):
    return "".join(text for _, text in document.gold)


def squeezed(text):
    return "".join(text.split())


def opened(document):
    """(title, text) of each numbered document, read back from the chunks; the numbers must be 1, 2, 3, ..."""
    parts = re.split(r"^Document (\d+): (.*)\n", "".join(document.chunks), flags=re.M)
    assert parts[0] == "" and [int(n) for n in parts[1::3]] == list(range(1, len(parts) // 3 + 1))
    return list(zip(parts[2::3], (text.strip() for text in parts[3::3]), strict=True))


def tokens(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.parametrize("samples", [(12, 4, 2, 1), pytest.param((24, 12, 8, 4), marks=pytest.mark.slow)])
def test_long_hotpotqa(qwen, hotpot, samples):
    """Of 50 to 400 documents: chunks, each gold paragraph once, nothing twice, a gold title is the gold's own."""
    rows = {row["_id"]: row for row in records("qa/hotpotqa_dev_distractor_200.jsonl")}
    questions, filler = hotpot
    short = next(n for n, q in enumerate(questions) if not q.other)  # its record has two paragraphs instead of ten
    for size, sample in zip((50, 100, 200, 400), samples, strict=True):
        places = set()
        for n in {*random.Random(size).sample(range(len(questions)), sample), short}:
            document = long_document(questions[n], n, filler, chunk_tokens=5120, documents=size)
            text, row, parts = "".join(document.chunks), rows[document.title], opened(document)
            assert len(parts) == size
            assert max(tokens(chunk, qwen) for chunk in document.chunks) <= 5120
            assert document.index == n and draw_recall(document, np.random.default_rng(0)) is None
            assert (document.question, document.answers) == (row["question"].strip(), [row["answer"]])
            titles, texts = [title.casefold() for title, _ in parts], [squeezed(text) for _, text in parts]
            assert len(set(titles)) == len(titles) and len(set(texts)) == len(texts)
            gold = {title for title, _ in row["supporting_facts"]}
            for title, sentences in row["context"]:
                body = squeezed("".join(sentences))
                assert squeezed(text).count(body) == 1
                assert (title, body) in zip([t for t, _ in parts], texts, strict=True)
                assert (body in squeezed(gold_text(document))) is (title in gold)
            places.add(tuple(n for n, (title, _) in enumerate(parts) if title in gold))
            assert len(next(iter(places))) == 2
        assert len(places) > sample * 0.8  # 50 documents have 1225 pairs of places, and more have more


def test_numbers_of_documents(qwen, hotpot):
    """50 documents are about 7k tokens and 200 about 28k, MemAgent's lengths."""
    questions, filler = hotpot
    for documents, about, sample in ((50, 7000, 10), (200, 28000, 3)):
        how = dict(chunk_tokens=5120, documents=documents)
        made = [long_document(question, n, filler, **how) for n, question in enumerate(questions[:sample])]
        assert [len(opened(d)) for d in made] == [documents] * sample
        assert abs(sum(tokens("".join(d.chunks), qwen) for d in made) / sample - about) < 0.1 * about


@pytest.mark.slow
def test_places_are_uniform_and_each_questions_own(pool):
    """Over many questions the gold stands at the front, in the middle and at the end equally often."""
    made = [(q, long_document(q, n, pool, documents=12)) for n, q in enumerate(TINY[:600])]
    places = [n for q, d in made for n, (title, _) in enumerate(opened(d)) if title == q.gold[0][0]]
    counts = Counter(places)
    assert len(places) == 600 and sum((counts[n] - 50) ** 2 / 50 for n in range(12)) < 31.3  # chi square, p = 0.001


def test_pure_function_of_seed_and_index(pool):
    """The same text whatever was made before it and in another process; another seed or index gives another."""

    def made(n, index, seed=3):
        return "".join(long_document(TINY[n], index, pool, seed=seed, documents=14).chunks)

    texts = [made(n, n) for n in range(5)]
    assert made(4, 4) == texts[4] and len({*texts, made(4, 5), made(4, 4, seed=4)}) == 7
    program = (
        "import json; from transformers import AutoTokenizer\n"
        "from tasks.longqa import LongText, measured; from tasks.questions import load_questions\n"
        "rows = map(json.loads, open('tiny/passages.jsonl', encoding='utf-8'))\n"
        "tokenizer = AutoTokenizer.from_pretrained('tiny/model')\n"
        "pool = measured([(r['title'], r['text']) for r in rows], tokenizer)\n"
        "question = load_questions('tiny/questions.jsonl')[4]\n"
        "text = LongText(question, 4, pool, tokenizer, 3, 64)\n"
        "print(json.dumps(text.document(text.draw(14)).chunks))"
    )
    command, env = [sys.executable, "-c", program], os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "".join(json.loads(done.stdout)) == texts[4]


def test_a_longer_text_keeps_the_order_of_a_shorter_one(pool):
    """With one seed and index two lengths differ by filler alone: what both hold stands in the same order."""
    for index, question in enumerate(TINY[:30]):
        made = [long_document(question, index, pool, documents=n) for n in (15, 60)]
        short, long = map(opened, made)
        assert set(short) < set(long) and [part for part in long if part in short] == short


def test_filler_repeats_nothing(tokenizer):
    """Of a pool no gold title in another spelling, no gold text under another title and no repeat is added."""
    question = Question(
        "q", "Who?", ["A"], [("The Golden Ass", "It is a novel."), ("U.S. Route 1", "It is a road.")],
        [("Ulm", "Ulm is a city."), ("Golden Ass", "A distractor that came with the question.")],
    )
    bad = [
        ("golden ass", "A second passage."), ("US Route 1", "A second one."), ("Ｕ.Ｓ. Route 1", "A wide one."),
        ("Novels", "It is  a novel."), ("Ulm", "Ulm is a\ncity."), ("Empty", " "),
    ]
    good = [("Ulm", "A different text on it."), ("Bonn", "Bonn is a city."), ("Rome", "Rome is a city.")]
    text = LongText(question, 0, measured(bad + good + good, tokenizer), tokenizer, 0, 64)
    assert text.draw(5) == 5 and text.draw(99) == 7
    document = text.document(7)
    assert sorted(opened(document)) == sorted(question.gold + question.other + good)
    assert document.gold == tuple(question.gold)


def test_own_distractors_come_first(pool):
    """The filler is the question's own until that is used up."""
    for index, question in enumerate(TINY[:20]):
        size = len(question.gold) + len(question.other)
        fewer, more = (long_document(question, index, pool, documents=size + n) for n in (-3, 5))
        assert set(opened(fewer)) < set(question.gold + question.other) < set(opened(more))


@pytest.mark.parametrize("chunk_tokens, chunks, why", [
    (16, 2, r"its 2 gold paragraphs take \d+ chunks of 16 tokens, but 2 are wanted; ask for more or longer chunks"),
    (64, 99, r"99 chunks wanted, but all 12 passages make \d; use a larger corpus"),
])
def test_texts_that_cannot_be_made(pool, chunk_tokens, chunks, why):
    """Gold that is too long, and a pool that is too small: the error tells the question and both numbers."""
    passages, tokenizer = pool
    question = next(q for q in TINY if len(q.gold) == 2 and len(q.other) == 8)
    few = [passage for passage in passages if passage.text not in str(question)][:2]
    with pytest.raises(UserError, match=f"question {question.id}: {why}"):
        LongText(question, 0, few, tokenizer, 0, chunk_tokens).of_chunks(chunks)


def test_training_takes_another_question_where_one_cannot_be_made(tokenizer):
    """Of four questions one fits a chunk: every training document is about it; in an evaluation each has its turn."""
    short = Question("short", "Who?", ["A"], [("A", "b.")], [])
    long = [Question(f"long {n}", "Who?", ["A"], [("A", "It is a long story. " * 30)], []) for n in range(3)]
    source = LongQA({"train": [short, *long], "test": [short, *long]}, [], tokenizer, seed=0, chunk_tokens=40, chunks=1)
    assert {source.document(i).title for i in range(12)} == {"short"}
    made, errors = [], []
    for i in range(4):
        try:
            made.append(source.document(i, "test").title)
        except UserError as error:
            errors.append(str(error))
    assert made == ["short"] and len(errors) == 3
    source.questions["train"] = long
    with pytest.raises(UserError, match="its 1 gold paragraphs take"):
        source.document(0)


def test_a_chunk_never_ends_with_a_heading(pool):
    """A title stays with the beginning of its text, however the chunks fall."""
    for index, question in enumerate(TINY[:60]):
        for limit in (40, 64, 100):
            chunks = long_document(question, index, pool, chunk_tokens=limit, documents=15).chunks
            assert len(chunks) >= 5 and max(tokens(chunk, pool[1]) for chunk in chunks) <= limit
            assert not any(re.search(r"Document \d+:[^\n]*\n?\Z", chunk) for chunk in chunks)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_memagents_files(tmp_path, tokenizer, kind):
    """Its evaluation .json and its training .parquet give the same documents, their text untouched."""
    texts = [f" Document 1:\nNumber {n} is a number.\n\n" * (n + 2) for n in range(3)]
    file = tmp_path / f"x.{kind}"
    if kind == "json":
        rows = [
            {"context": t, "input": f"Q{n}?", "answers": ["A", f"{n}"], "num_docs": n + 2, "index": 7 * n}
            for n, t in enumerate(texts)
        ]
        file.write_text(json.dumps(rows))
        bare = [{k: v for k, v in row.items() if k != "index"} for row in rows]
        (tmp_path / "bare.json").write_text(json.dumps(bare))
        assert [q.id for q in load_questions(tmp_path / "bare.json")] == ["0", "1", "2"]
    else:
        rows = [
            {
                "data_source": "hotpotqa", "prompt": [{"role": "user", "content": f"Q{n}?"}], "ability": "memory",
                "reward_model": {"ground_truth": ["A", f"{n}"], "style": "rule"},
                "extra_info": {"index": 7 * n, "question": f"Q{n}?"}, "context": t,
            }
            for n, t in enumerate(texts)
        ]
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    source = LongQA({"test": load_questions(file)}, [], tokenizer, seed=0, chunk_tokens=32, chunks=4)
    made = sorted((source.document(i, "test", 99) for i in range(3)), key=lambda d: int(d.title))
    assert source.lengths([2, 4], "test") == [len(source.document(0, "test").chunks)]
    assert ["".join(d.chunks) for d in made] == texts and sorted(d.index for d in made) == [0, 1, 2]
    assert [(d.title, d.question, d.answers) for d in made] == [(str(7 * n), f"Q{n}?", ["A", f"{n}"]) for n in range(3)]
    assert all(len(d.chunks) > 1 and tokens(c, tokenizer) <= 32 for d in made for c in d.chunks)


def test_a_pool_is_tokenised_in_batches(tokenizer):
    """Token ids of all passages at once would be gigabytes; the measures are those of one passage alone."""
    sizes = []

    def counting(texts, **more):
        sizes.append(len(texts))
        return tokenizer(texts, **more)

    pool = measured([(f"Town {n}", f"It lies at {n}.") for n in range(9000)], counting)
    assert len(pool) == 9000 and max(sizes) <= 4096
    assert pool[8999] == measured([("Town 8999", "It lies at 8999.")], tokenizer)[0]


def test_numbers_drawn_one_by_one_are_a_random_order():
    """Each once; and each place holds each number as often as chance has it."""
    orders = [list(shuffled(6, np.random.default_rng(n))) for n in range(3000)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    counts = np.array([[sum(order[place] == n for order in orders) for n in range(6)] for place in range(6)])
    assert abs(counts - 500).max() < 5 * (3000 * 5 / 36) ** 0.5
    few = shuffled(10**9, np.random.default_rng(0))
    assert len({next(few) for _ in range(100)}) == 100


@pytest.mark.parametrize("chunk_tokens, chunks", [(64, 48), (512, 8)])
def test_a_text_is_cut_once_or_twice(tokenizer, monkeypatch, chunk_tokens, chunks):
    """Its length is known from the passages' token counts; and an evaluation's document is built once."""
    pool = measured([(f"Town {n}", f"It lies at {n}. " * (1 + n % 7)) for n in range(4000)], tokenizer)
    questions = load_questions(ROOT / "tiny/questions.jsonl")[:12]
    split = {"train": questions, "test": questions}
    source, cuts = LongQA(split, pool, tokenizer, seed=0, chunk_tokens=chunk_tokens, chunks=4), []

    def counted(*given):
        cuts.append(1)
        return cut_chunks(*given)

    monkeypatch.setattr(longqa, "cut_chunks", counted)
    documents = [source.document(i, "test", chunks) for i in range(12)]
    assert len(cuts) <= 3 * 12 and all(chunks - len(document.chunks) in (0, 1) for document in documents)
    before = len(cuts)
    assert [source.document(i, "test", chunks) for i in range(12)] == documents and len(cuts) == before


def test_the_source_makes_texts_of_so_many_chunks(tokenizer):
    """A pure function of the index and the length: documents of a split's own questions, filled to the chunks asked."""
    questions = split_questions(TINY, None, subject)
    pool = measured([("A town", f"It lies at {i}.") for i in range(200)], tokenizer)
    source = LongQA(questions, pool, tokenizer, seed=0, chunk_tokens=64, chunks=6)
    document = source.document(5, "test")
    assert document == source.document(5, "test") and document.title in {q.id for q in questions["test"]}
    assert document.title != source.document(6, "test").title and source.lengths([2, 9], "test") == [2, 9]
    assert len("".join(source.document(5, "test", 12).chunks)) > len("".join(document.chunks))
    got = [chunks - len(source.document(i, "test", chunks).chunks) for i in range(8) for chunks in (3, 5, 12)]
    assert set(got) <= {0, 1} and got.count(0) > 18  # one more document can take two more chunks
