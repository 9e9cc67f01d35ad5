"""engine/files.py: a file is there whole, or as it was."""

import errno
import os
from pathlib import Path

import pytest

from engine import files
from engine.errors import UserError
from engine.files import replace_text


def test_a_file_changes_at_once_or_not_at_all(tmp_path, monkeypatch):
    """Until all is on the disk the old text stands; after an error it stays, and nothing else is left in the folder."""
    file = tmp_path / "new folder" / "notes.txt"
    replace_text(file, "old")
    assert file.read_text() == "old"
    seen, flush = [], files.flush
    monkeypatch.setattr(files, "flush", lambda path: seen.append((path.read_text(), file.read_text())) or flush(path))
    replace_text(file, "new")
    assert seen == [("new", "old")] and file.read_text() == "new"

    def full(path: Path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match="notes.txt: can't be written .No space left on device"):
        replace_text(file, "half")
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    """Each writes elsewhere; whoever ends last has the file."""
    file, flush = tmp_path / "cache.json", files.flush

    def other_process(path: Path):
        """Writes the same file from beginning to end while the first is about to flush."""
        monkeypatch.setattr(files, "flush", flush)
        monkeypatch.setattr(os, "getpid", lambda: 123456789)
        replace_text(file, "other")
        assert file.read_text() == "other" and path.read_text() == "one"

    monkeypatch.setattr(files, "flush", other_process)
    replace_text(file, "one")
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    """Inside a file there is no folder: a line that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/folder/notes.txt: can't be written .*; name another folder"):
        replace_text(tmp_path / "file/folder/notes.txt", "new")
