"""Whatever comes in, what goes out is an example, a setting, or one line that says what is wrong."""

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
from conftest import EOS, generate, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import (
    CorrectnessArguments,
    DataArguments,
    GenerateArguments,
    GenerationConfig,
    MeasurementArguments,
    ModelArguments,
    NewModelArguments,
    OptimizationArguments,
    RecipeArguments,
    SweepArguments,
    TrainingDataArguments,
    TuningArguments,
    parse,
)
from data import DATASETS, DataError, load_examples
from self_speculation.drafts.prompt_lookup import NgramIndex

GROUPS = [
    (ModelArguments, GenerationConfig, GenerateArguments, TuningArguments),
    (ModelArguments, GenerationConfig, DataArguments, MeasurementArguments, TuningArguments),
    (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments),
    (ModelArguments, GenerationConfig, DataArguments, SweepArguments),
    (ModelArguments, GenerationConfig, TuningArguments),
    (ModelArguments, NewModelArguments, TrainingDataArguments, RecipeArguments, OptimizationArguments),
]  # as the scripts have them

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**30, -(10**30), "1e400", "0x10", "\u0661"]),
).map(str)
VALUES = st.one_of(
    NUMBERS,
    st.text(max_size=12),
    st.sampled_from(["True", "False", "none", "auto", "half", "int8", "-", "--", "="]),
)


@st.composite
def command_lines(draw):
    groups = draw(st.sampled_from(GROUPS))
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    flag = st.one_of(st.sampled_from(names), st.text(max_size=8)).map("--{}".format)
    word = st.one_of(flag, VALUES, st.tuples(flag, VALUES).map("=".join))
    pairs = draw(st.lists(st.tuples(flag, VALUES).map(list), max_size=3))
    return groups, [*(word for pair in pairs for word in pair), *draw(st.lists(word, max_size=2))]


@given(command_lines())
@settings(max_examples=300)
def test_any_command_line_is_taken_or_refused_in_one_line(case):
    """Guards against tracebacks of the parser, and against refusals that go over several lines."""
    groups, words = case
    if {"--help", "-h"} & set(words):
        return
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            values = parse("test", *groups, args=words)
    except SystemExit as end:
        assert (end.code, errors.getvalue().count("\n")) == (2, 1)  # noqa: PT017
        assert ": error: " in errors.getvalue()
    else:
        assert [type(value) for value in values] == list(groups)
        assert errors.getvalue() == ""


@given(
    max_steps=st.integers(-1, 12) | st.just(10**30),
    exit_layer=st.integers(-2, 5) | st.just(10**30),
    num_speculations=st.integers(-2, 9) | st.just(10**30),
    strategy=st.sampled_from(["autoregressive", "self_speculative"]),
    sample=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 1.0]) | st.floats(),
    top_k=st.integers(-1, 60) | st.just(10**30),
    top_p=st.sampled_from([0.9, 1.0]) | st.floats(-0.1, 1.1),
    no_repeat_ngram_size=st.none() | st.integers(-1, 5) | st.just(10**30),
    stop_token_ids=st.none() | st.lists(st.integers(-1, 60), max_size=3),
    prompt_lookup=st.integers(-1, 40),
    draft_confidence=st.none() | st.sampled_from(["auto", "0", "0.5", "1", "-1", "x", "nan"]),
)
@settings(max_examples=300)
def test_any_setting_works_or_is_refused(strategy, **values):
    """Guards against numbers that pass the checks and break the arithmetic behind them."""
    try:
        output = generate(tiny_llama(), [5, 6, 7, 8] * 61, strategy=strategy, **values).predicted_tokens
    except ValueError as error:
        assert str(error).split()[0] in values, error  # noqa: PT017
    else:
        assert len(output) <= min(values["max_steps"], 256 - 4 * 61)
        assert EOS not in output


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(sorted({column for dataset in DATASETS.values() for column in dataset.columns}))
ROWS = st.lists(st.dictionaries(COLUMNS | st.sampled_from(["role", "message"]), JSON, max_size=5), max_size=4)


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
    content = draw(st.one_of(ROWS.map(write), st.binary(max_size=60)))
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


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 32), st.integers(1, 8))
def test_any_lookup_finds_what_a_search_finds(ids, longest, wanted):
    index = NgramIndex(longest)
    index.extend(ids)
    found = (0, [])
    for n in range(min(longest, len(ids) - 1), 0, -1):
        places = [i + n for i in range(len(ids) - n) if ids[i : i + n] == ids[-n:]]
        if places:
            behind = ids[places[-1] :]
            found = n, (behind * math.ceil(wanted / len(behind)))[:wanted]
            break
    assert index.lookup(wanted) == found
