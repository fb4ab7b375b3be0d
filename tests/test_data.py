"""Datasets: prompts, shots and order; a bad file gives one line of error."""

import contextlib
import csv
import gzip
import io
import json
import random
import re

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from arguments import DataArguments
from data import DATASETS, DataError, fingerprint, load_examples

ROWS = {
    "cnn_dm_summarization": [
        {"article": f"article {i}", "highlights": f"summary {i}"} for i in range(9)
    ],
    "xsum_summarization": [{"document": f"document {i}", "summary": f"summary {i}"} for i in range(9)],
    "cnn_dm_lm": [{"article": " ".join(f"w{i}_{j}" for j in range(120)), "id": "x"} for i in range(9)],
    "human_eval": [
        {"task_id": f"T/{i}", "prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}\n",
         "test": "def check(f): pass", "entry_point": f"f{i}"} for i in range(9)
    ],
    "top_v2": [{"domain": "x", "utterance": f"say {i}", "semantic_parse": f"[IN:{i} ]"} for i in range(9)],
    "custom_jsonl": [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(9)],
    "chat_format": [
        {"data": [{"role": "USER", "message": f"hi {i}"}, {"role": "PARSER", "message": "[A]"},
                  {"role": "USER", "message": "more"}, {"role": "PARSER", "message": "[B]"}]}
        for i in range(9)
    ],
}  # fmt: skip
FIRST = {
    "cnn_dm_summarization": ("Article: article 0\nSummary:", "summary 0"),
    "xsum_summarization": ("Article: document 0\nSummary:", "summary 0"),
    "cnn_dm_lm": (" ".join(f"w0_{j}" for j in range(100)), " ".join(f"w0_{j}" for j in range(100, 120))),
    "human_eval": ("def f0():\n", "    return 0\n"),
    "top_v2": ("say 0", "[IN:0 ]"),
    "custom_jsonl": ("ask 0", "say 0"),
    "chat_format": ("USER: hi 0\nPARSER:", "[A]"),
}


def write(path, rows):
    if ".parquet" in path.name:
        content = pandas.DataFrame(rows).to_parquet()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    elif ".csv" in path.name:
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def load(dataset, path=None, seed=42, **kwargs):
    return load_examples(DataArguments(dataset=dataset, data_path=path, **kwargs), seed)


def in_order(dataset, path=None, **kwargs):
    return load(dataset, path, random_shuffle=False, **kwargs)


KINDS = ["jsonl", "jsonl.gz", "parquet", "parquet.gz", "csv", "csv.gz"]
FILES = [(dataset, kind) for dataset in ROWS for kind in (KINDS[:4] if dataset == "chat_format" else KINDS)]


@pytest.mark.parametrize(("dataset", "kind"), FILES)
def test_local_files_of_every_kind(dataset, kind, tmp_path):
    """Guards against a dataset or a file format that is read otherwise than the others."""
    assert set(ROWS) == set(FIRST) == set(DATASETS)
    rows = ROWS[dataset]
    examples = in_order(dataset, write(tmp_path / f"data.{kind}", rows))
    assert (examples[0].prompt, examples[0].reference) == FIRST[dataset]
    assert len(examples) == (18 if dataset == "chat_format" else 9)


def test_chat_gives_an_example_for_each_parser_turn(tmp_path):
    """Guards against turns that are left out of the prompt."""
    second = in_order("chat_format", write(tmp_path / "a.jsonl", ROWS["chat_format"]))[1]
    assert second.prompt == "USER: hi 0\nPARSER: [A]\nUSER: more\nPARSER:"
    assert second.reference == "[B]"


@pytest.mark.parametrize(
    ("dataset", "hub"),
    [
        ("cnn_dm_summarization", ("abisee/cnn_dailymail", "3.0.0")),
        ("cnn_dm_lm", ("abisee/cnn_dailymail", "3.0.0")),
        ("xsum_summarization", ("EdinburghNLP/xsum",)),
        ("top_v2", ("WillHeld/top_v2",)),
    ],
)
def test_a_dataset_comes_from_its_place_on_the_hub(dataset, hub, monkeypatch):
    """Guards against another repository or split than the paper's."""
    asked = []

    def load_dataset(*name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS[dataset])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = in_order(dataset)
    assert (examples[0].prompt, examples[0].reference) == FIRST[dataset]
    assert asked == [(hub, "test")]
    if dataset != "cnn_dm_lm":
        assert "summary" in in_order(dataset, n_shot=2)[0].prompt or dataset == "top_v2"
        assert asked[-1] == (hub, "train")


def test_an_unreachable_hub_says_what_to_do():
    """Guards against a traceback, and minutes of retries without a network."""
    with pytest.raises(DataError, match=r"cannot load EdinburghNLP/xsum from the hub .*--data_path"):
        load("xsum_summarization")


def test_order_and_shots_depend_on_the_seed_alone(tmp_path):
    """Guards against other examples in each cell of a sweep, and shots that are evaluated."""
    path = write(tmp_path / "a.jsonl", ROWS["custom_jsonl"])
    once = load("custom_jsonl", path, n_shot=2)
    assert once == load("custom_jsonl", path, n_shot=2)
    assert once[:3] == load("custom_jsonl", path, n_shot=2, num_samples=3)
    assert fingerprint(once) != fingerprint(load("custom_jsonl", path, n_shot=2, seed=43))
    assert sorted(e.row["prompt"] for e in load("custom_jsonl", path)) == [f"ask {i}" for i in range(9)]
    assert all(example.prompt.count(example.row["prompt"]) == 1 for example in once)
    examples = in_order("custom_jsonl", path, n_shot=2)
    assert examples[0].prompt == "ask 0 say 0\n\nask 1 say 1\n\nask 2"
    assert len(examples) == 7


def test_shots_come_from_the_training_split_of_a_folder(tmp_path, monkeypatch):
    """Guards against shots from the test split, in a home folder too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "test.jsonl", ROWS["cnn_dm_summarization"])
    write(tmp_path / "train.csv", [{"article": "old", "highlights": "known"}])
    for path in (str(tmp_path), "~"):
        examples = in_order("cnn_dm_summarization", path, n_shot=1)
        assert examples[0].prompt == "Article: old\nSummary: known\n\nArticle: article 0\nSummary:"
        assert len(examples) == 9


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_only_the_shots_that_are_needed_become_examples(place, tmp_path, monkeypatch):
    """Guards against gigabytes of examples of which three are used, and shots in another order."""
    rows = [{"document": f"text {i}", "summary": f"summary {i}"} for i in range(500)]
    splits = {"train": rows, "test": rows[:2]}
    for split, part in splits.items():
        write(tmp_path / f"{split}.jsonl", part)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_list(splits[split]))
    read, value = [], data.cell
    monkeypatch.setattr(data, "cell", lambda *args: read.append(args) or value(*args))
    path = str(tmp_path) if place == "folder" else None
    (example,) = load("xsum_summarization", path, n_shot=3, num_samples=1)
    assert len(read) == 2 * (3 + 2)  # columns of the shots, and of the test split
    numbers = random.Random("shots 42").sample(range(500), 500)[:3]
    assert re.findall(r"summary (\d+)", example.prompt) == [str(number) for number in numbers]


@pytest.mark.parametrize("is_script", [True, False])
def test_a_dataset_that_is_a_script_on_the_hub(is_script, tmp_path, monkeypatch):
    """Guards against EdinburghNLP/xsum that `datasets` 4 refuses as a script: its Parquet branch is read."""
    main, branch = tmp_path / "main" / "xsum", tmp_path / "branch" / "xsum"
    for folder, origin in ((main, "main"), (branch, "branch")):
        if is_script and folder == main:
            folder.mkdir(parents=True)
            (folder / "xsum.py").write_text("raise SystemExit('it was run')")
            continue
        for split in ("train", "test"):
            (folder / "default" / split).mkdir(parents=True)
            rows = [{"document": f"{origin} {split} {i}", "summary": "s", "id": "0"} for i in range(3)]
            write(folder / "default" / split / "0000.parquet", rows)
    load_dataset = datasets.load_dataset
    branches = {None: main, "refs/convert/parquet": branch}

    def stand_in(name, *, split, revision=None):
        assert name == "EdinburghNLP/xsum"
        return load_dataset(str(branches[revision]), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    first = in_order("xsum_summarization", n_shot=1)[0].prompt
    origin = "branch" if is_script else "main"
    assert first == f"Article: {origin} train 0\nSummary: s\n\nArticle: {origin} test 0\nSummary:"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'prompt,response\r\n"a\r\nb","c\r\nd"\r\n'),
        ("a.csv", 'prompt,response\n"a\nb","c\nd"\n'.encode("utf-8-sig")),
        ("a.jsonl", '{"prompt": "a\\nb", "response": "c\\nd"}\n'.encode("utf-8-sig")),
    ],
)
def test_files_of_windows(name, content, tmp_path):
    """Guards against carriage returns in texts, and a byte order mark in the name of the first column."""
    (tmp_path / name).write_bytes(content)
    (example,) = in_order("custom_jsonl", str(tmp_path / name))
    assert (example.prompt, example.reference) == ("a\nb", "c\nd")


def test_human_eval_is_the_real_one():
    """Guards against a stand-in for the published problems, and shots that lose the indentation of code."""
    examples = in_order("human_eval")
    assert len(examples) == 164
    assert examples[0].row["task_id"] == "HumanEval/0"
    shot = in_order("human_eval", n_shot=1)[0].prompt
    assert shot.startswith("from typing import List")
    assert '    """\n    for idx, elem in enumerate(numbers):\n' in shot


def test_a_template_keeps_its_other_braces(tmp_path):
    """Guards against `str.format`, which fails on them."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "{x} {message}", "response": "r"}])
    (example,) = load("custom_jsonl", path, template='{"q": "{message}", {y}}')
    assert example.prompt == '{"q": "{x} {message}", {y}}'


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_values_stay_text(kind, tmp_path):
    """Guards against type inference, which makes these a number, a missing value and a date."""
    rows = [{"prompt": text, "response": "1.50"} for text in ("0123", "NA", "2020-01-01", "null", "")]
    examples = in_order("custom_jsonl", write(tmp_path / f"a.{kind}", rows))
    assert [e.prompt for e in examples] == ["0123", "NA", "2020-01-01", "null", ""]
    assert examples[0].reference == "1.50"
    path = write(tmp_path / "numbers.jsonl", [{"prompt": 5, "response": 1.5}])
    assert load("custom_jsonl", path)[0].prompt == "5"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n\n{"prompt": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"prompt": "", "answer": ""}\n', "line 1: no column 'response'; found: prompt, answer"),
        ("a.jsonl", b"[1]\n", "line 1: must be an object, not list"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 99_999, "line 1: lists and objects within each other"),
        ("a.jsonl", b'{"prompt": null, "response": ""}', "line 1: column 'prompt' must be text, not None"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl: 'utf-8' codec can't decode"),
        ("a.jsonl", b"", "a.jsonl: no examples"),
        ("a.csv", b"prompt,answer\na,b\n", "line 2: no column 'response'; found: prompt, answer"),
        ("a.csv", b"prompt,response\na,b\na,b,c\n", "a.csv, line 3: must have the 2 fields of the header"),
        ("a.csv", b"prompt,response\nc\n", "a.csv, line 2: must have the 2 fields"),
        ("a.csv", b"", "a.csv: no examples"),
        ("a.parquet", b"no", "a.parquet: "),
        ("a.jsonl.gz", b"no", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9] + b"xxxxxxxxx", "a.jsonl.gz: "),
        ("a.xml", b"", "must be a .jsonl, .csv or .parquet file"),
        ("test.csv", None, "No such file"),
        ("", None, "must hold one file test"),
        ("chat.jsonl", b'{"data": [{"role": "USER"}]}', "line 1: no column 'message'; found: role"),
        ("chat.jsonl", b'{"data": "hi"}', "line 1: column 'data' must be a list of turns"),
        ("chat.jsonl", b'{"data": [{"role": "PARSER", "message": null}]}', "column 'message' must be text"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_with_its_place(name, content, message, tmp_path):
    """Guards against a traceback, and a message without file and line."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("chat_format" if name == "chat.jsonl" else "custom_jsonl", str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dataset": "cnn_dm_lm", "n_shot": 1}, "^--n_shot 1: cnn_dm_lm takes no shots$"),
        ({"dataset": "custom_jsonl"}, "^--dataset custom_jsonl: needs --data_path$"),
    ],
)
def test_flags_that_do_not_fit_the_dataset(args, message):
    """Guards against shots or rows that are not there."""
    with pytest.raises(DataError, match=message):
        load(**args)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(sorted({column for dataset in DATASETS.values() for column in dataset.columns}))
ANY_ROWS = st.lists(
    st.dictionaries(COLUMNS | st.sampled_from(["role", "message"]), JSON, max_size=5), max_size=4
)


def as_csv(rows):
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    with contextlib.suppress(UnicodeEncodeError):
        writer.writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


def as_parquet(rows):
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError):  # rows of no common kind
        return b"PAR1"
    return buffer.getvalue()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@st.composite
def files(draw):
    """(suffix, content): rows of a kind, well written or damaged, or any bytes."""
    suffix, write = draw(st.sampled_from([(".jsonl", as_jsonl), (".csv", as_csv), (".parquet", as_parquet)]))
    content = draw(st.one_of(ANY_ROWS.map(write), st.binary(max_size=60)))
    if draw(st.booleans()):
        content = gzip.compress(content)
        suffix += ".gz"
    if content and draw(st.booleans()):
        cut = draw(st.integers(0, len(content) - 1))
        content = draw(st.sampled_from([content[:cut], content[:cut] + b"\xff\x00" + content[cut:]]))
    return suffix, content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(file=files(), dataset=st.sampled_from(sorted(DATASETS)), n_shot=st.integers(0, 2))
@settings(max_examples=400)
def test_any_file_is_read_or_refused_in_one_line(folder, file, dataset, n_shot):
    """Guards against tracebacks of the readers, and examples that are not text."""
    suffix, content = file
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    shots = 0 if DATASETS[dataset].between is None else n_shot
    try:
        examples = load_examples(DataArguments(dataset, data_path=str(path), n_shot=shots), seed=1)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert examples
        assert all(
            isinstance(text, str) for example in examples for text in (example.prompt, example.reference)
        )
