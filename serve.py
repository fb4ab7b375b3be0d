"""Serve a model over OpenAI's protocol with continuous batching, and a chat page for a browser.

    python serve.py --generation_strategy self_speculative --exit_layer 3 --num_speculations 3 --batch_size 8
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def f(x):"}'

The flags are defaults for what requests leave out.
"""

from __future__ import annotations

if __name__ == "__main__":
    import runs.early  # noqa: F401

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import FrameType

from arguments import (
    BatchArguments,
    GenerationConfig,
    ModelArguments,
    parse,
    refuse,
    refuse_idle_drafts,
)
from runs import ranks
from runs.program import run
from runs.tuning import TuningArguments, counts, tuned
from serving.flags import ServeArguments

_GRACE = 5  # seconds in which aborted requests get their last event


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, BatchArguments, ServeArguments, TuningArguments)
    model_args, config, batch, args, tuning = parse(__doc__ or "", *groups, args=argv)
    config = replace(tuned(config, tuning, model_args, argv), reuse_cache=True)
    refuse_idle_drafts(config)
    if model_args.parallel == "data" and not ranks.is_first():
        return 0  # only one process can have the port
    listener = _listen(args) if ranks.is_first() else None

    import uvicorn

    from runs.startup import load_generator, meet, model_name
    from serving.app import App
    from serving.engine import Engine, follow

    meet(model_args)
    generator = load_generator(model_args, config, counted=counts(tuning.tuned, model_args))
    if listener is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first rank ends this one
        follow(generator, config, batch.batch_size)
        return 0
    engine = Engine(generator, config, batch.batch_size, args.max_waiting)
    name = args.served_name or _name(model_name(model_args))
    address, port = listener.getsockname()[:2]
    server = uvicorn.Server(
        uvicorn.Config(
            App(generator, engine, config, args, name, address),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(args.shutdown_time) + _GRACE,
        )
    )

    def shut_down(number: int, frame: FrameType | None) -> None:
        engine.shut_down(args.shutdown_time)
        server.handle_exit(number, frame)

    def serve() -> None:
        try:
            server.run([listener])
        finally:
            engine.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, shut_down)
    host = f"[{address}]" if ":" in address else address
    print(f"serving {name} at http://{host}:{port}", file=sys.stderr, flush=True)
    http = Thread(target=serve, name="http")
    http.start()
    try:
        succeeded = engine.run()
    finally:
        server.should_exit = True
        http.join()
    return 0 if succeeded and server.started else 1


def _listen(args: ServeArguments) -> socket.socket:
    """Open the socket before the model is loaded: clients that connect early wait."""
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        refuse(f"--host {args.host} --port {args.port}: {why}")


def _name(model: str) -> str:
    """The hub id, or the last part of a path."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model


if __name__ == "__main__":
    run(main)
