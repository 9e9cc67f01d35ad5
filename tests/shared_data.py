"""The shared sample data beside the repository; a test that asks for it is skipped where it is absent."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared/data"


def shared(name: str = "") -> Path:
    """The path of a shared file or folder; of the whole folder without a name."""
    if not (SHARED / name).exists():
        pytest.skip("needs the shared data folder, which is not here")
    return SHARED / name


def records(name: str) -> list[dict]:
    """The rows of a shared .jsonl or .json."""
    text = shared(name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]
