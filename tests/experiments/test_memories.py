"""experiments/memories.py: what the last memory is asked, and how its answers are shown."""

from experiments.memories import recalled
from masking import Document
from rollout import Trajectory, Turn


def test_every_entity_of_the_earlier_chunks_is_asked_for():
    """In the order of the text, from the last memory; the last chunk's own entities are not asked for."""
    chunks, names = ["Ada was born in Ulm. She met Bob.", "Bob died.", "Cy left."], [["Ulm", "Bob"], ["Bob"], ["Cy"]]
    document = Document(0, "t", "q", ["y"], chunks, names)
    seen, answers = [], iter(["\\boxed{ulm}", "\\boxed{Cy}", "no box"])

    def sample(prompts, new_tokens, done):
        seen.extend(prompts)
        return [Turn([], [], True, next(answers)) for _ in prompts]

    class Settings:
        answer_tokens = 8

    trajectory = Trajectory(document, memories=["first", "second", "THE LAST ONE"])
    assert recalled(sample, trajectory, Settings) == [
        (True, "Ada was born in [TARGET]: ulm"),
        (False, "She met [TARGET]: Cy (it was Bob)"),
        (False, "[TARGET] died: nothing (it was Bob)"),
    ]
    assert len(seen) == 3 and all("THE LAST ONE" in prompt for prompt in seen)
