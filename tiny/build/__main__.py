"""Rebuild the tiny default from tiny/encyclopedia.jsonl: passages, questions, tokenizer and base model.

    torchrun --nproc_per_node 2 -m tiny.build   # all of it; see docs/tiny.md for the minutes. Rerun it to resume

The base model is taught by imitation, in two phases. Skills first: problems say how to read, so that each token of the
notes is certain. Then the policy, for a short time: most problems say nothing, and note-takers differ in what they
keep. So the base can copy, keep, answer, recall and search, but can't tell which notes pay: that is what MemTrain
teaches. A third of the subjects never appears in a demonstration.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from engine import parallel
from engine.errors import UserError, run_script
from fast.sampling import generate
from grpo import micro_batches, token_logprobs
from masking import QUESTION
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, Budget, Sampler, Turn
from tasks.search import SEARCH_PROMPT
from text.matching import MASK, TARGET, occurrences
from tiny.build.demonstrations import EVERYTHING, FOCUS, UNKNOWN, Demonstrations
from tiny.build.measure import Skills
from tiny.build.world import TINY, encyclopedia, questions, split, untested, versions, words_of

VERSIONS = 6  # most passages of a subject
VOCABULARY = 3712
POOL, STEP_TOKENS, RATE = 2048, 6144, 2e-3  # demonstrations drawn at a time, tokens a step, peak learning rate
POOLS, FREE = [140, 45], 0.6  # of each phase; of the readings in the second phase, those that are told nothing
EVERY = 10  # pools of the second phase between two measurements of the skills


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`. The fixed pieces of the prompts are one token each, which keeps prompts short.

    A word has one form, with its space before it, also at the start of a line: so a copied word has the same
    tokens wherever it stands.
    """
    tokenizer = Tokenizer(models.BPE())
    spaces = [normalizers.Replace(Regex(r"\n(?!\n)"), "\n "), normalizers.Prepend(" ")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    words = Regex(r" ?\[(?:MASK|TARGET)\]| ?\\boxed\{| ?</?search>| ?\p{L}+| ?\d{1,2}| ?[^\s\p{L}\d]|\n+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 24,  # room for the pieces of the prompts, below
        special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    fixed = f" {MASK} {TARGET} \\boxed{{.\n\n <search> name</search> {UNKNOWN}"
    tokenizer.train_from_iterator([*texts, *[fixed] * 500], trainer)
    slots = dict.fromkeys(("problem", "memory", "section", "query", "result", "left"), "\0")
    prompts = (READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT, SEARCH_PROMPT)
    pieces = {p for prompt in prompts for p in f"{prompt.format(**slots)}\n".split("\0") if len(p) > 9}
    pieces |= {QUESTION, EMPTY_MEMORY, f" {FOCUS}", f" {EVERYTHING}"}
    # normalized=False: a piece is matched as written, and the text between two pieces is normalised on its own.
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in sorted(pieces)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=2048, eos_token="<eos>", pad_token="<pad>"
    )


def build_model(tokenizer) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


# ---- imitation -------------------------------------------------------------------------------------------


def optimizers_of(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embeddings and norms, for which Muon is not meant."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def imitate(model, optimizers: list[torch.optim.Optimizer], batch: list[Turn], done: float) -> float:
    """One step on each process's batch, when this share of the training is done -> the own loss, nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _, mask = token_logprobs(model, batch)  # (turns, longest)
    loss = -logprobs.sum() / mask.sum()
    (loss / parallel.count()).backward()
    gradients = [p.grad for p in model.parameters()]
    together = parameters_to_vector(gradients)  # one message, not sixty: several times as fast
    parallel.sum_gradients([together])
    vector_to_parameters(together, gradients)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # a linear warm-up over 2 %, constant to the middle, then linear to 0
            group["lr"] = RATE * min(1.0, done / 0.02, 2 * (1 - done))
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.item()


def score(skills: Skills) -> tuple[float, str]:
    """(mean share of its bar that each skill reaches, all skills as text), over what all processes asked."""
    asked = parallel.gather(skills.measure())
    measured = {}
    for name, (least, _) in asked[0].items():
        hits = [hit for own in asked for hit in own[name][1]]
        measured[name] = least, sum(hits) / max(1, len(hits))
    reached = sum(min(1.0, value / least) for least, value in measured.values()) / len(measured)
    return reached, ", ".join(f"{name} {value:.2f}" for name, (_, value) in measured.items())


def train(model, demonstrations: Demonstrations, skills: Skills, folder: Path, pools: list[int]) -> None:
    """Both phases, of so many pools. `folder` keeps the state after each pool, and the best model by skills."""
    optimizers, total, first, best = optimizers_of(model), sum(pools), 0, -1.0
    processes, leads = parallel.count(), parallel.rank() == 0
    parts = [model, *optimizers]
    path = folder / f"state-{pools[0]}-{pools[1]}-{processes}.pt"
    if path.exists():
        first, best, states = torch.load(path, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    bar = tqdm(range(first, total), desc="pools", initial=first, total=total, disable=not leads)
    for number in bar:
        demonstrations.rng.seed(f"pool {number} of process {parallel.rank()}")  # so a resumed build draws the same
        demonstrations.free = 0.0 if number < pools[0] else FREE
        batches = micro_batches([demonstrations.draw() for _ in range(POOL // processes)], STEP_TOKENS // processes)
        batches = batches[: min(parallel.gather(len(batches)))]  # one each a step: a process may have more
        random.Random(number).shuffle(batches)  # they come longest first; alike for all, so that steps take as long
        shares = [(number + n / len(batches)) / total for n in range(1, len(batches) + 1)]  # of the training
        model.set_attn_implementation("eager")  # on a CPU, and at these lengths, the fastest to train
        losses = [imitate(model, optimizers, batch, done) for batch, done in zip(batches, shares, strict=True)]
        model.set_attn_implementation("sdpa")
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
        done = number + 1
        if done > pools[0] and ((done - pools[0]) % EVERY == 0 or done == total):
            reached, text = score(skills)
            if leads:
                bar.write(f"after {done} pools {reached:.3f}: {text}")
            if leads and reached >= best:
                model.save_pretrained(folder / "best")
            best = max(best, reached)
        if leads:
            fresh = path.with_suffix(".new")  # a kill can't spoil what has been saved before
            torch.save((done, best, [part.state_dict() for part in parts]), fresh)
            fresh.rename(path)


# ---- texts -----------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def passages_about(subjects: list[dict], rng) -> list[dict]:
    return [{"title": s["title"], "text": " ".join(lines)} for s in subjects for lines in versions(s, rng, VERSIONS)]


def write_questions(path: Path, subjects: list[dict], unseen: list[dict], demonstrations: Demonstrations) -> None:
    """Questions that start at an unseen subject, in HotpotQA's layout: ten paragraphs, one or two of them gold."""
    start = {s["title"] for s in unseen}
    rows = []
    for n, row in enumerate(row for row in questions(subjects) if row["hops"][0][0] in start):
        titles, passages, evidence = demonstrations.context(row, subjects, 10)
        paragraphs = list(zip(titles, passages, strict=True))
        rows.append({
            "_id": f"tiny-{n:04d}", "question": row["question"], "answer": row["answer"],
            "type": "bridge" if len(row["hops"]) == 2 else "single", "level": "tiny",
            "supporting_facts": [[t, lines.index(e)] for t, lines in paragraphs for e in evidence if e in lines],
            "context": [[title, [lines[0], *(f" {line}" for line in lines[1:])]] for title, lines in paragraphs],
        })
    # "What sort of institution is Charles University?" answers itself.
    write_jsonl(path, [row for row in rows if not occurrences(row["question"], row["answer"])])


def main() -> None:
    parser = argparse.ArgumentParser("python -m tiny.build", description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=int, nargs=2, default=POOLS, help="of the two phases, each at least 1")
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write to")
    arguments = parser.parse_args()
    if min(arguments.pools) < 1:
        raise UserError(f"--pools {arguments.pools}: each phase needs at least one")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all is done on CPUs
    parallel.start()
    leads = parallel.rank() == 0  # the one that writes
    started, rng = time.perf_counter(), random.Random(0)
    subjects = encyclopedia()
    known, unseen = split(subjects, rng)
    folder = arguments.out / ".build"  # all is made in here, and moved when it is whole
    (folder / "made").mkdir(parents=True, exist_ok=True)
    texts = passages_about(known, rng)
    words = words_of(subjects)  # a real model's tokenizer knows the words of what it hasn't read about, too
    told, asked = [p["text"] for p in texts], [row["question"] for row in questions(known)]
    tokenizer = build_tokenizer(told * 3 + asked * 3 + words * 60)
    demonstrations = Demonstrations(known, unseen, tokenizer, seed="questions")
    if leads:
        write_jsonl(folder / "made/passages.jsonl", texts)
        write_jsonl(folder / "made/passages_all.jsonl", texts + passages_about(unseen, rng))  # to search in
        write_questions(folder / "made/questions.jsonl", subjects, unseen, demonstrations)
    model = build_model(tokenizer)
    sample = Sampler(generate, model, tokenizer, Budget(24576), greedy=True)
    asked, seed = 100 // parallel.count(), f"to choose by {parallel.rank()}"
    train(model, demonstrations, Skills(sample, known, untested(unseen), asked, seed), folder, arguments.pools)
    parallel.stop()
    if not leads:
        return
    best = Qwen3ForCausalLM.from_pretrained(folder / "best")
    best.half().save_pretrained(folder / "made/model")  # float16: half the bytes in the repository
    tokenizer.save_pretrained(folder / "made/model")
    shutil.copytree(folder / "made", arguments.out, dirs_exist_ok=True)
    shutil.rmtree(folder)
    print(f"{len(known)} known and {len(unseen)} unseen subjects, {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    run_script(main)
