"""How a script begins and ends: Ctrl-C, the exit status, and errors in one line.

Light: a script imports it before it has read its flags.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from arguments import refuse


def run(main: Callable[[], int], **advice: str) -> NoReturn:
    """End the program with the status that `main` returns; after Ctrl-C, or what is no mistake of the
    program, in one line.

    Args:
        advice: see `reason`.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
        from runs import ranks

        ranks.leave()
    except KeyboardInterrupt:
        status = 130
        if int(os.environ.get("RANK", 0)) == 0:
            print("interrupted", file=sys.stderr)
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (RuntimeError, MemoryError, FloatingPointError) as error:
        from runs.failures import reason
        from self_speculation.model.devices import is_lost_rank

        if (why := reason(error, **advice)) is None and not is_lost_rank(error):
            raise
        refuse(why or "another rank is gone", status=1)
    sys.exit(status)
