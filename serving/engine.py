"""One thread has the model: jobs in, results out. Between two rounds jobs come and go.

It should be the thread that has loaded the model. On a CPU each thread that computes gets helpers of OpenMP,
and where there are more of them than cores, they sleep between the steps of a pass: it takes twice as long.

Knows nothing of HTTP, of text, or of who asks.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition

from transformers import PreTrainedModel

from self_speculation import (
    GenerationConfig,
    GenerationStrategyResult,
    HuggingfaceLlamaGenerator,
    Request,
)
from self_speculation.decoding_strategy import DecodingStrategy
from self_speculation.model.devices import broadcast_from_rank0
from self_speculation.model.families import context_length
from self_speculation.scheduler import Scheduler

# Tokens of a usual prompt.
_PROMPT = 1024

_log = logging.getLogger(__name__)


class RequestEnded(Exception):
    """A job that was not begun, or ended before its answer did, for no fault of its own."""


class QueueFull(RequestEnded):
    """There are as many jobs as there may be."""


class ClientDisconnected(RequestEnded):
    """Nobody waits for it any more."""


class RequestTimeout(RequestEnded):
    """It took longer than it may."""


class ServerShutdown(RequestEnded):
    """The engine ends."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine.

    Args:
        request: as a strategy takes it.
        ended: told by the engine's thread what came of it.
        most_seconds: that it may take from now on.
    """

    request: Request
    ended: Callable[[GenerationStrategyResult | Exception], None]
    most_seconds: float = math.inf
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = math.nan  # when it left the queue
    is_gone: bool = False  # set by whoever does not wait any more
    over: RequestEnded | None = None  # why it is to end


class Engine:
    """See the module.

    Where several processes hold one model together, this is the first one, and the others `follow` it.

    Args:
        batch_size: jobs at a time.
        max_waiting: jobs besides these.

    Raises:
        ValueError: a model or a config that cannot be decoded with.
    """

    def __init__(
        self,
        strategy: DecodingStrategy,
        model: PreTrainedModel,
        config: GenerationConfig,
        batch_size: int,
        max_waiting: int,
    ) -> None:
        self._scheduler: Scheduler[int] = Scheduler(strategy, model, config, batch_size)
        # A request that reaches further has its passes captured while others stream.
        self._scheduler.run_every_pass(min(context_length(model.config), _PROMPT + config.max_steps))
        self._model = model
        self._batch_size, self.most_jobs = batch_size, batch_size + max_waiting
        self._waiting: deque[Job] = deque()
        self._in_flight: dict[int, Job] = {}  # by the order in which they were admitted
        self._numbers = itertools.count()
        self._changed = Condition()  # guards the jobs
        self._ends_at = math.inf  # from when on no job goes on
        self._is_stopped = False

    @property
    def is_up(self) -> bool:
        """Whether it takes jobs."""
        return self._ends_at == math.inf

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have these done: all of them, or none.

        Raises:
            Unanswered: there is no room for them, or the engine ends.
        """
        with self._changed:
            if not self.is_up:
                raise ServerShutdown("the server shuts down")
            if self.num_waiting + self.num_in_flight + len(jobs) > self.most_jobs:
                raise QueueFull(f"{self.num_waiting} requests wait already: try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def shut_down(self, seconds: float) -> None:
        """Take no more jobs, and end those that there are in so many seconds. Takes no lock: it may be a
        signal's handler that calls.
        """
        self._ends_at = min(self._ends_at, time.perf_counter() + seconds)

    def stop(self) -> None:
        """Have `run` end, as soon as jobs can be ended."""
        self.shut_down(0)
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def run(self) -> bool:
        """Do what is submitted, until it is to stop; whether all went well."""
        try:
            while self._is_wanted():
                self._step()
            return True
        except Exception:
            _log.exception("the engine failed")
            return False
        finally:
            with self._changed:
                self.shut_down(0)
                left = [*self._in_flight.values(), *self._waiting]
                self._in_flight.clear()
                self._waiting.clear()
            for job in left:
                self._end(job, ServerShutdown("the server failed"))
            broadcast_from_rank0(self._model, None)

    def _is_wanted(self) -> bool:
        """Waits for work; False where there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._in_flight or self._is_stopped)
            return bool(self._waiting or self._in_flight)

    def _step(self) -> None:
        """End what is over, admit what there is room for, make a round, and tell what has ended."""
        over = [number for number, job in self._in_flight.items() if self._is_over(job)]
        with self._changed:
            given_up = [job for job in self._waiting if self._is_over(job)]
            for job in given_up:
                self._waiting.remove(job)
            room = min(self._batch_size - self.num_in_flight, self.num_waiting)
            admitted = {next(self._numbers): self._waiting.popleft() for _ in range(room)}
            self._in_flight |= admitted
        for job in given_up:
            self._end(job, job.over)
        # All that a clock or a client decides, once a round: each is a wait for the other processes.
        requests = [(job.request.ids, job.request.seed, job.request.config) for job in admitted.values()]
        broadcast_from_rank0(self._model, (over, requests))
        self._scheduler.cancel(over)
        for number, job in admitted.items():
            job.admitted = time.perf_counter()
            self._scheduler.add_request(number, job.request)
        try:
            self._scheduler.step()
        except Exception:  # it is the result of each of the rows, and of no other job
            _log.exception("a round of %d rows failed", len(self._scheduler.batch))
        for number, result in self._scheduler.pop_finished():
            job = self._in_flight.pop(number)
            self._end(job, job.over or result)

    def _is_over(self, job: Job) -> bool:
        """Whether it is to end although its answer has not, and why."""
        now = time.perf_counter()
        if job.is_gone:
            job.over = ClientDisconnected("nobody waits for the answer")
        elif now > job.arrived + job.most_seconds:
            job.over = RequestTimeout(f"no answer after {job.most_seconds:g} seconds")
        elif now > self._ends_at:
            job.over = ServerShutdown("the server shuts down")
        return job.over is not None

    def _end(self, job: Job, result: GenerationStrategyResult | Exception | None) -> None:
        assert result is not None
        try:
            job.ended(result)
        except Exception:
            _log.exception("a result reached nobody")


def follow(generator: HuggingfaceLlamaGenerator, config: GenerationConfig, batch_size: int) -> None:
    """Do what the engine of the first process does, up to its end."""
    model, strategy = generator.model, generator.generation_strategy
    assert isinstance(strategy, DecodingStrategy)
    scheduler: Scheduler[int] = Scheduler(strategy, model, config, batch_size)
    numbers = itertools.count()
    while (told := broadcast_from_rank0(model, None)) is not None:
        over, requests = told
        scheduler.cancel(over)
        for ids, seed, own in requests:
            scheduler.add_request(
                next(numbers), generator.prepared(Request(ids, seed=seed, config=own), own)[0]
            )
        with suppress(Exception):  # the first process says so
            scheduler.step()
        scheduler.pop_finished()
