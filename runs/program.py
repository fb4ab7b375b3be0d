"""How a script begins and ends: Ctrl-C, the exit status, and errors in one line.

Light: a script imports it before it reads its flags.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from arguments import refuse
from runs import ranks
from runs.failures import EXPLAINABLE, reason
from runs.status import work_bar
from self_speculation.config import RankError
from self_speculation.model.progress import shown_by


def run(main: Callable[[], int], **advice: str) -> NoReturn:
    """Run `main` and end the program with its status, or with one line after Ctrl-C or a known failure.

    `advice` is for `reason`.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Loading makes many objects and no garbage, and collections would take a second. `load_generator` enables
    # the collector again.
    gc.disable()
    try:
        with shown_by(work_bar):
            status = main()
        sys.stdout.flush()
        ranks.leave()
    except KeyboardInterrupt:
        status = 130
        if ranks.is_first():
            print("interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of the output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (*EXPLAINABLE, RankError) as error:
        from self_speculation.model.devices import is_lost_rank

        if (why := reason(error, **advice)) is not None:
            refuse(why, status=1)
        if not is_lost_rank(error):
            raise
        status = 1  # the lost rank or torchrun says why
    sys.exit(status)
