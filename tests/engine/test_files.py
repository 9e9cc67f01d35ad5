"""engine/files.py: a file is there whole, or as it was."""

import os

import pytest

from engine.files import replace_text, whole_file


def test_a_file_changes_at_once_or_not_at_all(tmp_path):
    """Until the block ends the old text stands; after an error it stays, and nothing else is left in the folder."""
    file = tmp_path / "new folder" / "notes.txt"
    replace_text(file, "old")
    with whole_file(file) as fresh:
        fresh.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    with pytest.raises(KeyError), whole_file(file) as fresh:
        fresh.write_text("half")
        raise KeyError
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    """Each writes elsewhere; whoever ends last has the file."""
    file = tmp_path / "cache.json"
    with whole_file(file) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 123456789)
        with whole_file(file) as other:
            other.write_text("other")
            assert one.read_text() == "one"
        assert file.read_text() == "other"
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]
