"""Serve a model over OpenAI's protocol with continuous batching, and a chat page for a browser.

    python serve.py --generation_strategy self_speculative --exit_layer 3 --num_speculations 3 --batch_size 8
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def f(x):"}'

The flags are defaults for what requests leave out. Variables of the environment are defaults of the flags:
SELF_SPECULATION_PORT is the default of --port.
"""

import ctypes
import math
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

from arguments import SELDOM, BatchArguments, GenerationConfig, ModelArguments, parse, refuse
from runs import ranks
from runs.flags import validate
from runs.program import on_signals, run
from runs.status import log_as_json, print_status
from serving.flags import ServeArguments

_GRACE = 5  # seconds in which aborted requests get their last event
_ADDRESSES = 2  # reserves: of threads and an answer, and the one that stays
_M_ARENA_MAX = -8  # of malloc.h
_POLL_SECONDS = 0.01  # until the port answers
_SWITCH_INTERVAL = 5e-4  # seconds that another thread may keep the engine's waiting; Python has 5e-3


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, BatchArguments, ServeArguments)
    without = ("output_dir", *SELDOM)
    model_args, config, batch, args = parse(
        __doc__ or "", *groups, args=argv, without=without, environment=os.environ
    )
    if args.log_format == "json":
        log_as_json()
    config = replace(config, reuse_cache=True)
    if not ranks.is_first():
        return 2  # the first one says why
    if ranks.num_processes() > 1:
        refuse("torchrun: serve.py is one process; for a model on several cards: --device split")
    validate(model_args, config)
    if args.max_answer_tokens is not None and args.max_answer_tokens < config.max_steps:
        what = f"at least --max_steps ({config.max_steps}), which requests without max_tokens get"
        refuse(f"--max_answer_tokens {args.max_answer_tokens}: must be {what}")
    try:  # before the model is loaded: clients that connect early wait
        family, *_, place = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family)
    except (OSError, UnicodeError) as error:
        refuse(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}")

    import uvicorn

    from runs.startup import load_generator
    from self_speculation import Request
    from self_speculation.machine.devices import RESERVED_ADDRESSES, free_addresses
    from self_speculation.text.grammar import Grammar
    from serving.answers import ServedModel
    from serving.app import App
    from serving.engine import Engine
    from serving.http11 import StrictProtocol, most_connections

    def check_addresses(weights: int) -> None:
        """End the program in time: without memory, libraries abort, and a thread that begins never ends."""
        least = _ADDRESSES * RESERVED_ADDRESSES + 2 * weights  # the file, and rows that are moved
        if (free := free_addresses()) < least:
            left = f"`ulimit -v` leaves {max(0.0, free) / 1e6:.0f} MB"
            refuse(f"out of memory: {left}, and the server needs {least / 1e6:.0f} more", status=1)

    if free_addresses() < math.inf:
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # glibc takes 64 MB of addresses for each thread
    path = Path(model_args.model_name).expanduser()
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    check_addresses(sum(file.stat().st_size for file in files))
    generator = load_generator(model_args, config)
    check_addresses(0)
    latest_end = max(args.shutdown_time, _GRACE)
    engine = Engine(generator, config, batch.batch_size, args.max_waiting)
    name = args.served_name or (path.resolve().name if path.exists() else model_args.model_name)
    address, port = listener.getsockname()[:2]
    app = App(ServedModel(generator, engine, config, args, name), address)
    # The first grammar takes longer. There may be no fast tokenizer, or the machine may be too busy now.
    with suppress(ValueError, ChildProcessError):
        generator.tokenize(Request("", grammar=Grammar.json_schema({})), config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=StrictProtocol,
            backlog=most_connections()[1],
            timeout_graceful_shutdown=_GRACE - 1,
        )
    )

    failure: Exception | None = None

    def serve() -> None:
        nonlocal failure
        try:
            server.run([listener])
        except Exception as error:
            failure = error
        finally:
            engine.shut_down(0)

    def shut_down(count: int) -> None:
        """Finish what is begun, or nothing at the second signal. Meanwhile /health says 503."""
        seconds = latest_end - _GRACE if count == 1 else 0
        engine.shut_down(seconds)
        if unfinished := len(engine.in_flight) + len(engine.waiting):
            print_status(f"shutting down; unfinished answers: {unfinished}, which may take {seconds:g} s")

    on_signals(shut_down, latest_end)
    sys.setswitchinterval(_SWITCH_INTERVAL)
    host = f"[{address}]" if ":" in address else address
    http = Thread(target=serve, name="http")
    http.start()
    try:
        while http.is_alive() and not server.started:
            http.join(_POLL_SECONDS)
        if server.started:
            print_status(f"serving {name} at http://{host}:{port}")
        succeeded = engine.run()
    finally:
        server.should_exit = True
        http.join()
    if failure is not None:
        raise failure
    print_status("the server has ended")
    return 0 if succeeded and server.started else 1


if __name__ == "__main__":
    run(main)
