"""The lesson as a whole: its size, what it leans on, and that the fast sampler equals its plain twin."""

import ast
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CONFIGS, VOCABULARY, Ends, ending_model

import rollout
from engine import sampling

ROOT = Path(__file__).parents[1]
LESSON = ["memtrain.py", "masking.py", "rollout.py", "rewards.py", "grpo.py", "eval.py"]
ROOMS = ("engine", "text", "tasks")


# ---- the six files --------------------------------------------------------------------------------------


def test_the_six_files_stay_a_lesson():
    """At most 1,400 lines together, 320 a file, 60 a function, 120 columns a line, and no formatter is switched off."""
    sizes = {}
    for name in LESSON:
        text = (ROOT / name).read_text()
        sizes[name] = len(text.splitlines())
        assert max(map(len, text.splitlines())) <= 120 and "fmt: " not in text, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, (name, node.name)
    assert sum(sizes.values()) <= 1400 and max(sizes.values()) <= 320, sizes


def test_every_file_fits_the_page():
    """120 columns, at most 450 lines, and no formatter is switched off; 400 lines where it is no test."""
    rooms = (".", *ROOMS, "tiny", "recipes", "benchmarks", "tests", "tests/*")
    for file in [file for room in rooms for file in ROOT.glob(f"{room}/*.py")]:
        lines = file.read_text().splitlines()
        assert max(map(len, lines), default=0) <= 120 and len(lines) <= (450 if "test" in file.name else 400), file
        assert not any(line.rstrip().endswith("# fmt: " + "skip") for line in lines), file


def imports(file: Path) -> list[tuple[str, str | None]]:
    """(module, name) of each `from module import name` in a file, and (module, None) of each `import module`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return found


def test_the_lesson_leans_on_few_names():
    """The six files import at most 20 names from engine/, text/ and tasks/ together, and no whole room."""
    imported = {own for name in LESSON for own in imports(ROOT / name) if own[0].split(".")[0] in ROOMS}
    assert len(imported) <= 20 and all(name for _, name in imported), sorted(imported)


def test_the_rooms_stay_below_the_lesson():
    """Of the lesson text/ imports nothing, engine/ rollout's types and helpers, tasks/ rollout, rewards and masking."""
    allowed = {"engine": {"rollout"}, "text": set(), "tasks": {"rollout", "rewards", "masking"}}
    lesson = {name.removesuffix(".py") for name in LESSON}
    for room in ROOMS:
        for file in (ROOT / room).glob("*.py"):
            assert {module.split(".")[0] for module, _ in imports(file)} & lesson <= allowed[room], file


def test_the_worked_changes_stay_short():
    """Each of the five in tests/test_change_it.py has at most 25 lines, its check included."""
    tree = ast.parse((ROOT / "tests/test_change_it.py").read_text())
    changes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(changes) == 5 and max(node.end_lineno - node.lineno + 1 for node in changes) <= 25


def test_readme_is_a_page_and_no_link_is_dead():
    """At most 1,300 words; every relative link of README and docs/ leads to a file, and each docs page is linked."""
    assert len((ROOT / "README.md").read_text().split()) <= 1300
    linked = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
            linked.add((page.parent / link).resolve())
    assert {page.resolve() for page in (ROOT / "docs").iterdir()} <= linked


def test_importing_the_lesson_changes_nothing_elsewhere():
    """transformers' attention functions and masks are the same objects after the import as before."""
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as m\n"
        "before = dict(a._global_mapping), dict(m._global_mapping)\n"
        "import grpo, rollout, masking, memtrain, eval\n"
        "assert before == (dict(a._global_mapping), dict(m._global_mapping))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- the samplers ---------------------------------------------------------------------------------------


def random_prompts(padded: bool, rng: random.Random) -> list[list[int]]:
    """Twelve prompts with three samples each, of one length or of many."""
    lengths = [rng.randrange(1, 25) if padded else 16 for _ in range(12)]
    return [prompt for n in lengths for prompt in [[rng.randrange(1, VOCABULARY) for _ in range(n)]] * 3]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_both_samplers_write_the_same_greedy_tokens(shape, padded):
    """Shared prompts, batches of a token budget and rows left out as they end change no token and no ending."""
    model, rng = ending_model(CONFIGS[shape]), random.Random(1)
    prompts = random_prompts(padded, rng)
    plain = rollout.generate(model, Ends, prompts, 15, greedy=True)
    for tokens in (120, 65536):
        fast = sampling.generate(model, Ends, prompts, 15, greedy=True, budget=sampling.Budget(tokens))
        assert [c[:2] for c in fast] == [c[:2] for c in plain]
    assert len({len(completion.ids) for completion in plain}) > 3 and not all(c.ended for c in plain)
