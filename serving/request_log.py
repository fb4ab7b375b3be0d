"""Lines about requests on standard error."""

from __future__ import annotations

import time

from runs.status import print_status

_MOST_NAMES = 200  # of fields, since clients could fill the log with them


class RequestLog:
    """Says which fields of requests are ignored, and with `is_on` also how each request ended."""

    def __init__(self, is_on: bool) -> None:
        self._is_on, self._ignored = is_on, set[str]()

    def write(self, origin: str, line: object) -> None:
        if self._is_on:  # in ASCII, since clients could write anything
            print_status(ascii(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {origin}: {line}")[1:-1])

    def name_ignored(self, names: set[str]) -> None:
        """Name each field once."""
        room = _MOST_NAMES - len(self._ignored)
        if new := sorted({ascii(name[:50]) for name in names} - self._ignored)[:room]:
            self._ignored.update(new)
            print_status(f"requests have fields that this server ignores: {', '.join(new)}")
