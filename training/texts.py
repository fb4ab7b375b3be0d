"""What a model is trained on: files or a hub dataset -> texts -> blocks of ids, and a tokenizer of its own.

Which text is held out for evaluation depends on its content alone: the same text is never on both sides.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import DataError, cell, is_table, load_from_hub, one_line, read_table
from training.flags import TrainingDataArguments
from training.recipe import IGNORED

END_OF_TEXT = "<|endoftext|>"

# Of a dataset that is read while training: as many are shuffled at a time, and teach a tokenizer.
_STREAMED_TEXTS = 10_000

# Folders of tables that programs wrote, of sources for other interpreters, or of errors made on purpose.
_NOT_PROSE = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3",
}  # fmt: skip


Texts: TypeAlias = datasets.Dataset | datasets.IterableDataset  # the latter is read while training


def load_texts(args: TrainingDataArguments) -> tuple[Texts, Texts]:
    """(training, evaluation) rows: `text`, or `prompt` and `response`; of files, also their `source`.

    Raises:
        DataError: no such files or dataset, or columns that are neither.
    """
    rows = _read(args)
    if is_stream(rows):
        parts = [
            rows.filter(lambda row, wanted=wanted: is_held_out(row, args.eval_fraction) is wanted)
            for wanted in (False, True)
        ]
        return parts[0], parts[1]
    held_out = [is_held_out(row, args.eval_fraction) for row in rows]
    parts = [rows.select([i for i, out in enumerate(held_out) if out is wanted]) for wanted in (False, True)]
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        if not len(part):
            raise DataError(
                f"--eval_fraction {args.eval_fraction}: leaves nothing of {len(rows)} texts for {name}"
            )
    return parts[0], parts[1]


def is_held_out(row: dict[str, str], share: float) -> bool:
    """By the content of the row alone, without where it is from."""
    content = "\0".join(value for name, value in row.items() if name != "source")
    return zlib.crc32(content.encode()) / 2**32 < share


def fingerprint(*parts: Texts) -> str:
    """Of all the texts; of those that are read while training, of the first ones."""
    checksum = 0
    for part in parts:
        for row in islice(part, 100) if is_stream(part) else part:
            content = {name: value for name, value in row.items() if name != "source"}
            checksum = zlib.crc32(json.dumps(content).encode(), checksum)
        checksum = zlib.crc32(b"the end of a part", checksum)
    return f"{checksum:08x}"


def is_stream(texts: Texts) -> bool:
    return isinstance(texts, datasets.IterableDataset)


def _read(args: TrainingDataArguments) -> Texts:
    """All rows, with the columns that are learnt."""
    if args.data_path is not None:
        paths, what = _files(args.data_path), f"--data_path {args.data_path}"
        # What was read before is read again when a file has changed.
        key = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        kwargs = {"files": key, "column": args.text_column}
        make = partial(datasets.Dataset.from_generator, _rows_with_sources, gen_kwargs=kwargs)
    elif args.data == "python_stdlib":
        sources, texts = zip(*standard_library(), strict=True)
        return datasets.Dataset.from_dict({"text": texts, "source": sources})
    else:
        what = f"--data {args.data}"
        make = partial(_hub_rows, args.data, args.text_column, args.streaming)
    try:
        return make()
    except Exception as error:  # those of the hub, of Arrow and of generators have no common base
        cause = error.__cause__ or error
        if isinstance(cause, DataError) and str(cause).startswith("--"):
            raise cause from error
        empty = type(cause).__name__ == "SchemaInferenceError"  # datasets asks for columns then
        raise DataError(f"{what}: {'has no texts' if empty else one_line(cause)}") from error


def _files(pattern: str) -> list[Path]:
    if (folder := Path(pattern).expanduser()).is_dir():
        suffixes = Counter(path.suffix for path in folder.rglob("*") if path.is_file())
        suffix = max(suffixes, key=lambda suffix: suffixes[suffix], default="")  # the most frequent one
        raise DataError(f'--data_path {pattern}: is a folder; name its files: "{folder}/**/*{suffix}"')
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not (paths := [Path(path) for path in found if Path(path).is_file()]):
        raise DataError(f"--data_path {pattern}: no such files")
    return paths


def _rows_with_sources(files: list[tuple[str, int, int]], column: str) -> Iterator[dict[str, str]]:
    """The rows of tables, and other files as one text each; of the first row's columns, those to learn."""
    columns: list[str] = []
    for name, *_ in files:
        path = Path(name)
        whole = [(name, {"text": path.read_text("utf-8-sig")})] if not is_table(path) else read_table(path)
        for place, row in whole:
            columns = columns or _columns(row, column)
            values = [cell(place, row, column) for column in columns]
            names = columns if len(columns) > 1 else ["text"]
            yield {**dict(zip(names, values, strict=True)), "source": place}


def _hub_rows(name: str, column: str, streaming: bool) -> Texts:
    rows = load_from_hub(name, split="train", streaming=streaming)
    if streaming and rows.column_names is None:
        rows = rows._resolve_features()
    columns = _columns(rows.column_names, column)
    rows = rows.select_columns(columns)
    for name in columns:
        if not all(isinstance(row[name], str) for row in (islice(rows, 100) if streaming else rows)):
            raise DataError(f"--text_column {name}: holds values that are no text, or none")
    return rows if columns in (["text"], ["prompt", "response"]) else rows.rename_columns({column: "text"})


def _columns(found: Collection[str], column: str) -> list[str]:
    """Those to learn, prompt and response before any other; raises DataError where there are none."""
    if {"prompt", "response"} <= set(found):
        return ["prompt", "response"]
    if column not in found:
        raise DataError(
            f"--text_column {column}: not in the data, which has {', '.join(found)}; prompt and response "
            "would do as well"
        )
    return [column]


def standard_library() -> Iterator[tuple[str, str]]:
    """(name, text) of the sources of the running interpreter's standard library, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_PROSE.isdisjoint(name.parts):
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
            if text.strip():
                yield str(name), text


def train_tokenizer(texts: Texts, vocabulary_size: int, context: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer; `<|endoftext|>` begins, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    # Digits and line breaks stand alone, so that a prompt may end in one, and a run of spaces is one token.
    lines, digits = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    columns = [column for column in texts.column_names if column != "source"]
    some = islice(texts, _STREAMED_TEXTS) if is_stream(texts) else texts
    tokenizer.train_from_iterator(("".join(row[column] for column in columns) for row in some), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def to_blocks(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, cache: str | None = None
) -> Texts:
    """Rows of `input_ids`, `labels` and `documents`, the first and the last of the shuffled texts in a row.

    Texts are joined, an end of text after each, and cut into blocks of `length`; tokens attend to those of
    the texts before theirs. A prompt with its response is a row of its own of at most `length`, in which
    only the response and its end have labels.

    Args:
        cache: a file that then holds the rows, and that they are taken from where it is there.

    Raises:
        DataError: not one block.
    """
    are_pairs = "prompt" in texts.column_names
    convert: Callable = partial(_pairs, tokenizer, length) if are_pairs else Joined(tokenizer, length)
    where = {} if cache is None else {"cache_file_name": cache}
    blocks = shuffled(texts, seed).map(
        convert, batched=True, with_indices=True, remove_columns=texts.column_names, **where
    )
    if not is_stream(texts) and not len(blocks):
        raise DataError(f"--sequence_length {length}: longer than all the text there is")
    return blocks


class Stream(torch.utils.data.IterableDataset):
    """Blocks again and again, each time in another order.

    Not a dataset of `datasets`: of such a one each rank would read files of its own, which a resumption with
    other ranks could not follow, and of which some end earlier. Of this one, each rank takes its samples.
    """

    def __init__(self, blocks: datasets.IterableDataset) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for times in count():
            self._blocks.set_epoch(times)
            blocks = iter(self._blocks)
            if (first := next(blocks, None)) is None:
                raise DataError("--sequence_length: longer than all the text there is")
            yield first
            yield from blocks


def shuffled(texts: Texts, seed: int) -> Texts:
    return texts.shuffle(seed, **({"buffer_size": _STREAMED_TEXTS} if is_stream(texts) else {}))


def named(texts: Texts, documents: list[list[int]], at_most: int = 8) -> str:
    """Those of the shuffled texts: by file, else by how they begin."""
    numbers = sorted({number for first, last in documents for number in range(first, last + 1)})
    if is_stream(texts):
        return f"texts {', '.join(map(str, numbers[:at_most]))} of the stream"
    rows = (texts[number] for number in numbers[:at_most])
    names = [row.get("source") or repr(next(iter(row.values()))[:40]) for row in rows]
    more = f" and {len(numbers) - at_most} more" if len(numbers) > at_most else ""
    return ", ".join(dict.fromkeys(names)) + more


class Joined:
    """Texts -> blocks of `length`; the ids left over from one call begin the first block of the next."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._rest = numpy.empty((2, 0), int)  # ids, and the numbers of the texts that they are from

    def __call__(self, rows: dict[str, list[str]], numbers: list[int]) -> dict[str, Any]:
        encoded = self._tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        texts = [[*text, self._tokenizer.eos_token_id] for text in encoded]
        new = numpy.stack([numpy.concatenate(texts), numpy.repeat(numbers, [len(text) for text in texts])])
        if numbers[0] == 0:  # the first call, or a stream that begins anew
            self._rest = self._rest[:, :0]
        both = numpy.concatenate([self._rest, new], axis=1)
        whole = both.shape[1] // self._length * self._length
        self._rest = both[:, whole:]
        ids, owners = both[:, :whole].reshape(2, -1, self._length)
        return {"input_ids": ids, "labels": ids, "documents": owners[:, [0, -1]]}


def _pairs(
    tokenizer: PreTrainedTokenizerBase, length: int, rows: dict[str, list[str]], numbers: list[int]
) -> dict[str, Any]:
    blocks, labels, documents = [], [], []
    for prompt, response, number in zip(rows["prompt"], rows["response"], numbers, strict=True):
        before = tokenizer(prompt, verbose=False)["input_ids"]
        if tokenizer.eos_token_id in before[-1:]:  # some tokenizers end every text
            before.pop()
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        if len(before) < length and len(before) + len(answer) > 1:  # else there is no label to learn
            blocks.append([*before, *answer][:length])
            labels.append([*[IGNORED] * len(before), *answer][:length])
            documents.append([number, number])
    return {"input_ids": blocks, "labels": labels, "documents": documents}


def padded(pad_token_id: int, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of different lengths -> one batch, padded on the right, where nothing is learnt."""
    values = {"input_ids": pad_token_id, "labels": IGNORED}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, values.get(name, 0))
        for name in rows[0]
    }
