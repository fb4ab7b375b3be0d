"""The operators on other processors: without vector instructions, with vectors of 16 numbers, on ARM
(emulated), and under sanitizers. test_in_place.py has whole passes by the variant of this processor.
"""

import shutil
import subprocess
import tempfile
from functools import cache

import pytest
import torch
from conftest import ROOT

from self_speculation.weights import kernels

FLAGS = {
    "AVX2": ["c++", *kernels.VARIANTS["AVX2"]],
    "AVX512_BF16": ["c++", *kernels.VARIANTS["AVX512_BF16"]],
    "no vectors": ["c++"],
    "16 numbers": ["c++", "-DWIDE"],
    "ARM": ["aarch64-linux-gnu-g++", "-static", *kernels.VARIANTS["ARM"]],
    "sanitizers": ["c++", *kernels.VARIANTS["AVX2"], "-O1", "-g", "-fsanitize=address,undefined"],
}


@cache
def printed(name):
    """By the name of flags, what operators.cpp prints: kinds and numbers. Each is compiled once."""
    compiler, *flags = FLAGS[name]
    if not shutil.which(compiler) or (name == "ARM" and not shutil.which("qemu-aarch64")):
        pytest.skip(f"no {compiler}, or no qemu-aarch64")
    if name == "AVX512_BF16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("a processor without")
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-O2", "-std=c++20", "-ffp-contract=off", *flags, "-o", f"{folder}/program"]
        headers = [ROOT / "self_speculation/weights/cpp", kernels._TORCH / "include"]
        source = ROOT / "tests/weights/operators.cpp"
        subprocess.run([*command, source, *(f"-I{folder}" for folder in headers)], check=True)
        emulator = ["qemu-aarch64"] if name == "ARM" else []
        result = subprocess.run([*emulator, command[-1]], capture_output=True, text=True, check=True)
    assert not result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "AVX2"])
def test_other_processors_compute_the_same(name):
    """Guards against code that only runs where nobody develops, and against reads out of bounds."""
    expected, found = printed("AVX2"), printed(name)
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    assert len(found) > 2000
    numbers = [torch.tensor([float(number) for _, number in each]) for each in (found, expected)]
    torch.testing.assert_close(*numbers, rtol=2e-5, atol=2e-5)
