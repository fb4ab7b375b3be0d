"""Bad flags and odd inputs: one line that says what is wrong, status 2, nothing executed, nothing torn."""

import io
import json
import os
import shlex
import sys

import pytest
from conftest import ROOT
from helpers import refused
from transformers import MistralConfig, MistralForCausalLM

import benchmark
import correctness
import eval as eval_script
import generate
import sweep

HUGE = str(10**30)
SPECULATIVE = "--generation_strategy self_speculative"
TASK = "--tasks python_functions"
UNFUSED = f"{SPECULATIVE} --exit_layer 2 --num_speculations 3 --draft_weights int4 --fuse False"
NOT_FUSED = "--draft_weights int4: not with --fuse False"

MISTAKES = {
    benchmark: {
        f"--exit_layer {HUGE}": f"--exit_layer {HUGE}: must be between 1 and 3",
        "--num_speculations 3": "--num_speculations 3: autoregressive decoding drafts nothing, add",
        "--compare True": "--exit_layer: self_speculative needs one between 1 and 3",
        "--execute_code True": "--execute_code True: only human_eval has programs to run",
        "--execute_code True --dataset human_eval --chat": "--execute_code True: runs continuations of",
        f"--n_shot {HUGE}": f"--n_shot {HUGE}: ",
        "--data_path /nowhere.jsonl": "/nowhere.jsonl: No such file",
        "--data_path /proc/self/mem": "--data_path /proc/self/mem: must be a .jsonl",
        "--model ''": "--model '': ",
        "--model 'a\nb'": "--model 'a\\nb': ",
        "--model '%s{0}$(touch x)'": "--model '%s{0}$(touch x)': ",
        "--output_dir /proc/nowhere": "--output_dir /proc/nowhere: cannot be created (",
        "--output_dir /proc": "--output_dir /proc: cannot be written (",
        "--resume /dev/null": "--resume /dev/null: no run.json of a run in there",
        "--batch_size 0": "--batch_size 0: must be at least 1",
    },
    correctness: {
        "--reference transformers": "--reference transformers: compares ids, so it needs --sample False",
        "--exit_layer 2": "--num_speculations: self_speculative needs at least 1",
    },
    sweep: {
        "--batch_size 3": "--batch_size 3: must be 1 in predicted mode",
        "--exit_layer_first 4 --exit_layer_last 3": "--exit_layer_first 4: beyond --exit_layer_last 3",
        "--exit_layer_first 9": "--exit_layer_first 9: must be between 1 and 3",
        "--num_speculations_step 0": "--num_speculations_step 0: must be at least 1",
        "--shared_lookup 9": "--shared_lookup 9: must be 0, each cell has the same prompts",
        "--verify_top -1": "--verify_top -1: must be at least 0",
        "--mode x": "choose from 'predicted', 'measured'",
    },
    generate: {
        "--exit_layer 4": "--exit_layer 4: must be between 1 and 3, the model has 4 layers; -1 is full depth",
        f"{SPECULATIVE} --exit_layer 4": "the model has 4 layers; with draft_weights int4 it may be 4",
        SPECULATIVE: "--exit_layer: self_speculative needs one between 1 and 3",
        "--prompt_lookup 3": "--prompt_lookup 3: autoregressive decoding drafts nothing, add",
        "--compare True": "--compare True: needs a --generation_strategy to compare",
        "--shared_lookup 9": "--shared_lookup 9: autoregressive decoding drafts nothing, add",
        "--prediction x": "--prediction: needs --generation_strategy adaptive or --prompt_lookup above 0",
        "--grammar /nowhere": "--grammar /nowhere: No such file or directory",
        "--model /nowhere": "--model '/nowhere': no such folder",
        "--device tpu": "--device 'tpu': not on this machine",
        "--parallel fsdp": "--parallel fsdp: is for train.py",
        "--prompt": "argument --prompt: expected one argument",
        "--stop_words": "argument --stop_words: expected at least one argument",
        "--prompt \udcff": "the prompt is not valid UTF-8",
    },
    eval_script: {
        "": "No tasks specified",
        "--tasks function": "Tasks not found: function",
        "--num_fewshots 3": "unknown argument '--num_fewshots'; did you mean --num_fewshot?",
        "--limit x": "--limit/-L: invalid float value: 'x'",
        f"{TASK} --gen_kwargs num_beams=2": "--gen_kwargs num_beams=2: supported are",
        f"{TASK} --gen_kwargs {{x": "Invalid JSON: {x",
        f"{TASK} --gen_kwargs top_p=1.5": "--gen_kwargs top_p 1.5: must be",
        f"{TASK} --batch_size auto:x": "--batch_size auto:x: must be a number from 1",
        f"{TASK} --exit_layer 4": "--exit_layer 4: must be between 1 and 3",
        f"{TASK} --verbosity loud": "Unknown level: 'LOUD'",
        f"{TASK} --limit 1 --samples '{{\"python_functions\": [0]}}'": "--limit must be None",
        f"{TASK} --config no/such": "--config no/such: Config file not found",
        f"{TASK} --output_path /dev/null/x": "--output_path /dev/null/x: cannot be",
        f"{TASK} --use_cache x --parallel tensor": "--use_cache: not with",
    },
}
for script in MISTAKES:  # of every script
    MISTAKES[script][f"{TASK if script is eval_script else ''} {UNFUSED}"] = NOT_FUSED


@pytest.mark.usefixtures("few_files_are_read")
@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [(script, *mistake) for script, mistakes in MISTAKES.items() for mistake in mistakes.items()],
)
def test_bad_usage_is_refused_before_weights_are_read(
    script, flags, says, common, tmp_path, monkeypatch, capsys
):
    """Guards against a traceback, a message without flag and value, and minutes of loading before it."""
    monkeypatch.setattr("self_speculation.model.loading._load", lambda *_: pytest.fail("weights were read"))
    own = {generate: [*common[:2], "--prompt", "def"]}
    own[eval_script] = [*common[:4], "--include_path", str(ROOT / "eval_tasks")]
    line = refused(script.main, [*own.get(script, common), *shlex.split(flags)], capsys)
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
        ["--num_speculations", HUGE, "--exit_layer", "1", *SPECULATIVE.split()],
    ],
)
def test_huge_and_tiny_numbers_work(flags, common):
    """Guards against an overflow where a limit is larger than what there is."""
    assert benchmark.main([*common, *flags]) == 0


def test_a_prompt_of_100_megabytes_is_refused_before_it_is_tokenized(model_folder, monkeypatch, capsys):
    """Guards against minutes of tokenizing, and gigabytes for it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("all work and no play " * 5_000_000))
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast._encode_plus", lambda *_, **__: pytest.fail("it was tokenized")
    )
    line = refused(generate.main, ["--model", str(model_folder)], capsys)
    said = "the prompt has 105000000 characters and leaves no room in the model's context of 256 tokens"
    assert said in line


def test_a_sliding_window_shorter_than_max_steps_is_refused(byte_tokenizer, common, tmp_path, capsys):
    """Guards against `every prompt has more than the -256 tokens`."""
    folder = tmp_path / "window"
    config = MistralConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=256, max_position_embeddings=1024,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    args = [*common, "--model", str(folder)]
    assert benchmark.main(args) == 0
    said = "--max_steps 512: leaves no room for a prompt in the model's sliding window of 256 positions"
    assert said in refused(benchmark.main, [*args, "--max_steps", "512"], capsys)


def test_characters_of_a_shell_are_text(common, tmp_path, monkeypatch):
    """Guards against a value that is executed or filled in; `{message}` alone has a meaning."""
    monkeypatch.chdir(tmp_path)
    odd = "a b;$(touch ran)`touch ran`{0}%s'\"*[x]~"
    data = tmp_path / f"{odd}.jsonl"
    data.write_text('{"prompt": "x {0} %s $(touch ran)", "response": "y"}\n')
    paths = ["--data_path", str(data), "--output_dir", str(tmp_path / odd)]
    assert benchmark.main([*common, *paths, "--template", odd + "{message}{1}"]) == 0
    (folder,) = (tmp_path / odd).iterdir()
    (record,) = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    assert record["prompt"] == odd + "x {0} %s $(touch ran){1}"
    assert not (tmp_path / "ran").exists()
