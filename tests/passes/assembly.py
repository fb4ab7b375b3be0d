"""Assembles the kernels of a card by Triton's compiler, which needs no card: a line of JSON for each.

python tests/passes/assembly.py CARD WIDTH HEADS KV_HEADS SIZE ROWS [...]    # 90 1 32 32 128 1: a 7B model
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as build

from self_speculation.devices import padded
from self_speculation.passes import triton_kernels as kernels

POINTERS = dict.fromkeys(("qkv", "query_norm", "key_norm", "cos", "sin", "keys", "values", "out"), "*bf16")
TYPES = {
    **POINTERS,
    "positions": "*i64",
    "sums": "*fp32",
    "stats": "*fp32",
    "epsilon": "fp32",
    "scale": "fp32",
}
TYPES |= {"of_slot": "i64", "of_head": "i64"}
PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}


def assembled(card, width, heads, kv_heads, size, rows):
    shape = kernels.shape_of(rows, width, heads, kv_heads, size, PROCESSORS[card])
    constants = shape.constants | {
        "SPLITS": shape.grid[1],
        "ADDED": 0.0,
        "HALF": padded(size // 2),
        "ROWS": padded(heads // kv_heads + 2),
        "KEYS": kernels.keys_at_a_time(size),
    }
    for kernel in (kernels.rotate_and_write, kernels.attend, kernels.merge):
        names = kernel.arg_names
        own = {name: value for name, value in constants.items() if name in names}
        if size != 256:  # only these have norms of queries and keys
            own |= {name: None for name in ("query_norm", "key_norm") if name in names}
        signature = {name: "constexpr" if name in own else TYPES.get(name, "i32") for name in names}
        aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in ("of_slot", "of_head")]
        attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        built = build(ASTSource(kernel, signature, own, attrs), target=GPUTarget("cuda", card, 32))
        yield kernel.__name__, built, shape


def resources(cubin):
    """REG, STACK, SHARED, LOCAL of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", said.stdout)}


if __name__ == "__main__":
    for case in sys.argv[1:]:
        numbers = [int(number) for number in case.split(",")]
        for name, built, shape in assembled(*numbers):
            used = resources(built.asm["cubin"])
            line = {"case": case, "kernel": name, "shared": built.metadata.shared}
            line |= {key.lower(): used[key] for key in ("REG", "STACK", "LOCAL")}
            print(json.dumps(line | {"programs": math.prod(shape.grid)}), flush=True)
