"""Training data: files or a hub dataset -> texts -> blocks of token ids, and a tokenizer for a new model.

The content of a text alone decides whether it is held out, so no text is both learnt and held out.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import DataError, cell, is_table, load_from_hub, one_line, read_table
from self_speculation.devices import round_up
from training.flags import TrainingDataArguments
from training.recipe import IGNORED

END_OF_TEXT = "<|endoftext|>"

# Texts of a stream that are shuffled at a time, and that train a tokenizer.
_STREAM_BUFFER = 10_000

# Folders of generated tables, of sources for other interpreters and of deliberate errors.
_NOT_PROSE = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3",
}  # fmt: skip


Texts: TypeAlias = datasets.Dataset | datasets.IterableDataset  # the latter is a stream


def load_texts(args: TrainingDataArguments) -> tuple[Texts, Texts]:
    """(training, evaluation) rows: `text`, or `prompt` and `response`.

    Raises:
        DataError: there are no such files or dataset, or it lacks the columns.
    """
    rows, share = _read(args), args.eval_fraction
    parts = [rows.filter(_is_in_part, fn_kwargs={"share": share, "held_out": out}) for out in (False, True)]
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        if not is_stream(part) and not len(part):
            raise DataError(f"--eval_fraction {share}: leaves nothing of {len(rows)} texts for {name}")
    return parts[0], parts[1]


def _is_in_part(row: dict[str, str], share: float, held_out: bool) -> bool:
    for name, value in row.items():
        if not isinstance(value, str):
            raise DataError(f"--text_column {name}: holds {value!r}, which is not text")
    return (crc32("\0".join(row.values()).encode()) / 2**32 < share) == held_out


def is_stream(texts: Texts) -> bool:
    return isinstance(texts, datasets.IterableDataset)


def _read(args: TrainingDataArguments) -> Texts:
    """All rows, with the columns to learn. `datasets` caches them until a file changes."""
    flag = f"--data {args.data}" if args.data_path is None else f"--data_path {args.data_path}"
    try:
        if args.data_path is None and args.data != "python_stdlib":
            return _hub_rows(args.data, args.text_column, args.streaming)
        paths = standard_library() if args.data_path is None else _files(args.data_path)
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        kwargs = {"files": files, "column": args.text_column}
        return datasets.Dataset.from_generator(_rows_of_files, gen_kwargs=kwargs)
    except Exception as error:  # the hub, Arrow and generators raise errors without a common base
        cause = error.__cause__ or error
        if isinstance(cause, DataError) and str(cause).startswith("--"):
            raise cause from None
        is_empty = type(cause).__name__ == "SchemaInferenceError"  # a generator without rows has no columns
        raise DataError(f"{flag}: {'has no texts' if is_empty else one_line(cause)}") from error


def _files(pattern: str) -> list[Path]:
    if os.path.isdir(os.path.expanduser(pattern)):
        raise DataError(f'--data_path {pattern}: is a folder; name its files, such as "{pattern}/**/*.jsonl"')
    found = map(Path, sorted(glob.glob(os.path.expanduser(pattern), recursive=True)))
    if not (paths := [path for path in found if path.is_file()]):
        raise DataError(f"--data_path {pattern}: no such files")
    return paths


def standard_library() -> list[Path]:
    """The sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path for path in sorted(root.rglob("*.py")) if _NOT_PROSE.isdisjoint(path.relative_to(root).parts)
    ]


def _rows_of_files(files: list[tuple[str, int, int]], column: str) -> Iterator[dict[str, str]]:
    """The rows of tables; any other file is one text, unless it is blank."""
    columns: list[str] = []
    for name, *_ in files:
        path = Path(name)
        if is_table(path):
            rows: Any = read_table(path)
        else:
            text = path.read_text("utf-8-sig")
            rows = [(name, {column: text})] if text.strip() else []
        for place, row in rows:
            columns = columns or _columns(row, column)
            names = columns if len(columns) > 1 else ["text"]
            yield dict(zip(names, (cell(place, row, name) for name in columns), strict=True))


def _hub_rows(name: str, column: str, streaming: bool) -> Texts:
    rows = load_from_hub(name, split="train", streaming=streaming)
    if rows.column_names is None:  # a stream learns its columns from its first rows
        rows = rows._resolve_features()
    columns = _columns(rows.column_names, column)
    rows = rows.select_columns(columns)
    return rows if columns in (["text"], ["prompt", "response"]) else rows.rename_columns({column: "text"})


def _columns(found: Collection[str], column: str) -> list[str]:
    """The columns to learn; prompt and response come before any other."""
    if {"prompt", "response"} <= set(found):
        return ["prompt", "response"]
    if column not in found:
        raise DataError(
            f"--text_column {column}: not in the data, which has {', '.join(found)}; must be one of these, "
            "or the data must have prompt and response"
        )
    return [column]


def train_tokenizer(texts: Texts, vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    # A prompt may end in a digit or line break: each is one token. A run of spaces is one token, too.
    lines, digits = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    some = texts.take(_STREAM_BUFFER) if is_stream(texts) else texts
    tokenizer.train_from_iterator(("".join(row.values()) for row in some), trainer)
    return tokenizer


def tokenizer_from_json(json: str, context: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model; `<|endoftext|>` begins, ends and pads a text."""
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json), model_max_length=context, **special
    )


def to_blocks(texts: Texts, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Texts:
    """Shuffled texts -> rows of `input_ids` and `labels`; a stream is shuffled within a buffer of texts.

    Texts are joined, an end of text after each, and cut into blocks of `length`; tokens attend to the texts
    before theirs. A prompt with its response is a block of its own of at most `length`, and only the
    response and its end have labels. `datasets` caches the blocks by texts, tokenizer, length and seed, but
    knows the code below by its name only: rename `Joined` or `_pair_blocks` when its output changes.

    Raises:
        DataError: the texts do not fill one block.
    """
    are_pairs = "prompt" in texts.column_names
    convert: Callable = partial(_pair_blocks, tokenizer, length) if are_pairs else Joined(tokenizer, length)
    buffer = {"buffer_size": _STREAM_BUFFER} if is_stream(texts) else {}
    blocks = texts.shuffle(seed, **buffer).map(
        convert, batched=True, with_indices=True, remove_columns=texts.column_names
    )
    if not is_stream(texts) and not len(blocks):
        raise DataError(f"--sequence_length {length}: longer than all the text there is")
    return blocks


class Stream(torch.utils.data.IterableDataset):
    """A stream of blocks that starts again when it ends, in another order.

    It hides the type of `datasets` from the trainer, which would let each rank read files of its own: their
    numbers of samples differ, and other ranks could not resume. From this type, each rank takes its samples.
    """

    def __init__(self, blocks: datasets.IterableDataset) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self._blocks.set_epoch(epoch)
            blocks = iter(self._blocks)
            if (first := next(blocks, None)) is None:
                raise DataError("--sequence_length: longer than all the text there is")
            yield first
            yield from blocks


class Joined:
    """Texts -> blocks of `length`. The ids left over from one call begin the first block of the next."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._rest: list[int] = []

    def __call__(self, rows: dict[str, list[str]], indices: list[int]) -> dict[str, list[list[int]]]:
        if indices[0] == 0:  # the first call, or a stream that starts again
            self._rest = []
        texts = self._tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*self._rest, *chain(*([*text, self._tokenizer.eos_token_id] for text in texts))]
        *blocks, self._rest = (ids[at : at + self._length] for at in range(0, len(ids) + 1, self._length))
        return {"input_ids": blocks, "labels": blocks}


def _pair_blocks(
    tokenizer: PreTrainedTokenizerBase, length: int, rows: dict[str, list[str]], _: list[int]
) -> dict[str, list[list[int]]]:
    blocks, labels = [], []
    for prompt, response in zip(rows["prompt"], rows["response"], strict=True):
        before = tokenizer(prompt, verbose=False)["input_ids"]
        if tokenizer.eos_token_id in before[-1:]:  # some tokenizers end every text
            before.pop()
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        if len(before) < length and len(before) + len(answer) > 1:  # else there is no label to learn
            blocks.append([*before, *answer][:length])
            labels.append([*[IGNORED] * len(before), *answer][:length])
    return {"input_ids": blocks, "labels": labels}


def padded(pad_token_id: int, at_most: int, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One batch of rows of different lengths, padded on the right; padding has no labels.

    Args:
        at_most: tokens of the longest row there can be. A batch has this length or a multiple of 128: each
            new length would cost a plan of cuDNN's attention, or a compilation.
    """
    width = min(round_up(max(len(row["labels"]) for row in rows), 128), at_most)
    paddings = {"input_ids": pad_token_id, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [padding] * (width - len(row[name])) for row in rows])
        for name, padding in paddings.items()
    }
