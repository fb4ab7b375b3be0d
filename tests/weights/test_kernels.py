"""The operators are built once, loaded, and not there where they cannot be built."""

import platform
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier

import pytest
import torch

from self_speculation.config import LoadingWarning
from self_speculation.weights import kernels
from self_speculation.weights.kernels import cpu_operators


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A cache, and a compiler that takes no time; files that were loaded."""
    if (variant := cpu_operators().variant) is None:
        pytest.skip(str(cpu_operators()))
    monkeypatch.setenv("SELF_SPECULATION_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo built > "$2"')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    loaded = []

    def load(file):
        if file.read_text() != "built\n":
            raise OSError("not a library")
        loaded.append(file)

    monkeypatch.setattr(torch.ops, "load_library", load)
    return tmp_path / "cache/kernels" / kernels._file_name(variant), compiler, loaded


def load():
    return kernels._load_operators.__wrapped__()


def test_threads_load_one_library(monkeypatch):
    """Guards against a process that two threads end: where no file can be kept, each built and loaded another
    one, and a second library may not define the operators again.
    """
    built = []
    arrived = Barrier(2)

    def build(variant):
        built.append(variant)
        time.sleep(0.05)

    def ask(_):
        arrived.wait()
        return cpu_operators()

    monkeypatch.setattr(kernels, "_load_operators", cache(kernels._load_operators.__wrapped__))
    monkeypatch.setattr(kernels, "_best_variant", lambda: "AVX2")
    monkeypatch.setattr(kernels, "_load_or_build", build)
    with ThreadPoolExecutor(2) as threads:
        assert [each.variant for each in threads.map(ask, range(2))] == ["AVX2", "AVX2"]
    assert built == ["AVX2"]


def test_it_is_built_once(builds):
    """Guards against a compiler at each start, and against files that other users can write."""
    file, compiler, loaded = builds
    assert load().variant
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    compiler.unlink()
    assert load().variant
    assert loaded == [file, file]
    file.chmod(0o777)
    assert "compiler, install Debian's package g++" in load().why_not
    file.chmod(0o755)
    file.write_text("cut sho")  # by a disk, say
    assert load().variant is None


def test_the_folder_is_where_the_user_says(monkeypatch):
    """Guards against files outside of the folder that is named, such as a container's volume."""
    for name in ("XDG_CACHE_HOME", "SELF_SPECULATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value, folder in (
        ("HOME", "/home/user", "/home/user/.cache/self-speculation"),
        ("XDG_CACHE_HOME", "/caches", "/caches/self-speculation"),
        ("SELF_SPECULATION_CACHE", "~/kept", "/home/user/kept"),
    ):
        monkeypatch.setenv(name, value)
        assert kernels._kept_file("AVX2").parent == Path(folder) / "kernels"


def test_another_source_has_another_file(builds, tmp_path, monkeypatch):
    """Guards against a kernel of an earlier version."""
    file, _, loaded = builds
    load()
    (tmp_path / "other.h").write_text("// another one")
    monkeypatch.setattr(kernels, "_SOURCES", (*kernels._SOURCES[:-1], tmp_path / "other.h"))
    load()
    assert loaded[0] == file != loaded[1]


ENDS = 'while [ "$1" != -o ]; do shift; done; '
CANNOT = {
    # What a compiler does ("": there is none), and the message.
    "no compiler": ("", "compiler, install Debian's package g++"),
    "error": ("echo 'x.cpp:1: fatal error: no header' >&2; exit 1", "compiler: x.cpp:1: fatal err"),
    "half": (ENDS + "echo half > $2; exit 3", "compiler: it fails"),
    "other file": (ENDS + "echo nothing > $2", "not a library"),
    "no file": ("exit 0", "No such file"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_operators_that_cannot_be_built(builds, case):
    """Guards against a traceback, half a file, an operator that is not there, and a user who does not know
    how to name another folder.
    """
    file, compiler, loaded = builds
    script, why = CANNOT[case]
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}")
    else:
        compiler.unlink()
    kernel = load()
    assert kernel.variant is None
    assert why in kernel.why_not
    assert str(kernel).startswith("torch (")
    names_folder = kernel.why_not.endswith("; SELF_SPECULATION_CACHE names another folder")
    assert names_folder == (case in ("other file", "no file"))
    assert not loaded
    assert case == "other file" or not file.exists()


def test_a_compiler_that_is_too_old_for_avx_vnni(builds, monkeypatch):
    """Guards against torch in the place of operators, where a compiler of 2020 builds those for AVX2."""
    file, compiler, loaded = builds
    refuses = "case \"$*\" in *-mavxvnni*) echo 'c++: error: unknown option -mavxvnni' >&2; exit 1; esac\n"
    compiler.write_text(compiler.read_text().replace("\n", f"\n{refuses}", 1))
    monkeypatch.setattr(kernels, "_best_variant", lambda: "AVX_VNNI")
    with pytest.warns(LoadingWarning, match=r"for AVX2, .* AVX_VNNI .*: unknown option -mavxvnni"):
        assert load().variant == "AVX2"
    assert [each.name for each in loaded] == [kernels._file_name("AVX2")]
    compiler.unlink()
    for each in file.parent.iterdir():
        each.unlink()
    assert "compiler, install Debian's package g++" in load().why_not


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        ("/proc/nowhere", "No such file"),
        ("~nobody at all", "home directory"),
        ("shared", "others can write"),
    ],
)
def test_operators_that_cannot_be_kept(cache, why, builds, monkeypatch, tmp_path):
    """Guards against decoding at a seventh of the speed, against code in a folder that other users can write,
    and against a compiler at each start that no message names.
    """
    _, _, loaded = builds
    if cache == "shared":
        cache = str(tmp_path / cache)
        (tmp_path / "shared/kernels").mkdir(parents=True)
        (tmp_path / "shared/kernels").chmod(0o777)
    monkeypatch.setenv("SELF_SPECULATION_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.warns(LoadingWarning, match=f"{why}.*; SELF_SPECULATION_CACHE names another folder"):
        assert load().variant
    (file,) = loaded
    assert file.parent.parent == tmp_path / "temporary"
    assert not file.parent.exists()


def test_other_processors_have_none(monkeypatch):
    """Guards against instructions that a processor does not have, and against AVX2 on Intel's processors for
    clients, which have AVX_VNNI and no AVX512.
    """
    both = {"avx512_vnni", "avx512_bf16"}
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    for level, has, variant in (
        ("AVX512", {*both, "amx_bf16"}, "AMX"),
        ("AVX512", both, "AVX512_BF16"), ("AVX512", {"avx512_vnni"}, "AVX512_VNNI"),
        ("AVX512", {"avx512_bf16"}, "AVX2"), ("AVX2", both, "AVX2"), ("AVX2", {"avx_vnni"}, "AVX_VNNI"),
        ("AVX2", {*both, "avx_vnni"}, "AVX_VNNI"), ("AVX512", {*both, "avx_vnni"}, "AVX512_BF16"),
        ("DEFAULT", {*both, "avx_vnni"}, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: dict.fromkeys(has, True))
        assert kernels._best_variant() == variant
    assert "none for this processor" in load().why_not


def test_tiles_that_linux_refuses(monkeypatch):
    """Guards against a process that ends at the first prompt, since the operating system forbids what the
    processor has.
    """
    has = dict.fromkeys(("avx512_vnni", "avx512_bf16", "amx_bf16"), True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    with pytest.warns(LoadingWarning, match="Linux refuses tiles"):
        assert kernels._best_variant() == "AVX512_BF16"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_an_image_has_all_variants(tmp_path):
    """Guards against an image whose kernel is that of the machine which built it."""
    kernels.build_into(tmp_path)
    names = {"ARM"} if platform.machine() == "aarch64" else kernels.VARIANTS.keys() - {"ARM"}
    assert {file.name for file in tmp_path.iterdir()} == {*map(kernels._file_name, names)}
