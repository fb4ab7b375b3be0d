"""How a script begins and ends: Ctrl-C, the exit status, and errors in one line.

Light: a script imports it before it reads flags.
"""

import faulthandler
import gc
import itertools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import NoReturn

from arguments import refuse
from runs import ranks
from runs.failures import LESS, reason
from runs.status import print_status, work_bar
from self_speculation.machine.progress import shown_by

_NO_THREAD = b"error: out of memory: a thread cannot start\n"


def on_signals(act: Callable[[int], None], seconds: float) -> None:
    """From now on a thread for signals calls `act` at SIGTERM, Ctrl-C and SIGHUP, whatever the main thread
    does; with the number of signals so far. SIGHUP stays ignored where it is (`nohup`).

    A process that still runs so many seconds after the first one is ended by faulthandler, whose thread does
    not wait for other threads. It writes where each thread is.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender)  # gets a byte at once; a handler in Python waits for the main thread
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)

    def wait() -> None:
        for count in itertools.count(1):
            os.read(receiver, 1)
            if count == 1:
                with suppress(RuntimeError):  # no memory for the thread
                    faulthandler.dump_traceback_later(seconds, exit=True)
            act(count)

    Thread(target=wait, name="signals", daemon=True).start()


def enable_collector() -> None:
    """Collect garbage from now on. Until a model is there `run` does not: loading makes many objects and no
    garbage, and collections would take a second.
    """
    gc.freeze()  # all present objects live to the end
    gc.enable()


def run(main: Callable[[], int], less: str = LESS) -> NoReturn:
    """Run `main` and end the program with the status, or with one line after Ctrl-C or a known failure;
    `less`: ways to use less memory.
    """
    gc.disable()  # until `enable_collector`
    sys.unraisablehook = _end_without_memory
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with shown_by(work_bar):
            status = main()
        sys.stdout.flush()
        ranks.leave()
    except BrokenPipeError:  # the reader of the output, such as `head`, is gone
        _discard_output()
        status = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__  # a library makes an ImportError of Ctrl-C
        if cause is not None:
            print_status("interrupted")
            sys.exit(130)
        if (why := reason(error, less)) is not None:
            try:
                sys.stdout.flush()
            except OSError:
                _discard_output()
            refuse(why, status=1)
        from self_speculation.machine.devices import is_lost_rank

        if not is_lost_rank(error):
            raise
        status = 1  # the lost rank or torchrun says why
    sys.exit(status)


def _end_without_memory(error: "sys.UnraisableHookArgs") -> None:
    """End the program, without more memory, if there is none for the first call of a thread: whoever starts
    the thread waits for ever. Elsewhere, such as in a function for the exit, the shortage is named already.
    """
    if not isinstance(error.exc_value, MemoryError):
        sys.__unraisablehook__(error)
    elif "thread" in (error.err_msg or ""):
        os.write(2, _NO_THREAD)
        os._exit(1)


def _discard_output() -> None:
    """Python would try to write it again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
