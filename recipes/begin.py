"""Begin a reproduction: split the questions, and note the settings, so that no other settings mix with them.

    python recipes/begin.py FOLDER SETTING=VALUE ...      # called by recipes/reproduce-tiny.sh

Questions are split by subject. Each seed is tested on a share of the test questions of its own, so that no question
counts twice, and learns from few labels of its own. recipes/tables.py reads the settings.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.errors import UserError, run_script  # noqa: E402
from recipes.tables import STUDENT  # noqa: E402
from tasks.questions import load_questions, split_of, subject  # noqa: E402

QUESTIONS, MODEL = ROOT / "tiny/questions.jsonl", ROOT / "tiny/model/model.safetensors"


def parts_of(file: Path, seeds: list[str], labels: list[str]) -> dict[str, list[str]]:
    """The lines of the question file by the name of their part: train, dev, test, test-SEED, train-LABELS-SEED."""
    rows = list(zip(load_questions(file), file.read_text().splitlines(), strict=True))
    random.Random(0).shuffle(rows)
    parts = {name: [line for row, line in rows if split_of(subject(row)) == name] for name in ("train", "dev", "test")}
    for n, seed in enumerate(seeds):
        parts[f"test-{seed}"] = parts["test"][n :: len(seeds)]
        few = random.Random(int(seed)).sample(parts["train"], len(parts["train"]))
        parts |= {f"train-{label}-{seed}": few[: int(label)] for label in labels}
    return parts


def settings_of(arguments: list[str]) -> dict:
    """SETTING=VALUE arguments, values as lists of words, and what the runs start from, by its hash."""
    settings: dict = {name: values.split() for name, _, values in (argument.partition("=") for argument in arguments)}
    for name, file in (("questions", QUESTIONS), ("model", MODEL)):
        settings[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return settings


def main() -> None:
    if len(sys.argv) < 2 or not {"seeds", "labels"} <= {argument.partition("=")[0] for argument in sys.argv[2:]}:
        raise UserError("give a folder, seeds=... and labels=...; recipes/reproduce-tiny.sh does")
    out, settings = Path(sys.argv[1]), settings_of(sys.argv[2:])
    seeds, labels = settings["seeds"], settings["labels"]
    if not 2 <= len(set(seeds)) == len(seeds) <= max(STUDENT) or not all(word.isdecimal() for word in seeds + labels):
        raise UserError(
            f"seeds={' '.join(seeds)} labels={' '.join(labels)}: must be numbers, and for an interval over seeds 2 to "
            f"{max(STUDENT)} different seeds"
        )
    if any(letter.isspace() for letter in str(out)):
        raise UserError(f"{out}: a folder without white space, please: its name travels through xargs")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    if file.exists() and (old := json.loads(file.read_text())) != settings:
        other = ", ".join(name for name in {*old, *settings} if old.get(name) != settings.get(name))
        raise UserError(f"{out} was begun with other {other}: delete it, or name another folder")
    for name, lines in parts_of(QUESTIONS, settings["seeds"], settings["labels"]).items():
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    file.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    run_script(main, __doc__)
