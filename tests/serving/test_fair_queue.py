"""The queue before parsing and compiling: whose turn it is, and who is refused."""

import asyncio
import gc
import threading

import pytest

from serving.app import FairQueue
from serving.engine import QueueFull


def in_queue(scenario, max_waiting=9):
    """Run a scenario over a queue whose single thread is busy until `go_on` is set; returns what was done."""
    go_on = threading.Event()
    done = []

    async def run():
        queue = FairQueue("bodies", max_waiting, num_threads=1)
        busy = asyncio.create_task(queue.run("busy", lambda: go_on.wait(60)))
        tasks = {}

        async def add(*names):
            for name in names:
                tasks[name] = asyncio.create_task(queue.run(name[0], lambda name=name: done.append(name)))
                await asyncio.sleep(0)

        try:
            await asyncio.sleep(0)
            await scenario(add, tasks)
        finally:
            go_on.set()
        await asyncio.gather(busy, *tasks.values(), return_exceptions=True)
        assert await queue.run("z", lambda: "free again") == "free again"
        return tasks

    return asyncio.run(run()), done


def test_clients_take_turns():
    """Guards against one client whose work keeps all clients waiting."""

    async def scenario(add, _):
        await add("a1", "a2", "a3", "a4", "b1", "b2", "c1")

    assert in_queue(scenario)[1] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_threads_are_there_before_work(monkeypatch):
    """Guards against a request for whose thread there is no memory: the turn was lost, and later requests
    waited for ever.
    """
    queue = FairQueue("bodies", 9, num_threads=2)
    monkeypatch.setattr(threading.Thread, "start", None)

    async def run():
        return await asyncio.gather(*(queue.run("a", lambda number=number: number) for number in range(4)))

    assert asyncio.run(run()) == [0, 1, 2, 3]


def test_a_queue_without_memory_for_threads_ends(monkeypatch):
    """Guards against a server that cannot start and does not end: its first thread waits for the second."""
    started = []
    start = threading.Thread.start

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="new thread"):
        FairQueue("bodies", 9, num_threads=2)
    gc.collect()  # the pool's thread ends with it
    started[0].join(60)
    assert not started[0].is_alive()


def test_nobody_fills_the_queue_for_all():
    """Guards against clients that get status 429 because of one other client."""

    async def scenario(add, tasks):
        await add("a1", "a2", "a3", "a4", "b1", "a5", "b2", "b3", "c1")
        for name in ("a5", "b3"):  # would have more work than another client
            with pytest.raises(QueueFull, match="4 bodies wait already"):
                await tasks[name]

    tasks, done = in_queue(scenario, max_waiting=4)
    assert done == ["a1", "b1", "c1", "b2"]
    refused = [name for name, task in tasks.items() if isinstance(task.exception(), QueueFull)]
    assert refused == ["a2", "a3", "a4", "a5", "b3"]


def test_what_nobody_waits_for_is_not_done():
    """Guards against work for clients that have left, which takes their place in the queue and a thread."""

    async def scenario(add, tasks):
        await add("a1", "a2", "a3")
        for name in ("a1", "a3"):
            tasks[name].cancel()
        await asyncio.sleep(0)
        await add("a4")
        assert not tasks["a4"].done()

    assert in_queue(scenario, max_waiting=3)[1] == ["a2", "a4"]


def test_who_loses_a_place_and_leaves_frees_no_thread():
    """Guards against one more thread for each client that leaves just as the place in the queue is lost."""

    async def scenario(add, tasks):
        await add("a1", "a2", "a3")
        await add("b1")
        tasks["a3"].cancel()  # before it knows that it has lost the place
        await add("c1")
        assert not tasks["a1"].done()

    tasks, done = in_queue(scenario, max_waiting=3)
    assert tasks["a3"].cancelled()
    assert done == ["a1", "b1", "c1"]


def test_a_thread_is_free_once_its_work_ends():
    """Guards against more work at once than there are threads, after clients have left."""
    running = [0]
    most = [0]
    go_on = threading.Event()

    def work():
        running[0] += 1
        most[0] = max(most[0], running[0])
        go_on.wait(60)
        running[0] -= 1

    async def run():
        queue = FairQueue("bodies", 9, num_threads=2)
        tasks = [asyncio.create_task(queue.run("a", work)) for _ in range(6)]
        while running[0] < 2:
            await asyncio.sleep(0.001)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(*tasks[2:])

    asyncio.run(run())
    assert most == [2]
