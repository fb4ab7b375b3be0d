"""Builds and loads this library's operators for a CPU, cpp/layers.cpp.

The file is built once, by the compiler that is there, and kept in the user's cache; an installed wheel and an
image have it built. A process that cannot keep it builds one for itself. Without a compiler, or on another
kind of processor, torch multiplies by the weights, which take four bytes each then.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from self_speculation.config import LoadingWarning

_FOLDER = Path(__file__).with_name("cpp")
_SOURCES = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
_TORCH = Path(torch.__file__).parent
_OPTIONS = (
    "-O3", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11
)  # fmt: skip

# The compiler's options, by the instructions that the operators use.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX_VNNI = (*_AVX2, "-mavxvnni")
_AVX512_VNNI = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_AVX512_BF16 = (*_AVX512_VNNI, "-mavx512bf16")
VARIANTS = {
    "AMX": (*_AVX512_BF16, "-DAMX"),
    "AVX512_BF16": _AVX512_BF16,
    "AVX512_VNNI": _AVX512_VNNI,
    "AVX_VNNI": _AVX_VNNI,
    "AVX2": _AVX2,
    "ARM": ("-march=armv8.2-a+fp16+dotprod",),
}

# Seconds after which a compiler counts as broken; it takes 10 to 20 on a quiet machine.
_TIMEOUT = 300.0

_lock = Lock()


class CPUOperators(NamedTuple):
    """The operators that compute passes on a CPU."""

    variant: str | None  # of VARIANTS; None: torch
    why_not: str = ""  # why it is torch

    @property
    def has_tiles(self) -> bool:
        return self.variant == "AMX"

    @property
    def max_pass_tokens(self) -> int:
        """The most tokens of one call of an operator: a core's cache holds their inputs. With tiles
        arithmetic is fast, so that more tokens have to pay for reading the weights.
        """
        return 256 if self.has_tiles else 64

    def __str__(self) -> str:
        return f"torch ({self.why_not})" if self.variant is None else f"operators for {self.variant}"


def cpu_operators() -> CPUOperators:
    """Load the operators, after building them if need be."""
    with _lock:  # the first thread loads them for all: a second library of them would end the process
        return _load_operators()


@cache
def _load_operators() -> CPUOperators:
    variant = _best_variant()
    if variant is None:
        return CPUOperators(None, "there are none for this processor")
    try:
        try:
            _load_or_build(variant)
        except RuntimeError as error:
            if variant != "AVX_VNNI":
                raise
            variant = "AVX2"  # the same bits, by what GCC before 11 and Clang before 12 know
            _load_or_build(variant)
            why = f"operators: for AVX2, since those for AVX_VNNI cannot be built: {error}"
            warnings.warn(why, LoadingWarning, stacklevel=3)
    except RuntimeError as error:
        return CPUOperators(None, f"ours cannot be built: {error}")
    except OSError as error:
        advice = "SELF_SPECULATION_CACHE names another folder"
        return CPUOperators(None, f"ours cannot be kept or loaded: {error}; {advice}")
    return CPUOperators(variant)


def _load_or_build(variant: str) -> None:
    """Load a file, or build and keep one; where none can be kept, build one for this process.

    Raises:
        RuntimeError: it cannot be built.
        OSError: it cannot be loaded, not even from a temporary folder.
    """
    with suppress(OSError):
        return _load(_FOLDER / _file_name(variant))  # of a wheel or an image
    try:
        kept = _kept_file(variant)
        with suppress(OSError):
            return _load(kept)
        _build(variant, kept)
    except OSError as error:
        with tempfile.TemporaryDirectory(prefix="self-speculation-") as folder:  # of one user
            _build(variant, Path(folder) / _file_name(variant))
        why = f"operators: built for this process alone, since they cannot be kept: {error}"
        advice = "SELF_SPECULATION_CACHE names another folder"
        warnings.warn(f"{why}; {advice}", LoadingWarning, stacklevel=4)


def build_into(folder: Path) -> None:
    """Build all variants for this kind of processor, for an image or a wheel: into the folder of the sources.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    for variant in VARIANTS:
        if (variant == "ARM") == (platform.machine() == "aarch64"):
            _compile(variant, folder / _file_name(variant))


def _best_variant() -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    if platform.machine() == "aarch64":
        return "ARM" if "asimddp" in Path("/proc/cpuinfo").read_text() else None
    level = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY lowers it
    if level not in ("AVX2", "AVX512"):
        return None
    has = torch.cpu.get_capabilities()
    if level == "AVX2" or not has.get("avx512_vnni", False):
        return "AVX_VNNI" if has.get("avx_vnni", False) else "AVX2"
    if not has.get("avx512_bf16", False):
        return "AVX512_VNNI"
    if not has.get("amx_bf16", False):
        return "AVX512_BF16"
    if torch.cpu._init_amx():  # asks Linux, for all threads of this process
        return "AMX"
    why = "operators: Linux refuses tiles (AMX) to this process, so prompts take longer"
    warnings.warn(why, LoadingWarning, stacklevel=3)
    return "AVX512_BF16"


def _file_name(variant: str) -> str:
    """The name has a digest of all that the file depends on, since machines share homes. The file runs with
    any torch from 2.11 on, by the interface that torch keeps stable.
    """
    inputs = (*(file.read_text() for file in _SOURCES), *_OPTIONS, *VARIANTS[variant])
    return f"layers-{variant}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"


def _kept_file(variant: str) -> Path:
    """The file in the user's cache. Raises OSError if there is no home."""
    named = os.environ.get("SELF_SPECULATION_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = Path(named) if named else caches / "self-speculation"
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error
    return folder / "kernels" / _file_name(variant)


def _build(variant: str, file: Path) -> None:
    """Build a file and load it. Raises RuntimeError if it cannot be built, OSError if it cannot be kept there
    or loaded.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(file.parent)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # another process may load it meanwhile
        new = Path(folder) / file.name
        _compile(variant, new)
        new.replace(file)
    _load(file)


def _compile(variant: str, file: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = str(_FOLDER / "layers.cpp")
    libraries = (f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}", "-ltorch_cpu")
    command = [*compiler, *_OPTIONS, *VARIANTS[variant], source, "-o", str(file), *libraries]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise RuntimeError(f"there is no {compiler[0]}, install Debian's package g++") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{compiler[0]}: {getattr(error, 'strerror', None) or error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "it fails")
        raise RuntimeError(f"{compiler[0]}: {first}")
    file.chmod(0o755)


def _load(file: Path) -> None:
    """Raises OSError if a file is not there, not whole, or not written by this user or root."""
    _check_owner(file.parent, file)
    torch.ops.load_library(file)


def _check_owner(*paths: Path) -> None:
    """Raises OSError if somebody else, except root, can have written one."""
    for path in paths:
        status = path.stat()
        if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
            raise PermissionError(f"others can write {path}")
