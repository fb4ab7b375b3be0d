"""The layout of `int4_kernel.cpp`, read back."""

import torch


def unpacked(weight, scales):
    """The kernel's layout -> steps [rows, groups, 32] from 0 to 15, sizes and middles [groups, rows]."""
    blocks, groups = weight.shape[:2]
    halves = torch.stack((weight & 15, weight >> 4), 3)  # [blocks, groups, 4, half, 4 rows + byte]
    steps = (
        halves.view(blocks, groups, 4, 2, 16, 4).permute(0, 4, 1, 2, 3, 5).reshape(blocks * 16, groups, 32)
    )
    return steps, *scales.float().permute(2, 1, 0, 3).flatten(2)
