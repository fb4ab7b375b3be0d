"""Keys and values: appended in place, rolled back by count."""

from contextlib import nullcontext

import pytest
import torch

from self_speculation.model.kv_cache import KVCache


def block(first, n):
    """n positions holding first, first+1, ..."""
    return torch.arange(first, first + n, dtype=torch.float).view(1, 1, n, 1).expand(1, 2, n, 3)


def contents(view):
    return view[0, 0, :, 0].tolist()


def test_append_grow_and_roll_back():
    """Guards against buffers that are made anew at each call, or lose what was there when they grow."""
    cache = KVCache(2)
    first, _ = cache.update(block(0, 3), block(0, 3), 0)
    cache.update(block(3, 2), block(3, 2), 0)
    keys, _ = cache.update(block(0, 5), block(0, 5), 1)
    cache.rollback(2)
    assert cache.length(0) == cache.length(1) == 3
    keys, values = cache.update(block(7, 5), block(7, 5), 0)
    assert contents(keys) == contents(values) == [0, 1, 2, 7, 8, 9, 10, 11]
    assert keys.data_ptr() == first.data_ptr()
    keys, _ = cache.update(block(12, 1), block(12, 1), 0)
    assert contents(keys) == [0, 1, 2, 7, 8, 9, 10, 11, 12]
    keys, _ = cache.update(block(5, 1), block(5, 1), 1)  # where only the other layer has grown
    assert contents(keys) == [0, 1, 2, 5]
    assert cache.capacity == 16


def test_rolling_back_more_than_there_is_fails_early():
    cache = KVCache(2)
    cache.update(block(0, 2), block(0, 2), 0)
    with pytest.raises(ValueError, match="cannot roll back 1"):
        cache.rollback(1)  # layer 1 is empty
    with pytest.raises(ValueError, match="cannot roll back -1"):
        cache.rollback(-1)
    assert cache.length(0) == 2


@pytest.mark.parametrize("missing", [(0, 0), (0, 1), (1, 0)])
def test_each_device_is_asked_for_what_its_layers_need(missing, monkeypatch):
    """Guards against a model over several GPUs whose cache is refused because it does not fit the first one,
    and against one that is found too large in the middle of a pass.
    """
    devices = torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")
    layer = 2 * 2 * 8 * 3 * 4  # bytes: keys and values of 2 heads, 8 positions, 3 numbers
    # The last layer's weights are loaded when it runs, on the first one's device.
    free = {devices[0]: 2 * layer - missing[0], devices[1]: layer - missing[1]}
    monkeypatch.setattr("self_speculation.model.kv_cache.free_memory", free.get)
    refused = pytest.raises(MemoryError, match="1 times 8 positions") if any(missing) else nullcontext()
    with refused:
        KVCache(3, devices=devices).update(block(0, 1), block(0, 1), 0)
