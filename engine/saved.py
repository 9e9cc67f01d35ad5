"""The settings of the run that wrote a model: the defaults of eval.py and experiments/habits.py."""

import json
from pathlib import Path


def saved_settings(model: str) -> dict:
    """Settings of the run that wrote `model` (runs/NAME/checkpoint or .../checkpoints/step-N); {} for other models."""
    folder, written = run_of(model)
    if not folder:
        print(f"{model}: not the checkpoint of a run, so only flags and --config set the settings")
        return {}
    print(f"settings are from {folder / 'config.json'}; the command line overrides them")
    return {name: value for name, value in written.items() if name not in ("model", "out")}


def run_of(model: str) -> tuple[Path | None, dict]:
    """(folder, settings) of the run that wrote `model`; (None, {}) for other models."""
    if not Path(model).parent.exists():  # a model of the hub
        return None, {}
    for folder in Path(model).absolute().parents[:2]:
        try:
            written = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(written, dict) and "chunk_tokens" in written:  # or it belongs to another program
            return folder, written
    return None, {}
