"""The number of threads follows what other programs leave."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ADAPTIVE, in_batch, tiny_llama

from self_speculation import Request, ThreadGovernor, govern_threads
from self_speculation.machine.threads import _Reading, adjust_threads, most_threads


class Machine(ThreadGovernor):
    """A governor of a process with so many threads, on as many processors and with a simulated clock."""

    def __init__(self, monkeypatch, num_threads):
        self.now = self.used = self.used_here = 0.0
        self.shown = []
        monkeypatch.setattr("torch.get_num_threads", lambda: self.num_threads if self.shown else num_threads)
        monkeypatch.setattr("torch.set_num_threads", lambda number: None)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr("self_speculation.machine.threads._processors", lambda number: [*range(number)])
        super().__init__(on_fewer=lambda governor: self.shown.append(governor.num_threads))

    def _read(self):
        return _Reading(self.now, self.used, self.used_here)

    def run(self, seconds, busy):
        """[number of threads after each tenth of a second] while other programs use `busy` processors."""
        found = []
        for _ in range(round(10 * seconds)):
            self.now += 0.1
            self.used_here += 0.1 * self.num_threads
            self.used += 0.1 * (self.num_threads + busy)
            self.adjust()
            found.append(self.num_threads)
        return found


def test_threads_fall_at_once_and_rise_after_a_quiet_time(monkeypatch):
    """Guards against two threads that wait for each other beside a busy program, and against one thread for
    ever after it.
    """
    machine = Machine(monkeypatch, 2)
    assert machine.run(60, busy=0.2) == [2] * 600
    assert machine.run(60, busy=1.0)[2:] == [1] * 598
    quiet = machine.run(5, busy=0.0)
    assert sorted(quiet) == quiet
    assert (quiet[15], quiet[-1]) == (1, 2)
    assert machine.shown == [1]


@pytest.mark.parametrize(("busy", "threads"), [(1.0, 15), (4.0, 12), (15.0, 1), (40.0, 1)])
def test_other_programs_get_as_many_processors_as_they_use(monkeypatch, busy, threads):
    """Guards against one thread of sixteen beside one busy program, and against none."""
    assert Machine(monkeypatch, 16).run(2, busy)[-1] == threads


def test_threads_change_between_rounds_and_ids_do_not():
    """Guards against passes that depend on the number of threads they began with."""
    model = tiny_llama(fused=True, agreement="always", bos_token_id=3)
    requests = [Request([5, 9, 4, 7 + i]) for i in range(3)]
    expected = in_batch(model, requests, 3, **ADAPTIVE, max_steps=12)
    seen = []

    class Changes(ThreadGovernor):
        def adjust(self):
            seen.append(torch.get_num_threads())
            self.num_threads = 1 + len(seen) % 2
            super().adjust()

    govern_threads(model, Changes())
    try:
        found = in_batch(model, requests, 3, **ADAPTIVE, max_steps=12)
    finally:
        govern_threads(model, None)
        torch.set_num_threads(1)
    assert len(seen) > 3
    assert set(seen) == {1, 2}
    for index, result in expected.items():
        assert found[index].predicted_tokens == result.predicted_tokens


def test_the_library_leaves_threads_alone_unless_asked(monkeypatch):
    """Guards against a change of a setting that belongs to the caller."""
    model = tiny_llama()
    monkeypatch.setattr("torch.set_num_threads", lambda number: pytest.fail("threads were set"))
    in_batch(model, [Request([5, 9, 4])], 1, max_steps=4)
    adjust_threads(model)
    assert most_threads(model) == torch.get_num_threads()


@pytest.mark.parametrize(("niceness", "used"), [(0, 2 * 111.0), (5, 2 * 1111.0)])
def test_what_counts_as_used(niceness, used, monkeypatch):
    """Guards against other processors, idle ones, and programs that give way."""
    times = SimpleNamespace(user=1.0, system=10.0, steal=100.0, nice=1000.0, idle=1e4, iowait=1e5)
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: [times] * 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 3})
    monkeypatch.setattr("os.nice", lambda _: niceness)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    governor = ThreadGovernor()
    assert (governor.num_processors, governor._read().used) == (2, used)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})  # OMP_PROC_BIND
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    assert ThreadGovernor().num_processors == 4
