"""Bad inputs: one line that says what is wrong, the documented exit status, nothing executed, nothing torn.

What is wrong with a model's files is in test_loading.py, with data files in test_data.py and test_fuzzing.py.
"""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT, generate, tiny_llama
from helpers import custom_data, only_run
from safetensors.torch import load_file, save_file

import benchmark
import generate as generate_script
from runs.program import run
from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    LoadingError,
    LoadingOptions,
    load_model_and_tokenizer,
    make_strategy,
)

HUGE = str(10**30)


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def common(model_folder, tmp_path):
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--num_samples", "2",
        "--max_steps", "6", "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
    ]  # fmt: skip


def outcome(args, capsys):
    """Exit status of benchmark.py and the last line on standard error."""
    try:
        status = benchmark.main(args)
    except SystemExit as end:
        status = end.code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return status, errors.strip().rpartition("\n")[2].rpartition("\r")[2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_steps", "0"], "--max_steps 0: must be at least 1"),
        (["--max_steps", "-5"], "--max_steps -5: must be at least 1"),
        (["--max_steps", "ten"], "argument --max_steps: invalid int value: 'ten'"),
        (["--max_steps", "1e3"], "argument --max_steps: invalid int value: '1e3'"),
        (["--exit_layer", HUGE], f"--exit_layer {HUGE}: must be between 1 and 3"),
        (["--exit_layer", "-2"], "--exit_layer -2: must be -1 (full depth) or at least 1"),
        (["--num_speculations", "0"], "--num_speculations 0: must be -1 or at least 1"),
        (["--num_speculations", "3"], "--num_speculations 3: autoregressive decoding drafts nothing, add"),
        (["--temperature", "nan"], "--temperature nan: must be 0 (greedy) or more"),
        (["--temperature", "inf"], "--temperature inf: must be 0 (greedy) or more"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0 (greedy) or more"),
        (["--top_p", "1.5"], "--top_p 1.5: must be between 0 and 1"),
        (["--top_p", "nan"], "--top_p nan: must be between 0 and 1"),
        (["--top_k", "-1"], "--top_k -1: must be 0 (off) or more"),
        (["--no_repeat_ngram_size", "0"], "--no_repeat_ngram_size 0: must be at least 1"),
        (["--stop_words", ""], "--stop_words ['']: must not be empty texts"),
        (["--stop_token_ids", "-1"], "--stop_token_ids [-1]: must be 0 or more"),
        (["--seed", "-1"], "--seed -1: must be between 0 and 4294967295"),
        (["--seed", HUGE], f"--seed {HUGE}: must be between 0 and 4294967295"),
        (["--num_samples", "-3"], "--num_samples -3: must be at least 1"),
        (["--n_shot", HUGE], f"--n_shot {HUGE}: "),
        (["--draft_vocabulary", "0"], "--draft_vocabulary 0: must be at least 1"),
        (["--draft_confidence", "2"], "--draft_confidence '2': must be auto or between 0 and 1"),
        (["--prompt_lookup", "-1"], "--prompt_lookup -1: must be between 0 (off) and 32"),
        (["--prompt_lookup", HUGE], f"--prompt_lookup {HUGE}: must be between 0 (off) and 32"),
        (["--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["--parallel", "sideways"], "--parallel: invalid choice: 'sideways'"),
        (["--model", ""], "--model '': "),
        (["--model", "a\nb"], "--model 'a\\nb': "),
        (["--model", "%s{0}$(touch x)"], "--model '%s{0}$(touch x)': "),
        (["--model_args", "trust_remote_code=True"], "--trust_remote_code is a flag of its own"),
        (["--template", "no place"], "--template 'no place': must contain {message}"),
        (["--data_path", "/proc/self/mem"], "--data_path /proc/self/mem: must be a .jsonl"),
        (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be created ("),
        (["--output_dir", "/dev/null"], "--output_dir /dev/null: "),
        (["--resume", "/dev/null"], "--resume /dev/null: no run.json of a run in there"),
        (["--max_stepz", "3"], "unknown argument '--max_stepz'; did you mean --max_steps?"),
        (["--sample", "perhaps"], "--sample"),
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


def test_the_tokenizer_of_another_model(folder):
    """Guards against an IndexError from the embedding, in the middle of a run."""
    tiny_llama(vocab_size=100).save_pretrained(folder)
    with pytest.raises(
        LoadingError, match=r"the tokenizer has \d+ tokens, but the model knows only 100: it is"
    ):
        load_model_and_tokenizer(str(folder))


def test_a_token_that_was_added_to_the_tokenizer_alone(folder):
    """As many a Llama 2 has it for padding: no matter, until a prompt has it."""
    model, tokenizer = load_model_and_tokenizer(str(folder))
    tokenizer.add_tokens(["<pad>"])
    generator = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("autoregressive"))
    generator.generate("a man", GenerationConfig(max_steps=2))
    with pytest.raises(ValueError, match="but the model knows only"):
        generator.generate("a<pad>", GenerationConfig(max_steps=2))


def with_a_hole(folder):
    """A weight of the last layer is not a number."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative", "adaptive"])
def test_logits_that_are_not_numbers(folder, strategy, sample):
    """argmax takes NaN for the largest, and a draw among NaN falls anywhere."""
    model, tokenizer = load_model_and_tokenizer(str(with_a_hole(folder)))
    layers = {"exit_layer": 2, "num_speculations": 2} if strategy == "self_speculative" else {}
    config = GenerationConfig(generation_strategy=strategy, sample=sample, max_steps=4, **layers)
    with pytest.raises(FloatingPointError, match=r"not numbers \(NaN\)"):
        HuggingfaceLlamaGenerator(tokenizer, model, make_strategy(strategy)).generate("a", config)


def test_the_scripts_say_so_in_a_line(folder, common, capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: benchmark.main([*common, "--model", str(with_a_hole(folder))]))
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: the model's logits are not numbers (NaN): its weights are damaged, or need "
                         "--dtype float32")  # fmt: skip


def test_numbers_that_end_in_the_middle():
    """NaN that comes from a token of the output is found at its end."""
    model = copy.deepcopy(tiny_llama(num_layers=3))
    tokens = generate(model, [5, 6, 7], eos=[], max_steps=12).predicted_tokens
    later = next(token for token in tokens[1:] if token not in (5, 6, 7, tokens[0]))
    model.get_input_embeddings().weight.data[later] = torch.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        generate(model, [5, 6, 7], eos=[], max_steps=12, exit_layer=1, num_speculations=2)


def test_a_prompt_of_100_megabytes(model_folder, monkeypatch, capsys):
    """Guards against minutes of tokenizing before the same answer, and gigabytes for it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("all work and no play " * 5_000_000))
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast._encode_plus", lambda *_, **__: pytest.fail("it was tokenized")
    )
    with pytest.raises(SystemExit) as end:
        generate_script.main(["--model", str(model_folder)])
    assert end.value.code == 2
    said = "the prompt has 105000000 characters, far more than the model's context of 256 tokens"
    assert said in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_written(common, tmp_path):
    """By a limit on the size of files, which Python reports as it reports a full disk."""
    common += ["--num_samples", "12", "--max_steps", "40"]

    program = tmp_path / "program.py"
    program.write_text(
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import benchmark\n"
        "from runs.program import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "run(benchmark.main)\n"
    )
    run = forks.run(program, *common)
    assert run.returncode == 1
    folder = only_run(tmp_path)
    kept = (folder / "records.rank0.jsonl").read_text().count("\n")
    last = run.stderr.strip().splitlines()[-1]
    assert f"cannot write {folder}/records.rank0.jsonl: File too large; " in last
    assert f"of 12 examples are kept, go on with --resume {folder}" in last
    assert kept >= 1
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert benchmark.main([*common, "--resume", str(folder)]) == 0
    assert len((folder / "records.jsonl").read_text().splitlines()) == 12


def test_a_cache_that_cannot_be_written(model_folder, script):
    """A local model needs no cache."""
    run = subprocess.run(
        script("generate.py", "--model", model_folder, "--prompt", "def", "--max_steps", "3"),
        capture_output=True, text=True, timeout=forks.HANGS,
        env={**os.environ, "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_ctrl_c_while_imports_take_their_time(model_folder):
    """Guards against a page of traceback for somebody who changed their mind early."""
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(model_folder), "--prompt", "def"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=forks.HANGS)[1] == b"interrupted\n"
    assert run.returncode == 130


def test_two_runs_into_one_folder_and_ctrl_c(endless_folder, common, tmp_path, capsys):
    """Guards against records of two runs in one file, and a traceback in place of what is kept."""
    args = [*common, "--model", str(endless_folder), "--max_steps", "3000", "--num_samples", "12"]
    with tempfile.TemporaryFile() as errors:
        run = forks.Fork(ROOT / "benchmark.py", *args, stderr=errors.fileno())
        try:
            while not list(tmp_path.glob("logs/*/run.json")):
                time.sleep(0.05)
                assert run.poll() is None
            folder = str(only_run(tmp_path))
            status, line = outcome([*args, "--resume", folder], capsys)
            run.send_signal(signal.SIGINT)
            assert run.wait() == 130
        finally:
            run.end()
        said = forks.read(errors, text=True)
    assert status == 2
    assert line.endswith(f"--resume {folder}: another run is writing there")
    assert "Traceback" not in said
    assert "interrupted; " in said.splitlines()[-1]


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


def test_code_of_a_repository_runs_when_asked_for_alone(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "import transformers\n"
        "class Model(transformers.LlamaForCausalLM): pass\n"
    )
    load_model_and_tokenizer(str(folder))  # by the class of transformers itself
    assert not (tmp_path / "ran").exists()
    load_model_and_tokenizer(str(folder), LoadingOptions(trust_remote_code=True))
    assert (tmp_path / "ran").exists()
