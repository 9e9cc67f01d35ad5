"""The figures of recipes/smollm2-wiki.sh as markdown tables: python -m recipes.smollm2_tables FOLDER"""

import json
import sys
from pathlib import Path

from engine.errors import UserError, run_script
from engine.metrics import table

MODELS = ("cold", "memtrain", "task-from-cold", "task-from-memtrain")
SETS = {
    "Masked documents": ["memtrain-before", "memtrain-after"],
    "HotpotQA, held back": [f"hotpot-{model}" for model in MODELS],
    "One hop, held back": [f"single_hop-{model}" for model in MODELS],
}


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give one folder: python -m recipes.smollm2_tables FOLDER")
    folder = Path(sys.argv[1])
    try:
        start = json.loads((folder / "cold/cold_start.json").read_text())
        print(f"**Cold start**, sampled; {start['minutes']:.1f} minutes, {start['tokens']} tokens\n")
        print(table(start["rows"]))
        for title, names in SETS.items():
            rows = [row | {"when": name} for name in names for row in json.loads((folder / f"{name}.json").read_text())]
            print(f"\n**{title}**, greedy\n\n{table(rows)}")
        print("\n**Time**, seconds with start-up\n\n```\n" + (folder / "minutes.txt").read_text() + "```")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: is no finished run of recipes/smollm2-wiki.sh ({error})") from None


if __name__ == "__main__":
    run_script(main, __doc__)
