"""What can end the work through no fault of the program, said in one line with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from self_speculation import RequestError

# What takes less memory when generating.
_LESS = (
    "a shorter prompt, a lower --max_steps, --dtype half, --quantization int8 or int4, --draft_weights exact"
)

# What `reason` may know something about; anything else is a mistake of the program.
KINDS = (RuntimeError, MemoryError, FloatingPointError)


class Failed(Exception):
    """The work on one example; the message is one line that names it."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device or the machine had none left, as an error says, or the one that it comes from."""
    if error is None:
        return False
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "allocate memory" in said))
        or is_out_of_memory(error.__cause__)
    )


def less(batch_size: int) -> str:
    """What takes less memory when generating so many sequences at a time."""
    return _LESS if batch_size == 1 else f"a --batch_size below {batch_size}, {_LESS}"


def reason(error: BaseException, less: str = _LESS) -> str | None:
    """The line about an error, None where it is a mistake of the program.

    Args:
        less: what takes less memory.
    """
    if is_out_of_memory(error):
        said = f": {error}" if isinstance(error, MemoryError) and str(error) else ""
        return f"out of memory{said}; less takes {less}"
    return str(error) if isinstance(error, FloatingPointError) else None


@contextmanager
def named(what: str, batch_size: int = 1) -> Iterator[None]:
    """Raises `Failed`, which names what was worked on, in place of errors that have a reason; of one request
    of a batch, the error that it met.
    """
    try:
        yield
        return
    except RequestError as error:
        cause = error.cause
    except KINDS as error:
        cause = error
    # Here: raised above, the cause of a RequestError would have that in its context.
    if not isinstance(cause, KINDS) or (why := reason(cause, less(batch_size))) is None:
        raise cause
    raise Failed(f"{what}: {why}") from cause
