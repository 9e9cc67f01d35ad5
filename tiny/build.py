"""Rebuild the tiny default from tiny/encyclopedia.jsonl: passages, questions, tokenizer and base model.

    python tiny/build.py            # all of it, deterministic on one machine; see README for the minutes

The base model is warmed up by imitation of a deliberately poor note-taker. It can read, copy sentences
into a memory, answer from a memory and recall, but has no judgement of what is worth keeping: that is
what MemTrain teaches. A third of the subjects never appears in the warm-up.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from masking import MASK, QUESTION, TARGET, mask  # noqa: E402
from rollout import ANSWER_PROMPT, EMPTY_MEMORY, READ_PROMPT, RECALL_PROMPT, encode_prompt  # noqa: E402
from tiny.world import HERE, LINKS, encyclopedia, questions, sentences  # noqa: E402

CHUNK_TOKENS, MEMORY_TOKENS = 64, 48
VERSIONS = 6  # passages of each subject
PASSAGE_SENTENCES = (3, 4)
VOCABULARY = 2048
STEPS, STEP_TOKENS, RATE = 2500, 6144, 3e-3
KEEP_OLD, KEEP_NEW, KEEP_NAMED = 0.75, 0.4, 0.55  # the poor note-taker's chances of copying a sentence


# ---- the split: a third of the subjects stays unseen ------------------------------------------------


def split(subjects: list[dict], rng) -> tuple[list[dict], list[dict]]:
    """(known, unseen): a third of each kind is unseen, those that fewest known facts mention.

    Known subjects lose the facts that name an unseen one, so that no unseen title enters the warm-up.
    """
    mentions = {s["title"]: 0 for s in subjects}
    for s in subjects:
        for value in s["facts"].values():
            if value in mentions:
                mentions[value] += 1
    unseen = set()
    for kind in ("person", "work", "place", "institution"):
        titles = [s["title"] for s in subjects if s["kind"] == kind]
        rng.shuffle(titles)
        titles.sort(key=lambda t: mentions[t])
        unseen.update(titles[: len(titles) // 3 + 1])
    known = [
        {**s, "facts": {a: v for a, v in s["facts"].items() if v not in unseen}}
        for s in subjects
        if s["title"] not in unseen
    ]
    return known, [s for s in subjects if s["title"] in unseen]


# ---- invented worlds ---------------------------------------------------------------------------------

PEOPLE = ("author", "founder", "alumnus", "teacher", "spouse", "sibling", "collaborator")
YEARS = ("born", "died", "year", "founded")


class Inventor:
    """Invents words that look like the known ones: a chain over letter pairs, learned from the known names."""

    def __init__(self, known: list[dict], rng):
        self.rng, self.known = rng, known
        self.after: dict[str, list[str]] = {}
        for s in known:
            for word in re.findall(r"[a-z]+", " ".join([s["title"], *s["facts"].values()]).lower()):
                for i in range(len(word) + 1):
                    self.after.setdefault(f"^^{word}"[i : i + 2], []).append(f"{word}$"[i])
        self.values: dict[tuple[str, str], list[str]] = {}
        for s in known:
            for attribute, value in s["facts"].items():
                self.values.setdefault((s["kind"], attribute), []).append(value)
        self.words = {c: [] for c in (True, False)}

    def word(self) -> str:
        while True:
            letters = "^^"
            while letters[-1] != "$":
                letters += self.rng.choice(self.after[letters[-2:]])
            if 3 <= len(letters) - 3 <= 9:
                return letters[2:-1]

    def name(self, kind: str) -> str:
        words = {"person": 2, "place": 1}.get(kind) or self.rng.choice((1, 2))
        known = [w for s in self.known if s["kind"] == kind for w in s["title"].split()]
        return " ".join(
            self.rng.choice(known) if words > 1 and self.rng.random() < 0.3 else self.word().capitalize()
            for _ in range(words)
        )

    def value(self, kind: str, attribute: str) -> str:
        if attribute == "placed" or (attribute not in YEARS and self.rng.random() < 0.4):
            return self.rng.choice(self.values[kind, attribute])
        if attribute in YEARS:
            return str(self.rng.randint(1300, 1999))
        if attribute in PEOPLE:
            return self.name("person")
        if attribute in ("occupation", "form", "currency"):
            return self.word()
        if attribute == "about":
            return f"{self.rng.choice(('a', 'the'))} {self.word()} {self.word()}"
        return self.word().capitalize()

    def fresh(self, size: int = 10) -> list[dict]:
        """A world of `size` invented subjects; half of the facts that can be links point into the world."""
        kinds = [self.rng.choice(("person", "person", "work", "place", "institution")) for _ in range(size)]
        world = [{"title": t, "kind": k} for t, k in {self.name(kind): kind for kind in kinds}.items()]
        kinds = {s["kind"] for s in world}
        targets = {k: [s["title"] for s in world if s["kind"] == k] for k in kinds}
        for s in world:
            attributes = {a for k, a in self.values if k == s["kind"]}
            s["facts"] = {a: self.value(s["kind"], a) for a in sorted(attributes) if a not in PEOPLE or self.rng.random() < 0.7}
            for link in LINKS.get(s["kind"], {}):
                kind = {"birthplace": "place", "deathplace": "place", "city": "place", "known_for": "work"}.get(link, "person")
                others = [t for t in targets.get(kind, []) if t != s["title"]]
                if others and self.rng.random() < 0.6:
                    s["facts"][link] = self.rng.choice(others)
        return world

    def mixed(self) -> list[dict]:
        """The known titles with every attribute's values dealt out anew."""
        decks = {key: self.rng.sample(values, len(values)) for key, values in self.values.items()}
        return [
            {**s, "facts": {a: decks[s["kind"], a].pop() for a in s["facts"]}} for s in self.known
        ]


# ---- demonstrations ----------------------------------------------------------------------------------


def passage(subject: dict, rng, must: tuple[str, ...] = ()) -> list[str]:
    """Three or four sentences about `subject`, in random order, the attributes in `must` among them."""
    lines = sentences(subject, rng)
    lines.sort(key=lambda line: line[0] not in must)  # stable: the rest stays shuffled
    lines = lines[: rng.choice(PASSAGE_SENTENCES)]
    rng.shuffle(lines)
    return [sentence for _, sentence in lines]


def gather(world: list[dict], centre: dict, rng, size: int) -> list[dict]:
    """`centre` and `size` - 1 others of its world, those that link to it first half of the time."""
    others = [s for s in world if s is not centre]
    rng.shuffle(others)
    if rng.random() < 0.5:
        values = set(centre["facts"].values())
        others.sort(key=lambda s: not (s["title"] in values or centre["title"] in s["facts"].values()))
    chosen = [centre, *others[: size - 1]]
    rng.shuffle(chosen)
    return chosen


class Demonstrations:
    """Draws (prompt, completion) texts for the four things the base model must be able to do."""

    def __init__(self, known: list[dict], tokenizer, seed: int):
        self.rng = random.Random(seed)
        self.known, self.tokenizer = known, tokenizer
        self.inventor = Inventor(known, self.rng)
        self.cost_cache: dict[str, int] = {}

    def cost(self, text: str) -> int:
        if len(self.cost_cache) > 200_000:
            self.cost_cache.clear()
        if text not in self.cost_cache:
            self.cost_cache[text] = len(self.tokenizer(text)["input_ids"])
        return self.cost_cache[text]

    def world(self, fresh: float, mixed: float) -> list[dict]:
        draw = self.rng.random()
        return self.inventor.fresh() if draw < fresh else self.inventor.mixed() if draw < fresh + mixed else self.known

    def masked(self, world: list[dict], size: int) -> tuple[list[list[str]], str]:
        """Passages of a document (lists of sentences) with one entity of a pivot masked, and that entity."""
        pivot = self.rng.choice(world)
        passages = [passage(s, self.rng) for s in gather(world, pivot, self.rng, size)]
        text = " ".join(s for p in passages for s in p if pivot["title"] in s)
        # What NER would find: the title, capitalised values and numbers.
        entities = [v for v in {pivot["title"], *pivot["facts"].values()} if v in text and (v[0].isupper() or v[0].isdigit())]
        if not entities:
            return self.masked(world, size)
        entity = self.rng.choice(sorted(entities))
        return [[mask(s, entity, MASK) for s in p] for p in passages], entity

    def asked(self, world: list[dict], size: int) -> tuple[dict, list[list[str]], list[str]]:
        """A question over `world`, half of the time of two hops, with its passages and evidence."""
        rows = questions(world)
        two_hops = [r for r in rows if len(r["hops"]) == 2]
        row = self.rng.choice(two_hops if two_hops and self.rng.random() < 0.5 else rows)
        _, passages, evidence = self.context(row, world, size)
        return row, passages, evidence

    def context(self, row: dict, world: list[dict], size: int) -> tuple[list[str], list[list[str]], list[str]]:
        """Titles and sentences of `size` passages that hold the evidence of question `row`, and the evidence sentences."""
        by_title = {s["title"]: s for s in world}
        needed = {title: attribute for title, attribute in row["hops"]}
        subjects = [by_title[t] for t in needed]
        centre = subjects[0]
        rest = [s for s in gather(world, centre, self.rng, size) if s not in subjects]
        chosen = subjects + rest[: size - len(subjects)]
        self.rng.shuffle(chosen)
        passages, evidence = [], []
        for s in chosen:
            must = (needed[s["title"]],) if s["title"] in needed else ()
            lines = passage(s, self.rng, must)
            passages.append(lines)
            if must:
                value = s["facts"][must[0]]
                evidence.append(next(line for line in lines if value in line))
        return [s["title"] for s in chosen], passages, evidence

    def sections(self, passages: list[list[str]]) -> list[list[str]]:
        """Sentences in chunks of at most CHUNK_TOKENS; a passage's first sentence keeps its paragraph break."""
        chunks: list[list[str]] = [[]]
        used = 0
        for lines in passages:
            for position, line in enumerate(lines):
                price = self.cost(line) + (position == 0)
                if used + price > CHUNK_TOKENS:
                    chunks.append([])
                    used = 0
                chunks[-1].append(("\n\n" if position == 0 and used else " " if used else "") + line)
                used += price
        return chunks

    def notes(self, memory: list[str], section: list[str], named: list[str]) -> list[str]:
        """One step of the poor note-taker: copy by chance, and when over the limit drop by chance."""
        kept = [s for s in memory if self.rng.random() < KEEP_OLD]
        for sentence in (s.strip() for s in section):
            chance = KEEP_NAMED if any(n in sentence for n in named) else KEEP_NEW
            if self.rng.random() < chance and sentence not in kept:
                kept.append(sentence)
        while sum(map(self.cost, kept)) > MEMORY_TOKENS - 2:
            kept.pop(self.rng.randrange(len(kept)))
        return kept

    def some_notes(self, passages: list[list[str]], evidence: list[str]) -> str:
        """A memory that holds `evidence` among sentences drawn from `passages`, within the limit, in random order."""
        others = [s for p in passages for s in p if s not in evidence]
        self.rng.shuffle(others)
        memory, limit = list(evidence), self.rng.choice((16, 32, MEMORY_TOKENS - 2))
        while others and sum(map(self.cost, memory)) + self.cost(others[-1]) < limit:
            memory.append(others.pop())
        self.rng.shuffle(memory)
        return " ".join(memory)

    def reading(self) -> tuple[str, str]:
        if self.rng.random() < 0.6:
            passages, _ = self.masked(self.world(0.4, 0.2), 8)
            problem, named = QUESTION, [MASK]
        else:
            row, passages, _ = self.asked(self.world(0.7, 0.3), 8)
            problem, named = row["question"], [title for title, _ in row["hops"]]
        chunks = self.sections(passages)
        memory: list[str] = []
        step = self.rng.randrange(len(chunks))
        for section in chunks[:step]:
            memory = self.notes(memory, section, named)
        section = chunks[step]
        after = self.notes(memory, section, named)
        prompt = READ_PROMPT.format(problem=problem, memory=" ".join(memory) or EMPTY_MEMORY, section="".join(section))
        return prompt, " ".join(after) or EMPTY_MEMORY

    def masked_answer(self) -> tuple[str, str]:
        passages, entity = self.masked(self.known, 5)
        clues = [s for p in passages for s in p if MASK in s]
        self.rng.shuffle(clues)
        memory = self.some_notes(passages, clues[: self.rng.choice((1, 1, 2, 3))])
        return ANSWER_PROMPT.format(problem=QUESTION, memory=memory), entity

    def asked_answer(self) -> tuple[str, str]:
        row, passages, evidence = self.asked(self.world(0.7, 0.3), 5)
        return ANSWER_PROMPT.format(problem=row["question"], memory=self.some_notes(passages, evidence)), row["answer"]

    def recalling(self) -> tuple[str, str]:
        passages, _ = self.masked(world := self.world(0.6, 0.4), 6)
        section = self.rng.choice(self.sections(passages))
        text = "".join(section)
        found = {v for s in world for v in (s["title"], *s["facts"].values()) if v in text and (v[0].isupper() or v[0].isdigit())}
        if not found:
            return self.recalling()
        entity = self.rng.choice(sorted(found))
        evidence = [s.strip() for s in section if mask(s, entity, TARGET) != s]
        self.rng.shuffle(evidence)
        memory = self.some_notes(passages, evidence[: self.rng.choice((1, 1, 2))])
        return RECALL_PROMPT.format(memory=memory, section=mask(text, entity, TARGET)), entity

    def draw(self) -> tuple[list[int], list[int]]:
        """Token ids of one demonstration: (prompt, completion with EOS)."""
        kind = self.rng.random()
        if kind < 0.35:
            prompt, completion = self.reading()
        else:
            make = self.masked_answer if kind < 0.6 else self.recalling if kind < 0.78 else self.asked_answer
            prompt, answer = make()
            completion = f"\\boxed{{ {answer}}}"
        ids = self.tokenizer(completion)["input_ids"]
        return encode_prompt(self.tokenizer, prompt), [*ids, self.tokenizer.eos_token_id]


# ---- tokenizer, model, training ------------------------------------------------------------------------


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`. The fixed pieces of the prompts are one token each, which keeps prompts short.

    A word has one form, with its space before it, also at the start of a line: copying is then copying.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")])
    words = Regex(r" ?\[(?:MASK|TARGET)\]| ?\\boxed\{| ?\p{L}+| ?\d{1,2}| ?[^\s\p{L}\d]|\s")
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
    tokenizer.train_from_iterator([*texts, *[f" {MASK} {TARGET} \\boxed{{"] * 500], trainer)
    slots = {"problem": "\0", "memory": "\0", "section": "\0"}
    pieces = {p for prompt in (READ_PROMPT, ANSWER_PROMPT, RECALL_PROMPT) for p in f"{prompt.format(**slots)}\n".split("\0")}
    # normalized=False: a piece is matched as written, and what stands between two pieces is normalised on its own.
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in sorted(pieces | {QUESTION, EMPTY_MEMORY})])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=2048)


def build_model(tokenizer, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
    )


def warm_up(model, demonstrations: Demonstrations, steps: int, tokens: int, rate: float, probe=None) -> None:
    """Supervised training on `tokens` padded tokens a step, loss on the completions only.

    Muon for the matrices and AdamW for the rest learns in about half the steps of AdamW alone.
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
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # (rows, width), right-padded: causal attention needs no mask
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
        if probe and (step + 1) % probe[0] == 0:
            probe[1](step + 1)


# ---- all of it -----------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_passages(path: Path, subjects: list[dict], rng) -> list[str]:
    rows = [{"title": s["title"], "text": " ".join(passage(s, rng))} for s in subjects for _ in range(VERSIONS)]
    write_jsonl(path, rows)
    return [row["text"] for row in rows]


def write_questions(path: Path, subjects: list[dict], unseen: list[dict], demonstrations: Demonstrations) -> None:
    """Questions that start at an unseen subject, in HotpotQA's layout: ten paragraphs, one or two of them gold."""
    start = {s["title"] for s in unseen}
    rows = []
    for n, row in enumerate(r for r in questions(subjects) if r["hops"][0][0] in start):
        titles, paragraphs, evidence = demonstrations.context(row, subjects, 10)
        facts = [[t, p.index(e)] for t, p in zip(titles, paragraphs, strict=True) for e in evidence if e in p]
        rows.append(
            {"_id": f"tiny-{n:04d}", "question": row["question"], "answer": row["answer"],
             "type": "bridge" if len(row["hops"]) == 2 else "single", "level": "tiny", "supporting_facts": facts,
             "context": [[t, [p[0], *(f" {s}" for s in p[1:])]] for t, p in zip(titles, paragraphs, strict=True)]}
        )  # fmt: skip
    write_jsonl(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="warm-up steps")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    started, rng = time.perf_counter(), random.Random(0)
    subjects = encyclopedia()
    known, unseen = split(subjects, rng)
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = write_passages(arguments.out / "passages.jsonl", known, rng)
    write_passages(arguments.out / "passages_unseen.jsonl", unseen, rng)
    tokenizer = build_tokenizer(texts * 3 + [row["question"] for row in questions(known)] * 3)
    demonstrations = Demonstrations(known, tokenizer, seed=1)
    write_questions(arguments.out / "questions.jsonl", subjects, unseen, demonstrations)
    model = build_model(tokenizer, seed=0)
    warm_up(model, demonstrations, arguments.steps, STEP_TOKENS, RATE)
    model.half().save_pretrained(arguments.out / "model")  # float16: half the bytes in the repository
    tokenizer.save_pretrained(arguments.out / "model")
    print(f"{len(known)} known and {len(unseen)} unseen subjects, {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
