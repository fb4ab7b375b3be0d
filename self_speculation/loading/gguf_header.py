"""Headers of `.gguf` files. Imports neither torch nor transformers: scripts check a file before both."""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Types of values: the number of a type is an index into codes of `struct`; 8 is a string, 9 an array.
_NUMBERS = "BbHhIif?__Qqd"
_STRING = 8
_ARRAY = 9


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]  # [out, in] of a matrix
    quant_type: GGMLQuantizationType
    start: int  # byte of the file
    num_bytes: int


class Header:
    """The header of a file; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Attributes:
        metadata: values by key. An array of strings is only counted.

    Raises:
        ValueError: the file is cut short, or is no GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._at = 4
        if not self.path.stat().st_size:  # it cannot be mapped
            raise ValueError("the file is empty")
        try:
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._bytes,
            ):
                self._read()
        except (struct.error, EOFError) as error:
            raise ValueError("the file is cut short: download it again") from error
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the file is damaged, or cannot be read ({error})") from error

    def _read(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_values = map(self._number, "IQQ")
        if version not in (2, 3):
            raise ValueError("it is not of version 2 or 3")
        self.metadata = {self._text(): self._value(self._number("I")) for _ in range(num_values)}
        found = [self._tensor() for _ in range(num_tensors)]
        align = self.metadata.get("general.alignment", 32)
        start = -(-self._at // align) * align
        self.tensors = [tensor._replace(start=start + tensor.start) for tensor in found]
        if any(tensor.start + tensor.num_bytes > len(self._bytes) for tensor in self.tensors):
            raise EOFError
        if not isinstance(self.metadata["general.architecture"], str):
            raise ValueError("its architecture has no name")

    def _number(self, code: str) -> Any:
        (number,) = struct.unpack_from(f"<{code}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{code}")
        return number

    def _text(self) -> str:
        length = self._number("Q")
        self._at += length
        return self._bytes[self._at - length : self._at].decode()

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._text()
        if value_type != _ARRAY:
            return self._number(_NUMBERS[value_type])
        value_type = self._number("I")
        number = self._number("Q")
        if value_type == _STRING:
            at = self._at
            length_at = struct.Struct("<Q").unpack_from
            for _ in range(number):  # of tokens, or of merges
                at += 8 + length_at(self._bytes, at)[0]
            self._at = at
            return number
        values = struct.unpack_from(f"<{number}{_NUMBERS[value_type]}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{number}{_NUMBERS[value_type]}")
        return [*values]

    def _tensor(self) -> TensorInfo:
        name = self._text()
        dimensions = self._number("I")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        quant_type = GGMLQuantizationType(self._number("I"))
        start = self._number("Q")
        block_size, num_bytes = GGML_QUANT_SIZES[quant_type]
        return TensorInfo(name, shape, quant_type, start, math.prod(shape) // block_size * num_bytes)
