"""engine/lora.py: an adapter against the full weights that it stands for, its reference, and its checkpoints."""

import copy
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import command, needs_peft, update
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine import lora, models
from engine.config import Config, check
from engine.errors import UserError
from engine.optimizer import AdamW
from grpo import token_logprobs
from recipes import merge
from rollout import ANSWER_PROMPT, Budget, Turn, encode_prompt, fill, generate

peft = needs_peft()
RANK = 4
SMALL = "--chunks 2 --documents 2 --g1 2 --g2 2 --memory_tokens 16 --eval_documents 0 --save_every 1 --keep 9".split()


@cache
def written() -> list[tuple[list[int], list[int]]]:
    """Eight prompts, four of them one, and what the base model writes to them."""
    model, tokenizer = models.load_model(Config().model, "cpu")
    torch.manual_seed(0)
    text = encode_prompt(tokenizer, fill(ANSWER_PROMPT, problem="Where is Ada?", memory="Ada is in Ulm."))
    prompts = [text[: len(text) - max(0, n - 3)] for n in range(8)]
    found = generate(model, tokenizer, prompts, 8, None, False, Budget(10_000))
    return [(turn.prompt_ids, turn.completion_ids) for turn in found]


def turns() -> list[Turn]:
    pairs = enumerate(written())
    return [Turn(prompt, ids, True, "", place=0, advantage=(-1.0) ** n) for n, (prompt, ids) in pairs]


def logprobs(model, some: list[Turn]) -> torch.Tensor:
    with torch.no_grad():
        return token_logprobs(model, some)[0]


def exact_logprobs(model) -> torch.Tensor:
    """In float64, so that what differs is the weights."""
    return logprobs(copy.deepcopy(model).double(), turns())


def trained(config: Config, steps: int = 3):
    """A policy after some updates, its tokenizer, and what the updates counted."""
    policy, tokenizer = models.load_policy(config, "cpu")
    reference = models.load_reference(config, policy, "cpu")
    optimizer, some = AdamW(policy, 1e-3), turns()
    for _ in range(steps):
        stats = update(policy, optimizer, some, 1e-3, config, reference)
    return policy, tokenizer, stats


def config(**more) -> Config:
    return Config(lora=RANK, documents=1, dtype=more.pop("dtype", "float32"), **more)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(folder of a trained adapter, its policy)."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    policy, tokenizer, _ = trained(config())
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, policy


def test_the_adapter_is_the_full_weights_that_it_stands_for(adapter):
    """W + 32 / rank * B A, added by hand from the file, gives the adapter's log-probs to 1e-5; so do merge.merged,
    load_model and plain transformers. An adapter that did nothing would be told from it."""
    folder, policy = adapter
    wanted, tensors = exact_logprobs(policy), load_file(folder / lora.WEIGHTS)
    full = AutoModelForCausalLM.from_pretrained(Config().model, dtype=torch.float32)
    base = exact_logprobs(full)
    with torch.no_grad():
        for name, b in tensors.items():
            if "lora_B" in name:
                path = name.removeprefix("base_model.model.").replace("lora_B.", "")
                full.get_parameter(path).add_(32 / RANK * b @ tensors[name.replace("lora_B", "lora_A")])
    loaded, _ = models.load_model(str(folder), "cpu")
    merged = merge.merged(models.load_model(str(folder), "cpu")[0])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for model in (full, loaded, merged, plain):
        torch.testing.assert_close(exact_logprobs(model), wanted, atol=1e-5, rtol=0)
    assert (base - wanted).abs().max() > 0.01
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 4.5 * sum(
        tensor.numel() for tensor in tensors.values()
    )


@pytest.mark.parametrize("kl, fast", [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_moves_the_adapter_alone(kl, fast, dtype):
    """Every weight of the base is as it was, and the reference, with the adapter off, gives the base's log-probs."""
    settings = config(kl=kl, dtype=dtype, fast=fast)
    policy, _, stats = trained(settings)
    base, _ = models.load_model(settings.model, "cpu", dtype)
    own = {name.replace(".base_layer", ""): p for name, p in policy.state_dict().items() if "lora" not in name}
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())
    assert {p.requires_grad for name, p in policy.named_parameters() if "lora" in name} == {True}
    assert stats["grad_norm"] > 0 and (stats["kl"] > 1e-6) == bool(kl)
    now = logprobs(policy, turns())
    with models.as_reference(policy, settings, "cpu"):
        assert torch.equal(logprobs(policy, turns()), logprobs(base, turns()))
    assert torch.equal(logprobs(policy, turns()), now) and not torch.equal(now, logprobs(base, turns()))


def test_a_later_run_goes_on_with_the_adapter(adapter):
    """--model FOLDER --lora RANK trains on from it; its reference is where it began, not the base without adapter."""
    folder, first = adapter
    settings = config(model=str(folder), kl=0.1)
    policy, _ = models.load_policy(settings, "cpu")
    began = logprobs(first, turns())
    assert torch.equal(logprobs(policy, turns()), began)
    update(policy, AdamW(policy, 1e-3), turns(), 1e-3, settings)
    with models.as_reference(policy, settings, "cpu"):
        assert torch.equal(logprobs(policy, turns()), began)
    assert not torch.equal(logprobs(policy, turns()), began)


def test_bfloat16_keeps_small_changes(tmp_path):
    """What a small rate has learned is still there after loading: the loaded model is the live policy to the bit."""
    policy, tokenizer = models.load_policy(config(dtype="bfloat16"), "cpu")
    update(policy, AdamW(policy, 1e-5), turns(), 1e-5, config())
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = models.load_model(str(tmp_path), "cpu", "bfloat16")
    base, _ = models.load_model(Config().model, "cpu", "bfloat16")
    assert torch.equal(logprobs(loaded, turns()), logprobs(policy, turns()))
    assert not torch.equal(logprobs(base, turns()), logprobs(policy, turns()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_every_process_begins_with_the_same_adapter():
    """Whatever it has drawn; and the draw of the adapter takes no number from those of the sampler."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        policy, _ = models.load_policy(config(), "cpu")
        assert torch.equal(torch.get_rng_state(), before)
        states.append({name: p for name, p in policy.named_parameters() if "lora" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(p.any() for name, p in states[0].items() if "lora_A" in name)


def test_gradient_checkpointing_changes_no_gradient():
    """With activations computed anew in the backward pass the gradient has the same norm."""
    first, second = (trained(config(gradient_checkpointing=on), steps=1)[2]["grad_norm"] for on in (False, True))
    assert first > 0 and abs(first - second) < 1e-5 * first


ADAPTED = [  # a family, layers that must have an adapter, and layers that can't
    ("llama", {}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, {"lm_head"}),
    ("gpt2", {}, {"c_attn", "c_proj", "c_fc"}, {"lm_head"}),
    ("falcon", {"alibi": False}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, {"lm_head"}),
    ("mamba", {}, {"in_proj", "x_proj"}, {"out_proj", "dt_proj", "conv1d", "lm_head"}),
    ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}, {"in_proj"}, {"out_proj", "conv1d", "lm_head"}),
    ("falcon_mamba", {}, {"in_proj", "x_proj"}, {"out_proj", "dt_proj", "lm_head"}),
    (
        "falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        {"in_proj", "q_proj", "o_proj", "down_proj"}, {"out_proj", "conv1d", "lm_head"},
    ),
    ("phimoe", {}, {"q_proj", "o_proj"}, {"router", "gate", "lm_head"}),
    ("opt", {}, {"q_proj", "out_proj", "fc1", "fc2"}, {"lm_head"}),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, {"in_proj", "out_proj", "q_proj", "w1"}, {"lm_head"}),
]


@pytest.mark.parametrize("kind, more, adapted, left_out", ADAPTED, ids=[kind for kind, *_ in ADAPTED])
def test_every_linear_layer_that_can_has_an_adapter(kind, more, adapted, left_out):
    """Not those whose weights a kernel takes by itself, nor a router that returns a tuple; and every adapter learns."""
    plain = AutoConfig.for_model(kind)
    shape = {
        "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32,
        "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 4,
        "head_dim": 8, "state_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    }
    shape = {name: value for name, value in shape.items() if hasattr(plain, name) and name in vars(plain)}
    model = AutoModelForCausalLM.from_config(type(plain)(**shape | more | {"vocab_size": 99}), dtype=torch.float32)
    lora.begin(model, config())
    names = {name.split(".lora_B")[0] for name, _ in model.named_parameters() if ".lora_B" in name}
    found = {name.rpartition(".")[2] for name in names}
    assert adapted <= found and not left_out & found
    token_logprobs(model, [Turn([5, 6, 7], [8, 9, 10], True, "")])[0].sum().backward()
    assert all(model.get_submodule(name).lora_B["default"].weight.grad.any() for name in names)


@pytest.mark.slow
def test_a_run_that_was_stopped_equals_one_never_stopped(tmp_path):
    """Its checkpoints hold the adapter; eval.py reads them, and a task's run goes on from them."""
    arguments = [*SMALL, "--fast", "True", "--lora", RANK, "--kl", "1e-3", "--steps", 3]
    done = command(*arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run/checkpoint"
    wanted = load_file(checkpoint / lora.WEIGHTS)
    assert not (checkpoint / "model.safetensors").exists()
    (tmp_path / "run/finished").unlink()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    done = command(*arguments, "--out", tmp_path / "run")
    assert done.returncode == 0 and "resuming after step 1" in done.stdout, done.stderr
    found = load_file(checkpoint / lora.WEIGHTS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    done = command("--model", checkpoint, "--eval_documents", 2, "--lengths", 2, script="eval")
    assert done.returncode == 0 and "end_to_end" in done.stdout, done.stderr
    task = ["--task", "longqa", "--memory_tokens", 40, "--steps", 1, "--out", tmp_path / "task", "--model", checkpoint]
    done = command(*SMALL[:-4], *task, "--lora", RANK)
    assert done.returncode == 0, done.stderr
    base = json.loads((tmp_path / "task/checkpoint" / lora.CONFIG).read_text())["base_model_name_or_path"]
    assert Path(base) == Path(Config().model)  # and not the folder of the first run


def test_the_merged_model_on_request(adapter, tmp_path, monkeypatch):
    """`python -m recipes.merge ADAPTER OUT` writes all weights; it refuses a folder that is there, and no adapter."""
    folder, policy = adapter
    monkeypatch.setattr(sys, "argv", ["merge", str(folder), str(tmp_path / "merged")])
    merge.main()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(exact_logprobs(merged), exact_logprobs(policy), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="merged: already exists"):
        merge.main()
    monkeypatch.setattr(sys, "argv", ["merge", Config().model, str(tmp_path / "other")])
    with pytest.raises(UserError, match="has no adapter_config.json, so it is not an adapter"):
        merge.main()


def test_mistakes_are_one_line(adapter, tmp_path, monkeypatch):
    """A wrong rank or flag, a lost base or file, weights that don't fit and a missing peft are one line each."""
    folder, _ = adapter
    with pytest.raises(UserError, match=f"--lora 9: the adapter in .* has rank {RANK}; give --lora {RANK}"):
        models.load_policy(Config(model=str(folder), lora=9), "cpu")
    with pytest.raises(UserError, match="is an adapter; train it further with --lora RANK, or merge it with"):
        models.load_policy(Config(model=str(folder)), "cpu")
    with pytest.raises(UserError, match="--offload-reference: with --lora the reference is the policy"):
        models.load_policy(config(offload_reference=True), "cpu")
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    settings = json.loads((lost / lora.CONFIG).read_text())
    (lost / lora.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(UserError, match="is an adapter of /no/such/model, which doesn't exist"):
        models.load_model(str(lost), "cpu")
    (lost / lora.CONFIG).write_text(json.dumps(settings))
    (lost / lora.WEIGHTS).rename(tmp_path / "weights")
    with pytest.raises(UserError, match="adapter_model.safetensors: can't be loaded"):
        models.load_model(str(lost), "cpu")
    tensors = load_file(tmp_path / "weights")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.0." not in name}, lost / lora.WEIGHTS)
    with pytest.raises(UserError, match="does not fit the model; .*layers.0.* differs"):
        models.load_model(str(lost), "cpu")
    (lost / lora.CONFIG).write_text(json.dumps(settings | {"lora_dropout": 0.5}))
    (lost / lora.WEIGHTS).unlink()
    (tmp_path / "weights").rename(lost / lora.WEIGHTS)
    model, _ = models.load_model(str(lost), "cpu")
    assert torch.equal(logprobs(model.train(), turns()), logprobs(model.eval(), turns()))  # dropout stays off
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=f"--lora {RANK}: needs peft; run `pip install peft`"):
        check(config())
    with pytest.raises(UserError, match="is an adapter, which needs peft; run `pip install peft`"):
        models.load_model(str(folder), "cpu")


def test_an_older_peft_than_transformers_takes_is_one_line(adapter, monkeypatch):
    """As with transformers 5.24, which came out before the peft that it asks for."""
    monkeypatch.setattr(lora, "MIN_PEFT_VERSION", "99.1")
    with pytest.raises(UserError, match=f"--lora {RANK}: needs peft 99.1 or newer with transformers .*; run `pip"):
        check(config())
    with pytest.raises(UserError, match="is an adapter, which needs peft 99.1 or newer"):
        models.load_model(str(adapter[0]), "cpu")
