"""The shared sample data; a test that asks for it is skipped where it is absent."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared/data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("needs the shared data folder, which is not here")
    return SHARED / name


def records(name: str) -> list[dict]:
    text = shared(name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]
