"""experiments/habits.py: with a reader that keeps only what it read last, and one that is told everything; gold."""

from types import SimpleNamespace

import pytest
from helpers import Scripted

from engine.errors import UserError
from experiments.habits import Habits, chunk_of_gold, habits_of, main
from masking import Document, mask
from rollout import Turn
from tasks.longqa import LongDocument
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
    config = Habits(questions_a_document=40)
    found = habits_of(Scripted(reader), documents, config)
    recalled = found["recall"]
    assert found["unchanged"] == [False] * 9 and sorted(recalled) == [1, 2, 3]
    assert not any(sum(hits) for hits in recalled.values()) and sum(map(len, recalled.values())) == 120
    assert found["end-to-end"] == found["end-to-end, empty memory"] == [1.0] * 3
    assert found["sentences copied"] == [True] * 12 and found["memories that repeat a sentence"] == [False] * 12

    def keeper(prompts, new_tokens, done=None):
        everything = " ".join(TOLD.values())
        turns = reader([prompt.replace("(empty)", everything) for prompt in prompts], new_tokens)
        return [turn if turn.text.startswith("\\boxed") else Turn([1], [1], True, everything) for turn in turns]

    found = habits_of(Scripted(keeper), documents, config)
    assert found["unchanged"] == [True] * 9 and all(sum(hits) == len(hits) for hits in found["recall"].values())
    # Of its first memory only the sentence of the first chunk was read; from then on the memory before holds all four.
    assert found["sentences copied"] == [True, *[False] * 3, *[True] * 12] * 3
    assert found["memories copied"] == [False, True, True, True] * 3


def test_what_is_copied_and_what_repeats(documents):
    """A changed word isn't copied, a cut sentence and one over two lines are; (empty) has no sentence."""
    memories = iter(["Ulm lies on the Rhine. Ulm lies", "Bern lies\non the Aare. Ulm is old.", "(empty)", ""])

    def script(prompts, new_tokens, done=None):
        text = next(memories) if "<section>" in prompts[0] and TARGET not in prompts[0] else "\\boxed{no}"
        return [Turn([1], [1], True, text) for _ in prompts]

    found = habits_of(Scripted(script), documents[:1], Habits(questions_a_document=1))
    assert found["sentences copied"] == [False, True, True, True, False]
    assert found["memories copied"] == [False, False, True, True]
    assert found["memories that repeat a sentence"] == [False, False, False, False]


def test_nothing_to_read_is_refused():
    """Without documents there is nothing to count, so --eval-documents 0 is an error."""
    with pytest.raises(UserError, match="nothing would be read"):
        main(SimpleNamespace(task="memtrain", eval_documents=0))
    with pytest.raises(UserError, match="give --lengths of at least 2"):
        main(SimpleNamespace(task="memtrain", eval_documents=1, lengths=[1]))
    with pytest.raises(UserError, match="give memtrain or longqa"):
        main(SimpleNamespace(task="searchqa"))


def test_the_chunk_of_the_gold_paragraph():
    """The first chunk with the whole text of one, title aside; cut through, it is in none; no gold is an error."""

    gold = ("Ulm", "Ulm lies\n\non the Danube."), ("Danube", "The Danube flows to the sea.")

    def place(chunks, gold=gold):
        return chunk_of_gold(LongDocument(0, "q", "Where?", ["x"], chunks, [], gold=gold))

    chunks = ["Ulm and Bern", "The Danube flows to the sea.", "Ulm lies\n\non the Danube."]
    assert place(chunks) == 2 and place(chunks[::2]) == 2
    assert place(["Ulm lies\n\n", "on the Danube."]) == 0
    with pytest.raises(UserError, match="question q: has no gold paragraphs"):
        place(chunks, gold=())
