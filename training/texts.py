"""What a model is trained on: files or a hub dataset -> texts -> blocks of ids, and a tokenizer of its own.

Which text is held out for evaluation depends on its content alone: the same text is never on both sides.
"""

from __future__ import annotations

import glob
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import DataError, cell, is_table, load_from_hub, one_line, read_table
from training.flags import TrainingDataArguments
from training.recipe import IGNORED

END_OF_TEXT = "<|endoftext|>"

# Folders of tables that programs wrote, of sources for other interpreters, or of errors made on purpose.
_NOT_PROSE = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3",
}  # fmt: skip


def load_texts(args: TrainingDataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, evaluation) rows: `text`, or `prompt` and `response`.

    Raises:
        DataError: no such files or dataset, or columns that are neither.
    """
    rows = _read(args)
    drawn = [zlib.crc32("\0".join(map(str, row.values())).encode()) / 2**32 for row in rows]  # from 0 to 1
    held_out = [number < args.eval_fraction for number in drawn]
    parts = [rows.select([i for i, out in enumerate(held_out) if out == wanted]) for wanted in (False, True)]
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        if not len(part):
            raise DataError(
                f"--eval_fraction {args.eval_fraction}: leaves nothing of {len(rows)} texts for {name}"
            )
    return parts[0], parts[1]


def _read(args: TrainingDataArguments) -> datasets.Dataset:
    """All rows, with the columns that are learnt."""
    if args.data_path is not None:
        paths, what = _files(args.data_path), f"--data_path {args.data_path}"
        # What was read before is read again when a file has changed.
        key = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        kwargs = {"files": key, "column": args.text_column}
        make = partial(datasets.Dataset.from_generator, _rows_of_files, gen_kwargs=kwargs)
    elif args.data == "python_stdlib":
        return datasets.Dataset.from_dict({"text": list(standard_library())})
    else:
        what = f"--data {args.data}"
        make = partial(_hub_rows, args.data, args.text_column)
    try:
        return make()
    except Exception as error:  # those of the hub, of Arrow and of generators have no common base
        cause = error.__cause__ or error
        raise cause if isinstance(cause, DataError) else DataError(f"{what}: {one_line(cause)}") from error


def _files(pattern: str) -> list[Path]:
    if (folder := Path(pattern).expanduser()).is_dir():
        suffixes = Counter(path.suffix for path in folder.rglob("*") if path.is_file())
        suffix = max(suffixes, key=lambda suffix: suffixes[suffix], default="")  # the most frequent one
        raise DataError(f'--data_path {pattern}: is a folder; name its files: "{folder}/**/*{suffix}"')
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not (paths := [Path(path) for path in found if Path(path).is_file()]):
        raise DataError(f"--data_path {pattern}: no such files")
    return paths


def _rows_of_files(files: list[tuple[str, int, int]], column: str) -> Iterator[dict[str, str]]:
    """The rows of tables, and other files as one text each; of the first row's columns, those to learn."""
    columns: list[str] = []
    for name, *_ in files:
        path = Path(name)
        whole = [(name, {"text": path.read_text("utf-8-sig")})] if not is_table(path) else read_table(path)
        for place, row in whole:
            columns = columns or _columns(row, column)
            values = [cell(place, row, column) for column in columns]
            yield dict(zip(columns if len(columns) > 1 else ["text"], values, strict=True))


def _hub_rows(name: str, column: str) -> datasets.Dataset:
    rows = load_from_hub(name, split="train")
    columns = _columns(rows.column_names, column)
    rows = rows.select_columns(columns)
    for name in columns:
        if not all(isinstance(value, str) for value in rows[name]):
            raise DataError(f"--text_column {name}: holds values that are no text, or none")
    return rows if len(columns) > 1 else rows.rename_columns({column: "text"})


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


def standard_library() -> Iterator[str]:
    """The sources of the running interpreter's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _NOT_PROSE.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
            if text.strip():
                yield text


def train_tokenizer(texts: datasets.Dataset, vocabulary_size: int, context: int) -> PreTrainedTokenizerBase:
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
    columns = texts.column_names
    tokenizer.train_from_iterator(("".join(row[column] for column in columns) for row in texts), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def to_blocks(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> datasets.Dataset:
    """Rows of `input_ids` and `labels`.

    Texts are joined, an end of text after each, and cut into blocks of `length`. A prompt with its response
    is a row of its own of at most `length`, in which only the response and its end have labels.

    Raises:
        DataError: not one block.
    """
    are_pairs = "prompt" in texts.column_names
    convert: Callable = partial(_pairs, tokenizer, length) if are_pairs else Joined(tokenizer, length)
    blocks = texts.shuffle(seed).map(convert, batched=True, remove_columns=texts.column_names)
    if not len(blocks):
        raise DataError(f"--sequence_length {length}: longer than all the text there is")
    return blocks


class Joined:
    """Texts -> blocks of `length`; the ids left over from one call begin the first block of the next."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._rest: list[int] = []

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = self._tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = self._rest + [token for text in encoded for token in [*text, self._tokenizer.eos_token_id]]
        starts = range(0, len(ids) - self._length + 1, self._length)
        blocks = [ids[start : start + self._length] for start in starts]
        self._rest = ids[len(blocks) * self._length :]
        return {"input_ids": blocks, "labels": blocks}


def _pairs(tokenizer: PreTrainedTokenizerBase, length: int, rows: dict[str, list[str]]) -> dict[str, Any]:
    blocks, labels = [], []
    for prompt, response in zip(rows["prompt"], rows["response"], strict=True):
        before = tokenizer(prompt, verbose=False)["input_ids"]
        if tokenizer.eos_token_id in before[-1:]:  # some tokenizers end every text
            before.pop()
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        if len(before) < length:  # else no label is left to learn from
            blocks.append([*before, *answer][:length])
            labels.append([*[IGNORED] * len(before), *answer][:length])
    return {"input_ids": blocks, "labels": labels}


def padded(pad_token_id: int, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of different lengths -> one batch, padded on the right, where nothing is learnt."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, value)
        for name, value in (("input_ids", pad_token_id), ("labels", IGNORED))
    }
