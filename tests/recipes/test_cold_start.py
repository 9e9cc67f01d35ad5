"""recipes/cold_start.py and single_hop.py."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import models
from engine.config import Config, parse
from engine.errors import UserError
from engine.optimizer import AdamW
from fast import packing
from masking import MASK, QUESTION, load_corpus
from recipes import cold_start, single_hop
from rewards import boxed
from rollout import EMPTY_MEMORY, READ_PROMPT, encode_prompt, fill
from text.matching import occurrences

ROOT = Path(__file__).parents[2]
SMALL = Config(chunk_tokens=48, memory_tokens=32, chunks=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer, corpus) of the tiny default."""
    model, tokenizer = models.load_model(SMALL.model, "cpu")
    config = replace(SMALL, out=str(tmp_path_factory.mktemp("runs") / "cold"))
    return model, tokenizer, load_corpus(config, tokenizer)


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_demonstrations_hold_what_the_text_holds(tiny):
    """Of 40 documents: each sentence of a memory stands in the section or the old memory, in their order, each once;
    a memory fits with its EOS; y and the recall target are boxed, and the memory of a recall turn holds its target."""
    _, tokenizer, corpus = tiny
    kinds, masked, plain = dict.fromkeys(("memory", "answer", "recall"), 0), [], []
    for i in range(40):
        document = corpus.document(i)
        shown = cold_start.demonstrate(document, tokenizer, SMALL.memory_tokens, np.random.default_rng(i))
        old = ""
        for turn, section in zip(shown["memory"], document.chunks, strict=True):
            assert len(turn.completion_ids) <= SMALL.memory_tokens and turn.completion_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(turn.completion_ids[:-1]).strip() == turn.text
            prompt = tokenizer.decode(turn.prompt_ids)
            assert f"<memory>\n{old or EMPTY_MEMORY}\n</memory>" in prompt and QUESTION in prompt
            source, last = [*cold_start.sentences(old), *cold_start.sentences(section)], -1
            kept = [] if turn.text == EMPTY_MEMORY else cold_start.sentences(turn.text)
            for sentence in kept:
                assert sentence in squeeze(f"{old} {section}") and source.index(sentence) > last
                last = source.index(sentence)
            for sentence in source:
                (masked if MASK in sentence else plain).append(sentence in kept)
            old = turn.text if kept else ""
        assert boxed(shown["answer"][0].text) == document.answers[0]
        assert f"<memory>\n{old or EMPTY_MEMORY}\n</memory>" in tokenizer.decode(shown["answer"][0].prompt_ids)
        for turn in shown["recall"]:
            memory, _, section = tokenizer.decode(turn.prompt_ids).partition("</memory>")
            assert occurrences(memory, boxed(turn.text)) and "[TARGET]" in section
        kinds = {kind: count + len(shown[kind]) for kind, count in kinds.items()}
    assert kinds["memory"] == 120 and kinds["answer"] == 40 and kinds["recall"] > 15
    assert np.mean(masked) > np.mean(plain) + 0.1  # those with [MASK] are kept more often


@pytest.mark.parametrize("fast", [False, True])
def test_learning_is_the_gradient_of_the_likelihood(tiny, fast):
    """The loss, and the first step of AdamW, are those of a float64 sum by hand: the mean over documents of the mean
    over turns of the mean over tokens of -log p. By the lesson's own functions, and by their fast twins."""
    _, tokenizer, corpus = tiny
    model, _ = models.load_model(SMALL.model, "cpu")
    turns = []
    for place in (0, 1):
        document = corpus.document(place)
        document.place = place
        shown = cold_start.demonstrate(document, tokenizer, SMALL.memory_tokens, np.random.default_rng(place))
        turns += [turn for own in shown.values() for turn in own]
    twin = AutoModelForCausalLM.from_pretrained(SMALL.model, dtype=torch.float64)
    loss = 0.0
    for place in (0, 1):
        own = [turn for turn in turns if turn.place == place]
        for turn in own:
            logits = twin(torch.tensor([turn.prompt_ids + turn.completion_ids])).logits[0].log_softmax(-1)
            places = range(len(turn.prompt_ids) - 1, len(turn.prompt_ids) + len(turn.completion_ids) - 1)
            total = sum(logits[n, t] for n, t in zip(places, turn.completion_ids, strict=True))
            loss = loss - total / len(turn.completion_ids) / len(own) / 2
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in twin.parameters()])
    gradients = []
    optimizer = AdamW(model, 1e-3)
    optimizer.adamw.register_step_pre_hook(lambda *_: gradients.extend(p.grad.flatten() for p in model.parameters()))
    twins = (packing.enable(model), packing.token_logprobs) if fast else ()
    found = cold_start.learn(model, optimizer, turns, 1e-3, Config(grad_clip=0.0, train_tokens=300), *twins)
    assert abs(found - loss.item()) < 1e-4
    torch.testing.assert_close(torch.cat(gradients).double(), wanted, atol=1e-5, rtol=1e-3)
    assert cold_start.learn(model, optimizer, turns, 1e-3, Config(train_tokens=300), *twins) < found


def test_a_cold_start_from_end_to_end(tmp_path, capsys, monkeypatch):
    """It leaves a model, what was shown and what was sampled before and after; and doesn't write over it."""
    out = tmp_path / "cold"
    flags = "--steps 2 --documents 2 --eval-documents 4 --chunks 2 --lr 1e-3 --out".split()
    monkeypatch.setattr(sys, "argv", ["cold_start.py", *flags, str(out)])
    cold_start.main(parse(cold_start.ColdStart))
    result = json.loads((out / "cold_start.json").read_text())
    assert result["demonstrations"]["memory"] == 8 and result["demonstrations"]["answer"] == 4
    rows = {(row["when"], row["task"]): row["n"] for row in result["rows"]}
    assert len(rows) == 8 and rows["after", "memory ends"] == 8 and rows["before", "end_to_end"] == 4
    heads, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert heads.split()[-4:] == ["before", "|", "after", "|"] and any(line.startswith("| recall ") for line in lines)
    model, _ = models.load_model(str(out), "cpu")
    base, _ = models.load_model(Config().model, "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    with pytest.raises(UserError, match="cold: already exists; delete it"):
        cold_start.main(parse(cold_start.ColdStart))


def test_prompts_of_demonstrations_are_those_of_rollouts(tiny):
    """The first turn's prompt is READ_PROMPT, filled with an empty memory and encoded as in a rollout."""
    _, tokenizer, corpus = tiny
    document = corpus.document(3)
    shown = cold_start.demonstrate(document, tokenizer, SMALL.memory_tokens, np.random.default_rng(0))
    prompt = fill(READ_PROMPT, problem=document.question, memory=EMPTY_MEMORY, section=document.chunks[0])
    assert shown["memory"][0].prompt_ids == encode_prompt(tokenizer, prompt)


def test_hops_become_questions(tmp_path):
    """References are replaced, relations asked in words, and a hop whose paragraph lacks its answer is left out."""
    texts = ["Hank sang Hello.", "Hank lived in Ulm.", "Ulm lies on the river."]
    hops = [("Hello >> performer", "Hank", 0), ("Where did #1 live?", "Ulm", 1), ("river at #2", "Danube", 2)]
    record = {
        "id": "q", "question": "?", "answer": "Danube",
        "paragraphs": [{"title": "T", "paragraph_text": text, "is_supporting": True} for text in texts],
        "question_decomposition": [dict(question=q, answer=a, paragraph_support_idx=n) for q, a, n in hops],
    }
    found = single_hop.single_hops(record)
    assert [row["question"] for row in found] == ["What is the performer of Hello?", "Where did Hank live?"]
    assert [[p["is_supporting"] for p in row["paragraphs"]] for row in found] == [
        [True, False, False], [False, True, False],
    ]
    file = tmp_path / "musique.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps({"question": "no hops"}) + "\n")
    command = [sys.executable, "-m", "recipes.single_hop", str(file), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "line 2: is not a MuSiQue question" in done.stderr
