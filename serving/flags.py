"""The flags of serve.py alone; model and generation have more. Imports nothing heavy."""

import math
from dataclasses import dataclass
from typing import Literal

from arguments import TemplateArguments, at_least, check


@dataclass(frozen=True)
class ServeArguments(TemplateArguments):
    """Address, access and limits of the server."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all addresses of this machine."""
    port: int = 8000
    """Port to listen at; 0: any free port."""
    api_key: str | None = None
    """Key that clients must send. Prefer the environment variable SELF_SPECULATION_API_KEY: other users of
    this machine can see a command line. Without a key, the server answers every client."""
    served_name: str | None = None
    """Name of the model for clients; default: the hub id or the name of the folder or file."""
    max_waiting: int = 64
    """Most requests that wait for a slot among --batch_size; further requests get status 429."""
    max_answer_tokens: int | None = None
    """Most tokens of an answer that a request may ask for; default: what the context has room for."""
    max_time: float = 600.0
    """Seconds from a request's arrival until it is aborted with status 504."""
    max_body: int = 4_000_000
    """Most bytes of a request body."""
    log_requests: bool = False
    """Print a line for each answer and error: path and x-request-id, how it ended, tokens and times."""
    log_format: Literal["text", "json"] = "text"
    """How lines on standard error are written; json: one object a line, with `time` and `message`."""
    shutdown_time: float = 30.0
    """Seconds after SIGTERM, SIGHUP or Ctrl-C in which the server ends, at least 5. Requests that are
    unfinished 5 seconds before are aborted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "port", 0 <= self.port < 2**16, f"must be between 0 and {2**16 - 1}")
        check(self, "api_key", self.api_key != "", "must not be empty")
        at_least(self, 0, "max_waiting", "max_time")
        check(self, "shutdown_time", 0 <= self.shutdown_time < math.inf, "must be 0 or more")
        at_least(self, 1, "max_body")
        if self.max_answer_tokens is not None:
            at_least(self, 1, "max_answer_tokens")
