"""Assembles the kernels that a fused layer launches on a card, without one: a line of JSON for each kernel.

python tests/backends/assembly.py CARD,WIDTH,HEADS,KV_HEADS,SIZE,ROWS [...]    # 90,1,32,32,128,1: a 7B model
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from self_speculation.backends import card_kernels as kernels

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}


def launch(card, width, heads, kv_heads, size, rows):
    """Call the kernels as a layer does, over tensors without memory."""
    target = GPUTarget("cuda", card, 32)
    driver = {"device": lambda: card, "stream": lambda _: 0, "target": lambda: target}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{k}": v for k, v in driver.items()}))
    kernels._processors = lambda _: PROCESSORS[card]
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    # Only models with heads of 256 have norms of queries and keys.
    norm = empty(size) if size == 256 else None
    table = empty(4096, size)
    cache = empty(8, kv_heads, 4096, size)
    positions = torch.empty(rows, width, dtype=torch.long, device="meta")
    qkv = empty(rows * width, (heads + 2 * kv_heads) * size)
    prefix_reads = torch.empty(9, dtype=torch.long, device="meta")
    kernels.decode_attention(
        qkv, norm, norm, 1e-5, False, table, table, cache, cache, positions, prefix_reads, size**-0.5, None
    )
    kernels.gated(empty(rows * width, 2 * 4096), size == 256)


def resources(cubin):
    """REG, STACK, SHARED, LOCAL of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [program, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name.lower(): int(number) for name, number in re.findall(r"(\w+):(\d+)", report.stdout)}


def assemble(case, run, kernel, *args, grid, warmup, **constants):  # noqa: ARG001
    built = run(kernel, *args, grid=grid, warmup=True, **constants)
    line = {"case": case, "kernel": built.name, "programs": math.prod(grid), **resources(built.asm["cubin"])}
    print(json.dumps(line | {"shared": built.metadata.shared}), flush=True)


if __name__ == "__main__":
    run = triton.JITFunction.run
    for case in sys.argv[1:]:
        triton.JITFunction.run = lambda *args, _case=case, **more: assemble(_case, run, *args, **more)
        launch(*map(int, case.split(",")))
