"""Progress of long work on a model's weights. Scripts show it; the library shows nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

# (title, size, unit) -> a function that is called with what is done since the last call
Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], object]]]

_bars: list[Bar] = []


@contextmanager
def shown_by(bar: Bar) -> Iterator[None]:
    """Show progress by bars of this kind, on all threads, in this context."""
    _bars.append(bar)
    try:
        yield
    finally:
        _bars.pop()


def is_shown() -> bool:
    """Whether somebody shows progress."""
    return bool(_bars)


def progress(title: str, size: int, unit: str = "B") -> AbstractContextManager[Callable[[int], object]]:
    """A context that gives a function to call with what is done since the last call."""
    return _bars[-1](title, size, unit) if is_shown() and size else nullcontext(lambda done: None)
