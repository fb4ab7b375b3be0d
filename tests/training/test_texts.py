"""Files and datasets -> texts -> blocks."""

import datasets
from helpers import error_line, write_rows

from data import DataError
from training.flags import TrainingDataArguments
from training.recipe import IGNORED
from training.texts import load_texts, padded, to_blocks, tokenizer_from_json, train_tokenizer


def arguments(path, **more):
    return TrainingDataArguments(data_path=str(path), eval_fraction=more.pop("eval_fraction", 0.3), **more)


def test_texts_are_rows_or_whole_files(tmp_path):
    """Guards against a text that is both learnt and held out, a byte order mark in it, and another column."""
    texts = [f"text number {i}" for i in range(30)]
    write_rows(tmp_path / "a.jsonl", [{"content": text, "other": "x"} for text in texts])
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text("\ufeff" + text)
    (tmp_path / "blank.txt").write_text("\n")
    rows, files = (
        [sorted(part["text"]) for part in load_texts(arguments(tmp_path / name, text_column="content"))]
        for name in ("a.jsonl", "*.txt")
    )
    assert rows == files
    assert sorted(rows[0] + rows[1]) == sorted(texts)
    assert not set(rows[0]) & set(rows[1])
    write_rows(tmp_path / "b.jsonl", [{"text": "x", "prompt": "ask", "response": text} for text in texts])
    pairs = [row for part in load_texts(arguments(tmp_path / "b.jsonl")) for row in part]
    assert sorted(map(tuple, map(dict.values, pairs))) == sorted(("ask", text) for text in texts)


def test_errors_of_files(tmp_path):
    """Guards against tracebacks of `datasets`, and against messages without the file."""
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    for name, message in (
        ("a.jsonl", "--text_column text: not in the data, which has content"),
        ("[ac].*", "c.txt: column 'content' must be text, not NoneType"),
        ("d.jsonl", "d.jsonl: column 'text' must be text, not NoneType"),
        ("c.txt", "leaves nothing of 1 texts for"),
    ):
        args = arguments(tmp_path / name, text_column="content" if "c" in name else "text")
        assert message in error_line(DataError, load_texts, args)
    for name, message in (("none*", "no such files"), ("", "is a folder; name its files, such as ")):
        assert message in error_line(ValueError, arguments, tmp_path / name)


def test_texts_are_tokenised_once_until_a_file_changes(tmp_path):
    """Guards against a cache that no later training finds, and against training on old contents."""
    path = tmp_path / "a.jsonl"
    files = []
    for word in ("old", "old", "new"):
        if not files or word == "new":
            write_rows(path, [{"text": f"{word} {i}"} for i in range(9)])
        parts = load_texts(arguments(path))
        assert {text.split()[0] for part in parts for text in part["text"]} == {word}
        tokenizer = tokenizer_from_json(train_tokenizer(parts[0], 260), 8)
        files.append([to_blocks(part, tokenizer, 8, seed=0).cache_files for part in parts])
    assert files[0] == files[1] != files[2]
    assert all(files[0])


def test_blocks_lose_nothing_but_the_tail(byte_tokenizer):
    """Guards against texts without an end between them, and against a tail lost after each text."""
    dataset = datasets.Dataset.from_dict({"text": ["abc def", "ghi", "jkl mno"] * 300})
    blocks = to_blocks(dataset, byte_tokenizer, 4, seed=0)
    ids = [token for block in blocks["input_ids"] for token in block]
    assert blocks["labels"] == blocks["input_ids"]
    shuffled = dataset.shuffle(0)["text"]
    expected = [t for text in shuffled for t in [*byte_tokenizer.encode(text, add_special_tokens=False), 2]]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) < 4


def test_prompts_are_masked(byte_tokenizer):
    """Guards against labels of prompts or padding, and against a block without a label."""
    rows = {"prompt": ["ab", "x" * 50], "response": ["cd", "y"]}
    (block,) = to_blocks(datasets.Dataset.from_dict(rows), byte_tokenizer, 12, seed=0)
    prompt = byte_tokenizer("ab")["input_ids"]
    response = [*byte_tokenizer("cd", add_special_tokens=False)["input_ids"], byte_tokenizer.eos_token_id]
    assert block["input_ids"] == prompt + response
    assert block["labels"] == [IGNORED] * len(prompt) + response
    batch = padded(0, 12, [block, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"][1].tolist() == [5] + [IGNORED] * 11
    # Few lengths: each costs a plan of cuDNN's attention, or a compilation.
    rows = [dict.fromkeys(("input_ids", "labels"), [5] * length) for length in (2, 128, 129, 299)]
    assert [padded(0, 300, [row])["input_ids"].shape[1] for row in rows] == [128, 128, 256, 300]
