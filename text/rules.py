"""A spaCy pipeline without a trained model: names, dates and numbers by their spelling, and a list of known names."""

import importlib.util
from pathlib import Path

import spacy
from spacy.lang.en.stop_words import STOP_WORDS

from engine.errors import UserError

MONTHS = "January February March April May June July August September October November December".split()
LINKS = "of de la le du des van von der den di da del al bin ibn - &".split()


def rules_pipeline(names=()) -> spacy.Language:
    """The pipeline. It sets doc.ents, labelled NAME, DATE, NUMBER, or TITLE for capitalised names of `names`."""
    capital, link = {"SHAPE": {"REGEX": "^X"}, "IS_STOP": False}, {"LOWER": {"IN": LINKS}, "OP": "{1,3}"}
    month, year = {"TEXT": {"IN": MONTHS}}, {"TEXT": {"REGEX": r"^(1\d|20)\d\d$"}}
    day, comma = {"TEXT": {"REGEX": r"^\d{1,2}(st|nd|rd|th)?$"}}, {"TEXT": ",", "OP": "?"}
    capitals = capital | {"OP": "+"}
    patterns = {
        "NAME": [
            [capitals, capital, {"TEXT": "I", "OP": "?"}],  # World War I: I is a stop word elsewhere
            [capitals, link, capitals], [capitals, link, capitals, link, capitals],
            [capitals, {"LOWER": "of"}, {"LOWER": "the"}, capitals],
            [capital | {"IS_SENT_START": False, "LENGTH": {">=": 2}}],  # within a sentence, a capital means a name
        ],
        "DATE": [
            [month, day, comma, year], [day, month, year], [month, year], [month, day], [day, month], [month], [year],
            [{"TEXT": {"REGEX": r"^\d{2,3}0s$"}}],
        ],
        "NUMBER": [[{"TEXT": {"REGEX": r"^\d+([.,]\d+)*$"}}]],
        "TITLE": sorted(name for name in names if name[:1].isupper() and name.lower() not in STOP_WORDS),
    }
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": label, "pattern": one} for label, some in patterns.items() for one in some])
    return nlp


def check_ner(ner: str) -> None:
    """Raises UserError if the pipeline `ner` is not installed. Loads nothing, so it can come first."""
    spec = importlib.util.find_spec(ner) if ner.isidentifier() else None  # spacy's is_package takes any package
    folder = Path(spec.origin).parent if spec and spec.origin else Path(ner)
    if ner != "rules" and not (folder / "meta.json").is_file():
        if spec:
            raise UserError(f"--ner {ner}: is not a spaCy pipeline; use one such as en_core_web_sm, or --ner rules")
        raise UserError(f"--ner {ner}: not installed; run `python -m spacy download {ner}`, or use --ner rules")
