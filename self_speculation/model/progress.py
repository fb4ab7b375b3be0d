"""Long work on a model's weights tells how far it is. Scripts show it; the library itself shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[int], object]
# What is being done, and of how many bytes -> what is called with the bytes that are done meanwhile.
Bar = Callable[[str, int], AbstractContextManager[Advance]]


def _no_bar(what: str, num_bytes: int) -> AbstractContextManager[Advance]:  # noqa: ARG001
    return nullcontext(lambda done: None)


_bar: Bar = _no_bar


@contextmanager
def shown_by(bar: Bar) -> Iterator[None]:
    """Show the progress of what is done in this context, on whichever thread, by bars of this kind."""
    global _bar
    before, _bar = _bar, bar
    try:
        yield
    finally:
        _bar = before


def progress(what: str, num_bytes: int) -> AbstractContextManager[Advance]:
    """For work on so many bytes: call what it gives with the bytes that are done since the last call."""
    return (_bar if num_bytes else _no_bar)(what, num_bytes)
