"""fast/sampling.py: batched sampling, where a completion ends, and what happens when memory runs out."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.errors import UserError
from fast import sampling
from fast.attention import PromptLayer, SharedPrompts, can_share_prompts, packs
from fast.sampling import Draw, Stop, closing_tokens, exponential_race
from rollout import Budget, answered
from text.thoughts import listener

ROOT = Path(__file__).parents[2]
SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def random_model(kind: str):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    whole = {"sliding_window": None} if kind == "mistral" else {}
    ends = {"eos_token_id": 7, "pad_token_id": 7}
    model = model(config(**SIZE, **whole, **ends, num_key_value_heads=2, initializer_range=0.5)).eval()
    model.generation_config = GenerationConfig(**ends)
    return model


@torch.no_grad()
def argmax_loop(model, prompt: list[int], new_tokens: int) -> list[int]:
    """The greedy completion, a plain unpadded pass for each token."""
    completion: list[int] = []
    while len(completion) < new_tokens and 7 not in completion:
        completion.append(int(model(torch.tensor([prompt + completion])).logits[0, -1].argmax()))
    return completion


def generate(model, tokenizer, prompts, new_tokens, done=None, greedy=False, budget=None):
    """That of fast/sampling.py, by default with the budget of a run."""
    return sampling.generate(model, tokenizer, prompts, new_tokens, done, greedy, budget or Budget(24576))


class Plain:
    """The little of a tokenizer that `generate` looks at."""

    pad_token_id = eos_token_id = 7
    chat_template, added_tokens_decoder = None, {}

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_batches_equal_one_unpadded_argmax_loop_a_prompt(kind):
    """Left padding, sorting and cutting into batches change no token, and a completion ends at its first EOS."""
    model, rng = random_model(kind), random.Random(0)
    prompts = [[rng.randrange(8, 300) for _ in range(rng.randrange(1, 20))] for _ in range(13)]
    expected = [argmax_loop(model, prompt, 12) for prompt in prompts]
    ended = 0
    for budget in (40, 10_000):
        found = generate(model, Plain, prompts, 12, greedy=True, budget=Budget(budget))
        assert [turn.completion_ids for turn in found] == expected
        assert [turn.ended for turn in found] == [ids[-1] == 7 for ids in expected]
        ended += sum(turn.ended for turn in found)
    assert ended < 26  # some were cut at the limit, so both cases were seen


def test_sampling_ignores_the_models_generation_config():
    """What the model folder says of penalties, cuts and forbidden tokens must not bend what is sampled."""
    model = random_model("qwen3")
    prompt, n = [9, 20, 33], 4000
    wanted = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    model.generation_config = GenerationConfig(
        eos_token_id=7, pad_token_id=7, do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.1,
        repetition_penalty=5.0, suppress_tokens=wanted.topk(2).indices.tolist(), min_new_tokens=1, top_h=0.1,
        num_return_sequences=2,
    )
    own = model.generation_config
    torch.manual_seed(0)
    first = [turn.completion_ids[0] for turn in generate(model, Plain, [prompt] * n, 1, budget=Budget(10**9))]
    seen = torch.bincount(torch.tensor(first), minlength=300) / n
    assert ((seen - wanted).abs() < 5 * (wanted / n).sqrt() + 5 / n).all()  # five standard errors, or a few draws
    assert (seen > 0).sum() > 20 and model.generation_config is own


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_shared_prompts_give_the_same_tokens(kind, monkeypatch):
    """Greedy decoding behind shared prompts equals one row a prompt, padded or not, and prefills each once."""
    model, rng = random_model(kind), random.Random(1)
    short = [rng.randrange(8, 300) for _ in range(4)]
    others = [[rng.randrange(8, 300) for _ in range(n)] for n in (9, 9, 12, 1)]
    distinct = [short, [7, 7, *short], *others]  # 7 also pads
    attend, calls, widths = SharedPrompts.__call__, [], []

    def counted(self, *given, **named):
        calls.append(1)
        return attend(self, *given, **named)

    monkeypatch.setattr(SharedPrompts, "__call__", counted)
    # The fourth has groups of too different sizes: their prompts are copied instead.
    uneven = [distinct[2]] * 9 + [distinct[3], distinct[3][::-1]]
    for prompts in (distinct * 4, [distinct[2]] * 8, [distinct[5]] * 3, uneven):
        prompts, calls[:], widths[:] = rng.sample(prompts, len(prompts)), [], []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        shared = generate(model, Plain, prompts, 12, greedy=True)
        hook.remove()
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "can_share_prompts", lambda model: False)
            apart = generate(model, Plain, prompts, 12, greedy=True)
            assert shared == apart
        if len(prompts[0]) > 1 and len(set(map(tuple, prompts))) == 1:
            assert widths[0] == (1, len(prompts[0]) - 1)
        assert bool(calls) == (max(map(len, prompts)) > 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", ["different", "groups", "uneven", "copies", "double"])
def test_rows_that_go_on_without_the_others_write_the_same(kind, rows, monkeypatch):
    """Completions of all lengths: generate is called anew as rows end, and each is that of an unpadded argmax loop."""
    model, rng = random_model(kind), random.Random(2)
    with torch.no_grad():  # ends often: all logits but this one are 0 in the mean
        model.lm_head.weight[7] *= 4
    distinct = [[rng.randrange(8, 300) for _ in range(rng.choice((1, 5, 6, 20)))] for _ in range(24)]
    kinds = {"groups": distinct[:8] * 3, "uneven": distinct + distinct[:1] * 9, "copies": distinct[:8] * 3}
    prompts = kinds.get(rows, distinct)
    if rows == "double":  # not float32, as bfloat16: torch's attention and a mask
        model.double()
    if rows == "copies":
        monkeypatch.setattr(sampling, "takes_shared_prompts", lambda model: False)
    calls, own = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(given["input_ids"].shape) or own(**given))
    found = generate(model, Plain, prompts, 30, greedy=True)
    assert len(calls) > 1 and [n for n, _ in calls] == sorted((n for n, _ in calls), reverse=True)
    assert all(few <= many // 2 for (many, _), (few, _) in zip(calls, calls[1:], strict=False))
    expected = {tuple(prompt): argmax_loop(model, prompt, 30) for prompt in distinct}
    for prompt, turn in zip(prompts, found, strict=True):
        assert turn.prompt_ids == prompt and turn.completion_ids == expected[tuple(prompt)]
        assert turn.ended == (turn.completion_ids[-1] == 7)
    assert len({len(turn.completion_ids) for turn in found}) > 2


def test_prompts_are_computed_with_others_of_their_length():
    """At most an eighth of the computed prompt tokens is padding; a batch has at most an eighth of the budget."""
    model, rng = random_model("qwen3"), random.Random(3)
    prompts = [[rng.randrange(8, 300) for _ in range(rng.choice((2, 9, 10, 90)))] for _ in range(60)]
    computed = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(model, Plain, prompts, 1, greedy=True, budget=Budget(8 * 300))
    hook.remove()
    computed = [(rows, width) for rows, width in computed if width > 1]
    tokens = sum(len(prompt) - 1 for prompt in prompts) - sum(len(prompt) == 2 for prompt in prompts)
    padded = sum(rows * width for rows, width in computed)
    assert 0 < padded - tokens <= padded / 8
    assert all(rows * width <= 300 for rows, width in computed)


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("draw", [Draw(greedy=False), exponential_race], ids=["running sum", "race"])
def test_draws_follow_the_probabilities_to_the_end_of_a_large_vocabulary(draw):
    """Half of the mass on one word, a little on each of many, none on the last: as often as a binomial lets them."""
    torch.manual_seed(0)
    words, rows, calls = 20_001, 400, 10
    scores = torch.full((rows, words), -float(np.log(19_999)))
    scores[:, 7] = 0.0
    scores[:, -1] = -torch.inf
    more = (None,) if isinstance(draw, Draw) else ()
    drawn = torch.cat([draw(*more, scores.clone()).argmax(1) for _ in range(calls)])
    n = len(drawn)
    assert abs((drawn == 7).float().mean() - 0.5) < 5 * (0.25 / n) ** 0.5
    rest = drawn[drawn != 7].double() / 20_000  # even over 0 to 1
    assert rest.max() < 1 and abs(rest.mean() - 0.5) < 5 * (1 / 12 / len(rest)) ** 0.5
    tenths = torch.tensor([0.1, 0.9]).double()
    assert torch.allclose(torch.quantile(rest, tenths), tenths, atol=0.03)
    assert len(drawn.unique()) > 0.4 * n  # rows are drawn apart


def test_the_race_gives_each_word_its_probability():
    """Ten words from 0.3 to 1e-4, 200,000 draws: each as often as a binomial lets it."""
    torch.manual_seed(0)
    wanted = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.03, 0.0149, 0.004, 0.001, 0.0001])
    n = 200_000
    seen = exponential_race(wanted.log().expand(n, -1)).argmax(1).bincount(minlength=10) / n
    assert ((seen - wanted).abs() < 4 * (wanted * (1 - wanted) / n).sqrt()).all()


def test_a_running_sum_is_for_a_cpu_and_the_race_for_a_gpu(monkeypatch):
    """Each where it is the cheaper one; a greedy draw is neither."""
    raced, scores = [], torch.randn(3, 50)
    monkeypatch.setattr(sampling, "exponential_race", lambda given: raced.append(given.shape) or given)
    left = Draw(greedy=False)(None, scores.clone())
    assert (left.isfinite().sum(1) == 1).all() and not raced
    on_gpu = scores.clone().as_subclass(OnGpu)
    assert Draw(greedy=True)(None, on_gpu).equal(scores) and not raced
    assert Draw(greedy=False)(None, on_gpu).equal(scores) and raced == [(3, 50)]


def test_a_greedy_draw_takes_forbidden_words():
    """Scores of -inf change no choice, even where a row has no others."""
    scores = torch.full((2, 5), -torch.inf)
    scores[1, 3] = -7.0
    assert Draw(greedy=True)(None, scores.clone()).equal(scores)


def test_models_that_cannot_share_fall_back():
    """A sliding window can't be copied or packed: the rows are computed one by one, with the same result as ever."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZE, num_key_value_heads=2, eos_token_id=7, pad_token_id=7, use_sliding_window=True,
        sliding_window=4, max_window_layers=1, layer_types=["full_attention", "sliding_attention"],
    )
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=7)
    assert not can_share_prompts(model) and can_share_prompts(random_model("qwen2"))
    prompt = [9, 10, 11, 12, 13, 14]
    found = generate(model, Plain, [prompt] * 3, 5, greedy=True)
    assert [turn.completion_ids for turn in found] == [argmax_loop(model, prompt, 5)] * 3


def test_shared_samples_are_independent():
    """Two neighbours of one prompt have a pair of words as often as their probabilities' product says."""
    model = random_model("qwen3")
    wanted = torch.softmax(model(torch.tensor([[9, 20, 33]])).logits[0, -1], -1)
    torch.manual_seed(0)
    n = 2000
    found = generate(model, Plain, [[9, 20, 33]] * 2 * n, 1, budget=Budget(10**9))
    first = torch.tensor([turn.completion_ids[0] for turn in found]).view(n, 2)
    seen = torch.bincount(first[:, 0] * 300 + first[:, 1], minlength=300**2).view(300, 300) / n
    product = wanted[:, None] * wanted  # (300, 300)
    assert ((seen - product).abs() < 5 * (product / n).sqrt() + 5 / n).all()  # five standard errors, or a few draws


def test_an_answer_ends_where_its_box_closes():
    """Each completion is the shortest prefix of the unstopped one in which a box is closed, whatever the others do."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    torch.manual_seed(0)
    size = SIZE | {"vocab_size": len(tokenizer)}
    config = Qwen3Config(**size, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, initializer_range=0.5)
    model = Qwen3ForCausalLM(config).eval()
    brace, rng = tokenizer.convert_tokens_to_ids("}"), random.Random(0)
    with torch.no_grad():  # braces often: the head's bias towards them is a large common direction
        model.lm_head.weight[brace] *= 6
    prompts = [[rng.randrange(8, 300) for _ in range(rng.randrange(2, 9))] for _ in range(40)]
    box = tokenizer(r"\boxed{")["input_ids"]

    def brace_on_third_token(text):
        return "}" in text and len(text.split()) > 2

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    wanted = [bool(set("}>") & set(decode([i]))) for i in range(len(tokenizer))]
    for words in (len(tokenizer), len(tokenizer) + 5, brace + 1):  # a model may know more words, or fewer
        assert closing_tokens(tokenizer, words).tolist() == (wanted + [False] * 5)[:words]
    for done in (answered, brace_on_third_token):
        free = generate(model, tokenizer, prompts, 20, greedy=True)
        held = generate(model, tokenizer, prompts, 20, greedy=True, done=done)
        stopped = 0
        for turn, unstopped in zip(held, free, strict=True):
            whole = unstopped.completion_ids
            ends = [n for n, token in enumerate(whole, 1) if set("}>") & set(decode([token]))]
            closing = [n for n in ends if done(decode(whole[:n]))]
            assert turn.completion_ids == whole[: closing[0] if closing else len(whole)]
            assert turn.ended == (bool(closing) or unstopped.ended)
            text = decode(turn.completion_ids)
            assert turn.text == (text if turn.ended else text.rstrip("\ufffd"))
            stopped += bool(closing) and closing[0] < len(whole)
    assert stopped > 10
    # The random model hardly ever writes a box, so one is scripted: the criterion alone, on rows that do.
    rows = [box + [20, brace, 21], [20, brace, 20, 20, 20][: len(box) + 3], box + [20, 21, brace]]
    width = max(map(len, rows))
    hear, ended = listener(tokenizer, [7], opened=False), []
    criterion = Stop(answered, hear, closing_tokens(tokenizer, len(tokenizer)), [7], len(rows), 2, 0, "cpu")
    grid = torch.tensor([[5, 6, *row, *[0] * (width - len(row))] for row in rows])
    for n in range(3, grid.shape[1] + 1):
        ended.append(criterion(grid[:, :n], None).tolist())
    assert criterion.lengths.tolist() == [len(box) + 2, 0, len(box) + 3]
    assert ended[-1] == [True, False, True] and ended[len(box) + 1] == [True, False, False]
    assert not any(ended[len(box)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_budget_is_never_exceeded(attention, monkeypatch):
    """Random groups, most of them uneven: the tokens that the cache really has room for, new ones included."""
    model, rng, held, real = random_model("qwen3"), random.Random(4), [], sampling.prefill
    model.set_attn_implementation(attention)

    def measured(model, prompts, *tokens):
        cache, shared = real(model, prompts, *tokens)
        layer = cache.layers[0]
        keys = layer.keys if shared is None else layer.prompt_keys  # (prompts or rows, heads, tokens, size)
        held.append((len(prompts), keys.shape[0] * (keys.shape[2] + 1) + len(prompts) * 6))
        return cache, shared

    monkeypatch.setattr(sampling, "prefill", measured)
    for _ in range(12):
        prompts = [[rng.randrange(8, 300) for _ in range(rng.choice((3, 20, 60)))] for _ in range(rng.randrange(1, 9))]
        rows = [prompt for prompt in prompts for _ in range(rng.choice((1, 1, 2, 9, 30)))]
        budget, held[:] = rng.choice((150, 400, 1000)), []
        found = generate(model, Plain, rows, 6, greedy=True, budget=Budget(budget))
        assert sum(n for n, _ in held) == len(rows) == len(found)
        assert all(tokens <= budget or n == 1 for n, tokens in held), (budget, held)


def test_the_cache_is_allocated_once_for_what_will_be_written(monkeypatch):
    """The number of new tokens is known, so nothing is copied while rows write."""
    model, buffers, real = random_model("qwen3"), set(), PromptLayer.update

    def seen(self, *given, **named):
        states = real(self, *given, **named)
        buffers.update((id(self), state.data_ptr()) for state in states)
        return states

    monkeypatch.setattr(PromptLayer, "update", seen)
    model.generation_config.eos_token_id = None
    generate(model, Endless, [[9, 20, 30, 40]] * 4, 200, greedy=True)
    assert len(buffers) == 2 * len(model.model.layers)  # keys and values of each


class Endless(Plain):
    """A tokenizer whose end the model never writes."""

    eos_token_id = 299_999


@pytest.mark.parametrize("attention, rows", [("sdpa", [32]), ("eager", [8, 8, 8, 8])])
def test_a_shared_prompt_counts_once_against_the_budget(attention, rows, monkeypatch):
    """4 prompts of 30 tokens for 8 rows each: 4 x 30 + 32 x 4 tokens where each is held once, 32 x 34 in copies."""
    model, sizes, real = random_model("qwen3"), [], sampling.generate_batch
    model.set_attn_implementation(attention)

    def counted(model, tokenizer, prompts, *more):
        sizes.append(len(prompts))
        return real(model, tokenizer, prompts, *more)

    monkeypatch.setattr(sampling, "generate_batch", counted)
    prompts = [[9 + n] * 30 for n in range(4) for _ in range(8)]
    generate(model, Plain, prompts, 4, greedy=True, budget=Budget(8 * 34))
    assert sizes == rows


def test_values_narrower_than_keys():
    """Latent attention (DeepSeek) has heads of two widths: the same tokens as one plain pass after another."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZE | {"num_attention_heads": 2}, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1, eos_token_id=7, pad_token_id=7, initializer_range=0.5,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=7)
    prompts = [[9, 10, 11, 12], [9, 10, 11, 12], [13, 14], [15]]
    found = generate(model, Plain, prompts, 6, greedy=True)
    assert [turn.completion_ids for turn in found] == [argmax_loop(model, prompt, 6) for prompt in prompts]


def test_out_of_memory_halves_the_batch(monkeypatch, capsys):
    """The same completions, in smaller batches, and a line that says so; one prompt that doesn't fit is an error. Each
    batch is tried twice."""
    model, sizes, room = random_model("qwen3"), [], 4
    real = model.generate

    def full(input_ids, **more):
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **more)

    prompts = [[12 + n, 13, 14] for n in range(16)]
    expected = generate(model, Plain, prompts, 5, greedy=True)
    monkeypatch.setattr(model, "generate", full)
    budget = Budget(1000)
    assert generate(model, Plain, prompts, 5, greedy=True, budget=budget) == expected
    assert sizes == [16, 16, 8, 8, 4, 4, 4, 4]
    assert budget.tokens == 32  # half of the batch that met the end, not of the budget
    told = [line for line in capsys.readouterr().out.splitlines() if "out of memory in rollout" in line]
    assert [line.split()[-1] for line in told] == ["64", "32"] and "--rollout-tokens" in told[0]
    room = 0
    with pytest.raises(UserError, match="out of memory for a single prompt of 3 tokens"):
        generate(model, Plain, prompts, 5, greedy=True)


@pytest.mark.parametrize(
    "failing, sizes",
    [
        ([1], [6, 6, 6]), ([2], [6, 6, 6]), ([1, 3], [6, 6, 6, 6]), ([], [6, 6]),  # never twice in a row
        ([1, 2], [6, 6, 3, 3, 3, 3]), ([2, 3], [6, 6, 6, 3, 3]), ([1, 3, 4], [6, 6, 6, 6, 3, 3]),
        ([1, 2, 3], [6, 6, 3, 3, 3, 3, 3]), ([1, 2, 3, 4], [6, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_batch_that_ran_out_of_memory_is_tried_once_more(failing, sizes, monkeypatch):
    """Memory in pieces comes together when it is given back: only a second failure of one batch halves the budget."""
    model, calls, emptied, real = random_model("qwen3"), [], [], sampling.generate_batch

    def sometimes(model, tokenizer, prompts, *more):
        calls.append(len(prompts))
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, prompts, *more)

    prompts = [[12 + n, 13, 14] for n in range(12)]
    expected, budget = generate(model, Plain, prompts, 5, greedy=True), Budget(6 * 8)
    monkeypatch.setattr(sampling, "generate_batch", sometimes)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(calls)))
    assert generate(model, Plain, prompts, 5, greedy=True, budget=budget) == expected
    assert calls == sizes and emptied == failing
    assert budget.tokens == 8 * {6: 6, 3: 3, 1: 1.5}[sizes[-1]]


def test_prompts_are_computed_by_the_attention_for_every_card():
    """Also where nobody has switched the model over for training, as in an evaluation."""
    model = random_model("qwen2")
    generate(model, Plain, [[9, 20, 33]], 2, greedy=True)
    assert packs(model)
    other = random_model("qwen2")
    other.set_attn_implementation("eager")
    generate(other, Plain, [[9, 20, 33]], 2, greedy=True)
    assert other.config._attn_implementation == "eager"
