"""Long work on a model's weights tells how far it is. Scripts show it; the library itself shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[int], object]
# The work, its size and the unit of that -> called with what is done since the last call.
Bar = Callable[[str, int, str], AbstractContextManager[Advance]]


def _no_bar(what: str, size: int, unit: str) -> AbstractContextManager[Advance]:  # noqa: ARG001
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


def progress(what: str, size: int, unit: str = "B") -> AbstractContextManager[Advance]:
    """A bar for work of this size: call it with what is done since the last call."""
    return (_bar if size else _no_bar)(what, size, unit)
