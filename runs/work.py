"""One loop of work: a record for each index, exactly once, over ranks, errors and interruptions."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from tqdm import tqdm

from arguments import refuse
from runs import ranks
from runs.description import Record, counted
from runs.failures import Failed, failed, reason
from runs.records import Run
from self_speculation.devices import is_lost_rank


class Work(ABC):
    """What a run does: a record for each index from 0, and the conclusion."""

    batch_size: int
    run: Run  # that `work_off` has opened
    unit = "example"

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """What each record is about, for messages."""

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        """Yield index and record, or error, of each index, in any order.

        A record depends on index and flags alone, except for its times.
        """
        for index in indices:
            try:
                record: Record | Exception = self.measure(index)
            except Exception as error:
                record = error
            yield index, record

    def measure(self, index: int) -> Record:
        """The record of an index, for work that makes one after the other."""
        raise NotImplementedError

    def is_done(self, record: Record) -> bool:  # noqa: ARG002
        """Whether a resumed run keeps a record."""
        return True

    @abstractmethod
    def conclude(self, records: list[Record]) -> int:
        """Finish the run with all records in order; the exit status."""


def work_off(work: Work, open_run: Callable[[], Run]) -> int:
    """Make the missing records of a run, each rank its share, and let rank 0 conclude.

    Every record is kept. The exit status is that of the conclusion, 130 after Ctrl-C or SIGTERM, or 1 if
    records are missing; `status` in `run.json` is then `interrupted` or `failed`.
    """
    with ranks.process_group():
        try:
            work.run = run = ranks.share(open_run)
        except Failed as error:
            refuse(str(error))
        kept = ranks.share(run.records)
        missing = [i for i in range(len(work.names)) if i not in kept or not work.is_done(kept[i])]
        try:
            _make_records(work, run, missing[ranks.rank() :: ranks.num_processes()])
            ranks.barrier()
            if not ranks.is_first():
                return 0
            complete = run.records()
            return work.conclude([complete[index] for index in range(len(work.names))])
        except (Exception, KeyboardInterrupt) as error:
            is_stopped = isinstance(error, KeyboardInterrupt)
            if ranks.is_first():
                with suppress(Failed):
                    run.write_status("interrupted" if is_stopped else "failed")
            why = reason(error, batch_size=work.batch_size)
            if not (why or is_stopped or is_lost_rank(error)):
                raise
            if why or ranks.is_first():
                why = why or ("interrupted" if is_stopped else "another rank is gone")
                done = sum(map(work.is_done, run.records().values()))
                kept_ones = f"{done} of {counted(len(work.names), work.unit)} are kept"
                print(f"{why}; {kept_ones}, go on with --resume {run.folder}", file=sys.stderr)
            return 130 if is_stopped else 1


def _make_records(work: Work, run: Run, indices: Sequence[int]) -> None:
    """Write the records of this rank's indices.

    Raises:
        Failed: the first error, after all other records are written.
    """
    wrong = []
    hidden = None if ranks.is_first() else True  # None: unless at a terminal
    with tqdm(total=len(indices), desc=f"{work.unit}s", disable=hidden) as bar:
        for index, record in work.records(indices):
            if isinstance(record, Exception):
                wrong.append(failed(work.names[index], record, work.batch_size))
                continue
            run.append({"index": index, **record})
            bar.update()
    if wrong:
        raise wrong[0]
