"""Training data: files -> texts -> blocks of token ids, and a tokenizer for a new model.

The content of a text alone decides whether it is held out, so no text is both learnt and held out.
"""

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from zlib import crc32

import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributions import Categorical
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import DataError, cell, one_line, rows_of
from self_speculation.config import default_model
from self_speculation.machine.devices import round_up
from training.flags import TrainingDataArguments
from training.recipe import IGNORED

# Folders of generated tables, of sources for other interpreters and of deliberate errors.
_NOT_PROSE = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3",
}  # fmt: skip


def load_texts(args: TrainingDataArguments) -> tuple[Dataset, Dataset]:
    """(training, evaluation) rows: `text`, or `prompt` and `response`.

    Raises:
        DataError: the files lack the columns, or are malformed.
    """
    rows = _read(args)
    share = args.eval_fraction
    splits = [rows.filter(_is_in_split, fn_kwargs={"share": share, "held_out": out}) for out in (False, True)]
    for name, split in zip(("training", "evaluation"), splits, strict=True):
        if not len(split):
            raise DataError(f"--eval_fraction {share}: leaves nothing of {len(rows)} texts for {name}")
    return splits[0], splits[1]


def _is_in_split(row: dict[str, str], share: float, held_out: bool) -> bool:
    text = "\0".join(row.values())
    return bool(text.strip()) and (crc32(text.encode()) / 2**32 < share) == held_out


def _read(args: TrainingDataArguments) -> Dataset:
    """All rows, with the columns to learn."""
    paths = args.paths() or _standard_library()
    names = [*next(rows_of(paths[0]))]
    column = args.text_column
    if {"prompt", "response"} <= {*names}:  # they come before any other
        columns = {"prompt": "prompt", "response": "response"}
    elif column in names or names == ["text"]:  # a file of text has no other
        columns = {column if column in names else "text": "text"}
    else:
        raise DataError(
            f"--text_column {column}: not in the data, which has {', '.join(names)}; must be one of these, "
            "or the data must have prompt and response"
        )
    # `datasets` keeps the table until a file changes.
    files = [(path, path.stat().st_mtime_ns) for path in paths]
    try:
        return Dataset.from_generator(_texts_of, gen_kwargs={"files": files, "columns": columns})
    except DatasetGenerationError as error:
        raise DataError(one_line(error.__cause__ or error)) from error


def _texts_of(files: list[tuple[Path, int]], columns: dict[str, str]) -> Iterator[dict[str, str]]:
    for path, _ in files:
        for row in rows_of(path):
            yield {ours: cell(f"{path}: column {name!r}", row.get(name)) for name, ours in columns.items()}


def _standard_library() -> list[Path]:
    """The sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path for path in sorted(root.rglob("*.py")) if _NOT_PROSE.isdisjoint(path.relative_to(root).parts)
    ]


def train_tokenizer(texts: Dataset, vocabulary_size: int) -> str:
    """The JSON of a byte-level tokenizer: the bundled model's, trained on `texts` instead. Line
    breaks, digits and runs of spaces are separate tokens, since a prompt may end in them.
    """
    bundled = AutoTokenizer.from_pretrained(default_model())
    joined = ("".join(row.values()) for row in texts)
    trained = bundled.train_new_from_iterator(joined, vocabulary_size, show_progress=False)
    return trained.backend_tokenizer.to_str()


def tokenizer_from_json(json: str, context: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model; `<|endoftext|>` begins, ends and pads a text."""
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = Tokenizer.from_str(json)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def to_blocks(texts: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Dataset:
    """Shuffled texts -> rows of `input_ids` and `labels`.

    Texts are joined, an end of text after each, and cut into blocks of `length`; tokens attend to earlier
    texts, too. A prompt and a response are one block of at most `length`, and only the response and the end
    of text have labels. `datasets` caches the blocks by texts, tokenizer, length and seed, but knows the
    functions below only by name: rename a function when the output changes.

    Raises:
        DataError: the texts do not fill one block.
    """
    cut = partial(_pair_blocks if "prompt" in texts.column_names else _joined_blocks, tokenizer, length)
    blocks = texts.shuffle(seed).map(cut, batched=True, remove_columns=texts.column_names)
    if not len(blocks):
        raise DataError(f"--sequence_length {length}: longer than all the text there is")
    return blocks


def _joined_blocks(
    tokenizer: PreTrainedTokenizerBase, length: int, rows: dict[str, list[str]]
) -> dict[str, list[list[int]]]:
    """The blocks of a thousand texts. Tokens that do not fill a last block are dropped."""
    texts = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*chain(*([*text, tokenizer.eos_token_id] for text in texts))]
    blocks = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return {"input_ids": blocks, "labels": blocks}


def _pair_blocks(
    tokenizer: PreTrainedTokenizerBase, length: int, rows: dict[str, list[str]]
) -> dict[str, list[list[int]]]:
    blocks = []
    labels = []
    for prompt, response in zip(rows["prompt"], rows["response"], strict=True):
        before = tokenizer(prompt, verbose=False)["input_ids"]
        if tokenizer.eos_token_id in before[-1:]:  # a tokenizer may end every text
            before.pop()
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        if len(before) < length and len(before) + len(answer) > 1:  # else there is no label to learn
            blocks.append([*before, *answer][:length])
            labels.append([*[IGNORED] * len(before), *answer][:length])
    return {"input_ids": blocks, "labels": labels}


def loss_by_frequency(labels: Iterable[list[int]]) -> float:
    """The least mean loss of predictions that do not depend on the text before: the entropy of the labels."""
    counts = Counter(label for row in labels for label in row[1:] if label != IGNORED)
    return float(Categorical(probs=torch.tensor([*counts.values()], dtype=torch.float64)).entropy())


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
