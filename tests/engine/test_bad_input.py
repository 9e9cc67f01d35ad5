"""Users' mistakes: each gets one line that says what, where and what to do, exit code 2, and leaves nothing behind."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import command

import memtrain
from engine import config, models, parallel
from engine.errors import UserError
from engine.models import load_model

ROOT = Path(__file__).parents[2]
GOOD = {
    "_id": "1", "question": "Who?", "answer": "Ada", "supporting_facts": [["A", 0]], "context": [["A", ["Ada was."]]],
    "type": "x", "level": "y",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    passage = '{"title": "A", "text": "Ada Lovelace met Charles Babbage."}\n'
    town = '{{"title": "Town {0}", "text": "Ada Lovelace went to Town {0} in 18{0}0."}}\n'
    files = {
        "malformed.jsonl": passage + '{"title": "B", "te\n', "list.jsonl": passage + "[1, 2]\n", "one.jsonl": passage,
        "plain.jsonl": '{"title": "x", "text": "nothing here is a name at all"}\n' * 9,
        "few.jsonl": "".join(town.format(i) for i in range(3)), "empty.jsonl": "",
        "field.jsonl": '{"title": "x", "body": "Ada Lovelace"}\n', "number.jsonl": '{"title": "x", "text": 5}\n',
        "blank.jsonl": '{"title": "x", "text": ""}\n', "masks.jsonl": '{"title": "x", "text": "Ada saw a [MASK]."}\n',
        "notes.csv": "a,b\n", "fake.parquet": "PAR", "nothing/x.csv": "", "bad.args": "--steps two\n",
        "strings.json": '["a"]', "half.json": "[{", "strange.json": json.dumps([{"_id": 1, "words": 2}]),
        "nq.jsonl": '{"question": "Who?", "golden_answers": []}\n', "note.args": "a note\n--steps 5\n",
        "two.args": "--config other.args\n", "open.args": "--corpus \"my data\n",
        "indented.json": '{\n "text": "x"\n}\n', "page.txt": "<!DOCTYPE html>\n<html><body>Ada</body></html>",
        "wrapped.json": '{"data": [{"text": "Ada Lovelace"}]}', "no_steps.args": "--steps 0",
        "one_title.jsonl": "".join(town.format(i).replace(f"Town {i}\"", 'Letters"', 1) for i in range(9)),
        "run/config.json": '{"chunk_tokens": 64}', "m.gguf": "GGUF", "nothing/.copy.jsonl": passage,
        "used/config.json": "{}", "used/metrics.jsonl": "", "other/thing.txt": "x", "not_a_model/x": "",
    }
    questions = {
        "questions": {}, "no_gold": {"supporting_facts": []}, "no_question": {"question": ""},
        "no_answer": {"answer": []}, "shape": {"context": 5}, "missing_fact": {"supporting_facts": [["B", 0]]},
    }
    files |= {f"{name}.json": json.dumps([GOOD | spoilt]) for name, spoilt in questions.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes(b'[{"question": "\xe9"}]')
    return folder


MISTAKES = [  # script, arguments, and the whole line that they get
    (
        "memtrain", "--corpus {bad}/missing.jsonl",
        "--corpus {bad}/missing.jsonl: no such file or folder (a hub data set is called OWNER/NAME)",
    ),
    (
        "memtrain", "--corpus {bad}/malformed.jsonl",
        "--corpus {bad}/malformed.jsonl: line 2 is not JSON (Invalid control character at: line 1 column 19 (char "
        "18)); fix or remove it",
    ),
    (
        "memtrain", "--corpus {bad}/list.jsonl",
        "--corpus {bad}/list.jsonl: line 2 is not a JSON object; fix or remove it",
    ),
    (
        "memtrain", "--corpus {bad}/plain.jsonl",
        "--ner rules: found no entity in the corpus, so there is nothing to mask; try another pipeline or text",
    ),
    (
        "memtrain", "--corpus {bad}/few.jsonl --passages 50",
        "the corpus has 3 passages, too few for --passages 50 (a document uses only one passage with the pivot's "
        "title): use a larger corpus (in a .txt file, a paragraph on each line), or ask for less",
    ),
    (
        "memtrain", "--corpus {bad}/one.jsonl",
        "the corpus has 1 passages, too few for --related 2 (a document uses only one passage with the pivot's "
        "title): use a larger corpus (in a .txt file, a paragraph on each line), or ask for less",
    ),
    (
        "memtrain", "--corpus {bad}/field.jsonl",
        "--corpus {bad}/field.jsonl: line 1: no field 'text', its fields are body, title; set --text-field",
    ),
    (
        "memtrain", "--corpus {bad}/field.jsonl --text_field story",
        "--corpus {bad}/field.jsonl: line 1: no field 'story', its fields are body, title; set --text-field",
    ),
    (
        "memtrain", "--corpus {bad}/number.jsonl",
        "--corpus {bad}/number.jsonl: line 1: field 'text' holds int, not text",
    ),
    *(
        (
            "memtrain", f"--corpus {{bad}}/{name}.jsonl",
            f"--corpus {{bad}}/{name}.jsonl: contains no usable passage; use another corpus",
        )
        for name in ("empty", "blank", "masks")
    ),
    (
        "memtrain", "--corpus {bad}/notes.csv",
        "--corpus {bad}/notes.csv: is neither a .jsonl, .json, .parquet, .txt file nor a folder that contains one",
    ),
    (
        "memtrain", "--corpus {bad}/nothing",
        "--corpus {bad}/nothing: is neither a .jsonl, .json, .parquet, .txt file nor a folder that contains one",
    ),
    (
        "memtrain", "--corpus {bad}/fake.parquet",
        "--corpus {bad}/fake.parquet: is not a readable .parquet file (Parquet file size is 3 bytes, smaller than the "
        "minimum file footer (8 bytes)); fix or remove it",
    ),
    (
        "memtrain", "--ner en_no_such_pipeline",
        "--ner en_no_such_pipeline: not installed; run `python -m spacy download en_no_such_pipeline`, or use "
        "--ner rules",
    ),
    (
        "memtrain", "--chunk_tokens 5120",
        "--chunk-tokens 5120, --memory-tokens 64 and --answer-tokens 16 need a window of 5253 tokens, but "
        "{root}/tiny/model has 2048; make them smaller",
    ),
    ("memtrain", "--chunk_tokens 3", "--chunk-tokens 3: a chunk needs at least 16 tokens"),
    ("memtrain", "--chunk_tokens 0", "--chunk-tokens 0: must be a number of at least 1"),
    ("memtrain", "--chunks 0", "--chunks 0: must be a number of at least 1"),
    ("memtrain", "--memory_tokens -4", "--memory-tokens -4: must be a number of at least 1"),
    ("memtrain", "--answer_tokens 0", "--answer-tokens 0: must be a number of at least 1"),
    ("memtrain", "--heldout 1", "--heldout 1.0: is a share of the titles, so it must be less than 1"),
    ("memtrain", "--steps 0", "--steps 0: must be a number of at least 1"),
    ("memtrain", "--steps two", "argument --steps: invalid int value: 'two'; --help lists all arguments"),
    ("memtrain", "--lr nan", "--lr nan: must be a number of at least 0"),
    ("memtrain", "--lr -1", "--lr -1.0: must be a number of at least 0"),
    ("memtrain", "--g1 1", "--g1 and --g2 must be at least 2: an advantage compares the samples of a group"),
    ("memtrain", "--g2 1", "--g1 and --g2 must be at least 2: an advantage compares the samples of a group"),
    ("memtrain", "--documents 0", "--documents 0: must be a number of at least 1"),
    ("memtrain", "--update_batch 0", "--update-batch 0: must be a number of at least 1"),
    ("memtrain", "--save_every 0", "--save-every 0: must be a number of at least 1"),
    ("memtrain", "--keep 0", "--keep 0: must be a number of at least 1"),
    (
        "memtrain", "--ablation both",
        "argument --ablation: invalid choice: 'both' (choose from 'none', 'end_to_end', 'decoupled', "
        "'shuffled_rewards'); --help lists all arguments",
    ),
    (
        "memtrain", "--task chess",
        "argument --task: invalid choice: 'chess' (choose from 'memtrain', 'longqa', 'searchqa'); --help lists "
        "all arguments",
    ),
    (
        "memtrain", "--dtype float8",
        "argument --dtype: invalid choice: 'float8' (choose from 'float32', 'bfloat16'); --help lists all "
        "arguments",
    ),
    (
        "memtrain", "--model {bad}/not_a_model",
        "--model {bad}/not_a_model: has no config.json, so it is not a model folder; name another",
    ),
    (
        "memtrain", "--model {bad}/nowhere",
        "--model {bad}/nowhere: no such folder (a model on the hub is called OWNER/NAME)",
    ),
    (
        "memtrain", "--model {bad}/m.gguf",
        "--model {bad}/m.gguf: is a file; name a model folder (config.json, tokenizer.json, *.safetensors)",
    ),
    (
        "memtrain", "--model {bad}/run",
        "--model {bad}/run: is the folder of a run; its model is {bad}/run/checkpoint",
    ),
    (
        "memtrain", "--ner torch",
        "--ner torch: is not a spaCy pipeline; use one such as en_core_web_sm, or --ner rules",
    ),
    *(
        (script, arguments, f"{name}: --task memtrain asks no questions; add --task longqa or --task searchqa")
        for script, arguments, name in (
            ("memtrain", "--questions {bad}/questions.json", "--questions"),
            ("memtrain", "--eval_questions {bad}/questions.json", "--eval-questions"),
            ("eval", "--retriever http://127.0.0.1:8000/retrieve", "--retriever"),
        )
    ),
    (
        "memtrain", "--corpus {bad}/one.jsonl {bad}/few.jsonl",
        "{bad}/few.jsonl: belongs to no flag; quote a path that has spaces, name a folder instead of several files, "
        "and put --config before each settings file",
    ),
    (
        "memtrain", "--corpus {bad}/indented.json",
        "--corpus {bad}/indented.json: is one JSON object on many lines, not a list of records or one a line; fix or "
        "remove it",
    ),
    (
        "memtrain", "--config {bad}/note.args",
        "--config {bad}/note.args: begins with 'a', not with a flag; write flags such as --steps 5",
    ),
    (
        "memtrain", "--config {bad}/two.args",
        "--config {bad}/two.args: can't contain --config; give both files on the command line",
    ),
    (
        "memtrain", "--config {bad}/open.args",
        "--config {bad}/open.args: can't be read (No closing quotation); save it as UTF-8 text, each quote closed",
    ),
    (
        "eval", "--out {bad}/rows",
        "--out {bad}/rows: name a .json file (in a recipe --out is the folder of a run; give another here)",
    ),
    ("memtrain", "--no_such_flag 1", "unknown argument --no_such_flag; --help lists all of them"),
    (
        "memtrain", "--config {bad}/none.args",
        "--config {bad}/none.args: no such file; those of the project are in recipes/",
    ),
    (
        "memtrain", "--config {bad}/bad.args",
        "--config {bad}/bad.args: argument --steps: invalid int value: 'two'; --help lists all arguments",
    ),
    (
        "memtrain", "--out {bad}/used",
        "--out {bad}/used: the folder holds another run or other files; choose another or delete it",
    ),
    (
        "memtrain", "--out {bad}/other",
        "--out {bad}/other: the folder holds another run or other files; choose another or delete it",
    ),
    (
        "memtrain", "--out {bad}/notes.csv/run",
        "--out {bad}/notes.csv/run: can't be written to (Not a directory); name another folder",
    ),
    (
        "memtrain", "--out {bad}/notes.csv",
        "--out {bad}/notes.csv: is a file; name a folder",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/missing.json",
        "--questions {bad}/missing.json: no such file",
    ),
    (
        "memtrain", "--task searchqa --eval_questions {bad}/missing.json",
        "--eval-questions {bad}/missing.json: no such file",
    ),
    (
        "memtrain", "--task longqa --eval-questions {root}/tiny/questions.jsonl",
        "--eval-questions {root}/tiny/questions.jsonl: "
        "is the file of --questions, so it would test what it has trained on; give another, or leave it out: then that "
        "file is split",
    ),
    (
        "memtrain", "--task longqa --eval-questions {bad}/strings.json",
        "--eval-questions {bad}/strings.json: record 1 is not a JSON object",
    ),
    (
        "memtrain", "--objectives 1",
        "--objectives: --task memtrain asks no questions; add --task longqa or --task searchqa",
    ),
    (
        "memtrain", "--eval-split dev",
        "--eval-split: --task memtrain asks no questions; add --task longqa or --task searchqa",
    ),
    ("memtrain", "--task longqa --searches 3", "--searches: --task longqa doesn't search; add --task searchqa"),
    ("memtrain", "--document 2", "unknown argument --document; --help lists all of them"),
    (
        "memtrain", "--model=~/missing",
        "--model {home}/missing: no such folder (a model on the hub is called OWNER/NAME)",
    ),
    ("memtrain", "--corpus {bad}/page.txt", "--corpus {bad}/page.txt: is HTML or XML; save it as plain text"),
    (
        "memtrain", "--corpus {bad}/wrapped.json",
        "--corpus {bad}/wrapped.json: line 1: no field 'text', its fields are data; save the list in 'data' alone",
    ),
    (
        "memtrain", "--corpus {bad}/one_title.jsonl",
        "no passage with an entity is left for the split 'train'; of 1 titles, 1 are held out: use a larger corpus, or "
        "change --heldout",
    ),
    (
        "memtrain", "--config {bad}/no_steps.args",
        "--config {bad}/no_steps.args: --steps 0: must be a number of at least 1",
    ),
    (
        "eval", "--lengths 900 --eval-documents 2",
        "no document could be built at any length: use a larger corpus, or other --lengths",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/half.json",
        "--questions {bad}/half.json: "
        "is not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2))",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/latin.json",
        "--questions {bad}/latin.json: is not UTF-8 text (byte 15)",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/strings.json",
        "--questions {bad}/strings.json: record 1 is not a JSON object",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/strange.json",
        "--questions {bad}/strange.json: "
        "record 1: lacks HotpotQA's 'context' [[title, [sentence]]] and 'supporting_facts' "
        "[[title, number]], or MuSiQue's 'paragraphs' [{'title', 'paragraph_text', 'is_supporting'}]; its fields are "
        "_id, words",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/no_gold.json",
        "--questions {bad}/no_gold.json: "
        "record 1: no text that 'supporting_facts' or 'is_supporting' marks as gold",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/no_question.json",
        "--questions {bad}/no_question.json: "
        "record 1: no text in field 'question'; its fields are _id, question, answer, supporting_facts, context, type, "
        "level",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/no_answer.json",
        "--questions {bad}/no_answer.json: "
        "record 1: no answer in field 'answer'; its fields are _id, question, answer, supporting_facts, context, type, "
        "level",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/shape.json",
        "--questions {bad}/shape.json: "
        "record 1: lacks HotpotQA's 'context' [[title, [sentence]]] and 'supporting_facts' [[title, "
        "number]], or MuSiQue's 'paragraphs' [{'title', 'paragraph_text', 'is_supporting'}]; its fields are _id, "
        "question, answer, supporting_facts, context, type, level",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/missing_fact.json",
        "--questions {bad}/missing_fact.json: "
        "record 1: no text that 'supporting_facts' or 'is_supporting' marks as gold ['B']",
    ),
    (
        "memtrain", "--task longqa --questions {bad}/questions.json",
        "--questions {bad}/questions.json: "
        "no question is left for the split 'test'; use a larger file, or give --eval-questions",
    ),
    (
        "memtrain", "--task searchqa --result_tokens 4000",
        "--result-tokens 4000, --memory-tokens 64 and --answer-tokens 16 need a window of 4246 tokens, but "
        "{root}/tiny/model has 2048; make them smaller",
    ),
    (
        "memtrain", "--task searchqa --questions {bad}/nq.jsonl",
        "--questions {bad}/nq.jsonl: "
        "line 1: no answer in field 'golden_answers'; its fields are question, golden_answers",
    ),
    (
        "memtrain", "--task searchqa --corpus wikimedia/wikipedia --corpus_config 20231101.en",
        "--corpus wikimedia/wikipedia: no such file; searchqa needs one .jsonl file of {title, text} or {contents}, "
        "not a folder or a hub data set",
    ),
    (
        "memtrain", "--task searchqa --retriever tfidf",
        "--retriever tfidf: neither bm25 nor a URL like http://127.0.0.1:8000/retrieve",
    ),
    (
        "memtrain", "--task searchqa --retriever dense",
        "--retriever dense: neither bm25 nor a URL like http://127.0.0.1:8000/retrieve",
    ),
    ("eval", "--eval_documents 0", "--eval-documents 0: nothing to evaluate; ask for at least one"),
    ("eval", "--controls full", "--controls full: --task memtrain supports only the control empty"),
    (
        "eval", "--task longqa --controls half",
        "argument --controls: invalid choice: 'half' (choose from 'empty', 'full', 'oracle'); --help lists all "
        "arguments",
    ),
    ("eval", "--task searchqa --controls full", "--controls full: --task searchqa supports only the control empty"),
    (
        "eval", "--out {bad}/nowhere/rows.json",
        "{bad}/nowhere/rows.json: its folder is missing or can't be written to; name another",
    ),
    ("eval", "--out {bad}", "{bad}: is a folder; name a file in it"),
    ("eval", "--lengths 0", "--lengths 0: must be a number of at least 1"),
    ("eval", "--lengths many", "argument --lengths: invalid int value: 'many'; --help lists all arguments"),
    (
        "eval", "--against {bad}/nowhere",
        "--against {bad}/nowhere: no such folder (a model on the hub is called OWNER/NAME)",
    ),
    ("memtrain", "--lr inf", "--lr inf: must be a number of at least 0"),
    (
        "eval", "--model {bad}/nowhere",
        "--model {bad}/nowhere: no such folder (a model on the hub is called OWNER/NAME)",
    ),
    ("eval", "--plot {bad}/curve.foo", "--plot {bad}/curve.foo: must end in .png, .svg or .pdf"),
]


@pytest.mark.parametrize("script, arguments, message", [pytest.param(*m, id=" ".join(m[:2])) for m in MISTAKES])
def test_a_mistake_gets_its_line(bad, tmp_path, script, arguments, message):
    """The whole message, no traceback, exit code 2, and no output but what a run locks its folder with."""
    arguments = [a.format(bad=bad, root=ROOT) for a in arguments.split()]
    held = files(bad)
    out = tmp_path / ("run" if script == "memtrain" else "run.json")
    done = command(*arguments, *([] if "--out" in arguments else ["--out", out]), script=script)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    wanted = message.replace("{bad}", str(bad)).replace("{root}", str(ROOT)).replace("{home}", str(Path.home()))
    assert last == f"error: {wanted}"
    left = {path for path in files(tmp_path) if ".entities" not in path.parts}
    assert left <= {tmp_path / "run", tmp_path / "run/config.json"} and files(bad) == held


def files(folder: Path) -> set[Path]:
    """All below a folder but locks."""
    return {path for path in folder.rglob("*") if path.name != ".lock"}


MISSING = {
    "--ner en_no_such_pipeline": "--ner en_no_such_pipeline: not installed; run `python -m spacy download",
    "--lora 4": "--lora 4: needs peft; run `pip install peft`",
    "--task longqa --questions nowhere.json": "--questions nowhere.json: no such file",
    "--task searchqa --eval_questions nowhere.json": "--eval-questions nowhere.json: no such file",
    "--g1 1": "--g1 and --g2 must be at least 2",
}


@pytest.mark.parametrize("arguments", MISSING)
def test_what_is_missing_is_told_before_any_work(tmp_path, monkeypatch, arguments):
    """Before processes meet, a folder is made, a model is loaded or a passage is read."""
    for module, name in ((parallel, "start"), (memtrain, "Run"), (models, "load_policy"), (memtrain, "load_task")):
        monkeypatch.setattr(module, name, lambda *more, name=name: pytest.fail(f"{name} was called"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name != "peft" and find(name, *more) or None)
    done = command(*arguments.split(), "--out", tmp_path / "run")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {MISSING[arguments]}") and not list(tmp_path.iterdir())


def test_fast_is_refused_with_versions_that_were_not_tested(tmp_path, monkeypatch):
    """fast/ stands on private parts of transformers: one line, and exit code 2. The default doesn't, and trains."""
    monkeypatch.setattr(config, "installed", "5.99.0")
    for name in ("fast", "fast.attention", "fast.packing", "fast.sampling"):  # as in a process that has just begun
        monkeypatch.delitem(sys.modules, name, raising=False)
    small = "--steps 1 --chunks 2 --chunk_tokens 32 --memory_tokens 8 --documents 1 --g1 2 --g2 2".split()
    small += ["--eval_documents", 0, "--out", tmp_path / "run"]
    done = command(*small, "--fast", "True")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: --fast True: tested with transformers") and "5.99.0 is installed" in last
    done = command("--fast", "True", "--eval_documents", 1, "--out", tmp_path / "rows.json", script="eval")
    assert done.returncode == 2 and "5.99.0 is installed" in done.stderr.strip().splitlines()[-1]
    done = command(*small)
    assert done.returncode == 0 and (tmp_path / "run/finished").exists(), done.stderr


def cut(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:9000])


def reshape(model: Path) -> None:
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"hidden_size": 128', '"hidden_size": 64'))


def drop_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


SPOILT = {
    "pointer": (
        lambda model: (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "SafetensorError",
    ),
    "cut": (cut, "SafetensorError"),
    "other shape": (reshape, "RuntimeError"),
    "no tokens": (
        lambda model: (model / "tokenizer.json").write_text("{}"), "not a causal language model with its tokenizer"
    ),
    "no tokenizer": (drop_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("spoil, why", SPOILT.values(), ids=SPOILT)
def test_a_broken_model_is_a_line(tmp_path, spoil, why):
    """Half a download, a config of other weights, a tokenizer that is none: named, with the reason."""
    shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir() if file.is_file()}
    spoil(tmp_path / "model")
    assert before != {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir() if file.is_file()}
    with pytest.raises(UserError, match=why) as caught:
        load_model(str(tmp_path / "model"), "cpu")
    assert str(caught.value).startswith(f"--model {tmp_path / 'model'}: ") and len(str(caught.value).splitlines()) == 1
