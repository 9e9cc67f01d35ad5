"""docs/lesson.ipynb: that its saved file is clean and repeats no code, and (slow) that it runs and the policy learns.

`python tests/test_notebook.py` runs it in a fresh copy of the project and saves it with the new outputs.
"""

import ast
import json
import re
import shutil
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/lesson.ipynb"
SIX = ("memtrain", "masking", "rollout", "rewards", "grpo", "eval")
LIMIT = 600  # seconds for the whole notebook
NOT_CLONED = (".*", "runs", "shared", "__pycache__", "*.pyc")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Run after the last cell: what the notebook's own variables say.
ASK = """
import json
names = "when", "task", "chunks", "memory", "accuracy"
print(json.dumps([{name: row[name] for name in names} for row in results]), json.dumps(history), sep="\\n")
"""


# ---- reading it ------------------------------------------------------------------------------------------


@cache
def cells(kind: str) -> list[dict]:
    """The saved cells of a kind, "code" or "markdown", each with its source as one string."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


def text_of(output: dict) -> str:
    """An output's text; of pictures, none."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(data[mime] for mime in sorted(data) if mime.startswith("text/"))]
    return "".join("".join(part) for part in parts)


def kinds_of(outputs: list[dict]) -> set[str]:
    """The names of streams and the MIME types in some outputs."""
    return {kind for output in outputs for kind in (output.get("name"), *output.get("data", {})) if kind}


def code_lines(node: ast.AST | list) -> list[str]:
    """The lines of some code in one layout, without comments and docstrings."""
    body = node if isinstance(node, list) else node.body
    body = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    return [line.strip() for part in body for line in ast.unparse(part).splitlines()]


@cache
def functions() -> dict[str, list[str]]:
    """The lines of every function of the six files; functions of one line are left out."""
    found = {}
    for file in SIX:
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and len(lines := code_lines(node)) > 1:
                found[f"{file}.{node.name}"] = lines
    return found


def repeated(source: str) -> set[str]:
    """Functions of the six files of which two neighbouring lines stand in `source`; of memtrain.main, all lines.

    main's lines are calls of the other functions, and a notebook that shows them one by one makes the same calls.
    """
    lines = code_lines(ast.parse(source))
    pairs = set(pairwise(lines))
    found = {name for name, own in functions().items() if name != "memtrain.main" and pairs & set(pairwise(own))}
    return found | ({"memtrain.main"} if set(functions()["memtrain.main"]) <= set(lines) else set())


# ---- the saved file -----------------------------------------------------------------------------------------


def test_it_is_saved_with_the_outputs_of_one_whole_run():
    """Cells ran once each, in order, without a word on stderr; several drew a picture."""
    saved = cells("code")
    assert [cell["execution_count"] for cell in saved] == list(range(1, len(saved) + 1))
    outputs = [cell["outputs"] for cell in saved]
    assert sum(bool(any(map(text_of, own))) for own in outputs) >= 18
    assert {output["output_type"] for own in outputs for output in own} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in set().union(*map(kinds_of, outputs))
    assert sum("image/png" in kinds_of(own) for own in outputs) >= 4


def test_it_holds_nothing_of_the_machine_that_ran_it():
    """No times, versions, paths or addresses of objects; and it is small."""
    saved = json.loads(NOTEBOOK.read_text())
    assert saved["metadata"] == METADATA and not any(cell["metadata"] for cell in saved["cells"])
    said = "\n".join(text_of(output) for cell in cells("code") for output in cell["outputs"])
    assert len(said) > 5000
    assert not re.findall(r"(?:^|[\s'\"(=])(?:/[\w.-]+){2,}|[A-Z]:\\\w|site-packages| at 0x[0-9a-f]+", said)
    assert NOTEBOOK.stat().st_size < 400_000


def test_cells_are_short_and_repeat_no_code_of_the_six_files():
    """At most 25 lines; no two neighbouring lines of a function, and no function of the same name."""
    sources = [cell["source"] for cell in cells("code")]
    assert max(len(source.splitlines()) for source in sources) <= 25
    together = "\n".join(sources)
    assert repeated(together) == set()
    defined = {node.name for node in ast.walk(ast.parse(together)) if isinstance(node, ast.FunctionDef)}
    assert defined.isdisjoint(name.split(".")[1] for name in functions())
    for name in ("rewards.trajectory_reward", "grpo.set_weights", "memtrain.main"):  # it would be found
        file, function = name.split(".")
        (node,) = (
            node for node in ast.parse((ROOT / f"{file}.py").read_text()).body if getattr(node, "name", "") == function
        )
        assert name in repeated(f"{together}\n{ast.unparse(node)}")


def test_the_loop_is_that_of_memtrain():
    """With its two helpers put in, it calls what memtrain.main calls, in that order, from reading to the optimizer."""
    calls = (
        "draw_documents(", "read(", "draw_targets(", "recall(", "answer_reward(", "recall_reward(",
        "trajectory_reward(", "assign_advantages(", "set_weights(", "micro_batches(", "batch_loss(", ".backward(",
        "optimizer.step(",
    )
    main = "\n".join(functions()["memtrain.main"]).replace("agent(", "read(")
    (loop,) = (cell["source"] for cell in cells("code") if "for step in" in cell["source"])
    for helper in ("give_rewards", "update"):
        (cell,) = (cell["source"] for cell in cells("code") if f"def {helper}(" in cell["source"])
        (node,) = (node for node in ast.parse(cell).body if getattr(node, "name", "") == helper)
        loop = loop.replace(f"{helper}(", "\n".join(code_lines(node)))
    for source in (main[main.index("for step in") :], loop[loop.index("for step in") :]):
        assert sorted(calls, key=source.index) == list(calls)


def test_each_part_ends_with_an_exercise_and_its_folded_answer():
    """And the text around it has no measured number: a cell prints what was measured."""
    texts = [cell["source"] for cell in cells("markdown")]
    parts = [int(n) for text in texts for n in re.findall(r"(?m)^## Part (\d+)\.", text)]
    assert parts == list(range(1, len(parts) + 1)) and len(parts) >= 8
    marks = [mark for text in texts for mark in re.findall(r"(?m)^## \w+|^\*\*Exercise \d+|<details>|</details>", text)]
    wanted = [mark for n in parts for mark in ("## Part", f"**Exercise {n}", "<details>", "</details>")]
    assert marks == [*wanted, "## Where"]
    answers = [text for text in texts if "<details>" in text]
    assert all(len(text.partition("</summary>")[2].split()) > 60 for text in answers)
    prose = re.sub(r"`[^`]*`|\$[^$]*\$|\([^()]*https?:[^()]*\)|arXiv [\d.]+", "", " ".join(texts))
    assert not re.findall(r"\d\.\d+|\d+ %", prose.replace("95 %", ""))


# ---- running it ----------------------------------------------------------------------------------------------


def execute(folder: Path, more: str | None = None):
    """The notebook, run in a copy of the project in `folder`, and without metadata; `more` is one more cell."""
    for name in ("nbformat", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is missing: `pip install jupyter matplotlib`")
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_CLONED))
    notebook = nbformat.read(folder / "docs/lesson.ipynb", as_version=4)
    if more:
        notebook.cells.append(nbformat.v4.new_code_cell(more))
    end = time.monotonic() + LIMIT
    NotebookClient(
        notebook, timeout_func=lambda cell: max(1, round(end - time.monotonic())), kernel_name="python3",
        record_timing=False, resources={"metadata": {"path": str(folder / "docs")}},
    ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


@pytest.mark.slow
def test_it_runs_in_ten_minutes_and_the_policy_learns(tmp_path):
    """Its outputs are of the same kinds as the saved ones, and equal up to the first sampling."""
    notebook = execute(tmp_path / "memtrain", ASK)
    *ran, asked = [cell for cell in notebook.cells if cell.cell_type == "code"]
    saved = cells("code")
    assert [kinds_of(cell.outputs) for cell in ran] == [kinds_of(cell["outputs"]) for cell in saved]
    sampling = next(n for n, cell in enumerate(saved) if "read(" in cell["source"])
    assert sampling >= 4
    for now, before in zip(ran[:sampling], saved, strict=False):
        assert "".join(map(text_of, now.outputs)) == "".join(map(text_of, before["outputs"]))

    results, history = map(json.loads, asked.outputs[0].text.splitlines())
    accuracy = {tuple(row[name] for name in ("when", "task", "memory", "chunks")): row["accuracy"] for row in results}
    lengths = sorted({row["chunks"] for row in results})
    assert len(lengths) == 2 and len(accuracy) == 16
    for n in lengths:
        assert accuracy["after", "end_to_end", "kept", n] > accuracy["before", "end_to_end", "kept", n] + 0.1
        assert accuracy["after", "end_to_end", "kept", n] > accuracy["after", "end_to_end", "empty", n] + 0.1
    assert {name: len(values) for name, values in history.items()} == {"end-to-end": 20, "recall": 20, "entropy": 20}
    assert sum(history["end-to-end"][-5:]) > sum(history["end-to-end"][:5])


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder) / "memtrain"), NOTEBOOK)
    print(f"saved {NOTEBOOK.relative_to(ROOT)}, {NOTEBOOK.stat().st_size / 1000:.0f} kB")
