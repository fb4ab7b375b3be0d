"""The user's cache: files that later starts need not make again.

Every error in here is an OSError. The caller goes on without the cache, and says so in a warning.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

# Seconds that a writer waits for another one.
_PATIENCE = 60.0


def cache_folder() -> Path:
    """SELF_SPECULATION_CACHE, or a folder in the user's cache; it need not exist. Raises OSError if the user
    has no home directory.
    """
    named = os.environ.get("SELF_SPECULATION_CACHE")
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return (Path(named) if named else users / "self-speculation").expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no home directory") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The path of a new file in an own folder. When the block ends without an error, the new file is on the
    disk, and then gets the name of `file`.

    Only one process writes to the folder at a time, so whatever it finds in "partial" is left over from a
    killed one. Raises OSError if the file cannot be written, or if another process takes a minute.
    """
    partial = file.parent / "partial"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file.parent / ".lock", _PATIENCE)
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, "the file system has no locks") from error
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial / file.name
        _sync(partial / file.name)
        (partial / file.name).replace(file)
        _sync(file.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
