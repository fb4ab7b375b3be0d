"""Failures that are no mistake of the program, in one line with advice: memory, logits, the disk.

Light: `runs.program` imports it before a script reads flags.
"""

import errno
import tempfile
from pathlib import Path

from arguments import refuse
from runs import ranks

# Ways to generate with less memory.
LESS = (
    "a shorter prompt, a lower --max_steps, --dtype half, --quantization int8 or int4, --draft_weights exact"
)
# Words of torch, of the operators and of Python; torch.OutOfMemoryError is a RuntimeError.
_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "allocate memory",
    "aoti_torch_empty",
    "can't start new thread",
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk


class Failed(Exception):
    """The work cannot go on; the message is one line that names the example or the file."""


def reason(error: BaseException, less: str = LESS, batch_size: int = 1) -> str | None:
    """Explain an error in one line; None for a mistake of the program. `less`: ways to use less memory."""
    if isinstance(error, FloatingPointError | ChildProcessError | Failed):
        return str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.filename or 'the output'} cannot be written ({error.strerror})"
    if batch_size > 1:
        less = f"a --batch_size below {batch_size}, {less}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"out of memory{f': {cause}' if str(cause) else ''}; less takes {less}"
        is_short = isinstance(cause, RuntimeError) and any(words in str(cause) for words in _OUT_OF_MEMORY)
        if is_short or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return f"out of memory; less takes {less}"
        cause = cause.__cause__
    return None


def check_writable(flag: str, folder: str | Path) -> None:
    """Make a folder; end the program with one line, before anything is loaded, if no file can be in it."""
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        refuse(f"--{flag} {folder}: is not a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        refuse(f"--{flag} {folder}: cannot be written ({error.strerror})")


def check_folder(output_dir: str, resume: str | None) -> None:
    """`check_writable` for the folder of a run's records, at the first process."""
    if ranks.is_first():
        check_writable("resume" if resume else "output_dir", resume or output_dir)
