"""How a script begins and ends: Ctrl-C, the exit status, and errors in one line.

Light: a script imports it before it has read its flags.
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
from runs.status import bars_fit_the_output, work_bar
from self_speculation.model.progress import shown_by


def run(main: Callable[[], int], **advice: str) -> NoReturn:
    """End the program with the status that `main` returns; after Ctrl-C, or what is no mistake of the
    program, in one line.

    Args:
        advice: see `reason`.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    bars_fit_the_output()
    # Modules and vocabularies are many objects and no garbage: to look for some takes a second while they are
    # loaded. Who has loaded a model calls `gc.enable`.
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
    except ranks.AnotherRankFailed:
        ranks.let_the_failed_end_first()
        status = 1
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except EXPLAINABLE as error:
        if (why := reason(error, **advice)) is None and not ranks.is_lost(error):
            raise
        refuse(why or "another rank is gone", status=1)
    sys.exit(status)
