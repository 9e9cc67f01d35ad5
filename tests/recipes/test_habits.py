"""recipes/habits.py: with a reader that keeps nothing but what it read last, and one that is told everything."""

from types import SimpleNamespace

import pytest

from engine.errors import UserError
from masking import Document, mask
from recipes.habits import Habits, habits_of, main
from rollout import Limits, Turn
from text.matching import TARGET

TOLD = {
    "Ulm": "Ulm lies on the Danube.", "Bern": "Bern lies on the Aare.", "Oslo": "Oslo lies on a fjord.",
    "Basel": "Basel lies on the Rhine.",
}


@pytest.fixture
def documents():
    return [Document(n, "A", "Who?", ["B"], list(TOLD.values()), [[name] for name in TOLD]) for n in range(3)]


def reader(prompts, new_tokens, done=None):
    """Writes the section down; names [TARGET] only where the memory holds the sentence."""
    turns = []
    for prompt in prompts:
        memory = prompt.split("<memory>\n")[1].split("\n</memory>")[0]
        text = prompt.split("<section>\n")[1].split("\n</section>")[0] if "<section>" in prompt else "\\boxed{B}"
        if TARGET in text:
            (name,) = [name for name, sentence in TOLD.items() if mask(sentence, name, TARGET) == text]
            text = f"\\boxed{{{name if name in memory else 'no'}}}"
        turns.append(Turn([1], [1], True, text))
    return turns


def test_habits_of_a_reader_that_forgets_at_once(documents):
    """Its memory changes with each section, and nothing is recalled at any distance; one that keeps all recalls all."""
    limits, config = Limits(64, 16, 0, 0, lambda text, tokens: text), Habits(questions_a_document=40)
    recalled, unchanged = habits_of(reader, documents, config, limits)
    assert unchanged == [False] * 9 and sorted(recalled) == [1, 2, 3]
    assert not any(sum(hits) for hits in recalled.values()) and sum(map(len, recalled.values())) == 120

    def keeper(prompts, new_tokens, done=None):
        everything = " ".join(TOLD.values())
        turns = reader([prompt.replace("(empty)", everything) for prompt in prompts], new_tokens)
        return [turn if turn.text.startswith("\\boxed") else Turn([1], [1], True, everything) for turn in turns]

    recalled, unchanged = habits_of(keeper, documents, config, limits)
    assert unchanged == [True] * 9 and all(sum(hits) == len(hits) for hits in recalled.values())


def test_nothing_to_read_is_refused():
    """Without documents there is nothing to count, so --eval-documents 0 is an error."""
    with pytest.raises(UserError, match="nothing would be read"):
        main(SimpleNamespace(eval_documents=0))
    with pytest.raises(UserError, match="give --lengths of at least 2"):
        main(SimpleNamespace(eval_documents=1, lengths=[1]))
