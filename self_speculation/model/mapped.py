"""Weights that are mapped from a file: whether somebody wrote to them, and memory that they need not take.

A private mapping has the file's pages, which are in memory once they were read. A page that the process
writes to becomes its own. Linux tells the two apart (/proc/self/pagemap). So a weight that nobody wrote to is
known without reading it. On other systems no weight counts as mapped.
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

# A page by the three highest bits of its entry (present, swapped, of a file): not in memory, the file's, the
# file's while the kernel moves it.
_UNWRITTEN = (0, 5, 3)

# Start, end, offset in the file, device and inode of a private mapping that may be written to.
_MAPPING = re.compile(r"^(\w+)-(\w+) rw-p (\w+) (\S+) ([1-9]\d*) ", re.MULTILINE)


class MappedFiles:
    """The files that are mapped when the first weight is asked about."""

    def place(self, weight: Tensor) -> Hashable | None:
        """Device, inode and offset of the bytes of a weight in the file that it is mapped from; None where it
        is not mapped, or somebody has written to one of its pages since.
        """
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
    """Let the pages of a mapped weight go: whoever reads it next gets them from the file again. A weight that
    is not mapped, or that somebody wrote to, stays as it is.
    """
    if not _is_unwritten(weight):
        return
    start = -(-weight.data_ptr() // _PAGE) * _PAGE
    size = (weight.data_ptr() + weight.nbytes) // _PAGE * _PAGE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _is_unwritten(weight: Tensor) -> bool:
    """Whether each page of a weight is a file's, or in no memory yet."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.nbytes:
        return False
    first, last = weight.data_ptr() // _PAGE, -(-(weight.data_ptr() + weight.nbytes) // _PAGE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(8 * first)
            entries = pages.read(8 * (last - first))
    except OSError:  # another system, or one that does not show it
        return False
    kinds = np.frombuffer(entries, np.uint64) >> 61
    return len(kinds) == last - first and bool(np.isin(kinds, _UNWRITTEN).all())
