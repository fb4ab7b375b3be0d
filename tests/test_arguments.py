"""The command line: every spelling that is promised, and one line for every mistake."""

import dataclasses

import pytest

from arguments import (
    GenerationConfig,
    ModelArguments,
    given_flags,
    parse,
)
from generate import GenerateArguments

GROUPS = (ModelArguments, GenerationConfig, GenerateArguments)


def values(*args):
    return {
        key: value
        for group in parse("test", *GROUPS, args=args)
        for key, value in dataclasses.asdict(group).items()
    }


def test_defaults_are_the_documented_ones():
    config = GenerationConfig()
    assert dataclasses.asdict(config) == {
        "max_steps": 512, "exit_layer": -1, "num_speculations": -1, "generation_strategy": "autoregressive",
        "sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9, "no_repeat_ngram_size": None,
        "stop_words": None, "stop_token_ids": None, "draft_weights": "exact", "draft_confidence": None,
        "draft_vocabulary": None, "prompt_lookup": 0,
    }  # fmt: skip
    assert values() == {
        **dataclasses.asdict(config), "model": None, "model_args": None, "seed": 42, "output_dir": "./logs",
        "dtype": "auto", "device": "auto", "streamer": "standard", "prompt": None, "chat": False,
        "compare": False, "fuse": True, "compile": False, "parallel": "data", "quantization": "none",
        "trust_remote_code": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "sample"),
    [
        (["--sample", "True"], True),
        (["--sample", "False"], False),
        (["--sample"], True),
        (["--nosample"], False),
        (["--sample", "false"], False),
    ],
)
def test_spellings_of_a_boolean(args, sample):
    assert values(*args)["sample"] is sample


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["--max-steps", "3"], "max_steps", 3),
        (["--max-steps=3"], "max_steps", 3),
        (["--no_sample"], "sample", False),
        (["--no-sample"], "sample", False),
        (["--no-repeat-ngram-size", "2"], "no_repeat_ngram_size", 2),
        (["--no_repeat_ngram_size", "2"], "no_repeat_ngram_size", 2),
        (["--prompt=--no-sample"], "prompt", "--no-sample"),
    ],
)
def test_spellings_that_the_papers_scripts_take_as_well(args, field, value):
    """Guards against a script that is refused for its dashes, and a flag whose own name begins with `no_`."""
    assert values(*args)[field] == value
    group = GenerationConfig if field != "prompt" else GenerateArguments
    assert given_flags(args, group) == {field}


def test_lists_and_choices():
    parsed = values("--stop_words", "a b", "\n", "--stop_token_ids", "1", "2", "--streamer", "speculative")
    assert parsed["stop_words"] == ["a b", "\n"]
    assert parsed["stop_token_ids"] == [1, 2]
    assert parsed["streamer"] == "speculative"


def test_model_args_become_python_values():
    (model,) = parse("test", ModelArguments, args=["--model_args", "a=1,b=x,c=True,d=0.5,e=None"])
    assert model.from_pretrained_args() == {"a": 1, "b": "x", "c": True, "d": 0.5, "e": None}
    in_any_case = ModelArguments(model_args="a=true, b=FALSE,c=none,d=nOne").from_pretrained_args()
    assert in_any_case == {"a": True, "b": False, "c": None, "d": None}
    assert ModelArguments().from_pretrained_args() == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--max_steps 0", "--max_steps 0: must be at least 1"),
        ("--max_steps x", "--max_steps: invalid int value: 'x'"),
        ("--exit_layer 0", "--exit_layer 0: must be -1 (full depth) or at least 1"),
        ("--exit_layer -2", "--exit_layer -2: must be"),
        ("--num_speculations 0", "--num_speculations 0: must be -1 or at least 1"),
        ("--temperature -1", "--temperature -1.0: must be 0 (greedy) or more"),
        ("--temperature nan", "--temperature nan: must be"),
        ("--temperature inf", "--temperature inf: must be"),
        ("--top_k -1", "--top_k -1: must be 0 (off) or more"),
        ("--top_p 1.5", "--top_p 1.5: must be between 0 and 1"),
        ("--no_repeat_ngram_size 0", "--no_repeat_ngram_size 0: must be at least 1"),
        ("--draft_weights int2", "choose from 'exact', 'int8', 'int4'"),
        ("--draft_weights int4 --fuse False", "--draft_weights int4: not with --fuse False"),
        ("--draft_weights int8 --compile True", "--draft_weights int8: not with --compile True"),
        ("--draft_weights int4 --parallel tensor", "--draft_weights int4: not with --parallel tensor"),
        ("--draft_weights int8 --quantization int8", "--draft_weights int8: not with --quantization int8"),
        ("--stop_token_ids -1", "--stop_token_ids [-1]: must be 0 or more"),
        ("--stop_words=", "--stop_words ['']: must not be empty texts"),
        ("--generation_strategy x", "'x' (choose from 'autoregressive', 'self_speculative', 'adaptive')"),
        ("--sample perhaps", "Boolean value expected"),
        ("--streamer x", "choose from 'standard', 'none', 'speculative'"),
        ("--dtype int3", "choose from 'auto', 'half', 'float32', 'bfloat16', 'float16'"),
        ("--seed -1", "--seed -1: must be between 0 and 4294967295"),
        ("--model_args x", "--model_args 'x': must be k=v,k=v"),
        ("--model_args a=b=c,true,d=1", "--model_args 'a=b=c,true,d=1': must be k=v,k=v"),
        ("--max_step 3", "unknown argument '--max_step'; did you mean --max_steps?"),
        ("--max-step 3", "unknown argument '--max-step'; did you mean --max_steps?"),
        ("--no_max_steps", "unknown argument '--nomax_steps'; did you mean --max_steps?"),
        ("--zzz", "unknown argument '--zzz'; --help lists the flags"),
        ("stray", "unknown argument 'stray'"),
    ],
)
def test_a_mistake_is_refused_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        values(*args.split())
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_tells_meaning_and_default_of_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        values("--help")
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert f"--{field.name} " in text
            assert field.default is None or f"(default: {field.default})" in text
    assert "None" not in text
    assert "[" not in "".join(line for line in text.splitlines() if line.endswith(":"))
