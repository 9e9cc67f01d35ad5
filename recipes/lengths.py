"""Accuracy by length, before and after, of several runs together: README's plot and table.

    for seed in 0 1 2; do python memtrain.py --seed $seed --out runs/first-$seed; done
    python recipes/lengths.py docs/lengths.png runs/first-0 runs/first-1 runs/first-2

Each run was evaluated on held-out documents of its own, so all of them count.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.errors import UserError, run_script  # noqa: E402
from engine.report import check_files, plot, row, table  # noqa: E402


def together(folders: list[str]) -> list[dict]:
    """The rows of several eval.json, those of one place as one row. Raises UserError."""
    scores: dict[tuple, list[float]] = {}
    for folder in folders:
        file = Path(folder) / "eval.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; give folders of runs that were evaluated")
        for one in json.loads(file.read_text()):
            scores.setdefault((one["when"], one["task"], one["chunks"], one["memory"]), []).extend(one["scores"])
    return [row(*place, dict(enumerate(values))) for place, values in scores.items()]


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError("give a picture and folders of runs: python recipes/lengths.py docs/lengths.png runs/X ...")
    picture, *folders = sys.argv[1:]
    check_files(Path(picture), picture)
    rows = together(folders)
    print(table(rows))
    plot([one for one in rows if one["memory"] == "kept" or one["when"] == "after"], picture)
    minutes = [sum(seconds(json.loads(line)) for line in (Path(f) / "metrics.jsonl").open()) / 60 for f in folders]
    print("minutes of training:", ", ".join(f"{value:.1f}" for value in minutes))


def seconds(step: dict) -> float:
    return sum(value for name, value in step.items() if name.startswith("seconds_"))


if __name__ == "__main__":
    run_script(main)
