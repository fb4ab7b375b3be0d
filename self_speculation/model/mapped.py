"""Weights mapped from a file: whether they were written to, and how to free the memory of their pages.

A private mapping has pages of the file until the process writes to them. Linux tells the two kinds apart
(/proc/self/pagemap), so an unwritten weight is known without reading it. On other systems no weight counts as
mapped.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import re
from collections.abc import Hashable
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

_PAGE = mmap.PAGESIZE

# The three highest bits of a page's entry (present, swapped, of a file): not in memory; the file's; the
# file's while the kernel moves it.
_UNWRITTEN = (0, 5, 3)

# Start, end, offset in the file, device and inode of a writable private mapping.
_MAPPING = re.compile(r"^(\w+)-(\w+) rw-p (\w+) (\S+) ([1-9]\d*) ", re.MULTILINE)


class MappedFiles:
    """The process's mappings, read at the first mapped weight."""

    def address(self, weight: Tensor) -> Hashable | None:
        """Device, inode and offset of a weight in its file; None: it is not mapped, or was written to."""
        if not _is_unwritten(weight):
            return None
        first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        index = bisect.bisect_right(self._mappings, (first, 2**64)) - 1
        start, end, offset, *file = self._mappings[index] if index >= 0 else (0, 0, 0)
        return (*file, offset + first - start) if first < last <= end else None

    @cached_property
    def _mappings(self) -> list[tuple[int, int, int, str, str]]:
        maps = Path("/proc/self/maps").read_text()
        return [
            (int(start, 16), int(end, 16), int(offset, 16), device, inode)
            for start, end, offset, device, inode in _MAPPING.findall(maps)
        ]


def release(weight: Tensor) -> None:
    """Free the pages of an unwritten mapped weight; the next read gets them from the file again."""
    if not _is_unwritten(weight):
        return
    start = -(-weight.data_ptr() // _PAGE) * _PAGE
    size = (weight.data_ptr() + weight.nbytes) // _PAGE * _PAGE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _is_unwritten(weight: Tensor) -> bool:
    """Whether each page of a weight is a file's, or not in memory."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.nbytes:
        return False
    first, last = weight.data_ptr() // _PAGE, -(-(weight.data_ptr() + weight.nbytes) // _PAGE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(8 * first)
            entries = pages.read(8 * (last - first))
    except OSError:  # another system, or no access
        return False
    kinds = np.frombuffer(entries, np.uint64) >> 61
    return len(kinds) == last - first and bool(np.isin(kinds, _UNWRITTEN).all())
