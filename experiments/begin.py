"""Begin a reproduction: split the questions, and save the settings, so runs with other settings can't be mixed in.

    python -m experiments.begin FOLDER SETTING=VALUE ...      # called by experiments/reproduce-tiny.sh

Questions are split by subject. Each seed has its own share of the test questions, so that no question counts twice, and
its own few labelled questions. The ceiling has the same test questions, told to focus. experiments/tables.py reads the
settings.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

from engine.config import ROOT
from engine.errors import UserError, run_script
from experiments.tables import STUDENT
from tasks.questions import load_questions, split_questions, subject
from tiny.build.demonstrations import FOCUS

QUESTIONS, MODEL = ROOT / "tiny/questions.jsonl", ROOT / "tiny/model/model.safetensors"


def parts_of(file: Path, seeds: list[str], labels: list[str]) -> dict[str, list[str]]:
    """{part: lines of the question file}, for train, dev, test, test-SEED, test-SEED-told and train-LABELS-SEED."""
    rows = list(zip(load_questions(file), file.read_text().splitlines(), strict=True))
    random.Random(0).shuffle(rows)
    split = split_questions(rows, None, key=lambda row: subject(row[0]))
    parts = {name: [line for _, line in some] for name, some in split.items()}
    for n, seed in enumerate(seeds):
        parts[f"test-{seed}"] = asked = parts["test"][n :: len(seeds)]
        parts[f"test-{seed}-told"] = [told_to_focus(line) for line in asked]
        few = random.Random(int(seed)).sample(parts["train"], len(parts["train"]))
        parts |= {f"train-{label}-{seed}": few[: int(label)] for label in labels}
    return parts


def told_to_focus(line: str) -> str:
    row = json.loads(line)
    return json.dumps(row | {"question": f"{row['question']} {FOCUS}"})


def main() -> None:
    out, *arguments = sys.argv[1:] or [""]
    settings = {name: values.split() for name, _, values in (argument.partition("=") for argument in arguments)}
    if not out or not {"seeds", "labels"} <= settings.keys():
        raise UserError("give a folder, seeds=... and labels=..., as experiments/reproduce-tiny.sh does")
    if any(letter.isspace() for letter in out):
        raise UserError(f"{out}: name a folder without white space, as its name goes through xargs")
    seeds, labels = settings["seeds"], settings["labels"]
    if not 2 <= len(set(seeds)) == len(seeds) <= max(STUDENT) or not all(word.isdecimal() for word in seeds + labels):
        raise UserError(
            f"seeds={' '.join(seeds)} labels={' '.join(labels)}: must be numbers; an interval over seeds needs 2 to "
            f"{max(STUDENT)} different seeds"
        )
    for name, file in (("questions", QUESTIONS), ("model", MODEL)):  # what the runs start from
        settings[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    folder, file = Path(out), Path(out) / "settings.json"
    if file.exists() and (old := json.loads(file.read_text())) != settings:
        other = ", ".join(name for name in {*old, *settings} if old.get(name) != settings.get(name))
        raise UserError(f"{out} was begun with other {other}: delete it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in parts_of(QUESTIONS, seeds, labels).items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    file.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    run_script(main, __doc__)
