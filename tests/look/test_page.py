"""`eval.py --report`: a run as a page. Texts are only ever texts there, and the page works in a browser."""

import html
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import command

from engine.metrics import row
from look.page import ceiling, change, difference, figure, marked, write

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \"y\""
SAMPLE = {
    "step": 1, "question": HOSTILE, "answers": [HOSTILE, "Ulm"], "document": [f"Ulm {HOSTILE}", "Bern. [MASK]"],
    "trajectories": [
        {
            "memories": [HOSTILE, "Bern"], "searches": [], "prediction": HOSTILE, "reward": 0.5, "advantage": -1.0,
            "recall": {
                "k": 2, "l": 1, "entity": HOSTILE, "section": f"[TARGET] {HOSTILE}",
                "answers": [{"text": HOSTILE, "reward": 1.0, "advantage": 0.5}],
            },
        },
        {"memories": [], "searches": [HOSTILE], "prediction": None, "reward": 0.0, "advantage": 1.0, "recall": None},
    ],
}
PANELS = 5  # two turns, the answer and the recall of the first trajectory, the answer of the second
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose every text is hostile."""
    steps = [{"step": n, "end_to_end": n / 4, "recall": None, "entropy": 0.1 * n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model": HOSTILE, "task": "memtrain"}))
    rows = [row(HOSTILE, "recall", chunks, "kept", {0: 1.0, 1: 0.0}) for chunks in (1, 2, 64)]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    return tmp_path


class Elements(HTMLParser):
    """Collects what a browser would make of a page: its tags, the names of attributes, and all texts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.texts.append(data)


def test_no_text_becomes_an_element(run):
    """One script, no image, no attribute that runs anything; what was hostile can be read as it was written."""
    page = Elements(write(run).read_text())
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.texts.count(HOSTILE) >= 4 and "".join(page.texts).count("document.title") >= 10
    assert page.tags.count("figure") == 3 and page.tags.count("tr") == 2  # two curves, one task; a head and one row
    assert f"task memtrain, model {HOSTILE}" in page.texts


def test_a_folder_without_a_run_is_refused(tmp_path):
    """One line names the file that is missing."""
    done = command("--report", tmp_path / "nothing", script="eval")
    assert done.returncode == 2 and "metrics.jsonl" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_command_names_the_page(run):
    """`eval.py --report FOLDER` writes report.html into the folder and prints its path."""
    done = command("--report", run, script="eval")
    assert done.returncode == 0 and str(run / "report.html") in done.stdout and (run / "report.html").exists()


def test_the_difference_holds_both_memories():
    """Without what was lost it is the new memory, letter for letter; without what was added, the old one's words."""
    rng = random.Random(0)
    for _ in range(300):
        old, new = ("".join(rng.choices(["a", "bc", " ", "\n\n", "<b>", "&", "."], k=rng.randrange(30))) for _ in "12")
        shown = difference(old, new)
        kept = {tag: re.sub(f"<{tag}>.*?</{tag}>", "", shown, flags=re.DOTALL) for tag in ("ins", "del")}
        texts = {tag: html.unescape(re.sub("</?(ins|del)>", "", text)) for tag, text in kept.items()}
        assert texts["del"] == new
        assert re.sub(r"\s", "", texts["ins"]) == re.sub(r"\s", "", old)


def test_names_are_marked_as_whole_words():
    """In any case, but not inside another word; a target wins over a name inside it; other text is escaped."""
    assert marked("Ulm, ULM & Ulmer [MASK].", ["[MASK]", "Ulm"], []) == (
        '<mark class="y">Ulm</mark>, <mark class="y">ULM</mark> &amp; Ulmer <mark class="y">[MASK]</mark>.'
    )
    assert marked("New York", ["York"], ["New York"]) == '<mark class="target">New York</mark>'
    assert marked("a < b", [], []) == "a &lt; b"


def test_a_log_without_its_end(run):
    """The last line of a run that still goes on is left out."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "end_to')
    assert "3 steps" in write(run).read_text()


def test_the_top_of_a_chart_is_short():
    """The highest value is rounded up to 1, 2, 4 or 8 times a power of ten."""
    assert [ceiling(value) for value in (0.03, 0.11, 1, 3, 7, 9, 49)] == pytest.approx([0.04, 0.2, 1, 4, 8, 10, 80])


def test_a_chart_places_its_points():
    """Half of the highest stands in the middle, values of x are equally far apart, an interval has its ends."""
    drawn = figure("t", {"a": [(1, 0.0, 0, 0), (2, 0.5, 0.25, 1.0), (4, 1.0, 1, 1)]}, 1.0)
    points = [tuple(map(float, point.split(","))) for point in re.search('points="([^"]*)"', drawn)[1].split()]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2) and y1 > y2 > y3 and y2 == pytest.approx((y1 + y3) / 2, abs=0.11)
    low, high = map(float, re.search(r'class="line c0" x1="\S+" x2="\S+" y1="(\S+)" y2="(\S+)"', drawn).groups())
    assert low == pytest.approx(y1 + (y3 - y1) / 4, abs=0.11) and high == y3


def evaluated(when: str, chunks: int, *scores: float) -> dict:
    """A row of eval.json; what was said of a document begins with the row's name and the document's number."""
    texts = {"question": HOSTILE, "answers": ["Ulm"], "memory": HOSTILE}
    said = {n: texts | {"prediction": f"{when} {chunks} {n} {HOSTILE}"} for n in range(len(scores))}
    return row(when, "end_to_end", chunks, "kept", dict(enumerate(scores)), said)


@pytest.mark.parametrize(
    "before, after, shown",
    [
        ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0), 2),  # it rose: the first that rose, not the first that changed
        ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0), 1),  # it fell
        ((0.0, 1.0), (1.0, 0.0), None),  # as many right as before
    ],
)
def test_the_page_opens_on_a_document_before_and_after(before, after, shown):
    """The same one, at the training length, with what was answered each time; no text becomes an element."""
    rows = [evaluated("before", 4, *before), evaluated("after", 4, *after)]
    shorter = [evaluated("before", 2, *after), evaluated("after", 2, *before)]
    recall = row("after", "recall", 4, "kept", {0: 1.0})
    page = Elements(change([*shorter, recall, *rows], 4))
    found = [re.findall(r"answered: (\w+ \d+ \d+)", text) for text in page.texts]
    assert sum(found, []) == ([] if shown is None else [f"before 4 {shown}", f"after 4 {shown}"])
    assert not {"script", "img"} & set(page.tags) and page.attributes <= {"class"}
    assert change(rows[:1], 4) == change([], 4) == ""


@pytest.mark.skipif(not chromium, reason="no Chromium is installed")
def test_a_browser_opens_on_the_last_step(run):
    """Of two sampled steps it shows the later one."""
    lines = [SAMPLE, SAMPLE | {"step": 9}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 'class="panel on" data-sample="1" data-step="step 9"' in opened(run / "page.html", write(run).read_text())


@pytest.mark.skipif(not chromium, reason="no Chromium is installed")
def test_the_page_works_in_a_browser(run):
    """Its own script runs and shows one panel of all; no other does, not even one that the page let in unescaped."""
    page = write(run).read_text()
    dom = opened(run / "let_in.html", page.replace("</body>", "<script>document.title='owned'</script></body>"))
    assert f'data-ready="{PANELS}"' in dom and dom.count('class="panel on"') == 1
    assert "1 of 4" in dom and "<title>owned" not in dom and dom.count("<option") == 3
    key = "document.onkeydown({key: 'ArrowRight', target: document.body});"
    dom = opened(run / "key.html", without_policy(page, f"document.getElementById('next').click(); {key}"))
    assert "3 of 4" in dom and "The answer" in dom.split('class="panel on"')[1].split("</h3>")[0]
    other = "trajectory.value = '1'; trajectory.onchange();"
    assert "1 of 1" in opened(run / "other.html", without_policy(page, other))


def without_policy(page: str, script: str) -> str:
    """The page as if its policy let `script` run, too."""
    page = re.sub("<meta http-equiv[^>]*>", "", page)
    return page.replace("</body>", f"<script>{script}</script></body>")


def opened(file, page: str) -> str:
    """What a browser has made of the page."""
    file.write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    return subprocess.run([chromium, *flags, file], capture_output=True, text=True, timeout=60).stdout
