"""text/thoughts.py: what follows a thought, in the forms that models write."""

import pytest
from helpers import small_bpe
from tokenizers import decoders

from text.thoughts import decode_with_marks, listener, opens_thought, said

# (text, what was said, whether there is a thought)
CASES = [
    ("Ada was born in Ulm.", "Ada was born in Ulm.", False),
    ("<think>\n\n</think>\n\nUlm", "\n\nUlm", True),
    ("<think>Is it \\boxed{Rome}? No</think> \\boxed{Ulm}", " \\boxed{Ulm}", True),
    ("<think>Is it \\boxed{Rome}", "", True),
    ("Rome? No</think>Ulm", "Ulm", True),
    ("<think>a</think>b<think>c</think>d", "d", True),
    ("<think>a</think>b<think>c", "", True),
    ("Ulm <think> or not", "", True),
    ("<thinking>a</thinking>b", "b", True),
    ("<thought>a</thought>\nb", "\nb", True), ("\n<reflection>a</reflection>b", "b", True),
    ("<analysis>Rome", "", True),
    ("<longcat_think>a</longcat_think>b", "b", True), ("<chain_of_thought>a</chain_of_thought>b", "b", True),
    ("<reasoning_content>a</reasoning_content>b", "b", True), ("<unused94>thought\na<unused95>b", "b", True),
    ("[REASONING]a[/REASONING]b", "b", True), ("<inner_monologue>a</inner_monologue>b", "b", True),
    ("<think>a</think><answer>\nUlm</answer>\n", "\nUlm", True), ("<think>a</think>\n<response>Ulm", "Ulm", True),
    ("<think>a</think><think>b</think><output>Ulm</output> c", "<output>Ulm</output> c", True),
    ("<Reasoning> a </Reasoning> b", " b", True),
    ("<seed:think>a</seed:think>b", "b", True),
    ("< think >a</ think >b", "b", True),
    ("[THINK]a[/THINK]b", "b", True),
    ("◁think▷a◁/think▷b", "b", True),
    ("<|START_THINKING|>a<|END_THINKING|>b", "b", True),
    ("<|begin_of_thought|>a<|end_of_thought|>b", "b", True),
    ("<|inner_prefix|>a<|inner_suffix|>b", "b", True),
    ("<|channel>thought\na<channel|>b", "b", True),
    ("<|channel|>analysis<|message|>We need Rome<|end|><|start|>assistant<|channel|>final<|message|>Ulm", "Ulm", True),
    ("<|channel|>analysis<|message|>We need \\boxed{Rome}", "", True),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}", True),
    ("<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", "a", True),
    ("<|channel|>commentary<|message|>final answer: Rome<|end|>", "", True),
    # Not thoughts: other tags, words, and tags that only look alike.
    ("<b>think</b> Ulm", "<b>think</b> Ulm", False),
    ("I think </b> that <i>Ulm", "I think </b> that <i>Ulm", False),
    ("[think] it over: Ulm", "[think] it over: Ulm", False),
    ("<thinker>Rodin</thinker>", "<thinker>Rodin</thinker>", False),
    ("a < think and b > think", "a < think and b > think", False),
    ("<search>who can think?</search>", "<search>who can think?</search>", False),
    ("She wrote <reflection> in Ulm.", "She wrote <reflection> in Ulm.", False),
    ("<answer>Ulm</answer>", "<answer>Ulm</answer>", False),
    ("In <scratchpad> and <analysis>", "In <scratchpad> and <analysis>", False),
    ("analysis: the final channel is Ulm", "analysis: the final channel is Ulm", False),
    ("", "", False),
]


@pytest.mark.parametrize("text, spoken, thought", CASES)
def test_what_is_said_follows_the_last_thought(text, spoken, thought):
    assert said(text) == (spoken, thought)


@pytest.mark.parametrize("text, spoken", [
    ("Rome? No</think> Ulm", " Ulm"), ("Rome? \\boxed{Rome}", ""), ("", ""), ("a</think>b</think>c", "c"),
    ("a<think>b</think>c", "c"), ("a</think>b<think>c", ""), ("[/THINK]b", "b"), ("a</b>c", ""),
])
def test_a_template_that_opens_the_thought(text, spoken):
    """The completion begins inside it: nothing is said until it is closed."""
    assert said(text, opened=True) == (spoken, True)


@pytest.mark.parametrize("template, opened", [
    ("<|im_end|>\n<|im_start|>assistant\n", False), ("<|Assistant|><think>\n", True),
    ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False), ("[/INST][THINK]", True), ("", False),
    ("<|assistant|>\n<think></think>", False), ("<|Assistant|></think>", False),
    ("<|channel>thought\n<channel|>", False),
    ("<|START_THINKING|><|END_THINKING|>", False), ("[THINK][/THINK]", False),
    ("Begin with <think>. ASSISTANT:", False),
    ("<|im_start|>assistant\n<|channel>thought\n", True), ("<|START_THINKING|>", True), ("a</think>\n<think>\n", True),
    ("<|start|>assistant<|channel|>analysis<|message|>", True), ("<|start|>assistant", False),
    ("<|start|>assistant<|channel|>final<|message|>", False), (" Think: ", False),
])
def test_whether_a_template_opens_a_thought(template, opened):
    assert opens_thought(template) == opened


def with_marks(special: list[str], plain: list[str]):
    tokenizer = small_bpe()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(plain)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text, spoken", [
    ("<think>Rome? No</think>Ulm", "Ulm"), ("[THINK]Rome[/THINK]Ulm", "Ulm"), ("<think>Rome", ""),
    ("<|channel|>analysis<|message|>Rome<|end|><|start|>assistant<|channel|>final<|message|>Ulm", "Ulm"),
    ("Ulm<|tool|>", "Ulm"),
])
def test_marks_are_found_whether_or_not_they_are_special_tokens(special, text, spoken):
    """Decoding drops special tokens, but a thought's marks count first; other special tokens go."""
    marks = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|end|>"]
    tokenizer = with_marks(["<|tool|>", *marks], []) if special else with_marks(["<|tool|>"], marks)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    hear = listener(tokenizer, [tokenizer.eos_token_id], opened=False)
    assert hear(ids)[0] == hear([*ids, tokenizer.eos_token_id])[0] == spoken
    assert decode_with_marks(tokenizer, ids) == text.replace("<|tool|>", "")


def test_an_end_that_is_no_special_token_is_not_said():
    """As fine-tunes have it: <|im_end|> was added as a plain token, and is the turn's end all the same."""
    tokenizer = with_marks([], ["<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer("Ulm", add_special_tokens=False)["input_ids"]
    assert listener(tokenizer, [end], opened=False)([*ids, end]) == ("Ulm", False)
    assert listener(tokenizer, [], opened=False)([*ids, end]) == ("Ulm<|im_end|>", False)
