"""Files that a kill can't spoil: written under another name, flushed, renamed."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError


def flush(path: Path) -> None:
    """Have the file or folder on the disk, not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in a folder that is made if need be. Raises UserError.

    Several processes may write the same file at once: each has a fresh path of its own.
    """
    replace_lines(path, [text])


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """The same for what need not stand in memory at once; each line brings its own end."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("w") as file:
                file.writelines(lines)
            flush(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); name another folder, or free space") from None


def must_write(path: Path) -> bool:
    """Whether this process has to make the file `path`. The first process does; the others wait here until it is there.

    Not in a collective: these have a time limit, and a large file takes hours. torchrun ends those that wait in vain.
    The folder must be one that all machines share.
    """
    while not path.exists():
        if "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":
            return True
        time.sleep(0.5)
    return False


def digest(settings: tuple, texts) -> str:
    """A name for the file of something that is made of these texts with these settings."""
    found = hashlib.sha256(repr(settings).encode())
    for text in texts:
        found.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:24]


def check_writable(file: Path) -> None:
    """Raises UserError for a file that can't be written: told before hours of work."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"{file}: its folder is missing or can't be written to; name another")
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file in it")
