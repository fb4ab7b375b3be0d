"""Models in `.gguf` files: their headers, and their weights in any format.

transformers reads such a file three times by gguf's reader: for the config, the tokenizer and the weights.
That reader makes numpy views of each token and each merge, which takes 6 to 13 s for a vocabulary of 150,000.
Only the tokenizer needs them, and it has another reader. `Header` is gguf's reader without them.

Weights are dequantised one by one. In float16 they go into a file in the user's cache, valid for the content
of the `.gguf` file, and the model is mapped from there: only copies that passes read are in memory, and the
next start dequantises nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.constants import GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from self_speculation.model.progress import progress

# Longer arrays of numbers have one for each token.
_LONGEST = 2**12

# Elements that are dequantised at a time: they stay in the processor's cache.
_AT_A_TIME = 2**18

# Bytes that must stay free on the disk.
_SPARE = 2**30


class Header(gguf.GGUFReader):
    """Fields and tensors of a file, without long arrays and those of strings. All tokens are empty.

    Raises:
        ValueError: the file is cut short, or is no GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("not a GGUF file")
        super().__init__(path)

    @property
    def data(self) -> Any:
        """[bytes]"""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)  # slicing a memmap takes 20 times as long

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        self._check_end(int(offset) + int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start, number = orig_offs + 12, int(count[0])
        number_type = self.gguf_scalar_to_np.get(GGUFValueType(kind[0]))
        if kind[0] == GGUFValueType.STRING:
            end = self._end_of_strings(start, number)
        elif number_type is not None and number > _LONGEST:
            end = start + number * np.dtype(number_type).itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        self._check_end(end)
        return end - orig_offs, [kind, count], [], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]

    def _push_field(self, field: ReaderField, skip_sum: bool = False) -> int:
        if field.name == "tokenizer.ggml.tokens":  # the config needs their number
            number, empty = int(field.parts[-1][0]), np.empty(0, np.uint8)
            field = field._replace(parts=[*field.parts, empty], data=[len(field.parts)] * number)
        return super()._push_field(field, skip_sum)

    def _end_of_strings(self, start: int, number: int) -> int:
        length_of, end = struct.Struct("=Q").unpack_from, start
        try:
            for _ in range(number):
                end += 8 + length_of(self.data, end)[0]
        except struct.error:
            self._check_end(end + 8)
            raise
        return end

    def _check_end(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(
                f"the file is cut short ({len(self.data):,} bytes, and its header needs {end:,} at least): "
                "download it again"
            )


@contextmanager
def read_once(header: Header | None) -> Iterator[None]:
    """Give transformers this header when it calls gguf's reader."""
    reader = gguf.GGUFReader
    if header is not None:
        vars(gguf)["GGUFReader"] = lambda *_: header
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader


def read_weights(header: Header, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a model in this format, by the names of its parameters."""
    weights: dict[str, Tensor] = {}
    _read(header, _sources(header, config), dtype, weights.__setitem__)
    return weights


def mapped_weights(header: Header, config: PretrainedConfig) -> dict[str, Tensor]:
    """All weights in float16, mapped from a file in the user's cache, which is written at first.

    Raises:
        OSError: it cannot be written.
    """
    sources = _sources(header, config)
    layout = _layout(sources)
    file = cache_folder() / f"{_digest(header.path)}.safetensors"
    if not (file.is_file() and file.stat().st_size == layout.size):
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < layout.size + _SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            with partial.open("wb", buffering=0) as written:
                written.write(layout.head)
                descriptor = written.fileno()

                _read(
                    header,
                    sources,
                    torch.float16,
                    lambda name, weight: _write(descriptor, weight, layout.starts[name]),
                )
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return load_file(file)


def cache_folder() -> Path:
    """SELF_SPECULATION_CACHE, or a folder in the user's cache."""
    named = os.environ.get("SELF_SPECULATION_CACHE")
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(named).expanduser() if named else users / "self-speculation"


class _Sources(NamedTuple):
    tensors: Mapping[str, ReaderTensor]  # by the name of the parameter
    processor: TensorProcessor  # restores transformers' order of rows


def _sources(header: Header, config: PretrainedConfig) -> _Sources:
    architecture = header.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).state_dict()
    of_file = {names.get_name(name, (".weight", ".bias")): name for name in parameters}
    return _Sources({of_file[t.name]: t for t in header.tensors if t.name in of_file}, processor)


def _read(header: Header, sources: _Sources, dtype: torch.dtype, take: Callable[[str, Tensor], Any]) -> None:
    """Call `take` with the name and the weight of each parameter, on several threads."""

    def read(name: str) -> int:
        tensor = sources.tensors[name]
        weight = _dequantized(header.path, tensor, dtype if len(tensor.shape) > 1 else torch.float32)
        # Rows are ordered, and nothing is computed: numpy need not know bfloat16.
        plain = weight.view(torch.int16) if weight.dtype.itemsize == 2 else weight
        ordered = sources.processor.process(weights=plain.numpy(), name=tensor.name).weights
        ordered = torch.from_numpy(np.ascontiguousarray(ordered)).view(weight.dtype)
        take(name, ordered.to(dtype))
        return tensor.n_bytes

    largest_first = sorted(sources.tensors, key=lambda name: -sources.tensors[name].n_bytes)
    total = sum(tensor.n_bytes for tensor in sources.tensors.values())
    with (
        progress(f"unpacking {header.path.name}", total) as advance,
        ThreadPoolExecutor(torch.get_num_threads()) as threads,
    ):
        for num_bytes in threads.map(read, largest_first):
            advance(num_bytes)


def _dequantized(path: Path, tensor: ReaderTensor, dtype: torch.dtype) -> Tensor:
    shape = [*reversed(tensor.shape.tolist())]
    row, bytes_of_row = math.prod(shape[1:]), tensor.n_bytes // shape[0]
    weight = torch.empty(shape, dtype=dtype)
    start = int(tensor.data_offset)
    for rows in weight.split(max(1, _AT_A_TIME // row)):
        # Read, not mapped: pages of a mapping count as memory of this process. gguf dequantises 16 rows at a
        # time; these are one row of many blocks.
        blocks = np.fromfile(path, np.uint8, len(rows) * bytes_of_row, offset=start)[None]
        rows.copy_(torch.from_numpy(gguf.dequantize(blocks, tensor.tensor_type)).view(rows.shape))
        start += blocks.nbytes
    return weight


class _Layout(NamedTuple):
    """Layout of a safetensors file."""

    head: bytes
    starts: Mapping[str, int]  # of each tensor, in the file
    size: int


def _layout(sources: _Sources) -> _Layout:
    """The layout of all weights in float16, one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sources.tensors.items():
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [*reversed(tensor.shape.tolist())]
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = struct.pack("<Q", len(text)) + text
    starts = {name: len(head) + entries[name]["data_offsets"][0] for name in sources.tensors}
    return _Layout(head, starts, len(head) + end)


def _write(descriptor: int, weight: Tensor, start: int) -> None:
    rest = memoryview(weight.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    while rest:
        written = os.pwrite(descriptor, rest, start)
        start, rest = start + written, rest[written:]


def _digest(path: Path) -> str:
    """Digest of the content of a file."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(2**22):
            state.update(part)
    return state.hexdigest()
