"""text/rules.py: what the pipeline without training finds."""

from text.rules import rules_pipeline


def test_rules_find_names_years_dates_numbers_and_known_names():
    """Known cases, and what must not be found: a sentence's first word, a trailing 's, a small word though known."""
    text = "The physicist Albert Einstein's house in Ulm, built on 14 March 1879, had 1,200 books. It was Queen of "
    text += "Sheba's. Cells are small."
    inside = {"Albert Einstein", "Ulm", "14 March 1879", "1,200", "Queen of Sheba"}
    assert {entity.text for entity in rules_pipeline()(text).ents} == inside
    assert {entity.text for entity in rules_pipeline({"Cells", "the", "It"})(text).ents} == {*inside, "Cells"}
