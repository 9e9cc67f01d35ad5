"""The lesson as a whole: what it loads, which way imports go, and that the fast twins equal the plain functions."""

import ast
import json
import random
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, LENGTHS, VOCABULARY, Ends, ending_model, random_turns, tiny_model

import grpo
import rollout
from fast import packing, sampling
from rollout import Budget

ROOT = Path(__file__).parents[1]

# ---- what is loaded --------------------------------------------------------------------------------------

LOAD = """
import json, sys
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
before = dict(functions._global_mapping), dict(masks._global_mapping)
import memtrain
same = before == (dict(functions._global_mapping), dict(masks._global_mapping))
print(json.dumps([same, {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}]))
"""


@pytest.fixture(scope="module")
def loaded():
    """(whether transformers is as it was, {module: its file}) in a new process, after `import memtrain`."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_loads_the_lesson_and_what_it_stands_on(loaded):
    """The six files, engine and text; nothing of fast, look and tasks: what is read is what runs."""
    files = {Path(file) for file in loaded[1].values() if file}
    ours = [file for file in files if file.is_relative_to(ROOT) and "site-packages" not in file.parts]
    rooms = {file.relative_to(ROOT).parts[0] for file in ours}
    assert rooms == {"memtrain.py", "masking.py", "rollout.py", "rewards.py", "grpo.py", "eval.py", "engine", "text"}
    assert not [name for name in loaded[1] if name.split(".")[0] in ("fast", "look", "tasks", "recipes", "tiny")]


def test_importing_the_lesson_changes_nothing_elsewhere(loaded):
    """transformers' attention functions and masks are the same objects after the import as before."""
    assert loaded[0]


# ---- which way imports go ---------------------------------------------------------------------------------

# From the bottom up. A module may import what stands below its level, and its own level, as long as it makes no circle.
LEVELS = [
    ("engine", "text"), ("grpo", "rollout", "masking", "rewards"), ("look", "tasks", "fast"), ("eval", "tiny"),
    ("memtrain",), ("recipes", "experiments", "benchmarks"),
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; not the tests."""
    rooms = [file for room in LEVEL for file in (ROOT / room).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (*ROOT.glob("*.py"), *rooms)}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that a file imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_every_module_stands_on_a_level():
    """A new file at the root or a new room has to be put in its place first."""
    files = [file.relative_to(ROOT) for file in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"))]
    rooms = {file.parts[0].removesuffix(".py") for file in files}
    assert rooms - {"tests"} <= LEVEL.keys() and {"memtrain", "grpo", "engine", "tasks", "fast", "recipes"} <= rooms


def test_imports_make_no_circle():
    """Not by imports inside functions either."""
    known = modules()
    order = list(TopologicalSorter({name: imports(file, known) for name, file in known.items()}).static_order())
    assert sorted(order) == sorted(known) and order.index("memtrain") > order.index("grpo") > order.index("rollout")


def test_imports_go_down():
    """recipes, experiments, benchmarks > memtrain > eval, tiny > look, tasks, fast > the method > engine, text."""
    known = modules()
    up = [
        f"{name} imports {other}" for name, file in known.items() for other in imports(file, known)
        if LEVEL[other.split(".")[0]] > LEVEL[name.split(".")[0]]
    ]
    assert up == []


# ---- what stands beside it ---------------------------------------------------------------------------------


def test_the_worked_changes_stay_short():
    """Each of the seven in tests/test_change_it.py has at most 25 lines, its check included."""
    tree = ast.parse((ROOT / "tests/test_change_it.py").read_text())
    changes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(changes) == 7 and max(node.end_lineno - node.lineno + 1 for node in changes) <= 25


def test_no_link_is_dead():
    """Every relative link of README and docs/ leads to a file, and each docs page is linked.

    The badge's address is relative to GitHub's page of the repository, and names a workflow.
    """
    linked = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text().replace("../../actions/workflows/", ".github/workflows/").replace("/badge.svg", "")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), (page.name, link)
            linked.add((page.parent / link).resolve())
    assert {page.resolve() for page in (ROOT / "docs").iterdir()} <= linked


# ---- the twins ----------------------------------------------------------------------------------------------


def random_prompts(padded: bool, rng: random.Random) -> list[list[int]]:
    """Twelve prompts with three samples each, of one length or of many."""
    lengths = [rng.randrange(1, 25) if padded else 16 for _ in range(12)]
    return [prompt for n in lengths for prompt in [[rng.randrange(1, VOCABULARY) for _ in range(n)]] * 3]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_both_samplers_write_the_same_greedy_turns(shape, padded):
    """Shared prompts, batches of a token budget and rows left out as they end change no token and no ending."""
    model, rng = ending_model(CONFIGS[shape]), random.Random(1)
    prompts = random_prompts(padded, rng)
    plain = rollout.generate(model, Ends, prompts, 15, None, True, Budget(65536))
    for tokens in (120, 65536):
        assert sampling.generate(model, Ends, prompts, 15, None, True, Budget(tokens)) == plain
    assert len({len(turn.completion_ids) for turn in plain}) > 3 and not all(turn.ended for turn in plain)


@pytest.mark.parametrize("packs", [False, True])
def test_both_ways_to_train_make_the_same_log_probs(packs):
    """Without packing the batches are the same, too; packed, turns of one prompt share a row of theirs."""
    model, turns = tiny_model(), random_turns(LENGTHS * 3, seed=2)
    for turn in turns[:12:2]:
        turn.prompt_ids = turns[0].prompt_ids
    plain_batches = grpo.micro_batches(turns, 60)
    batches = packing.enable(model)(turns, 60) if packs else packing.micro_batches(turns, 60, model)
    assert (batches == plain_batches) != packs and len(batches) > 3
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            logprobs, _, mask = packing.token_logprobs(model, batch)
            found |= {id(turn): row[own] for turn, row, own in zip(batch, logprobs, mask, strict=True)}
        for batch in plain_batches:
            logprobs, _, mask = grpo.token_logprobs(model, batch)
            for turn, row, own in zip(batch, logprobs, mask, strict=True):
                torch.testing.assert_close(found.pop(id(turn)), row[own], atol=1e-5, rtol=0)
    assert found == {}
