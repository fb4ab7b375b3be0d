"""Datasets: prompts, shots and order; a bad file gives one line of error."""

import json
import random
import re

import datasets
import pandas
import pytest
from conftest import ROOT
from helpers import error_line, watch

import data
from data import DATASETS, DataArguments, DataError, load_examples

CHAT = [("USER", "hi #"), ("PARSER", "[A]"), ("USER", "more"), ("PARSER", "[B]")]
EXAMPLES = {  # a row, the first prompt and the reference; # stands for the number of the row
    "cnn_dm_summarization": (
        {"article": "article #", "highlights": "summary #"}, "Article: article #\nSummary:", "summary #"
    ),
    "xsum_summarization": (
        {"document": "document #", "summary": "summary #"}, "Article: document #\nSummary:", "summary #"
    ),
    "cnn_dm_lm": ({"article": "w# " * 120, "id": "x"}, ("w# " * 100).strip(), ("w# " * 20).strip()),
    "human_eval": (
        {"task_id": "T/#", "prompt": "def f#():\n", "canonical_solution": "    return #\n",
         "test": "def check(f): pass", "entry_point": "f#"}, "def f#():\n", "    return #\n"
    ),
    "top_v2": ({"utterance": "say #", "semantic_parse": "[IN:# ]", "domain": "x"}, "say #", "[IN:# ]"),
    "custom_jsonl": ({"prompt": "ask #", "response": "say #"}, "ask #", "say #"),
    "chat_format": (
        {"data": [{"role": role, "message": message} for role, message in CHAT]},
        "USER: hi #\nPARSER:", "[A]",
    ),
    "spec_bench": (
        {"question_id": 81, "category": "stem", "turns": ["ask #", "more"], "reference": ["x"]}, "ask #", ""
    ),
}  # fmt: skip
FIRST = {name: tuple(text.replace("#", "0") for text in texts) for name, (_, *texts) in EXAMPLES.items()}
ROWS = {
    name: [json.loads(json.dumps(row).replace("#", str(i))) for i in range(9)]
    for name, (row, *_) in EXAMPLES.items()
}


def write(path, rows):
    """Write a file in the format that the name says. Returns the path as text."""
    frame = pandas.DataFrame(rows, dtype=object)
    if ".jsonl" in path.name:
        frame.to_json(path, orient="records", lines=True)
    elif ".csv" in path.name:
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def load(dataset, path=None, seed=42, **kwargs):
    return load_examples(DataArguments(dataset=dataset, data_path=path, **kwargs), seed)


def in_order(dataset, path=None, **kwargs):
    return load(dataset, path, random_shuffle=False, **kwargs)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub, which has the given splits. Returns the requests."""

    def has(**splits):
        rows = {split: datasets.Dataset.from_list(part) for split, part in splits.items()}
        asked = []

        def load_dataset(split, **place):
            asked.append((place, split))
            return rows[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return has


PLACES = {
    "cnn_dm_summarization": {"path": "abisee/cnn_dailymail", "name": "3.0.0"},
    "cnn_dm_lm": {"path": "abisee/cnn_dailymail", "name": "3.0.0"},
    "xsum_summarization": {"path": "EdinburghNLP/xsum", "revision": "refs/convert/parquet"},
    "top_v2": {"path": "WillHeld/top_v2"},
}
KINDS = [("custom_jsonl", kind) for kind in ("jsonl.gz", "parquet", "csv", "csv.gz")]
KINDS += [(dataset, "jsonl") for dataset in DATASETS] + [(dataset, "hub") for dataset in PLACES]


@pytest.mark.parametrize(("dataset", "kind"), [*KINDS, ("chat_format", "parquet"), ("spec_bench", "parquet")])
def test_a_dataset_from_every_place(dataset, kind, hub, tmp_path):
    """Guards against a format that is read otherwise than the other formats, and another split than the
    paper's.
    """
    asked = hub(test=ROWS[dataset])
    path = None if kind == "hub" else write(tmp_path / f"data.{kind}", ROWS[dataset])
    examples = in_order(dataset, path)
    assert asked == ([(PLACES[dataset], "test")] if kind == "hub" else [])
    assert (examples[0].prompt, examples[0].reference) == FIRST[dataset]
    assert len(examples) == (18 if dataset == "chat_format" else 9)
    if dataset == "chat_format":
        second = "USER: hi 0\nPARSER: [A]\nUSER: more\nPARSER:"
        assert (examples[1].prompt, examples[1].reference) == (second, "[B]")
    later = ("more",) if dataset == "spec_bench" else ()
    assert {example.later_turns for example in examples} == {later}


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    """Guards against a traceback, and minutes of retries without a network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("self_speculation.loading.sources.hub_answers", lambda *_: False)
    error = error_line(DataError, load, "xsum_summarization")
    assert re.match(r"cannot load EdinburghNLP/xsum from the hub \(.*Offline.*--data_path", error)


def test_order_and_shots_depend_on_the_seed_alone(tmp_path):
    """Guards against other examples in each cell of a sweep, and shots that are evaluated."""
    path = write(tmp_path / "a.jsonl", ROWS["custom_jsonl"])
    once = load("custom_jsonl", path, n_shot=2)
    assert once == load("custom_jsonl", path, n_shot=2)
    assert once[:3] == load("custom_jsonl", path, n_shot=2, num_samples=3)
    assert once != load("custom_jsonl", path, n_shot=2, seed=43)
    assert sorted(e.row["prompt"] for e in load("custom_jsonl", path)) == [f"ask {i}" for i in range(9)]
    assert all(example.prompt.count(example.row["prompt"]) == 1 for example in once)
    examples = in_order("custom_jsonl", path, n_shot=2)
    assert examples[0].prompt == "ask 0 say 0\n\nask 1 say 1\n\nask 2"
    assert len(examples) == 7
    (example, *_) = in_order("custom_jsonl", path, n_shot=1, template="<{message}>")
    assert example.prompt == "<ask 0 say 0\n\nask 1>"


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_shots_come_from_the_training_split(place, hub, tmp_path, monkeypatch):
    """Guards against shots of the test split or in another order, and gigabytes read for three of them."""
    rows = [{"document": f"text {i}", "summary": f"summary {i}"} for i in range(500)]
    splits = {"train": rows, "test": rows[:2]}
    monkeypatch.setenv("HOME", str(tmp_path))
    for split, part in splits.items():
        write(tmp_path / f"{split}.jsonl", part)
    hub(**splits)
    made = watch(monkeypatch, data, "Example")
    (example,) = load("xsum_summarization", "~" if place == "folder" else None, n_shot=3, num_samples=1)
    assert len(made) == 3 + 2 + 1  # shots, the test split, and the one that is asked for
    numbers = random.Random("shots 42").sample(range(500), 500)[:3]
    assert re.findall(r"summary (\d+)", example.prompt) == [str(number) for number in numbers]


def test_files_of_windows(tmp_path):
    """Guards against line breaks that are lost or added, and a byte order mark in the first column's name."""
    for name, content, prompt in (
        ("a.csv", 'prompt,response\r\n"a\r\nb","c\nd"\r\n', "a\nb"),
        ("a.jsonl", '{"prompt": "a\\r\\nb", "response": "c\\nd"}\r\n', "a\r\nb"),
    ):
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
        (example,) = in_order("custom_jsonl", str(tmp_path / name))
        assert (example.prompt, example.reference) == (prompt, "c\nd")


def test_human_eval_is_the_real_one():
    """Guards against a stand-in for the published problems, and shots that lose the indentation of code."""
    first, *later = in_order("human_eval", n_shot=1)
    assert first.prompt.startswith("from typing import List")
    assert '    """\n    for idx, elem in enumerate(numbers):\n' in first.prompt
    assert len(later) == 162


def test_a_template_keeps_its_other_braces(tmp_path):
    """Guards against `str.format`, which fails on them, and later turns without the template."""
    path = write(tmp_path / "a.jsonl", ROWS["spec_bench"])
    example, *_ = in_order("spec_bench", path, template='{"q": "{message}", {y}}')
    assert (example.prompt, *example.later_turns) == ('{"q": "ask 0", {y}}', '{"q": "more", {y}}')


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_values_stay_text(kind, tmp_path):
    """Guards against type inference: a number, a missing value, a date, and columns that nobody needs."""
    for texts in (["0123", "NA", "2020-01-01", "null", ""], ["2020-01-01"] * 3):
        rows = [{"prompt": text, "response": "1.50"} for text in texts]
        examples = in_order("custom_jsonl", write(tmp_path / f"a.{kind}", rows))
        assert [e.prompt for e in examples] == texts
        assert examples[0].reference == "1.50"
    rows = [{"prompt": 5, "response": "long" * 2**22, "id": 1}, {"prompt": 1.5, "response": "", "id": "x"}]
    path = write(tmp_path / "numbers.jsonl", rows)
    assert [e.prompt for e in in_order("custom_jsonl", path)] == ["5", "1.5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": \n', "a.jsonl: line 2 is no JSON: "),
        ("a.jsonl", b'{"prompt": "", "answer": ""}\n', "no column 'response'; found: prompt, answer; "),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is no JSON: maximum recursion depth"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl: line 2 must be a JSON object"),
        ("a.jsonl", b'{"prompt": null, "response": ""}', "row 1: column 'prompt' must be text, not None"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": []}', "row 2: column 'prompt' must be"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "line 1 is no JSON: 'utf-8' codec can't decode byte"),
        ("a.jsonl", b'{"prompt": "a\\ud800", "response": ""}', "has half of a surrogate pair"),
        ("a.csv", b"prompt,response\n", "a.csv: has no rows"),
        ("a.csv", b"prompt,response\n\nx,y\na,b,c\n", "a.csv: line 4 has another number of values"),
        ("a.csv", b"prompt,prompt,response\nx,y,z\n", "a.csv: there are two columns 'prompt'"),
        ("a.csv", b"prompt,response\nx\n", "a.csv: line 2 has another number of values"),
        ("a.csv", b'prompt,response\nx,"y\n', "a.csv: unexpected end of data"),
        ("a.parquet", b"no", "a.parquet: "),
        ("a.jsonl.gz", b"no", "a.jsonl.gz: Not a gzipped file"),
        (".", None, "must hold one file test"),
        ("chat.jsonl", b'{"data": [{"role": "USER"}]}', "row 1: column 'data' must be a list of turns"),
        ("spec.jsonl", b'{"question_id": [1], "category": "", "turns": ["b"]}', "must be text, not list"),
        ("spec.jsonl", b'{"question_id": 1, "category": "", "turns": []}', "'turns' must be a list of texts"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_with_its_place(name, content, message, tmp_path):
    """Guards against a traceback, and a message without file and line."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    kinds = {"chat.jsonl": "chat_format", "spec.jsonl": "spec_bench"}
    assert message in error_line(ValueError, load, kinds.get(name, "custom_jsonl"), str(tmp_path / name))


def test_columns_of_other_names(tmp_path):
    """Guards against columns that are read as those of another dataset, and an error that lists none."""
    path = write(tmp_path / "a.jsonl", [{"turns": "2 + 2?", "data": "4", "task_id": 7}])
    fields = {"prompt_field": "turns", "response_field": "data"}
    (example,) = load("custom_jsonl", path, **fields)
    assert (example.prompt, example.reference, example.later_turns) == ("2 + 2?", "4", ())
    with pytest.raises(DataError, match=r"no column 'x'; found: turns, data, task_id; .* in --prompt_field"):
        load("custom_jsonl", path, **{**fields, "prompt_field": "x"})


def test_the_entry_on_the_page_is_one_of_the_table():
    """Guards against a recipe of another version."""
    page = (ROOT / "docs" / "measuring.md").read_text()
    (entry,) = re.findall(r"## Add a dataset\n.*?```py\n(.*?)```", page, re.DOTALL)
    assert entry.strip() in (ROOT / "data.py").read_text()
