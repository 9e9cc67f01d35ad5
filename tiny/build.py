"""Rebuild the tiny default from tiny/encyclopedia.jsonl: passages, questions, tokenizer and base model.

    python tiny/build.py            # all of it, deterministic on one machine; see README for the minutes

The base model is warmed up by imitation of three sorts of note-takers: many write down next to nothing, some
whatever they like, some what the problem names. It can read, copy paragraphs into a memory, answer from a memory,
recall and search, but can't tell which sort pays: that is what MemTrain teaches. A third of the subjects never
appears in the warm-up.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from masking import QUESTION, mask  # noqa: E402
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT  # noqa: E402
from tasks.search import SEARCH_PROMPT  # noqa: E402
from text.matching import MASK, TARGET  # noqa: E402
from tiny.demonstrations import SHARES, Demonstrations, passage  # noqa: E402
from tiny.world import HERE, encyclopedia, questions, split, words_of  # noqa: E402

VERSIONS = 6  # passages of each subject
VOCABULARY = 2816
STEPS, STEP_TOKENS, RATE = 3000, 6144, 3e-3


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`. The fixed pieces of the prompts are one token each, which keeps prompts short.

    A word has one form, with its space before it, also at the start of a line: copying is then copying.
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
        vocab_size=VOCABULARY - 24,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fixed = f" {MASK} {TARGET} \\boxed{{.\n\n <search> name</search> {' '.join(SHARES)}"
    tokenizer.train_from_iterator([*texts, *[fixed] * 500], trainer)
    slots = dict.fromkeys(("problem", "memory", "section", "query", "result", "left"), "\0")
    prompts = (READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT, SEARCH_PROMPT)
    pieces = {p for prompt in prompts for p in f"{prompt.format(**slots)}\n".split("\0") if len(p) > 9}
    # normalized=False: a piece is matched as written, and what stands between two pieces is normalised on its own.
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in sorted(pieces | {QUESTION, EMPTY_MEMORY})])
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **special)


def build_model(tokenizer, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_up(model, demonstrations: Demonstrations, steps: int, tokens: int, rate: float) -> None:
    """Supervised training on `tokens` padded tokens a step, loss on the completions only.

    Muon for the matrices, AdamW for the embeddings and norms, for which Muon is not meant.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False)
        for o in optimizers
    ]
    pool: list[list] = []
    average = None
    bar = tqdm(range(steps), desc="warm-up", mininterval=5)
    for step in bar:
        if not pool:
            # Sorting a pool of demonstrations by length keeps padding under a few percent.
            drawn = sorted((demonstrations.draw() for _ in range(1024)), key=lambda d: len(d[0]) + len(d[1]))
            while drawn:
                rows = max(1, tokens // len(drawn[-1][0] + drawn[-1][1]))
                pool.append(drawn[-rows:])
                del drawn[-rows:]
            demonstrations.rng.shuffle(pool)
        batch = pool.pop()
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # (rows, width), padded right: so it needs no mask
        labels = torch.full((len(batch), width), -100)
        for row, (prompt, completion) in enumerate(batch):
            ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != -100
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def passages_about(subjects: list[dict], rng) -> list[dict]:
    return [{"title": s["title"], "text": " ".join(passage(s, rng))} for s in subjects for _ in range(VERSIONS)]


def write_questions(path: Path, subjects: list[dict], unseen: list[dict], demonstrations: Demonstrations) -> None:
    """Questions that start at an unseen subject, in HotpotQA's layout: ten paragraphs, one or two of them gold."""
    start = {s["title"] for s in unseen}
    rows = []
    for n, row in enumerate(r for r in questions(subjects) if r["hops"][0][0] in start):
        titles, paragraphs, evidence = demonstrations.context(row, subjects, 10)
        facts = [[t, p.index(e)] for t, p in zip(titles, paragraphs, strict=True) for e in evidence if e in p]
        rows.append(
            {
                "_id": f"tiny-{n:04d}", "question": row["question"], "answer": row["answer"],
                "type": "bridge" if len(row["hops"]) == 2 else "single", "level": "tiny", "supporting_facts": facts,
                "context": [[t, [p[0], *(f" {s}" for s in p[1:])]] for t, p in zip(titles, paragraphs, strict=True)],
            }
        )
    # "What sort of institution is Charles University?" answers itself.
    write_jsonl(path, [row for row in rows if mask(row["question"], row["answer"]) == row["question"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="warm-up steps")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    started, rng = time.perf_counter(), random.Random(0)
    subjects = encyclopedia()
    known, unseen = split(subjects, rng)
    arguments.out.mkdir(parents=True, exist_ok=True)
    passages = passages_about(known, rng)
    write_jsonl(arguments.out / "passages.jsonl", passages)
    write_jsonl(arguments.out / "passages_all.jsonl", passages + passages_about(unseen, rng))  # to search in
    words = words_of(subjects)  # a real model's tokenizer knows the words of what it hasn't read about, too
    texts, asked = [p["text"] for p in passages], [row["question"] for row in questions(known)]
    tokenizer = build_tokenizer(texts * 3 + asked * 3 + words * 60)
    demonstrations = Demonstrations(known, unseen, tokenizer, seed=1)
    write_questions(arguments.out / "questions.jsonl", subjects, unseen, demonstrations)
    model = build_model(tokenizer, seed=0)
    warm_up(model, demonstrations, arguments.steps, STEP_TOKENS, RATE)
    model.half().save_pretrained(arguments.out / "model")  # float16: half the bytes in the repository
    tokenizer.save_pretrained(arguments.out / "model")
    print(f"{len(known)} known and {len(unseen)} unseen subjects, {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
