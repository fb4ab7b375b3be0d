"""Serve a model to programs that speak OpenAI's protocol, many requests at once, and to people, by a page.

    python serve.py --generation_strategy self_speculative --exit_layer 3 --num_speculations 3 --batch_size 8
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def f(x):"}'

What a request leaves out is as the flags say: they are its defaults.
"""

from __future__ import annotations

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

_GRACE = 5  # seconds for the last words of answers that were ended


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, BatchArguments, ServeArguments, TuningArguments)
    model_args, config, batch, args, tuning = parse(__doc__ or "", *groups, args=argv)
    config = replace(tuned(config, tuning, model_args, argv), reuse_cache=True)
    refuse_idle_drafts(config)
    if model_args.parallel == "data" and not ranks.is_first():
        return 0  # a port is for one process
    listener = _listen(args) if ranks.is_first() else None

    import uvicorn

    from runs.startup import load_generator, meet, model_name
    from serving.app import make_app
    from serving.engine import Engine, follow

    meet(model_args)
    generator = load_generator(model_args, config, counted=counts(tuning.tuned, model_args))
    if listener is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first process ends it
        follow(generator, config, batch.batch_size)
        return 0
    engine = Engine(
        generator.generation_strategy, generator.model, config, batch.batch_size, args.max_waiting
    )
    name = args.served_name or _name(model_name(model_args))

    address, port = listener.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address  # version 6
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(generator, engine, config, args, name, address),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(args.shutdown_time) + _GRACE,
        )
    )

    def shut_down(number: int, frame: FrameType | None) -> None:
        engine.shut_down(args.shutdown_time)
        server.handle_exit(number, frame)

    def answer() -> None:
        try:
            server.run([listener])
        finally:
            engine.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, shut_down)
    print(f"serving {name} at http://{host}:{port}", file=sys.stderr, flush=True)
    http = Thread(target=answer, name="http")
    http.start()
    went_well = engine.run()
    server.should_exit = True
    http.join()
    return 0 if went_well and server.started else 1


def _listen(args: ServeArguments) -> socket.socket:
    """The socket; early, since it takes a while to load a model. Who connects meanwhile waits."""
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        refuse(f"--host {args.host} --port {args.port}: {why}")


def _name(model: str) -> str:
    """What clients call a model: as the hub does, or, where that would be a path, by its last part."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model


if __name__ == "__main__":
    run(main)
