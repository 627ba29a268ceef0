"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place where the block ends, and is deleted if the block raises.

    The folders of `path` are made. What was there stays until then. A link stays one, and what it leads to is written;
    so is a pipe or a device, which gets all at once.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        with tempfile.TemporaryDirectory() as folder:
            yield (content := Path(folder) / path.name)
            path.write_bytes(content.read_bytes())
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with contextlib.suppress(OSError):  # of a process killed before, of the same number
        partial.unlink()
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # there is none any more, mostly
            partial.unlink()


def replace_durably(path: Path, content: bytes) -> None:
    """Puts a file in the place of the one that may be there, and waits until it is on the disk."""
    with whole_file(path) as new:
        write_durably(new, content)
    sync_directory(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk. Raises OSError, FileExistsError among them."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the entries of a directory (new and renamed files) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
