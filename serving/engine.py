"""One thread runs the model: it takes jobs from a queue, and admits and finishes jobs between two steps.

Run it in the thread that has loaded the model. On a CPU every thread that computes starts helper threads of
OpenMP. With more helpers than cores, a pass takes twice as long.

Knows nothing of HTTP or text.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Event

from self_speculation import GenerationConfig, GenerationStrategyResult, HuggingfaceLlamaGenerator
from self_speculation.engine.scheduler import DecodingStrategy, Scheduler
from self_speculation.generator_base import TokenizedRequest
from self_speculation.machine.devices import is_lost_device
from self_speculation.models.families import context_length
from self_speculation.weights.kernels import cpu_operators

_USUAL_PROMPT = 1024  # tokens of a usual prompt
_IDLE_SECONDS = 300  # idle time after which the engine gives back memory of longer prompts
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue has no room for a job."""


class ClientDisconnected(Exception):
    """The client of a job no longer waits."""


class RequestTimeout(Exception):
    """A job is older than --max_time."""


class ServerShutdown(Exception):
    """The engine stops before the end of a job."""


@dataclass(eq=False)
class Job:
    """A request in the engine."""

    request: TokenizedRequest
    on_finish: Callable[[GenerationStrategyResult | Exception], None]  # called by the engine's thread, once
    is_cancelled: Event = field(default_factory=Event)  # all jobs of a client's request share it
    timeout: float = math.inf  # seconds from arrival to end
    arrival_time: float = field(default_factory=time.perf_counter)
    admission_time: float = math.nan
    origin: object = ""  # the client's request, for a log


class Engine:
    """Runs jobs. `run` is the loop; other threads call `submit` and `shut_down`."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        batch_size: int,
        max_waiting: int,
    ) -> None:
        strategy = generator.generation_strategy
        model = generator.model
        assert isinstance(strategy, DecodingStrategy)
        # A chunk of a prompt must not hold up streams for much longer than a round.
        token_budget = min(128, cpu_operators().max_pass_tokens) if model.device.type == "cpu" else 512
        self._scheduler: Scheduler[Job] = Scheduler(strategy, model, config, batch_size, token_budget)
        # Longer requests need more graphs, which the engine captures later, between steps.
        longest = context_length(model.config)
        self._usual = min(longest, _USUAL_PROMPT + config.max_steps)  # positions of a slot
        self._scheduler.capture_passes(self._usual, longest)
        self._batch_size = batch_size
        self.max_jobs = batch_size + max_waiting
        self.max_choices = max(1, self.max_jobs // 2)  # jobs of one request; a second request has room
        self._num_positions = batch_size * longest
        self.waiting: deque[Job] = deque()
        self.in_flight: list[Job] = []
        # The engine's thread calls it with an admitted job, the result, and the error that aborted the job.
        self.on_end: Callable[..., None] = lambda *_: None
        # The engine's thread calls it with the rows of a round and the seconds since the round before.
        self.on_round: Callable[..., None] = lambda *_: None
        self._round_ended = math.nan
        self._changed = Condition()  # guards the jobs
        self._deadline = math.inf  # when the engine aborts all jobs

    @property
    def accepts_jobs(self) -> bool:
        """Whether the engine runs and does not shut down."""
        return self._deadline == math.inf

    @property
    def cache_usage(self) -> float:
        """Used positions of the cache over all positions that the batch can have, from 0 to 1."""
        return self._scheduler.num_positions / self._num_positions

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs or none.

        Raises:
            QueueFull: the queue has no room for them.
            ServerShutdown: the engine accepts no more jobs.
        """
        with self._changed:
            if not self.accepts_jobs:
                raise ServerShutdown("the server shuts down")
            if len(self.waiting) + len(self.in_flight) + len(jobs) > self.max_jobs:
                raise QueueFull(f"{len(self.waiting)} requests wait already: try again later")
            self.waiting.extend(jobs)
            self._changed.notify()

    def shut_down(self, seconds: float) -> None:
        """Accept no more jobs, abort the jobs that are unfinished after `seconds`, and let `run` return."""
        with self._changed:
            self._deadline = min(self._deadline, time.perf_counter() + seconds)
            self._changed.notify()

    def run(self) -> bool:
        """Run jobs until `shut_down` or the loss of the GPU. Returns whether the engine worked to the end."""
        try:
            while True:
                with self._changed:
                    if not self._changed.wait_for(self._must_act, _IDLE_SECONDS):
                        self._scheduler.shrink_cache(self._usual)
                        self._changed.wait_for(self._must_act)
                    if not (self.waiting or self.in_flight):
                        return True
                self._step()
        except Exception:
            _log.exception("the engine failed")
            return False
        finally:
            with self._changed:
                self.shut_down(0)
                unfinished = [*self.in_flight, *self.waiting]
                self.in_flight.clear()
                self.waiting.clear()
            for job in unfinished:
                _call(job.on_finish, ServerShutdown("the server failed"))

    def _must_act(self) -> bool:
        return bool(self.waiting or self.in_flight) or not self.accepts_jobs

    def _step(self) -> None:
        """Abort and admit jobs, run one step of the scheduler, finish jobs."""
        with self._changed:
            jobs = [*self.in_flight, *self.waiting]
            aborted = {job: error for job in jobs if (error := self._abort_error(job))}
            dropped = [job for job in self.waiting if job in aborted]
            for job in dropped:
                self.waiting.remove(job)
            room = min(self._batch_size - len(self.in_flight), len(self.waiting))
            admitted = [self.waiting.popleft() for _ in range(room)]
            self.in_flight += admitted
        for job in dropped:
            _call(job.on_finish, aborted[job])
        self._scheduler.cancel(aborted)
        for job in admitted:
            job.admission_time = time.perf_counter()
            self._scheduler.add_request(job, job.request)
        num_rows = len(self._scheduler.batch)
        try:
            self._scheduler.step()
        except Exception:  # each sequence in the batch has this error as the result
            _log.exception("a step of %d sequences failed", num_rows)
        before = self._round_ended
        self._round_ended = time.perf_counter()
        _call(self.on_round, num_rows, self._round_ended - before)
        for job, result in self._scheduler.pop_finished():
            if isinstance(result, Exception) and is_lost_device(result):
                raise result
            self.in_flight.remove(job)
            if isinstance(result, GenerationStrategyResult):  # also when the engine aborted the job
                _call(self.on_end, job, result, aborted.get(job))
            _call(job.on_finish, aborted.get(job, result))

    def _abort_error(self, job: Job) -> Exception | None:
        now = time.perf_counter()
        if job.is_cancelled.is_set():
            return ClientDisconnected("the client has disconnected")
        if now > job.arrival_time + job.timeout:
            return RequestTimeout(f"no answer after {job.timeout:g} seconds")
        return ServerShutdown("the server shuts down") if now > self._deadline else None


def _call(callback: Callable[..., None], *args: object) -> None:
    """Call and log errors: an error of a callback must not end the engine."""
    try:
        callback(*args)
    except Exception:
        _log.exception("a callback of the engine failed")
