"""Keys and values: appended in place, rolled back by count."""

import itertools
from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_speculation.passes.kv_cache import Buffers, KVCache, ScatteredCache

CPU = torch.device("cpu")


def pair(rows):
    """Keys and values [B * T, heads, head_dim] of positions with these numbers, row by row."""
    both = torch.tensor(rows, dtype=torch.float32).flatten()[:, None, None].expand(-1, 2, 3)
    return both, both


def append(cache, numbers, layer=0):
    return cache.append(*pair([[*numbers]]), layer)


def contents(view):
    return view[0, 0, :, 0].tolist()


def test_layers_grow_and_roll_back_alike():
    """Guards against buffers that are made anew at each call, and layers that grow where others have."""
    cache = KVCache(Buffers([CPU] * 2))
    first, _ = append(cache, range(3))
    append(cache, range(5), 1)
    append(cache, [3, 4])
    cache.rollback(2)
    keys, values = append(cache, range(7, 12))
    assert contents(keys) == contents(values) == [0, 1, 2, 7, 8, 9, 10, 11]
    assert keys.data_ptr() == first.data_ptr()
    append(cache, [12])
    keys, _ = append(cache, [5], 1)  # where only the other layer has grown
    assert contents(keys) == [0, 1, 2, 5]
    assert cache.buffers.capacity == 16


def test_a_cache_on_a_gpu_has_all_positions_at_once(monkeypatch):
    """Guards against buffers that grow, by a copy of each, while a request streams; and against a limit that
    does not fit, of a request that will be shorter.
    """
    cache = KVCache(Buffers([torch.device("cuda")]))
    cache.reserve(30, 1500)
    assert cache.buffers.capacity == 1504
    cache = KVCache(Buffers([CPU]))
    cache.reserve(8, 1000)
    position = 2 * 2 * 3 * 4  # bytes
    monkeypatch.setattr("self_speculation.passes.kv_cache.free_memory", lambda *_: 500 * position)
    append(cache, range(8))
    assert cache.buffers.capacity == 448  # nine tenths, in whole steps


@pytest.mark.parametrize("missing", [(0, 0), (0, 1), (1, 0)])
def test_each_device_is_asked_for_what_its_layers_need(missing, monkeypatch):
    """Guards against a model over several GPUs whose cache is refused because it does not fit the first one,
    and against one that is found too large in the middle of a pass.
    """
    devices = CPU, torch.device("cuda:1"), torch.device("meta")
    layer = 2 * 2 * 8 * 3 * 4  # bytes: keys and values of 2 heads, 8 positions, 3 numbers
    # The last layer's weights are loaded when it runs, on the first one's device.
    free = {devices[0]: 2 * layer - missing[0], devices[1]: layer - missing[1]}
    monkeypatch.setattr("self_speculation.passes.kv_cache.free_memory", lambda device: free[device])
    refused = pytest.raises(MemoryError, match="1 times 8 positions") if any(missing) else nullcontext()
    with refused:
        append(KVCache(Buffers(devices)), [0])


@given(data=st.data(), num_slots=st.integers(1, 4))
@settings(max_examples=50)
def test_rows_hold_what_was_written_to_them(data, num_slots):
    """Guards against rows that take another one's place with its contents or its length, and against a
    roll back, an append or a swap that reaches a neighbour's slot.
    """
    cache, rows, free, numbers = KVCache(Buffers([CPU], num_slots)), [], {}, itertools.count(1)
    cache.set_rows([])

    def new(number):
        return [next(numbers) for _ in range(number)]

    for _ in range(data.draw(st.integers(4, 16))):
        what = data.draw(st.sampled_from(["prompt", "prompt", "append", "roll back", "remove"]))
        if what == "prompt" and len(rows) < num_slots:
            ids, row = new(data.draw(st.integers(1, 5))), len(rows)
            slot = data.draw(st.integers(row, num_slots - 1))
            cache.prompt_view(slot).append(*pair([ids]), 0)
            free[slot], free[row] = free.get(row, []), []
            cache.swap(slot, row, max(len(ids), len(free[slot])))
            cache.add_row(len(ids))
            rows.append(ids)
        elif what == "append" and rows:
            width = data.draw(st.integers(1, 3))
            added = [new(width) for _ in rows]
            if cache.is_uniform:
                cache.append(*pair(added), 0)
            else:
                positions = cache.positions(0, width, CPU)
                cache.extend(0, 1, width)
                ScatteredCache(cache.buffers.of_layers, positions, 0).append(*pair(added), 0)
            rows = [row + more for row, more in zip(rows, added, strict=True)]
        elif what == "roll back" and rows:
            dropped = [data.draw(st.integers(0, min(3, len(row)))) for row in rows]
            cache.rollback(dropped)
            rows = [row[: len(row) - number] for row, number in zip(rows, dropped, strict=True)]
        elif what == "remove" and rows:
            row = data.draw(st.integers(0, len(rows) - 1))
            cache.remove_row(row)
            rows[row], rows[-1] = rows[-1], rows[row]
            removed = rows.pop()
            free[len(rows)] = removed
        assert cache.lengths() == list(map(len, rows))
        for slot, ids in (*enumerate(rows), *free.items()):
            if ids:
                keys, values = cache.buffers.of_layers[0]
                assert keys[slot, 0, : len(ids), 0].tolist() == values[slot, 1, : len(ids), 1].tolist() == ids


class OutOfMemory(TorchDispatchMode):
    """No tensor is allocated after so many."""

    def __init__(self, left):
        super().__init__()
        self._left = left

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {part.untyped_storage()._cdata for part in tree_leaves(args) if isinstance(part, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in held:
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_swapped_without_memory(dtype):
    """Guards against two slots that are exchanged in some layers only, and against bits that change."""
    cache = KVCache(Buffers([CPU] * 3, num_slots=3))
    buffers = [(torch.randn(3, 2, 8, 3, dtype=dtype), torch.randn(3, 2, 8, 3, dtype=dtype)) for _ in range(3)]
    cache.buffers.of_layers = dict(enumerate(buffers))
    parts = [part for pair in buffers for part in pair]
    parts[0][0, 0, 0] = torch.tensor([torch.nan, torch.inf, -0.0])
    before = [part.clone() for part in parts]
    with OutOfMemory(0):
        cache.swap(2, 0, 5)
        cache.swap(1, 1, 5)
    for part, was in zip(parts, before, strict=True):
        expected = was.clone()
        expected[0, :, :5], expected[2, :, :5] = was[2, :, :5], was[0, :, :5]
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("left", range(5))
def test_growing_without_memory_keeps_what_is_there(left):
    """Guards against lost positions, and against a capacity that is not there, so that shorter sequences fail
    as well.
    """
    cache = KVCache(Buffers([CPU] * 2))
    for layer in range(2):
        append(cache, range(8), layer)
    cache.reserve(1000, 2000)  # of another sequence
    try:
        with OutOfMemory(left):
            cache.extend(0, 2, 1)
    except torch.OutOfMemoryError:
        assert (cache.buffers.capacity, cache.lengths(0), cache.lengths(1)) == (8, [8], [8])
    else:
        cache.rollback([1])
    cache.rollback([4])
    for layer in range(2):
        keys, values = append(cache, range(4, 8), layer)
        assert contents(keys) == contents(values) == [*range(8)]


def test_buffers_grow_one_after_another(monkeypatch):
    """Guards against twice the memory: lists of buffers would keep the smaller ones."""
    cache, alive, grow = KVCache(Buffers([CPU] * 4)), [], Buffers.with_room
    for layer in range(4):
        append(cache, range(8), layer)
    cache.extend(0, 4, 0)
    before = [*map(ref, cache.buffers.all())]

    def with_room(*args):
        alive.append(sum(part() is not None for part in before))
        return grow(*args)

    monkeypatch.setattr(Buffers, "with_room", with_room)
    cache.extend(0, 4, 8)
    assert alive == [8, 6, 4, 2]
