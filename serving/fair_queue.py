"""A few threads that do work of requests: clients take turns, and a full queue refuses more."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from serving.engine import QueueFull

Result = TypeVar("Result")


class FairQueue:
    """Runs work in threads. While all threads are busy, work waits, and clients take turns. Beyond the limit,
    the client with the most work in the queue loses the newest piece, so no client fills the queue for all.
    The threads skip cancelled work.

    Args:
        what: the kind of work, in the plural, for messages.
        max_waiting: most pieces of work that wait.
    """

    def __init__(self, what: str, max_waiting: int, num_threads: int = 2) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._threads = ThreadPoolExecutor(num_threads, what)
        self._num_free = num_threads
        # Client -> a future for each piece of work; the next client comes first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(self, client: str, work: Callable[[], Result]) -> Result:
        """Do the work in a thread and return the result. Raises QueueFull."""
        loop = asyncio.get_running_loop()

        def pass_on(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._pass_on)

        if self._num_free:
            self._num_free -= 1
        else:
            await self._turn(client)
        # The work runs to the end, also when the client has left.
        running = self._threads.submit(work)
        running.add_done_callback(pass_on)
        return await asyncio.wrap_future(running)

    async def _turn(self, client: str) -> None:
        """Wait until a thread is free."""
        alive = {
            name: deque(turn for turn in turns if not turn.done()) for name, turns in self._waiting.items()
        }
        self._waiting = {name: turns for name, turns in alive.items() if turns}
        numbers = {client: 0, **{name: len(turns) for name, turns in self._waiting.items()}}
        if (number := sum(numbers.values())) >= self._max_waiting:
            full = QueueFull(f"{number} {self._what} wait already: try again later")
            busiest = max(numbers, key=lambda name: numbers[name])
            if numbers[busiest] <= numbers[client] + 1:
                raise full
            self._waiting[busiest][-1].set_exception(full)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # The turn has come, and it has not lost its place: another client gets the thread.
            if not turn.cancelled() and turn.exception() is None:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give the thread that has become free to the next client."""
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            del self._waiting[client]
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # the last in the order
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
