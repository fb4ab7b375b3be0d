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
from self_speculation.weights.kernels import cpu_operators

FLAGS = {
    "AVX2": ["c++", *kernels.VARIANTS["AVX2"]],
    "AVX_VNNI": ["c++", *kernels.VARIANTS["AVX_VNNI"]],
    "eight bits": ["c++", *kernels.VARIANTS["AVX2"], "-DEIGHT_BITS"],  # AVX_VNNI in plain C++
    "AVX512_BF16": ["c++", *kernels.VARIANTS["AVX512_BF16"]],
    "no vectors": ["c++"],
    "16 numbers": ["c++", "-DWIDE"],
    "ARM": ["aarch64-linux-gnu-g++", "-static", *kernels.VARIANTS["ARM"]],
    "sanitizers": ["c++", *kernels.VARIANTS["AVX2"], "-O1", "-g", "-fsanitize=address,undefined"],
}
NEEDS = {"AVX_VNNI": "avx_vnni", "AVX512_BF16": "avx512_bf16"}  # of the processor

DIGEST_OF_TILES = "digest 1a4b7ff81fa3445f"  # of a Xeon's


def run_program(source, compiler, flags, emulator=()):
    """Lines that a program over the headers of the operators prints."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-std=c++20", "-ffp-contract=off", *flags, "-o", f"{folder}/program"]
        headers = [ROOT / "self_speculation/weights/cpp", kernels._TORCH / "include"]
        subprocess.run([*command, ROOT / source, *(f"-I{header}" for header in headers)], check=True)
        done = subprocess.run([*emulator, f"{folder}/program"], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("flags", [["-DTILES"], kernels.VARIANTS["AMX"]], ids=["plain C++", "processor"])
def test_tiles(flags):
    """Guards against tiles in plain C++, by which prompts are tested where there are no tiles, that are not
    equal to a processor's in every bit, tokens whose bits depend on tokens beside them, and NaN that spreads.
    """
    if "-DTILES" not in flags and not cpu_operators().has_tiles:
        pytest.skip("a processor without, or Linux refuses them")
    assert run_program("tests/weights/tiles.cpp", "c++", ["-O1", *flags]) == [DIGEST_OF_TILES]


@cache
def printed(name):
    """By the name of flags, what operators.cpp prints: kinds and numbers. Each is compiled once."""
    compiler, *flags = FLAGS[name]
    if name == "ARM" and not shutil.which("qemu-aarch64"):
        pytest.skip("no qemu-aarch64")
    if name in NEEDS and not torch.cpu.get_capabilities().get(NEEDS[name], False):
        pytest.skip("a processor without")
    emulator = ["qemu-aarch64"] if name == "ARM" else []
    lines = run_program("tests/weights/operators.cpp", compiler, ["-O2", *flags], emulator)
    return [line.split() for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "AVX2"])
def test_other_processors_compute_the_same(name):
    """Guards against code that only runs where nobody develops, and against reads out of bounds."""
    expected, found = printed("AVX2"), printed(name)
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    assert len(found) > 2000
    numbers = [torch.tensor([float(number) for _, number in each]) for each in (found, expected)]
    torch.testing.assert_close(*numbers, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AVX_VNNI", "eight bits"])
def test_eight_bits_at_once_change_no_bit(name):
    """Guards against text that depends on the processor: AVX_VNNI adds in 32 bits what AVX2 adds in 16, and
    takes quants of eight bits whole. Integers are exact, and all other sums have one order.
    """
    assert printed(name) == printed("AVX2")
