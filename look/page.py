"""A run as one page of HTML: a held-out document before and after training, curves, accuracy by length, trajectories.

    python eval.py --report runs/X        # writes runs/X/report.html

The page needs nothing else, no network either. Texts of a corpus or a model are escaped, and the page's policy lets no
script run but its own, which it names by a hash.
"""

import base64
import difflib
import hashlib
import json
import math
import re
from html import escape
from pathlib import Path
from string import Template

from engine.errors import UserError
from engine.metrics import table, unit_of
from text.matching import MASK, TARGET, occurrences

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 220, 44, 26  # of a chart, and the room for its labels
CURVES = {  # titles, and the metrics of a step that are drawn together
    "success while sampling": ("end_to_end", "recall"), "reward R^E": ("reward", "reward_std"),
    "entropy, nats a token": ("entropy",), "groups without a signal": ("degenerate",),
    "cut off, and without an answer": ("truncated", "unboxed"), "tokens of a memory": ("memory_tokens",),
    "gradient norm": ("grad_norm",), "KL to the reference": ("kl",),
}
SETTINGS = ("task", "model", "steps", "documents", "g1", "g2", "chunks", "chunk_tokens", "memory_tokens", "lr", "seed")
COLOURS = 4  # classes c0 to c3 of page.html
Point = tuple[float, float, float, float]  # x, y, and the ends of y's interval


def write(folder: str) -> Path:
    """Write the page of a run's folder -> its file. Raises UserError where the folder holds no run."""
    run = Path(folder)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"--report {run}: holds no metrics.jsonl; give the folder of a run, its --out")
    metrics, samples = log_lines(run / "metrics.jsonl"), log_lines(run / "samples.jsonl")
    settings, rows = object_of(run / "config.json", {}), object_of(run / "eval.json", [])
    script = (Path(__file__).parent / "page.js").read_text()
    page = Template((Path(__file__).parent / "page.html").read_text()).substitute(
        title=escape(f"{run.resolve().name}: {len(metrics)} steps"),
        about=escape(", ".join(f"{name} {settings[name]}" for name in SETTINGS if name in settings)),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), script=script,
        change=change(rows, settings.get("chunks", 0)), curves=curves(metrics), accuracy=accuracy(rows),
        trajectories=trajectories(samples),
    )
    file = run / "report.html"
    try:
        file.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--report {run}: {error.strerror} for {file.name}; fix that, or copy the run") from None
    return file


def log_lines(file: Path) -> list[dict]:
    """The lines of a log. A last one that a kill, or a run that still goes on, left without its end is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def object_of(file: Path, otherwise):
    return json.loads(file.read_text()) if file.is_file() else otherwise


# ---- charts ----------------------------------------------------------------------------------------------


def curves(metrics: list[dict]) -> str:
    """A chart for each of CURVES that has numbers other than 0."""
    figures = []
    for title, names in CURVES.items():
        lines: dict[str, list[Point]] = {}
        for name in names:
            points = [(row["step"], row[name], row[name], row[name]) for row in metrics if row.get(name) is not None]
            if any(y for _, y, *_ in points):
                lines[name] = points
        if lines:
            figures.append(figure(title, lines, ceiling(max(y for points in lines.values() for _, y, *_ in points))))
    return "".join(figures)


def accuracy(rows: list[dict]) -> str:
    """A chart for each task of an evaluation, with 95 % intervals, and its table."""
    if not rows:
        return '<p class="soft">This run was not evaluated.</p>'
    charts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines: dict[str, list[Point]] = {}
        for row in sorted(rows, key=lambda row: row["chunks"]):
            if row["task"] == task:
                name = row["when"] if row["memory"] == "kept" else f"{row['when']}, {row['memory']} memory"
                lines.setdefault(name, []).append((row["chunks"], row["accuracy"], row["low"], row["high"]))
        charts.append(figure(f"{task}, by {unit_of(rows)}", lines, 1.0))
    head, _, *body = ([escape(cell.strip()) for cell in line.split("|")[1:-1]] for line in table(rows).splitlines())
    cells = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in (head, *body))
    return f'<div class="charts">{"".join(charts)}</div><div class="scroll"><table>{cells}</table></div>'


def ceiling(value: float) -> float:
    """The next number of the kind 1, 2, 4, 8 times a power of ten, so that its quarters are short."""
    power = 10 ** math.floor(math.log10(value or 1.0))
    return next(n * power for n in (1, 2, 4, 8, 10) if n * power >= value)


def figure(title: str, lines: dict[str, list[Point]], top: float) -> str:
    """Lines with intervals as a figure, from 0 up to `top`. All values of x stand equally far apart, in order."""
    xs = sorted({x for points in lines.values() for x, *_ in points})
    across = {x: round(LEFT + (WIDTH - LEFT - 10) * n / max(1, len(xs) - 1), 1) for n, x in enumerate(xs)}

    def down(y: float) -> str:
        return f"{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * y / top:.1f}"

    drawn, legend = [], []
    for y in (0, top / 4, top / 2, 3 * top / 4, top):
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{down(y)}" y2="{down(y)}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{down(y)}" dy="4" text-anchor="end">{y:.3g}</text>')
    for x in xs[:: max(1, len(xs) // 5)]:
        drawn.append(f'<text x="{across[x]}" y="{HEIGHT - 6}" text-anchor="middle">{x}</text>')
    for n, (name, points) in enumerate(lines.items()):
        colour = f"c{n % COLOURS}"
        path = " ".join(f"{across[x]},{down(y)}" for x, y, *_ in points)
        drawn.append(f'<polyline class="line {colour}" points="{path}"><title>{escape(name)}</title></polyline>')
        legend.append(f'<span class="name"><i class="{colour}"></i>{escape(name)}</span>')
        for x, low, high in ((x, low, high) for x, _, low, high in points if low < high):
            ends = f'x1="{across[x]}" x2="{across[x]}" y1="{down(low)}" y2="{down(high)}"'
            drawn.append(f'<line class="line {colour}" {ends}/>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption><b>{escape(title)}</b>{''.join(legend)}</figcaption></figure>"


# ---- trajectories ----------------------------------------------------------------------------------------


def change(rows: list[dict], chunks: int) -> str:
    """How the page opens: a held-out document before and after training, each with its last memory and its answer.

    It is the first, of those nearest to `chunks`, whose score changed as the accuracy did. Nothing unless that changed.
    """
    first, last = ({r["chunks"]: r for r in rows if "said" in r and r["when"] == when} for when in ("before", "after"))
    length = min(first.keys() & last.keys(), key=lambda n: abs(n - chunks), default=None)
    if length is None:
        return ""
    before, after = first[length], last[length]
    rise = after["accuracy"] - before["accuracy"]
    old, new = (  # by the number of the document, its score and what was said
        dict(zip(r["documents"], zip(r["scores"], r["said"], strict=True), strict=True)) for r in (before, after)
    )
    changed = [n for n in old if n in new and (new[n][0] - old[n][0]) * rise > 0]
    if not changed:
        return ""
    asked = "held-out documents" if before["task"] == "end_to_end" else "held-out questions"
    why = f"""Of the {asked} of {before["chunks"]} {unit_of(rows)}, answered greedily before and after training, the
first whose score changed as the accuracy did, from {before["accuracy"]:.2f} to {after["accuracy"]:.2f}.
<mark class="y">Marked</mark>: where the answer stands, or its mask."""
    read = (f"<h3>{when}</h3>{answered(**of[changed[0]][1])}" for when, of in (("before", old), ("after", new)))
    return f'<h2>Before and after</h2><p class="soft">{why}</p>{"".join(read)}'


def trajectories(samples: list[dict]) -> str:
    """A panel for each turn of each trajectory, of which page.js shows one; without scripts all stand there."""
    panels = []
    for s, sample in enumerate(samples):
        step = f"step {sample['step']}"
        for t, trajectory in enumerate(sample["trajectories"]):
            name = f"trajectory {t + 1}: R^E {trajectory['reward']:.2f}, A {trajectory['advantage']:+.2f}"
            data = f'data-sample="{s}" data-step="{step}" data-trajectory="{t}" data-name="{name}"'
            for title, body in turns(sample, trajectory):
                head = f'<p class="soft">{step}, {name}</p><h3>{escape(title)}</h3>'
                panels.append(f'<div class="panel" {data}>{head}{body}</div>')
    return "".join(panels) or '<p class="soft">This run has no samples to step through.</p>'


def turns(sample: dict, trajectory: dict) -> list[tuple[str, str]]:
    """(title, HTML) of each turn: the sections beside the memories, the answer, and recall."""
    found, before, recall = [], "", trajectory["recall"]
    answers = [answer for answer in sample["answers"] if isinstance(answer, str)]
    searches = trajectory["searches"]
    for k, memory in enumerate(trajectory["memories"], 1):
        if k <= len(sample["document"]):
            targets = [recall["entity"]] if recall and recall["l"] == k else []
            left = text_box(f"section {k}", marked(sample["document"][k - 1], [MASK, *answers], targets))
        else:
            left = text_box("searched for", escape(searches[k - 1] if k <= len(searches) else ""))
        right = text_box(f"memory m_{k}, changes from m_{k - 1}" if k > 1 else "memory m_1", difference(before, memory))
        found.append((f"Turn {k}: {sample['question']}", f'<div class="columns">{left}{right}</div>'))
        before = memory
    rewards = f"R^E {trajectory['reward']:.2f}, advantage {trajectory['advantage']:+.3f}"
    body = answered(sample["question"], sample["answers"], before, trajectory["prediction"], rewards)
    found.append(("The answer", body))
    if recall:
        k = recall["k"]
        left = text_box(f"section {recall['l']}, {recall['entity']} masked", marked(recall["section"], [], [TARGET]))
        right = text_box(f"memory m_{k}", marked(trajectory["memories"][k - 1], [], [recall["entity"]]))
        lines = [f"{a['text']}   R^I {a['reward']:.0f}, advantage {a['advantage']:+.3f}" for a in recall["answers"]]
        right += text_box("recall answers", escape("\n".join(lines)))
        found.append((f"Recall, from m_{k}: what is [TARGET]?", f'<div class="columns">{left}<div>{right}</div></div>'))
    return found


def answered(question: str, answers: list, memory: str, prediction: str | None, rewards: str = "") -> str:
    """A last memory beside the question, the answer that was given, and the one wanted, as HTML."""
    said = "no box" if prediction is None else prediction.strip()
    names = [MASK, *(name for answer in answers for name in ([answer] if isinstance(answer, str) else answer))]
    outcome = f"{question}\nanswered: {said}\nwanted: {', '.join(names[1:])}\n{rewards}".strip()
    left, right = text_box("the last memory", marked(memory, names, [])), text_box("the answer", escape(outcome))
    return f'<div class="columns">{left}{right}</div>'


def text_box(title: str, body: str) -> str:
    return f'<div><span class="soft">{escape(title)}</span><div class="text">{body}</div></div>'


def marked(text: str, answers: list[str], targets: list[str]) -> str:
    """The text, escaped, with every form of some names marked; of overlapping forms, the longest."""
    found = [(*span, "y") for name in answers for span in occurrences(text, name)]
    found += [(*span, "target") for name in targets for span in occurrences(text, name)]
    pieces, copied, taken = [], 0, []
    for start, end, kind in sorted(found, key=lambda form: form[0] - form[1]):
        if all(end <= other_start or other_end <= start for other_start, other_end, _ in taken):
            taken.append((start, end, kind))
    for start, end, kind in sorted(taken):
        pieces += [escape(text[copied:start]), f'<mark class="{kind}">{escape(text[start:end])}</mark>']
        copied = end
    return "".join([*pieces, escape(text[copied:])])


def difference(before: str, after: str) -> str:
    """A memory, escaped, with the words that were added to the one before it, and those that were lost, marked."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    pieces = []
    for kind, i, j, m, n in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(escape("".join(new[m:n])))
            continue
        lost, added = escape("".join(old[i:j])), escape("".join(new[m:n]))
        pieces.append(f"<del>{lost}</del>" * bool(lost.strip()) + f"<ins>{added}</ins>" * bool(added))
    return "".join(pieces)
