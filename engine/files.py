"""Files that a kill can't corrupt: written under another name, flushed, renamed."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all; creates its folder if needed. Raises UserError.

    Several processes may write the same file at once: each uses its own temporary path.
    """
    replace_lines(path, [text])


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """The same for text that needn't be in memory at once; each line includes its line break."""
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
    """Whether this process has to write the file `path`: process 0 does; the others wait here until it exists.

    Not a collective: those time out, and a large file takes hours. If process 0 fails, torchrun ends the others.
    The folder must be shared by all machines.
    """
    while not path.exists():
        if "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":
            return True
        time.sleep(0.5)
    return False


def digest(settings: tuple, texts) -> str:
    """A file name for something made from these texts with these settings: 24 hexadecimal digits."""
    found = hashlib.sha256(repr(settings).encode())
    for text in texts:
        found.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:24]


def check_writable(file: Path) -> None:
    """Raises UserError if a file can't be written: to be called before hours of work."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"{file}: its folder is missing or can't be written to; name another")
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file in it")
