"""Files that appear whole or not at all, whatever stops the work."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a place beside a file's own to write to; the file takes its own when it is complete.

    An exception leaves what stood there before.

    Raises:
        OSError: the file cannot be written; names it.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            yield partial
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the disk name the file that is written, where they name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        # Writers in other languages tell neither the error's number nor the file.
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise OSError(errno.ENOSPC, full, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
