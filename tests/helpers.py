"""What tests of several scripts share: small data, the folder that a run left, and records."""

import json

import forks
import pandas
import pytest

SPECULATION = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]
PYTHON_FUNCTIONS = ["--include_path", str(forks.ROOT / "eval_tasks"), "--tasks", "python_functions"]
SMALL_TRAINING = [
    "--model_args", "vocab_size=300,num_hidden_layers=3,hidden_size=16,intermediate_size=24,"
    "num_attention_heads=2,num_key_value_heads=1",
    "--sequence_length", "32", "--batch_size", "4", "--seed", "1", "--warmup_steps", "2",
    "--learning_rate", "3e-3", "--eval_fraction", "0.2", "--device", "cpu",
]  # fmt: skip


class Killed(BaseException):
    """SIGKILL, as far as files show it: no code of the product handles it."""


def write_rows(path, rows):
    """Write a JSONL file. Returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def custom_data(folder):
    """A file for `--dataset custom_jsonl`: 12 rows."""
    rows = [{"prompt": f"add{i}(a, b):", "response": f"    return a + b + {i}"} for i in range(12)]
    return write_rows(folder / "data.jsonl", rows)


def watch(monkeypatch, owner, name, before=lambda *_, **__: None):
    """The calls of a function from now on: arguments and result. `before` gets the arguments first."""
    calls = []
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        before(*args, **kwargs)
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


def only_run(tmp_path):
    """The one folder that was written below `--output_dir tmp_path/logs`."""
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def records_of(folder):
    return pandas.read_json(folder / "records.jsonl", lines=True)


def write_program(folder, code):
    """The path of a program of this code, which may import this repository and the tests."""
    program = folder / "program.py"
    program.write_text(f"import sys; sys.path[:0] = {[*map(str, forks.PATHS)]}\n{code}")
    return program


def run_program(ranks, folder, code, *args):
    """Run such a program with so many ranks."""
    return forks.run_ranks(ranks, write_program(folder, code), *args)


def no_pictures(monkeypatch):
    """For a test that is not about what sweep.py and benchmark.py draw: it takes half a second each."""
    for drawn in ("sweeping.heat_maps", "benchmarking.paired_ratios"):
        monkeypatch.setattr(f"measures.{drawn}", lambda *_: None)


def small_run(model, tmp_path, num_samples=2, max_steps=6):
    """Flags of a script over a small dataset."""
    return [
        "--model", str(model), "--output_dir", str(tmp_path / "logs"), "--num_samples", str(num_samples),
        "--max_steps", str(max_steps), "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
    ]  # fmt: skip


def about(folder):
    """What `run.json` says of a run."""
    return json.loads((folder / "run.json").read_text())


def refused(main, args, capsys):
    """The one line of error of a script that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if ": error: " in line]
    assert errors.rstrip().endswith(line)
    return line


def error_line(kind, call, *args, **kwargs):
    """The message of an error that a call raises; it has one line."""
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message
