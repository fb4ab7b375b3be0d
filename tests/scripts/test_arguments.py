"""The command line: spellings, defaults, and one line for each mistake."""

import contextlib
import dataclasses
import io
import re
import shlex
from typing import get_type_hints

import pytest
from conftest import EOS, ROOT, generate, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import self_speculation
from arguments import _FOREIGN, GenerationConfig, ModelArguments, given_flags, parse
from benchmark import MeasurementArguments
from correctness import CorrectnessArguments
from data import DataArguments
from eval import EvalArguments
from generate import GenerateArguments
from serving.flags import ServeArguments
from sweep import SweepArguments
from training.flags import Flags

GROUPS = (ModelArguments, GenerationConfig, GenerateArguments)


def test_the_defaults_of_the_papers_settings():
    """Guards against a default that changes without the page, and settings by position that change places."""
    defaults = (512, -1, -1, "autoregressive", True, 0.6, 0, 0.9, None, None, None)
    assert GenerationConfig() == GenerationConfig(*defaults)


def test_spellings_of_flags():
    """Guards against flags of the paper's scripts that are refused, and a flag that begins with `no_`."""
    for args, field, value in (
        ("--sample True", "sample", True),
        ("--sample False", "sample", False),
        ("--sample", "sample", True),
        ("--nosample", "sample", False),
        ("--no-sample", "sample", False),
        ("--max-steps 3", "max_steps", 3),
        ("--no-repeat-ngram-size 2", "no_repeat_ngram_size", 2),
        ("--prompt=--no-sample", "prompt", "--no-sample"),
        ("--stop_token_ids 1 2", "stop_token_ids", [1, 2]),
        ("--stop_words 'yes, sir' 1,000 , [", "stop_words", ["yes, sir", "1,000", ",", "["]),
    ):
        words = shlex.split(args)
        (group,) = (group for group in parse("test", *GROUPS, args=words) if hasattr(group, field))
        assert getattr(group, field) == value, args
        assert given_flags(words, type(group)) == {field}


def test_flags_by_variables(capsys):
    """Guards against a variable that wins over a flag, one of another kind of value, a misspelt one, and a
    traceback because of an apostrophe.
    """

    def found(args=(), **variables):
        environment = {f"SELF_SPECULATION_{name}": value for name, value in variables.items()}
        groups = (GenerationConfig, ServeArguments)
        return parse("test", *groups, args=args, environment={"PORT": "1", **environment})

    config, serve = found(PORT="81", SAMPLE="no", STOP_WORDS="'yes, sir' b", API_KEY="", CACHE="x")
    assert (serve.port, config.sample, serve.api_key) == (81, False, None)
    assert config.stop_words == ["yes, sir", "b"]
    assert found(["--port", "82"], PORT="81")[1].port == 82
    for variables, says in (
        ({"PROT": "1"}, "SELF_SPECULATION_PROT: there is no flag --prot; did you mean --port?"),
        ({"PORT": "x"}, "SELF_SPECULATION_PORT 'x': must be an integer"),
        ({"PORT": "99999"}, "SELF_SPECULATION_PORT 99999: must be between 0 and 65535"),
        ({"SAMPLE": "maybe"}, "SELF_SPECULATION_SAMPLE 'maybe': must be True or False"),
        ({"STOP_WORDS": "it's"}, 'SELF_SPECULATION_STOP_WORDS "it\'s": must be words as in a shell; '),
        ({"STOP_WORDS": "a\\"}, "has no end"),
    ):
        with pytest.raises(SystemExit) as exit_:
            found(**variables)
        message = capsys.readouterr().err
        assert (exit_.value.code, says in message) == (2, True), message


def test_model_args_become_python_values():
    """Guards against `False` as a text, commas in a dictionary, and code that any value trusts."""
    given = 'a=1,b=x, c=True,d=0.5,e=nOne,f=FALSE,g={"h": 4.0, "i": [1, 2], "j": "k=m"}, l=3'
    found = {"a": 1, "b": "x", "c": True, "d": 0.5, "e": None, "f": False}
    found |= {"g": {"h": 4.0, "i": [1, 2], "j": "k=m"}, "l": 3}
    for text in (given, '{"a": 1, "b": {"c": [null]}}'):
        (model,) = parse("test", ModelArguments, args=["--model_args", text])
        assert model.from_pretrained_args() == (found if text == given else {"a": 1, "b": {"c": [None]}})
    for value, is_trusted in (("true", True), ("1", False)):
        options = ModelArguments(model_args=f"trust_remote_code={value},a=1").loading_options()
        assert (options.trust_remote_code, options.model_args) == (is_trusted, {"a": 1})


def test_help_is_short_and_help_all_has_every_flag_with_its_default(capsys):
    """Guards against a page of flags before the first answer, and a flag that nobody can find."""
    texts = []
    for words in (["--max_steps", "x", "--help"], ["--help", "all"]):
        with pytest.raises(SystemExit, match="0"):
            parse("test", *GROUPS, args=words)
        texts.append(capsys.readouterr().out)
    assert texts[0].count("\n") < 80
    assert "--prompt STR " in texts[0]
    text = " ".join(texts[1].split())
    for field in (field for group in GROUPS for field in dataclasses.fields(group)):
        if field.name not in ("trust_remote_code", "fuse"):
            assert f"--{field.name} " in text
            assert field.default is None or f"(default: {field.default})" in text
    assert "None" not in text


def test_the_version_of_a_script(capsys):
    """Guards against a report that cannot say what it is about."""
    with pytest.raises(SystemExit, match="0"):
        parse("test", *GROUPS, args=["--version"])
    assert capsys.readouterr().out.split()[1:] == [self_speculation.__version__]


ODD_NUMBERS = st.sampled_from([10**30, -(10**30), "1e400", "0x10", "\u0661"])
NUMBERS = st.one_of(st.integers(), st.integers(-3, 3), st.floats(), ODD_NUMBERS).map(str)
WORDS = st.sampled_from(["True", "False", "none", "auto", "half", "int8", "-", "--", "="])
VALUES = st.one_of(NUMBERS, st.text(max_size=12), WORDS)
OTHERS = [DataArguments, MeasurementArguments, CorrectnessArguments, SweepArguments, EvalArguments]
OTHERS += [GenerateArguments, ServeArguments, *list(get_type_hints(Flags).values())[1:]]


@given(data=st.data(), other=st.sampled_from(OTHERS))
@settings(max_examples=100)
def test_any_command_line_is_taken_or_refused_in_one_line(data, other):
    """Guards against tracebacks of the parser, and against refusals that go over several lines."""
    groups = (ModelArguments, GenerationConfig, other)
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    flag = st.one_of(st.sampled_from(names), st.text(max_size=8)).map("--{}".format)
    word = st.one_of(flag, VALUES, st.tuples(flag, VALUES).map("=".join))
    pairs = data.draw(st.lists(st.tuples(flag, VALUES), max_size=3))
    words = [*(word for pair in pairs for word in pair), *data.draw(st.lists(word, max_size=2))]
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
    min_p=st.floats(-0.1, 1.1),
    repetition_penalty=st.just(1.0) | st.floats(),
    frequency_penalty=st.floats(-3, 3),
    presence_penalty=st.floats(-3, 3),
)
@settings(max_examples=150)
def test_any_setting_works_or_is_refused(strategy, **values):
    """Guards against numbers that pass the checks and break the arithmetic behind them."""
    try:
        output = generate(tiny_llama(), [5, 6, 7, 8] * 61, strategy=strategy, **values).predicted_tokens
    except ValueError as error:
        assert str(error).split()[0].rstrip(":") in values, error  # noqa: PT017
    else:
        assert len(output) <= min(values["max_steps"], 256 - 4 * 61)
        assert EOS not in output


def test_the_page_of_llama_cpp_and_the_hints_name_the_same_flags():
    """Guards against a hint for a foreign flag that contradicts the page, and a flag without a hint."""
    hints = {name: hint for names, hint in _FOREIGN.items() for name in names.split()}
    page = (ROOT / "docs/llamacpp.md").read_text()
    for foreign, here in re.findall(r"^\| (`-.*?) \| (.*) \|$", page, re.MULTILINE):
        for flag in re.findall(r"(?<![\w-])--?([a-z][a-z-]*)", foreign):
            hint = hints.get(flag.replace("-", "_"), f"--{flag.replace('-', '_')}")
            flags = set(re.findall(r"--\w+", hint))
            assert here.startswith("the same") or flags <= set(re.findall(r"--\w+", here)), flag
