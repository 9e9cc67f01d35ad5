"""The lesson as a whole: its size, what it leans on, and that each fast part equals its plain twin."""

import ast
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config

import grpo
import rollout
from engine import packing, sampling
from engine.attention import enable_packing
from rollout import Turn

ROOT = Path(__file__).parents[1]
LESSON = ["memtrain.py", "masking.py", "rollout.py", "rewards.py", "grpo.py", "eval.py"]
ROOMS = ("engine", "text", "tasks")
SHAPES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


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


def test_the_lesson_leans_on_few_names():
    """The six files import at most 20 names from engine/, text/ and tasks/ together."""
    names = set()
    for name in LESSON:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ROOMS:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert not (isinstance(node, ast.Import) and node.names[0].name.split(".")[0] in ROOMS), name
    assert len(names) <= 20, sorted(names)


def test_the_rooms_stay_below_the_lesson():
    """text/ imports nothing of the lesson, engine/ only rollout's types and helpers, and no file is over 400 lines."""
    lesson = {name.removesuffix(".py") for name in LESSON}
    for room in ROOMS:
        for file in (ROOT / room).glob("*.py"):
            text = file.read_text()
            assert len(text.splitlines()) <= 400, file
            imported = {
                node.module.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
            }
            allowed = {"engine": {"rollout"}, "text": set(), "tasks": {"rollout", "rewards", "masking"}}[room]
            assert imported & lesson <= allowed, file


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


# ---- the twins ------------------------------------------------------------------------------------------


class Ends:
    """The little of a tokenizer that `generate` looks at without `done`."""

    pad_token_id = eos_token_id = 7


def random_model(shape: str):
    torch.manual_seed(0)
    config = SHAPES[shape](
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=7, pad_token_id=7, bos_token_id=1, initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=7)
    with torch.no_grad():  # ends often
        model.lm_head.weight[7] *= 3
    return model


def random_prompts(padded: bool, rng: random.Random) -> list[list[int]]:
    """Twelve prompts with three samples each, of one length or of many."""
    lengths = [rng.randrange(1, 25) if padded else 16 for _ in range(12)]
    return [prompt for n in lengths for prompt in [[rng.randrange(8, 300) for _ in range(n)]] * 3]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_samplers_write_the_same_greedy_tokens(shape, padded):
    """Shared prompts, batches of a token budget and rows left out as they end change no token and no ending."""
    model, rng = random_model(shape), random.Random(1)
    prompts = random_prompts(padded, rng)
    plain = rollout.generate(model, Ends, prompts, 15, greedy=True)
    for tokens in (120, 65536):
        fast = sampling.generate(model, Ends, prompts, 15, greedy=True, budget=sampling.Budget(tokens))
        assert [c[:2] for c in fast] == [c[:2] for c in plain]
    assert len({len(completion.ids) for completion in plain}) > 3 and not all(c.ended for c in plain)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_log_probs_are_the_same(shape, packed, padded):
    """Log-probs and entropies to 1e-4 in float32, and gradients to 1e-5 of their norm, all turns in one batch."""
    model, rng = random_model(shape), random.Random(2)
    turns = [
        Turn(prompt, [rng.randrange(8, 300) for _ in range(rng.randrange(1, 13) if padded else 12)], True, "")
        for prompt in random_prompts(padded, rng)
    ]
    coefficients = torch.randn(len(turns), 12, generator=torch.Generator().manual_seed(1))
    results = []
    for twin in (grpo.token_logprobs, packing.token_logprobs):
        assert not packed or twin is grpo.token_logprobs or enable_packing(model)
        logprobs, entropy, mask = twin(model, turns, with_entropy=True)
        (coefficients[:, : logprobs.shape[1]] * logprobs).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        results.append((logprobs.detach(), entropy, mask, gradient))
    (plain, plain_entropy, plain_mask, plain_gradient), (fast, entropy, mask, gradient) = results
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy, plain_entropy, atol=1e-4, rtol=0)
    assert torch.equal(mask, plain_mask) and (plain != 0).sum() == mask.sum()
    assert (gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()
