"""Memory of keys and values. Ids of test_same_answers.py show what rows hold."""

from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from conftest import assert_close, own_llama
from psutil import Process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_speculation.backends import buffers
from self_speculation.backends.buffers import Buffers, SharedPrefix
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ModelRunner

CPU = torch.device("cpu")


def append(cache, numbers, layer=0):
    """Keys and values [T, heads, head_dim] of one row: each value is the number of the position."""
    both = torch.tensor([*numbers], dtype=torch.float32)[:, None, None].expand(-1, 2, 3)
    written = cache.write(both, both, layer)
    cache.extend(layer, layer + 1, [len(both)])
    return written


def contents(view):
    return view[0, 0, :, 0].tolist()


def cache_of(*devices, **slots):
    return KVCache(Buffers(devices, (2, 3), torch.float32, **slots))


def test_a_cache_on_a_gpu_has_all_positions_at_once(monkeypatch):
    """Guards against buffers that grow, by a copy of each, while a request streams; and against a limit that
    does not fit, of a request that will be shorter.
    """
    position = 2 * 2 * 3 * 4  # bytes
    for free, capacity in ((10_000, 1504), (500, 400)):  # four fifths
        monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda _, n=free: n * position)
        cache = cache_of(torch.device("meta"))
        cache.reserve(30, 1500)
        assert cache.buffers.capacity == capacity


@pytest.mark.parametrize("missing", [(0, 0), (0, 1), (1, 0)])
def test_each_device_is_asked_for_what_its_layers_need(missing, monkeypatch):
    """Guards against a model over several GPUs whose cache is refused because it does not fit the first one,
    and against one that is found too large in the middle of a pass.
    """
    devices = CPU, torch.device("cuda:1"), CPU
    layer = 2 * 2 * 8 * 3 * 4  # bytes: keys and values of 2 heads, 8 positions, 3 numbers
    free = {devices[0]: 2 * layer - missing[0], devices[1]: layer - missing[1]}
    monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda device: free[device])
    refused = pytest.raises(MemoryError, match="1 times 8 positions") if any(missing) else nullcontext()
    with refused:
        cache_of(*devices).reserve(1, 1)


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


def test_numbers_beyond_the_range_of_float16_are_found():
    """Guards against infinite keys, which hide their position or all other keys without an error, and against
    another position in the message.
    """
    cache = KVCache(Buffers([CPU] * 2, (2, 3), torch.float16))
    for layer, largest in enumerate((65_519.0, -65_520.0)):
        append(cache, [1, 2, largest, torch.nan], layer)
    keys, _ = cache.buffers.by_layer[0]
    assert contents(keys)[:3] == [1, 2, 65_504]
    assert cache.beyond_range(0, 4) == 2
    assert cache.beyond_range(0, 2) is None
    assert not any(part.isinf().any() for part in cache.buffers.all())
    in_bfloat16 = KVCache(Buffers([CPU], (2, 3), torch.bfloat16))
    append(in_bfloat16, [1e30])
    assert in_bfloat16.beyond_range(0, 1) is None


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 40), (torch.float16, 80), (torch.bfloat16, 80)])
def test_limits_count_the_bytes_of_the_dtype(dtype, most, monkeypatch):
    """Guards against a prompt that is refused, or memory that is promised twice, since positions count in
    another dtype.
    """
    monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda _: 40 * 2 * 2 * 3 * 4)
    cache = KVCache(Buffers([CPU], (2, 3), dtype))
    cache.reserve(most, most)
    with pytest.raises(MemoryError, match=f"{most + 8} positions of keys and values"):
        cache.reserve(most + 8, most + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_swapped_without_memory(dtype):
    """Guards against two slots that are exchanged in one layer only, and against bits that change."""
    cache = cache_of(*[CPU] * 3, num_slots=3)
    buffers = [(torch.randn(3, 2, 8, 3, dtype=dtype), torch.randn(3, 2, 8, 3, dtype=dtype)) for _ in range(3)]
    cache.buffers.by_layer = dict(enumerate(buffers))
    parts = [part for pair in buffers for part in pair]
    parts[0][0, 0, 0] = torch.tensor([torch.nan, torch.inf, -0.0])
    before = [part.clone() for part in parts]
    with OutOfMemory(0):
        cache.swap(2, 0, 5)
        cache.swap(1, 1, 5)
    for part, was in zip(parts, before, strict=True):
        expected = was.clone()
        expected[0, :, :5] = was[2, :, :5]
        expected[2, :, :5] = was[0, :, :5]
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("left", range(5))
def test_growing_without_memory_keeps_what_is_there(left, monkeypatch):
    """Guards against lost positions, and against a capacity that is not there, so that shorter sequences fail
    as well.
    """
    cache = cache_of(*[CPU] * 2)
    for layer in range(2):
        append(cache, range(8), layer)
    cache.reserve(1000, 2000)  # of another sequence
    allocated = []
    zeros = buffers.zeros

    def few_zeros(*args):
        if len(allocated) == left:
            raise MemoryError
        allocated.append(args)
        return zeros(*args)

    monkeypatch.setattr(buffers, "zeros", few_zeros)
    try:
        cache.make_room(0, 2, [1])
    except MemoryError:
        assert left < 4
        assert (cache.buffers.capacity, cache.lengths(0), cache.lengths(1)) == (8, [8], [8])
    monkeypatch.undo()
    cache.rollback([4])
    for layer in range(2):
        keys, values = append(cache, range(4, 8), layer)
        assert contents(keys) == contents(values) == [*range(8)]


def test_buffers_grow_one_after_another(monkeypatch):
    """Guards against twice the memory: lists of buffers would keep the smaller ones."""
    cache = cache_of(*[CPU] * 4)
    alive = []
    grow = Buffers.with_room
    for layer in range(4):
        append(cache, range(8), layer)
    cache.make_room(0, 4, [0])
    before = [*map(ref, cache.buffers.all())]

    def with_room(*args):
        alive.append(sum(part() is not None for part in before))
        return grow(*args)

    monkeypatch.setattr(Buffers, "with_room", with_room)
    cache.make_room(0, 4, [16])
    assert alive == [8, 6, 4, 2]


def test_memory_of_positions_that_another_slot_has_is_given_back():
    """Guards against a shared prefix that each row holds, too, positions that go with it, and slots that lose
    it in a swap or as buffers grow.
    """
    cache = cache_of(CPU, num_slots=3, num_prefix_slots=1)
    cache.buffers.key_shape = (2, 64)
    numbers = torch.arange(1.0, 201).view(-1, 1, 1).expand(-1, 2, 64)
    cache.set_rows([])
    for slot in range(2):
        view = cache.prompt_view(slot)
        view.write(numbers, numbers, 0)
    cache.copy_prefix(0, SharedPrefix(3, 128))
    cache.set_prefix(1, SharedPrefix(3, 64))
    keys, _ = cache.buffers.by_layer[0]
    assert not keys[0, :, :128].any()
    assert not keys[1, :, :64].any()
    cache.swap(1, 2, 200)
    cache.buffers.reserve(1024, 1)
    cache.prompt_view(0, [200]).make_room(0, 1, [1])
    for slot in (0, 2):
        for buffer in cache.buffers.all():
            assert torch.equal(cache.positions_of(buffer, slot, 200)[0, :, 0], numbers[:, 0, 0])
    cache.set_prefix(0, SharedPrefix())
    assert cache.is_shared(3)
    cache.set_prefix(2, SharedPrefix())
    assert not cache.is_shared(3)
    assert not any(part[3].any() for part in cache.buffers.all())


def test_slots_have_no_memory_that_nobody_reads():
    """Guards against a swap after which a slot counts, or copies when buffers grow, what only the other one
    has written, and against memory that a cleared slot keeps and no limit counts.
    """
    cache = cache_of(CPU, num_slots=2)
    cache.buffers.key_shape = (2, 64)
    cache.set_rows([])
    numbers = torch.ones(40_000, 2, 64)
    resident = Process().memory_info().rss
    cache.prompt_view(0).write(numbers, numbers, 0)
    one = Process().memory_info().rss - resident
    cache.swap(0, 1, 100)
    assert cache.buffers.num_used == [40_000, 100]
    cache.clear_slot(0)
    assert cache.buffers.num_used == [0, 100]
    assert Process().memory_info().rss - resident < one / 4
    assert not cache.buffers.by_layer[0][0][0].any()
    assert cache.buffers.by_layer[0][0][1].sum() == 100 * 2 * 64


def test_numbers_of_a_shared_prefix_are_checked_for_each_slot_and_stay_when_one_is_cleared():
    """Guards against NaN, and numbers beyond float16's range, that are not found where rows share them."""
    cache = cache_of(CPU, num_slots=2, num_prefix_slots=1)
    cache.buffers.dtype = torch.float16
    cache.buffers.key_shape = (1, 8)
    numbers = torch.ones(100, 1, 8)
    numbers[50] = 1e6
    cache.set_rows([])
    view = cache.prompt_view(0)
    view.write(numbers, numbers, 0)
    cache.copy_prefix(0, SharedPrefix(2, 64))
    cache.set_prefix(1, SharedPrefix(2, 64))
    cache.clear_slot(0)
    assert [cache.beyond_range(slot, 100) for slot in range(2)] == [50, 50]
    assert not any(cache.is_finite(slot, 64) for slot in range(2))
    for slot in range(2):
        cache.set_prefix(slot, SharedPrefix())
    assert all(cache.is_finite(slot, 100) for slot in range(3))


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.__name__.partition(".")[0] in ("copy_", "zero_", "zeros", "fill_", "clone", "index_put_"):
            self.numbers += result.numel()
        return result


def test_growing_costs_time_by_what_slots_hold():
    """Guards against a step that copies or clears the room of all slots, and holds up all rows for seconds,
    when a long prompt comes; and against positions that are lost or not zero.
    """
    cache = cache_of(*[CPU] * 2, num_slots=4)
    cache.buffers.reserve(40_000, 1)
    for layer in range(2):
        append(cache, range(8), layer)
    other = cache.prompt_view(2)
    for layer in range(2):
        append(other, range(100, 105), layer)
    cache.swap(1, 2, 5)
    with Written() as written:
        cache.buffers.reserve(90_000, 1)
        cache.prompt_view(1, [5]).make_room(0, 2, [80_000])
        cache.clear_slot(2)
    assert written.numbers <= 2 * 2 * 2 * 3 * (8 + 5 + 5 + 5)
    for part in cache.buffers.all():
        assert part.shape == (4, 2, 90_000, 3)
        assert part[0, 0, :8, 0].tolist() == [*range(8)]
        assert part[1, 0, :5, 0].tolist() == [*range(100, 105)]
        assert not part[0, :, 8:].any()
        assert not part[1, :, 5:].any()
        assert not part[2:].any()


def test_growing_copies_nothing_where_slots_have_addresses(monkeypatch):
    """Guards against a step that copies what all slots hold when one of them outgrows the capacity, against
    memory that is not asked for then, and against memory of positions that no row has.
    """
    positions = 200_000
    cache = cache_of(*[CPU] * 2, num_slots=8, longest=positions)
    cache.buffers.key_shape = (2, 64)
    resident = Process().memory_info().rss
    numbers = torch.ones(500, 2, 64)
    for layer in range(2):
        cache.write(numbers, numbers, layer)
    cache.extend(0, 2, [500])
    before = cache.make_room(0, 2, [0])
    with Written() as written:
        cache.reserve(100_000, 150_000)
        after = cache.make_room(0, 2, [positions - 500])
    assert written.numbers == 0
    assert [part.data_ptr() for part in after] == [part.data_ptr() for part in before]
    assert {part.shape for part in after} == {(8, 2, positions, 64)}
    assert Process().memory_info().rss - resident < 50 * 2**20
    monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda _: 2**30)
    refused = cache_of(*[CPU] * 2, num_slots=8, longest=positions)
    refused.buffers.key_shape = (2, 64)
    with pytest.raises(MemoryError, match="8 times 150000 positions"):
        refused.reserve(150_000, 150_000)


def test_buffers_grow_where_the_system_refuses_addresses(monkeypatch):
    """Guards against a model of a long context that does not decode under `ulimit -v`, and against an error
    for a text that fits.
    """
    mapped = buffers.mmap.mmap

    def limited(number, size, flags):
        if size > 10_000:
            raise OSError
        return mapped(number, size, flags)

    monkeypatch.setattr(buffers.mmap, "mmap", limited)
    cache = cache_of(*[CPU] * 2, longest=100_000)
    for start in range(0, 80, 8):
        for layer in range(2):
            keys, values = append(cache, range(start, start + 8), layer)
            assert contents(keys) == contents(values) == [*range(start + 8)]
    with pytest.raises(MemoryError):
        cache.make_room(0, 2, [1000])


def test_buffers_leave_addresses_to_libraries_that_abort_without(monkeypatch):
    """Guards against a server under `ulimit -v` that a tokenizer or a grammar ends, and against first layers
    with addresses for whole texts that leave none to the last one.
    """
    layer = 2 * 1000 * 2 * 3 * 4  # bytes of keys and values of 1,000 positions
    for free, capacities in ((3 * layer, {1000}), (3 * layer - 1, {16})):
        left = buffers.RESERVED_ADDRESSES + free
        monkeypatch.setattr(buffers, "free_addresses", lambda left=left: left)
        cache = cache_of(*[CPU] * 3, longest=1000)
        for number in range(3):
            append(cache, range(8), number)
        assert {part.shape[2] for part in cache.buffers.all()} == capacities
    monkeypatch.setattr(buffers, "free_addresses", lambda: buffers.RESERVED_ADDRESSES)
    with pytest.raises(MemoryError):
        cache.make_room(0, 2, [1000])


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 9]])
def test_a_rejected_draft_beyond_the_range_of_float16_changes_no_other_token(lengths):
    """Guards against a request that fails without operators, since a draft that no output has, in the same
    pass or an earlier one, has a key or value beyond 65504.
    """
    torch.manual_seed(0)
    model = own_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[49] = torch.eye(len(model.model.embed_tokens.weight[49]))[0]
        model.model.layers[0].self_attn.v_proj.weight[:, 0] = 1e6
    runner = ModelRunner(model)
    rows = len(lengths)
    with torch.inference_mode():
        cache = runner.new_cache(1, 40, rows, dtype="float16")
        cache.set_rows([0] * rows)
        for row, length in enumerate(lengths):
            runner.run(cache.prompt_view(row), torch.arange(3, 3 + length)[None])
        cache.set_rows(lengths)
        expected = runner.run(cache, torch.tensor([[7]] * rows)).logits[:, -1]
        cache.rollback(1)
        drafted = torch.tensor([[7, 49, 8], [7, 9, 8]][:rows])
        found = runner.run(cache, drafted, num_logits=3).logits
        assert found.isfinite().all(-1).tolist() == [[True, False, False], [True] * 3][:rows]
        assert_close(found[:, 0], expected)
        cache.rollback([3, 2][:rows])
        again = runner.run(cache, torch.tensor([[7], [9]][:rows])).logits[:, -1]
        assert_close(again[:1], expected[:1])
        assert again.isfinite().all()
