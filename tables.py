"""Rows of JSONL, CSV and Parquet files, each with its place for messages."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]


class DataError(ValueError):
    """The data is unusable; the message is one line with file and line, or what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names of files and columns may have line breaks


def is_table(path: Path) -> bool:
    """Whether `read_table` reads files of that name."""
    return _kind(path) in (".jsonl", ".json", ".csv", ".parquet")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL, CSV or Parquet file, also of a .gz, each with its place for messages.

    Text stays text, and all values of CSV are text: nothing is inferred.

    Raises:
        DataError: the file is malformed; names file and line.
    """
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            yield from _read(path, file)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:  # pyarrow's are ValueErrors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: {reason}") from error


def _read(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    if _kind(path) == ".parquet":
        import pyarrow.parquet  # other files do not need it

        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
        for number, row in enumerate(table.to_pylist(), 1):
            yield f"{path}, row {number}", row
        return
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # drops a byte order mark
    if _kind(path) == ".csv":
        csv.field_size_limit(1 << 30)  # articles are longer than the default limit
        reader = csv.DictReader(text, strict=True)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():  # the reader's marks of too many and too few fields
                raise DataError(f"{place}: must have the {len(reader.fieldnames or ())} fields of the header")
            yield place, row
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            yield (place := f"{path}, line {number}"), _parsed(place, line)


def _parsed(place: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{place}: lists and objects within each other, too deep to read") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be an object, not {type(row).__name__}")
    return row
