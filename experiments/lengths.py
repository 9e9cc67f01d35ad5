"""Accuracy by length, before and after training, of several runs pooled: README's plot and table.

    export OMP_NUM_THREADS=1
    for seed in 0 1 2; do python memtrain.py --fast True --seed $seed --out runs/first-$seed; done
    python -m experiments.lengths docs/lengths.png runs/first-0 runs/first-1 runs/first-2

Each seed draws its own held-out documents. Some may ask for the same entity, so the intervals, which treat them as
independent, are somewhat too narrow.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from engine.errors import UserError, run_script
from engine.metrics import row, table
from look.compare import check_picture, plot


def together(folders: list[str]) -> list[dict]:
    """The rows of several eval.json pooled, one for each stage, task, length and memory. Raises UserError."""
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice; give each once")
    scores: dict[tuple, list[float]] = defaultdict(list)
    for folder in folders:
        file = Path(folder) / "eval.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; give folders of evaluated runs")
        for one in json.loads(file.read_text()):
            scores[one["when"], one["task"], one["chunks"], one["memory"]] += one["scores"]
    return [row(*place, dict(enumerate(values))) for place, values in scores.items()]


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError("give a picture and folders of runs: python -m experiments.lengths docs/lengths.png runs/X ...")
    picture, *folders = sys.argv[1:]
    check_picture(picture, name="picture")
    rows = together(folders)
    print(table(rows))
    plot([one for one in rows if one["memory"] == "kept" or one["when"] == "after"], picture)


if __name__ == "__main__":
    run_script(main, __doc__)
