"""The model folders that the scripts in recipes/ write."""

from pathlib import Path

from engine.errors import UserError


def check_new(folder: Path) -> None:
    """Raises UserError for a model folder that would be overwritten."""
    if folder.exists():
        raise UserError(f"{folder}: already exists; delete it, or name another folder")


def save_new(model, tokenizer, folder: Path) -> None:
    """Write a new model folder, completely or not at all."""
    fresh = folder.with_name(f"{folder.name}.new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(folder)
