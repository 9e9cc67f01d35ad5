"""tasks/search.py: the searching agent, with a script of answers in the model's place."""

from helpers import Scripted

from engine.config import Config
from masking import Document
from rollout import EMPTY_MEMORY, Turn, answered
from tasks.search import NOTHING, acted, search


def settings(memory_tokens=40, answer_tokens=9, result_tokens=99, searches=6) -> Config:
    return Config(
        memory_tokens=memory_tokens, answer_tokens=answer_tokens, result_tokens=result_tokens, searches=searches
    )


class Library:
    """Answers with what it was asked, and remembers that."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append(queries)
        return [[{"title": f"T{i}", "text": f"about {query}", "score": 1.0} for i in range(k)] for query in queries]


def test_search_keeps_notes_query_and_result_and_nothing_else():
    """Scripted episodes: an answer at once, a search then an answer, no action, and one that never stops searching."""
    script = {
        "first": [r"easy, \\boxed{Ulm}"],
        "second": ["note A <search>who is it</search>", r"note B \\boxed{Bern} and more"],
        "third": ["I say nothing useful <search>unclosed"],
        "fourth": [f"note {n} <search>again {n}</search>" for n in range(9)],
    }
    script = {name: [line.replace("\\\\", "\\") for line in lines] for name, lines in script.items()}
    turn_of, prompts_of = dict.fromkeys(script, 0), {name: [] for name in script}

    def sample(prompts, new_tokens, done):
        turns = []
        for text in prompts:
            name = next(name for name in script if f"Who is {name}" in text)
            prompts_of[name].append(text)
            turns.append(Turn([1], [2], True, script[name][turn_of[name]]))
            turn_of[name] += 1
        return turns

    documents = [Document(n, name, f"Who is {name}?", ["x"], [], []) for n, name in enumerate(script)]
    library = Library()
    found = search(Scripted(sample), documents, settings(searches=2), retriever=library, top=3)
    assert [t.prediction for t in found] == ["Ulm", "Bern", None, None]
    assert [len(t.turns) for t in found] == [1, 2, 1, 3]  # the third search of two allowed ends the episode
    assert library.asked == [["who is it", "again 0"], ["again 1"]]
    assert [t.searches for t in found] == [[], ["who is it"], [], ["again 0", "again 1"]]
    second, fourth = prompts_of["second"], prompts_of["fourth"]
    assert EMPTY_MEMORY in second[0] and "Searches left: 2." in second[0] and "Searches left: 1." in second[1]
    for part in ("note A", "who is it", "T0\nabout who is it", "T2\nabout"):
        assert part in second[1], part
    assert "T3" not in second[1]
    assert "again 1" in fourth[2] and "again 0" not in fourth[2]
    assert "note 1" in fourth[2] and "note 0" not in fourth[2]


def test_only_generated_text_is_an_action():
    """Boxes and searches that stand in the question or in a search result are nobody's action and nobody's answer."""
    trap = r"Is it \boxed{x} or <search>y</search>?"
    sample, question = Scripted(lambda *_: [Turn([1], [2], True, "I wonder")]), Document(0, "t", trap, ["x"], [], [])
    (found,) = search(sample, [question], settings(), retriever=Library())
    assert found.prediction is None and found.searches == [] and len(found.turns) == 1


def test_notes_queries_and_results_keep_to_their_limits():
    """Notes and query are cut to memory_tokens, a result to result_tokens; a turn may write notes and action."""
    cuts, asked = [], []

    def cut(text: str, tokens: int) -> str:
        cuts.append((text, tokens))
        return text[:tokens]

    def sample(prompts, new_tokens, done):
        asked.append((prompts, new_tokens))
        return [Turn([1], [2], True, "notes that are long <search>words that are long</search>")]

    question = Document(0, "t", "Who?", ["x"], [], [])
    search(Scripted(sample, cut), [question], settings(5, 3, 8, 1), retriever=Library(), top=1)
    assert [new_tokens for _, new_tokens in asked] == [8, 8]
    assert cuts[:3] == [("notes that are long", 5), ("words that are long", 5), ("T0\nabout words", 8)]
    (second,) = asked[1][0]
    assert "<result>\nT0\nabout\n</result>" in second and "<query>\nwords\n</query>" in second


def test_an_empty_box_is_no_answer_and_ends_nothing():
    """A model that repeats "the final answer in \\boxed{}" has not answered: its search counts, and a later box."""
    assert not answered(r"the final answer in \boxed{}") and answered(r"in \boxed{}: \boxed{Ulm}")
    assert not acted(r"the final answer in \boxed{}") and acted(r"\boxed{} <search>Ulm</search>")
    said = iter([r"I need \boxed{}. <search>Ulm</search>", r"So \boxed{} is \boxed{Bern}"])

    def sample(prompts, new_tokens, done):
        return [Turn([1], [2], True, next(said))]

    question = Document(0, "t", "Who?", ["x"], [], [])
    (found,) = search(Scripted(sample), [question], settings(), retriever=Library())
    assert found.searches == ["Ulm"] and found.prediction == "Bern" and len(found.turns) == 2


def test_episodes_of_a_group_are_searched_together():
    """G1 episodes of each question, question by question; those that search in a turn ask the retriever at once."""
    def sample(prompts, new_tokens, done):
        assert done is acted and new_tokens == 49
        said = "<search>words</search>" if NOTHING in prompts[0] else r"\boxed{Ulm}"
        return [Turn([1], [2], True, said) for _ in prompts]

    documents, library = [Document(n, str(n), f"Who is {n}?", ["x"], [], []) for n in range(2)], Library()
    found = search(Scripted(sample), documents, settings(), samples=3, retriever=library)
    assert [t.document.index for t in found] == [0, 0, 0, 1, 1, 1] and library.asked == [["words"] * 6]
    assert all(t.prediction == "Ulm" and len(t.turns) == 2 and t.memories == [EMPTY_MEMORY] for t in found)


def test_a_search_that_finds_nothing_says_so():
    """The slot of the result isn't empty, and differs from that of a search that was never made."""
    prompts = []

    class Empty:
        def search(self, queries, k):
            return [[] for _ in queries]

    def sample(given, new_tokens, done):
        prompts.extend(given)
        return [Turn([1], [2], True, "<search>words</search>")]

    search(Scripted(sample), [Document(0, "t", "Who?", ["x"], [], [])], settings(searches=1), retriever=Empty())
    first, second = (prompt.split("<result>\n")[1].split("\n</result>")[0] for prompt in prompts)
    assert (first, second) == (NOTHING, "(nothing found)")
