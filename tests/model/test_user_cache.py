"""The user's cache. test_gguf.py has its troubles as a user meets them."""

import os
import signal
from pathlib import Path

import pytest

from self_speculation.model import user_cache
from self_speculation.model.user_cache import cache_folder, replacing


def in_a_child(work):
    """Run it in another process. Returns the process's id."""
    if child := os.fork():
        return child
    try:
        work()
    finally:
        os._exit(1)


def test_a_killed_writer_leaves_nothing_for_ever(tmp_path):
    """Guards against gigabytes that a kill during the write leaves: the next writer removes them, whatever
    its file.
    """

    def killed():
        with replacing(tmp_path / "first") as new:
            new.write_bytes(b"new")
            new.with_name(".tmp").write_bytes(b"of a library")
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "first").write_bytes(b"old")
    _, status = os.waitpid(in_a_child(killed), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "first").read_bytes() == b"old"
    assert len([*tmp_path.rglob("*tmp")]) == 1
    with replacing(tmp_path / "second") as new:
        new.write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "first", "second"]


def test_a_file_has_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch):
    """Guards against a name without contents after a power failure: its directory may be written first."""
    synced, file = [], tmp_path / "file"

    def fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, path.stat().st_size if path.is_file() else None, file.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(file) as new:
        new.write_bytes(b"whole")
    assert synced == [("file", 5, False), (tmp_path.name, None, True)]


def test_one_process_writes_at_a_time(tmp_path, monkeypatch):
    """Guards against a writer that takes the new file of another one for a left one, or waits for ever."""
    monkeypatch.setattr(user_cache, "_PATIENCE", 0.1)
    is_writing, may_end = os.pipe(), os.pipe()

    def write():
        with replacing(tmp_path / "file") as new:
            new.write_bytes(b"whole")
            os.write(is_writing[1], b".")
            os.read(may_end[0], 1)

    child = in_a_child(write)
    os.read(is_writing[0], 1)
    with pytest.raises(OSError, match="lock"), replacing(tmp_path / "file"):
        pytest.fail("two processes write")
    os.write(may_end[1], b".")
    os.waitpid(child, 0)
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_the_folder_is_where_the_user_says(monkeypatch):
    """Guards against files outside of the folder that is named, such as a container's volume."""
    monkeypatch.delenv("SELF_SPECULATION_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/self-speculation")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/self-speculation")
    monkeypatch.setenv("SELF_SPECULATION_CACHE", "~/kept")
    assert cache_folder() == Path("/home/user/kept")
