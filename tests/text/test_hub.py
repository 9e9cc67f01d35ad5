"""Text of the hub: it is kept, what goes wrong is told, and a stream ends before its process does."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import pytest
from hub_server import Hub, serving

from engine.config import ROOT, Config
from engine.errors import UserError
from text.corpus import Passage, load_passages, load_text

RUN = """--corpus owner/articles --steps 2 --save-every 1 --documents 2 --g1 2 --g2 2 --chunks 2 --eval-documents 0
--date 2026-01-01""".split()


def command(url: str, home, *words: str, offline: str = "0") -> subprocess.CompletedProcess:
    """`python WORDS` with this hub."""
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | hub, capture_output=True, text=True, timeout=120
    )


def load(url: str, home, name: str, *more) -> subprocess.CompletedProcess:
    code = "from engine.errors import run_script\nfrom text.corpus import load_passages\n"
    return command(url, home, "-c", f"{code}run_script(lambda: print(len(load_passages({name!r}, *{more!r}))))")


@pytest.fixture
def hub():
    """Serves the tiny passages, each as an article whose end is left out."""
    served = Hub()
    rows = map(json.loads, (ROOT / "tiny/passages.jsonl").read_text().splitlines())
    served.rows = [row for row in rows if len(row["text"].split()) >= 15]
    return served


@pytest.mark.slow
def test_a_run_resumes_without_the_hub_bit_for_bit(hub, tmp_path):
    """Stopped after one of two steps, the hub's text changed and then away, it ends like a run in one go."""
    with serving(hub) as url:
        run = partial(command, url, tmp_path / "home", "memtrain.py", *RUN)
        whole = run("--out", str(tmp_path / "a/whole"))
        assert whole.returncode == 0, whole.stderr
        stop = "import sys, memtrain\nfrom engine.run import Run\nsave = Run.save_if_due\n" \
            "Run.save_if_due = lambda *a: (save(*a), sys.exit(7))\n" \
            "memtrain.run_with_flags(memtrain.main, memtrain.Config)"
        half = command(url, tmp_path / "home", "-c", stop, *RUN, "--out", str(tmp_path / "b/half"))
        assert half.returncode == 7, half.stderr
        hub.rows, asked = [row | {"text": row["text"].upper()} for row in hub.rows], hub.asked
        rest = run("--out", str(tmp_path / "b/half"), offline="1")
        assert rest.returncode == 0 and hub.asked == asked, rest.stderr
        assert "resuming after step 1" in rest.stdout and "read from" in rest.stderr
    one, other = tmp_path / "a/whole", tmp_path / "b/half"
    weights = [(run / "checkpoint/model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1] != (ROOT / "tiny/model/model.safetensors").read_bytes()
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (one, other)]
    timed = {name for line in lines[0] + lines[1] for name in line if "second" in name or "_s" in name}
    assert [[{k: v for k, v in line.items() if k not in timed} for line in run] for run in lines][0] == [
        {k: v for k, v in line.items() if k not in timed} for line in lines[1]
    ]


@pytest.mark.slow
def test_text_of_the_hub_is_written_once_and_read_by_all(tmp_path, monkeypatch, capsys):
    """The first process writes it, with what was left out; a later one, another rank and a run beside read it."""
    rows = [{"title": "T\u2028", "text": "Körper \U0001f600\nline."}, {"title": "B", "text": "a [MASK]"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))
    monkeypatch.setattr("text.corpus.hub_revision", lambda name: "abc")
    config = Config(corpus="owner/name", out=str(tmp_path / "run"))
    first, later, told = Counter(), Counter(), "1 with a literal [MASK]"
    assert load_text(config, first) == [Passage("T\u2028", "Körper \U0001f600\nline.")]
    (file,) = (tmp_path / ".passages").iterdir()
    assert told in capsys.readouterr().err
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    config.out = str(tmp_path / "beside")
    assert load_text(config, later) == [Passage("T\u2028", "Körper \U0001f600\nline.")] and later == first
    err = capsys.readouterr().err
    assert told in err and str(file) in err and "revision abc" in err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(load_text(config)) == 1 and capsys.readouterr().err == ""
    monkeypatch.delenv("LOCAL_RANK")
    for other in (
        Config(corpus="owner/other"), Config(corpus="owner/name", corpus_config="en"), Config(max_passages=1),
        Config(text_field="body"), Config(ner="en_core_web_sm"), Config(task="longqa"),
    ):
        other.corpus, other.out = other.corpus or "owner/name", config.out
        with pytest.raises(UserError, match="division by zero"):  # it is loaded anew, under another name
            load_text(other)


def test_nothing_is_kept_of_a_stream_that_breaks(tmp_path, monkeypatch):
    """Half a text must not pass for the whole."""
    def rows():
        yield {"text": "Fine."}
        raise ConnectionError("cut off")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    monkeypatch.setattr("text.corpus.hub_revision", lambda name: None)
    with pytest.raises(UserError, match="cut off"):
        load_text(Config(corpus="owner/name", out=str(tmp_path / "run")))
    assert list((tmp_path / ".passages").iterdir()) == []


def test_a_stream_has_ended_when_the_text_is_there(monkeypatch):
    """What reads ahead for it in a thread is done: a process that ends before aborts."""
    done = []

    def rows():
        try:
            yield from ({"text": f"Text {n}."} for n in range(9))
        finally:
            threading.Timer(0.2, done.append, ["read"]).start()

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    assert len(load_passages("owner/name", max_passages=3)) == 3 and done == ["read"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 451])
def test_a_refusal_is_told_with_its_reason(hub, tmp_path, status):
    """Of a data set and of a model: one line, with more in it than an id."""
    hub.status = status
    with serving(hub) as url:
        data = load(url, tmp_path, hub.name)
        code = "from engine.errors import run_script\nfrom engine.models import load_model\n"
        model = command(url, tmp_path, "-c", f"{code}run_script(lambda: load_model({hub.name!r}, 'cpu'))")
    for found in (data, model):
        (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
        assert found.returncode == 2 and len(line) < 500 and "equest ID" not in line and "Traceback" not in found.stderr
        assert str(status) in line
    assert "can't be loaded (hub down, no access, no such model, not a causal model): OSError: " in model.stderr


@pytest.mark.slow
def test_a_forgotten_configuration_and_field_are_named(hub, tmp_path):
    """With the flag, and some of what can be given."""
    hub.configs = ("2023.de", "2023.en", "2023.fr")
    with serving(hub) as url:
        for given, some in ((), "2023.en"), (("2022.fr",), "2023.fr"):
            found = load(url, tmp_path, hub.name, *given)
            assert found.returncode == 2
            assert f"set --corpus-config to one of its configurations (3 in all), such as {some}" in found.stderr
        found = load(url, tmp_path, hub.name, "2023.en", "body")
        assert found.returncode == 2 and "no field 'body', its fields are text, title; set --text-field" in found.stderr
        assert load(url, tmp_path, hub.name, "2023.en", "text", 7).stdout == "7\n"
