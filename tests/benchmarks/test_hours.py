"""benchmarks/hours.py: what it counts of models, and a line for every combination of recipes."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_peft
from transformers import AutoModelForCausalLM

from benchmarks import hours
from benchmarks.step import model_config
from engine.config import Config

ROOT = Path(__file__).parents[2]
PUBLISHED = {"qwen2.5-0.5b": 0.494e9, "qwen2.5-1.5b": 1.544e9, "qwen2.5-7b": 7.616e9, "qwen3-4b": 4.022e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counted_parameters_are_the_models(name):
    """Within 0.2 % of what is published; adapters as peft makes them."""
    assert abs(hours.parameters(name) / PUBLISHED[name] - 1) < 2e-3
    peft = needs_peft()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    model.add_adapter(peft.LoraConfig(r=8, target_modules="all-linear"))
    assert sum(p.numel() for name, p in model.named_parameters() if "lora" in name) == hours.parameters(name, rank=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b"])
def test_the_counted_activations_are_what_autograd_keeps(name, dtype):
    """Of one layer more, a token: all that backward needs and no weight, within 20 %."""
    settings = model_config(name)
    settings.vocab_size = 9
    kept = {}
    for layers in (1, 2):
        settings.num_hidden_layers, settings.layer_types = layers, ["full_attention"] * layers
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive, sizes = [], {}

        def keep(tensor, alive=alive, sizes=sizes):
            alive.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
        kept[layers] = sum(size for pointer, size in sizes.items() if pointer not in weights) / 64
    counted = hours.layer_bytes(Config(dtype=dtype), settings)
    assert abs(counted / (kept[2] - kept[1]) - 1) < 0.2


def test_the_hours_of_every_recipe_are_estimated(capsys, monkeypatch):
    """A line per combination, each file in some; an adapter fits 24 GB, and the 7B on eight GPUs fits 80 GiB."""
    monkeypatch.setattr(sys, "argv", ["hours.py"])
    hours.main()
    lines = {row.split("|")[1].strip(): row.split("|") for row in capsys.readouterr().out.splitlines()[2:]}
    assert len(lines) == 3 * len(hours.MODELS)
    assert {word for name in lines for word in name.split() if word.endswith(".args")} == {
        file.name for file in (ROOT / "recipes").glob("*.args")
    }
    assert float(lines["wiki-80gb.args qwen2.5-7b-8gpus.args"][-2]) < 80 * 2**30 / 1e9
    for name, gigabytes in (
        ("wiki-24gb.args", 24), ("wiki-24gb.args qwen3-4b-lora.args", 24), ("searchqa-24gb.args t4-16gb.args", 15),
        ("wiki-80gb.args", 80),
    ):
        assert float(lines[name][-2]) < gigabytes
    assert " T4 " in lines["wiki-24gb.args t4-16gb.args"][2] and "RTX" in lines["wiki-24gb.args"][2]
    monkeypatch.setattr(sys, "argv", ["hours.py", "--steps", "1234"])
    hours.main()
    assert capsys.readouterr().out.count("| 1234 |") == len(lines)
