"""Seven worked changes, to copy from: each shows what a fork would write, runs it, and looks at what it changed."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import patch
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from helpers import command

import grpo
import memtrain
import rollout
from engine.config import Config
from engine.models import load_model
from masking import Corpus, Document
from rewards import answer_reward, boxed
from rollout import EMPTY_MEMORY, Budget, Sampler, Trajectory, Turn, draw_targets, finished_turn, read, until_end
from tasks.evaluate import f1_score
from text.corpus import Passage
from text.thoughts import listener

SMALL = ["--documents", 2, "--g1", 2, "--g2", 2, "--chunks", 2, "--steps", 1, "--eval_documents", 0]


@pytest.fixture(scope="module")
def tiny():
    return load_model(Config().model, "cpu")


def test_another_corpus(tmp_path):
    """A folder of Markdown notes becomes passages: a JSON line with a title and a text for each."""
    for n in range(30):
        (tmp_path / f"note{n}.md").write_text(f"# Lake {n}\nLake {n} lies in Finland. Fishing is what Lake {n} is for.")

    with (tmp_path / "notes.jsonl").open("w") as file:
        for note in sorted(tmp_path.glob("*.md")):
            heading, text = note.read_text().split("\n", 1)
            file.write(json.dumps({"title": heading.removeprefix("# "), "text": text}) + "\n")

    done = command(*SMALL, "--corpus", tmp_path / "notes.jsonl", "--keep_leaky", "True", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert "lies in" in "".join(sample["document"]) and "[MASK]" in "".join(sample["document"])


def test_another_entity_finder(tiny):
    """Anything that sets passage.entities to spans will do: here every number, by a regular expression."""
    texts = [f"Peak {n} is {1000 + 7 * n} m high, first climbed in {1800 + n}." for n in range(40)]
    passages = [Passage(f"Peak {n}", text) for n, text in enumerate(texts)]
    for passage in passages:
        passage.entities = [match.span() for match in re.finditer(r"\b\d{4}\b", passage.text)]

    corpus = Corpus(passages, tiny[1], seed=0, chunk_tokens=64, n_chunks=2)
    documents = [corpus.document(n) for n in range(10)]
    assert all(document.answers[0].isdigit() and len(document.answers[0]) == 4 for document in documents)
    assert all("[MASK]" in "".join(document.chunks) for document in documents)


def test_a_new_proxy_reward(monkeypatch, tmp_path):
    """Recall with partial credit: the F1 of the words instead of an exact match (Eq. 1)."""

    seen = []

    def recall_reward(completion: str, entity: str) -> float:
        seen.append(f1_score(boxed(completion), [entity]))
        return seen[-1]

    monkeypatch.setattr(memtrain, "recall_reward", recall_reward)
    assert recall_reward("\\boxed{Albert Einstein}", "Einstein") == pytest.approx(2 / 3)
    done = command(*SMALL, "--g1", 8, "--g2", 8, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (sample,) = map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
    rewards = [answer["reward"] for asked in sample["trajectories"] for answer in asked["recall"]["answers"]]
    assert rewards == seen[1 : 1 + len(rewards)] and len(seen) == 1 + 2 * 8 * 8


def test_another_advantage(monkeypatch):
    """RLOO (arXiv 2402.14740): a sample against the mean of the others of its group."""

    def group_advantages(rewards: list[float], mode: str) -> list[float]:
        others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
        return [reward - other for reward, other in zip(rewards, others, strict=True)]

    monkeypatch.setattr(grpo, "group_advantages", group_advantages)
    document, rewards = Document(0, "", "", ["y"], [], []), (1.0, 0.0, 0.0, 0.5)
    trajectories = [Trajectory(document, [Turn([5], [6], True, "")], reward=reward) for reward in rewards]
    kept = grpo.assign_advantages(trajectories, Config(g1=4))
    assert kept == [t.turns[0] for t in trajectories]
    assert [turn.advantage for turn in kept] == pytest.approx([1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3])


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server, as vLLM's is with return_token_ids; it completes with the tiny model, greedily."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and asked["temperature"] == 0.0
        made = rollout.generate(*self.server.model, asked["prompt"], asked["max_tokens"], None, True, Budget(10_000))
        choices = [{"index": n, "token_ids": turn.completion_ids} for n, turn in enumerate(made)]
        answer = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(tiny):
    """The address of a Server."""
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        server.model = tiny
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_another_sampler(tiny, url):
    """A server samples, by token ids. To train with it, it needs fresh weights at every step."""

    opener = build_opener(ProxyHandler({}))  # a proxy would look for 127.0.0.1 on its own machine

    def generate(url, tokenizer, prompts, new_tokens, done, greedy, budget):
        how = {"max_tokens": new_tokens, "temperature": 0.0 if greedy else 1.0, "return_token_ids": True}
        body = json.dumps({"model": "policy", "prompt": prompts} | how).encode()
        request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with opener.open(request, timeout=60) as answer:
            choices = sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])
        ends = [tokenizer.eos_token_id]
        hear = listener(tokenizer, ends, opened=False)  # what is said: without special tokens and thoughts
        cut = [until_end(choice["token_ids"], ends, hear, done) for choice in choices]
        return [finished_turn(prompt, *own, hear) for prompt, own in zip(prompts, cut, strict=True)]

    documents = [Document(0, "", "What is Ulm known for?", ["x"], ["Ulm stands in Germany."] * 2, [[], []])]
    remote_sample = Sampler(generate, url, tiny[1], Budget(10_000), greedy=True)
    local_sample = Sampler(rollout.generate, *tiny, Budget(10_000), greedy=True)
    (remote,), (local,) = (read(sample, documents, Config()) for sample in (remote_sample, local_sample))
    assert remote == local and len(remote.turns) == 3


def scripted(*script):
    """A generate whose calls say these texts in turn; for None, and after the last, what the model itself says."""
    texts, sample = iter(script), rollout.generate

    def generate(model, tokenizer, prompts, *how):
        text = next(texts, None)
        if text is None:
            return sample(model, tokenizer, prompts, *how)
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return [Turn(prompt, ids, True, text) for prompt in prompts]

    return generate


def one_step(out, *flags):
    """One step of memtrain.py -> its trajectories, advantages set, and the prompts of each call of its sampler."""
    with (
        patch.object(rollout, "generate", wraps=rollout.generate) as generate,
        patch.object(memtrain, "assign_advantages", wraps=memtrain.assign_advantages) as advantages,
    ):
        done = command(*SMALL, *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return advantages.call_args.args[0], [call.args[2] for call in generate.call_args_list]


def test_an_update_gate(tiny, monkeypatch, tmp_path):
    """A turn of reading may answer UNCHANGED: its memory stays, and this word is trained instead of a copy."""

    class Memories(list):
        def append(self, memory: str) -> None:
            super().append([EMPTY_MEMORY, *self][-1] if memory == "UNCHANGED" else memory)

    gate = " If the section adds nothing that may help, answer UNCHANGED, and the memory stays as it is."
    monkeypatch.setattr(rollout, "READ_PROMPT", rollout.READ_PROMPT + gate)
    monkeypatch.setattr(rollout, "Trajectory", lambda document: Trajectory(document, memories=Memories()))

    first, second = "Ulm stands in Germany. Ulm is known for its church.", "Albert Einstein was born in Ulm."
    said = ["UNCHANGED", first, "UNCHANGED", second]  # the tiny model never says it by itself
    monkeypatch.setattr(rollout, "generate", scripted(None, *said))  # None: the check at a run's start
    trajectories, _ = one_step(tmp_path / "run", "--chunks", 4)
    for t in trajectories:
        assert t.memories == [EMPTY_MEMORY, first, first, second]  # what recall shows, too
        shown = [tiny[1].decode(turn.prompt_ids) for turn in t.turns]
        for text, memory in zip(shown, [EMPTY_MEMORY, *t.memories], strict=True):
            assert f"<memory>\n{memory}\n</memory>" in text and (gate in text) == ("<section>" in text)
        trained = [tiny[1].decode(turn.completion_ids, skip_special_tokens=True) for turn in t.turns[:-1]]
        assert trained == said and len(t.turns[2].completion_ids) < len(t.turns[1].completion_ids)  # that of a copy


def test_screening(monkeypatch, tmp_path):
    """No recall for documents whose answers are all right or all wrong: DAPO's screening (arXiv 2503.14476), no refill.

    Their recall answers could still differ, in groups of their own and through R^E (Eq. 2): that signal is lost.
    """

    def screened(trajectories, config, step):
        draw_targets(trajectories, config, step)
        for start in range(0, len(trajectories), config.g1):
            group = trajectories[start : start + config.g1]
            if len({answer_reward(t.prediction, t.document.answers) for t in group}) == 1:
                for t in group:
                    t.target = None

    monkeypatch.setattr(memtrain, "recall_reward", lambda text, _: len(text) % 2)  # the tiny model's are mostly 0
    full, full_prompts = one_step(tmp_path / "full", "--documents", 8, "--chunks", 3)
    monkeypatch.setattr(memtrain, "draw_targets", screened)
    part, part_prompts = one_step(tmp_path / "part", "--documents", 8, "--chunks", 3)
    agreeing = {a.document.place for a, b in zip(part[::2], part[1::2], strict=True) if a.em == b.em}
    assert 0 < len(agreeing) < 8 and [t.em for t in part] == [t.em for t in full]  # the same reading
    assert all(len(t.recalls) == 2 * (t.document.place not in agreeing) for t in part)
    assert len(full_prompts[-1]) - len(part_prompts[-1]) == 2 * 2 * len(agreeing)  # recall's prompts, sampled last
    kept = [{t.document.place for t in ts for turn in t.turns + t.recalls if turn.advantage} for ts in (full, part)]
    assert kept[1] == set(range(8)) - agreeing and kept[0] > kept[1]  # what is lost
