"""The flags of serve.py besides those of model and generation. Light: a mistyped flag is answered at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from arguments import at_least, check


@dataclass(frozen=True)
class ServeArguments:
    """Where to listen, to whom, and how much at once."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: at all of this machine."""
    port: int = 8000
    """Port to listen at; 0: any free one."""
    api_key: str | None = None
    """What clients must know. Better in the environment variable SELF_SPECULATION_API_KEY: everybody on this
    machine can see a command line. Without a key, whoever reaches the port is answered."""
    served_name: str | None = None
    """The model's name for clients; without it, the hub id or the name of the folder or file."""
    max_waiting: int = 64
    """Most requests that wait for a place among --batch_size; more are refused with status 429."""
    max_time: float = 600.0
    """Seconds from a request's arrival after which it is ended with status 504."""
    max_tokens: int | None = None
    """Most new tokens that a request may ask for; without it, as many as the context has room for. What a
    request gets that asks for no number is --max_steps."""
    max_body: int = 4_000_000
    """Most bytes of a request."""
    sanitize_control_tokens: bool = False
    """Read control tokens that stand in the messages of a chat, such as <|im_end|>, as text. Without it they
    are the tokens that they name: a message can end itself, and begin another one in the system's name."""
    shutdown_time: float = 30.0
    """Seconds that requests have to end in after SIGTERM or Ctrl-C."""

    def __post_init__(self) -> None:
        check(self, "port", 0 <= self.port < 2**16, f"must be between 0 and {2**16 - 1}")
        check(self, "api_key", self.api_key != "", "must not be empty")
        at_least(self, 0, "max_waiting", "max_time")
        check(self, "shutdown_time", 0 <= self.shutdown_time < math.inf, "must be 0 or more")
        at_least(self, 1, "max_tokens", "max_body")

    @property
    def key(self) -> str | None:
        """What clients must know, by flag or environment."""
        return self.api_key or os.environ.get("SELF_SPECULATION_API_KEY") or None
