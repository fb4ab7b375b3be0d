"""Datasets: prompts, shots, order; and one line for whatever is wrong with a file."""

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
from arguments import DataArguments, parse
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


def test_every_dataset_is_covered_here():
    assert set(ROWS) == set(FIRST) == set(DATASETS)


KINDS = ["jsonl", "jsonl.gz", "parquet", "parquet.gz", "csv", "csv.gz"]
FILES = [(dataset, kind) for dataset in ROWS for kind in (KINDS[:4] if dataset == "chat_format" else KINDS)]


@pytest.mark.parametrize(("dataset", "kind"), FILES)
def test_local_files_of_every_kind(dataset, kind, tmp_path):
    rows = ROWS[dataset]
    examples = in_order(dataset, write(tmp_path / f"data.{kind}", rows))
    assert (examples[0].prompt, examples[0].reference) == FIRST[dataset]
    assert len(examples) == (18 if dataset == "chat_format" else 9)


def test_chat_gives_an_example_for_each_parser_turn(tmp_path):
    second = in_order("chat_format", write(tmp_path / "a.jsonl", ROWS["chat_format"]))[1]
    assert second.prompt == "USER: hi 0\nPARSER: [A]\nUSER: more\nPARSER:"
    assert second.reference == "[B]"


def test_human_eval_is_the_real_one():
    examples = in_order("human_eval")
    assert len(examples) == 164
    assert examples[0].row["task_id"] == "HumanEval/0"
    assert examples[0].prompt.startswith("from typing import List")


@pytest.mark.parametrize(
    ("dataset", "hub"),
    [
        ("cnn_dm_summarization", ("abisee/cnn_dailymail", "3.0.0")),
        ("cnn_dm_lm", ("abisee/cnn_dailymail", "3.0.0")),
        ("xsum_summarization", ("EdinburghNLP/xsum",)),
        ("top_v2", ("WillHeld/top_v2",)),
    ],
)
def test_the_hub_is_asked_for_the_right_set(dataset, hub, monkeypatch):
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
    with pytest.raises(DataError, match=r"cannot load EdinburghNLP/xsum from the hub .*--data_path"):
        load("xsum_summarization")


def test_order_and_shots_depend_on_the_seed_alone(tmp_path):
    """A global generator would give each sweep cell other examples."""
    path = write(tmp_path / "a.jsonl", ROWS["custom_jsonl"])
    once = load("custom_jsonl", path, n_shot=2)
    assert once == load("custom_jsonl", path, n_shot=2)
    assert once[:3] == load("custom_jsonl", path, n_shot=2, num_samples=3)
    assert fingerprint(once) != fingerprint(load("custom_jsonl", path, n_shot=2, seed=43))
    assert sorted(e.row["prompt"] for e in load("custom_jsonl", path)) == [f"ask {i}" for i in range(9)]


def test_shots_stand_before_the_prompt_and_are_not_evaluated(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS["custom_jsonl"])
    examples = in_order("custom_jsonl", path, n_shot=2)
    assert examples[0].prompt == "ask 0 say 0\n\nask 1 say 1\n\nask 2"
    assert len(examples) == 7
    for example in load("custom_jsonl", path, n_shot=3):
        assert example.prompt.count(example.row["prompt"]) == 1


def test_shots_come_from_the_training_split_of_a_folder(tmp_path):
    write(tmp_path / "test.jsonl", ROWS["cnn_dm_summarization"])
    write(tmp_path / "train.csv", [{"article": "old", "highlights": "known"}])
    examples = in_order("cnn_dm_summarization", str(tmp_path), n_shot=1)
    assert examples[0].prompt == "Article: old\nSummary: known\n\nArticle: article 0\nSummary:"
    assert len(examples) == 9


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_only_the_shots_that_are_needed_become_examples(place, tmp_path, monkeypatch):
    """Guards against gigabytes of examples of a training split, of which three are used; and against other
    shots than the whole of them, shuffled, would begin with.
    """
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
    """Under datasets 4 and later, EdinburghNLP/xsum is read from its Parquet branch; where the hub's copy is
    no script, as it is. What is refused, and the words for it, are those of `datasets` itself.
    """
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


def test_line_ends_of_windows(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'prompt,response\r\n"a\r\nb","c\r\nd"\r\n')
    (example,) = in_order("custom_jsonl", str(path))
    assert (example.prompt, example.reference) == ("a\nb", "c\nd")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "prompt,response\na,b\n"), ("a.jsonl", '{"prompt": "a", "response": "b"}\n')],
)
def test_a_byte_order_mark_is_no_text(name, content, tmp_path):
    """Guards against a file that Windows wrote and whose first column is not found."""
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    (example,) = in_order("custom_jsonl", str(tmp_path / name))
    assert (example.prompt, example.reference) == ("a", "b")


def test_shots_keep_the_indentation_of_code():
    prompt = in_order("human_eval", n_shot=1)[0].prompt
    assert '    """\n    for idx, elem in enumerate(numbers):\n' in prompt


def test_a_home_folder_is_found_for_shots_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "test.jsonl", ROWS["custom_jsonl"])
    write(tmp_path / "train.jsonl", [{"prompt": "old", "response": "known"}])
    examples = in_order("custom_jsonl", "~", n_shot=1)
    assert (examples[0].prompt, len(examples)) == ("old known\n\nask 0", 9)


def test_a_template_keeps_its_other_braces(tmp_path):
    """`str.format` would fail on them."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "{x} {message}", "response": "r"}])
    (example,) = load("custom_jsonl", path, template='{"q": "{message}", {y}}')
    assert example.prompt == '{"q": "{x} {message}", {y}}'


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_values_stay_text(kind, tmp_path):
    """Type inference would turn these into a number, a missing value and a date."""
    rows = [{"prompt": text, "response": "1.50"} for text in ("0123", "NA", "2020-01-01", "null", "")]
    examples = in_order("custom_jsonl", write(tmp_path / f"a.{kind}", rows))
    assert [e.prompt for e in examples] == ["0123", "NA", "2020-01-01", "null", ""]
    assert examples[0].reference == "1.50"


def test_a_number_in_json_becomes_its_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": 5, "response": 1.5}])
    assert load("custom_jsonl", path)[0].prompt == "5"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n\n{"prompt": \n', "a.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"prompt": "a", "answer": "b"}\n',
            "line 1: no column 'response'; found: prompt, answer",
        ),
        ("a.jsonl", b"[1]\n", "line 1: must be an object, not list"),
        (
            "a.jsonl",
            b'{"prompt": ' + b"[" * 99_999,
            "line 1: lists and objects within each other",
        ),
        (
            "a.jsonl",
            b'{"prompt": null, "response": "b"}',
            "line 1: column 'prompt' must be text, not NoneType",
        ),
        ("a.jsonl", b"\xff\xfe", "a.jsonl: 'utf-8' codec can't decode"),
        ("a.jsonl", b"", "a.jsonl: no examples"),
        ("a.csv", b"prompt,answer\na,b\n", "line 2: no column 'response'; found: prompt, answer"),
        ("a.csv", b"prompt,response\na,b\na,b,c\n", "a.csv, line 3: must have the 2 fields of the header"),
        ("a.csv", b"prompt,response\na,b,\n", "a.csv, line 2: must have the 2 fields"),
        ("a.csv", b"prompt,response\nc\n", "a.csv, line 2: must have the 2 fields"),
        ("a.csv", b"", "a.csv: no examples"),
        ("a.parquet", b"no", "a.parquet: "),
        ("a.jsonl.gz", b"no", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9] + b"xxxxxxxxx", "a.jsonl.gz: "),
        ("a.xml", b"", "must be a .jsonl, .csv or .parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("custom_jsonl", str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load("custom_jsonl", str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="must hold one file test"):
        load("custom_jsonl", str(tmp_path))


def test_malformed_turns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"data": [{"role": "USER"}]}])
    with pytest.raises(DataError, match="line 1: no column 'message'; found: role"):
        load("chat_format", path)
    write(tmp_path / "a.jsonl", [{"data": "hi"}])
    with pytest.raises(DataError, match="line 1: column 'data' must be a list of turns"):
        load("chat_format", path)
    write(tmp_path / "a.jsonl", [{"data": [{"role": "PARSER", "message": None}]}])
    with pytest.raises(DataError, match="line 1: column 'message' must be text"):
        load("chat_format", path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--num_samples 0", "--num_samples 0: must be at least 1"),
        ("--n_shot -1", "--n_shot -1: must be at least 0"),
        ("--dataset nothing", "choose from 'cnn_dm_summarization', 'xsum_summarization', 'cnn_dm_lm'"),
        ("--template x", "--template 'x': must contain {message}"),
    ],
)
def test_impossible_flags(args, message, capsys):
    with pytest.raises(SystemExit):
        parse("test", DataArguments, args=args.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dataset": "cnn_dm_lm", "n_shot": 1}, "^--n_shot 1: cnn_dm_lm takes no shots$"),
        ({"dataset": "custom_jsonl"}, "^--dataset custom_jsonl: needs --data_path$"),
    ],
)
def test_what_a_dataset_has_not_got(args, message):
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
    """Guards against tracebacks of four readers, and examples that are not text."""
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
