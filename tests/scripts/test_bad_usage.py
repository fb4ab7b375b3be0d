"""Bad flags and odd inputs: one line that says what is wrong, status 2, nothing executed, nothing torn."""

import io
import json
import os
import sys

import pytest
from helpers import outcome

import generate as generate_script

HUGE = str(10**30)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_steps", "-5"], "--max_steps -5: must be at least 1"),
        (["--max_steps", "1e3"], "argument --max_steps: invalid int value: '1e3'"),
        (["--exit_layer", HUGE], f"--exit_layer {HUGE}: must be between 1 and 3"),
        (["--num_speculations", "3"], "--num_speculations 3: autoregressive decoding drafts nothing, add"),
        (["--top_p", "nan"], "--top_p nan: must be between 0 and 1"),
        (["--seed", HUGE], f"--seed {HUGE}: must be between 0 and 4294967295"),
        (["--n_shot", HUGE], f"--n_shot {HUGE}: "),
        (["--draft_vocabulary", "0"], "--draft_vocabulary 0: must be at least 1"),
        (["--draft_confidence", "2"], "--draft_confidence '2': must be auto or between 0 and 1"),
        (["--prompt_lookup", "-1"], "--prompt_lookup -1: must be between 0 (off) and 32"),
        (["--prompt_lookup", HUGE], f"--prompt_lookup {HUGE}: must be between 0 (off) and 32"),
        (["--shared_lookup", "-1"], "--shared_lookup -1: must be 0 (off) or more"),
        (["--parallel", "sideways"], "--parallel: invalid choice: 'sideways'"),
        (["--model", ""], "--model '': "),
        (["--model", "a\nb"], "--model 'a\\nb': "),
        (["--model", "%s{0}$(touch x)"], "--model '%s{0}$(touch x)': "),
        (["--data_path", "/proc/self/mem"], "--data_path /proc/self/mem: must be a .jsonl"),
        (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be created ("),
        (["--output_dir", "/proc"], "--output_dir /proc: cannot be written ("),
        (["--output_dir", "/dev/null"], "--output_dir /dev/null: "),
        (["--resume", "/dev/null"], "--resume /dev/null: no run.json of a run in there"),
    ],
)  # fmt: skip
def test_bad_usage(flags, says, common, capsys, tmp_path):
    """Status 2, before a model is loaded, in one line that names flag and value."""
    args = [*common, *flags] if "--data_path" not in flags else [*common[:-2], *flags]
    status, line = outcome(args, capsys)
    assert status == 2
    assert says in line
    assert line.startswith(os.path.basename(sys.argv[0]) + ": error: ")
    assert not list((tmp_path / "logs").glob("*/*"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_steps", HUGE],
        ["--num_samples", HUGE],
        ["--top_k", HUGE],
        ["--no_repeat_ngram_size", HUGE, "--sample", "False"],
        ["--stop_token_ids", HUGE],
        ["--temperature", "1e308"],
        ["--temperature", "5e-324"],
        ["--top_p", "0"],
        ["--prompt_lookup", "32", "--generation_strategy", "adaptive"],
        ["--num_speculations", HUGE, "--exit_layer", "1", "--generation_strategy", "self_speculative"],
    ],
)
def test_numbers_that_are_huge_and_make_sense(flags, common, capsys):
    """No limit of a number format shows: more than there can be is as much as there is."""
    assert outcome([*common, *flags], capsys)[0] == 0


def test_a_prompt_of_100_megabytes(model_folder, monkeypatch, capsys):
    """Guards against minutes of tokenizing before the same answer, and gigabytes for it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("all work and no play " * 5_000_000))
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast._encode_plus", lambda *_, **__: pytest.fail("it was tokenized")
    )
    with pytest.raises(SystemExit) as end:
        generate_script.main(["--model", str(model_folder)])
    assert end.value.code == 2
    said = "the prompt has 105000000 characters and leaves no room in the model's context of 256 tokens"
    assert said in capsys.readouterr().err


def test_names_with_characters_of_a_shell(common, tmp_path, capsys, monkeypatch):
    """Nothing is executed or filled in; `{message}` alone has a meaning."""
    monkeypatch.chdir(tmp_path)
    odd = "a b;$(touch ran)`touch ran`{0}%s'\"*[x]~"
    data = tmp_path / f"{odd}.jsonl"
    data.write_text('{"prompt": "x {0} %s $(touch ran)", "response": "y"}\n')
    flags = [
        "--data_path",
        str(data),
        "--output_dir",
        str(tmp_path / odd),
        "--template",
        odd + "{message}{1}",
    ]
    assert outcome([*common, *flags], capsys)[0] == 0
    (folder,) = (tmp_path / odd).iterdir()
    (record,) = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    assert record["prompt"] == odd + "x {0} %s $(touch ran){1}"
    assert not (tmp_path / "ran").exists()
