"""train.py with several ranks, and with adapters, which need a separate process."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import forks
import pandas
import pytest
import torch
import yaml
from conftest import ROOT, assert_close
from helpers import only_run, write_rows
from safetensors.torch import load_file
from test_train import GENERATE, arguments, assert_learns, assert_similar, log, program, run, weights
from transformers import AutoModelForCausalLM

import train

FSDP = yaml.safe_load((ROOT / "training" / "fsdp.yaml").read_text())["fsdp_config"]
SHARDED = {"ACCELERATE_USE_FSDP": "true"} | {  # as `accelerate launch` sets them
    name.upper(): value if isinstance(value, str) else str(value).lower() for name, value in FSDP.items()
}
SHARDS = '"torch.distributed.checkpoint:FileSystemWriter"'
NO_SPACE = 'OSError(28, "No space left on device")'
NOT_WRITTEN = "checkpoint-4: [Errno 28] No space left on device; no checkpoint was written yet"
REFUSED = '"training.run", "load_texts", ValueError("data_path x: no such files")'


@pytest.mark.parametrize(
    ("patch", "env", "status", "message"),
    [
        ("at_step(5, SIGTERM, rank=1)", {}, 143, "interrupted; step 6 is kept"),
        (f'at_rank(1, {SHARDS}, "write_data", {NO_SPACE})', SHARDED, 1, NOT_WRITTEN),
        (f"at_rank(0, {REFUSED})", {}, None, "program.py: error: --data_path x: no such files\n"),
        (f"at_rank(1, {REFUSED})", {}, None, "program.py: error: --data_path x: no such files\n"),
    ],
    ids=["signal", "disk_full_of_a_shard", "refused_by_0", "refused_by_1"],
)
def test_an_event_at_one_rank_ends_all(patch, env, status, message, tmp_path, texts):
    """Guards against ranks that wait for one another, and that fail with different errors."""
    command = arguments(tmp_path, texts, "--batch_size", "2")
    ended = forks.run_ranks(2, program(tmp_path, patch), *command, env=env)
    if status is None:  # one rank alone says why
        assert (ended.returncode != 0, ended.stderr) == (True, message)
    else:
        assert (ended.returncode, message in ended.stderr) == (status, True), ended.stderr


DROPPING = ["--layer_dropout", "0.7", "--exit_loss", "distill", "--rotation", "2"]


@pytest.mark.slow
def test_a_sharded_training_resumes_with_other_ranks(tmp_path, texts, model_folder):
    """Guards against shards that only the same number of ranks can read."""
    more = [*DROPPING, "--model", str(model_folder)]
    whole = run(tmp_path / "one", texts, *more)
    shared = [*arguments(tmp_path, texts, *more), "--gradient_checkpointing"]
    ranks = partial(forks.run_ranks, env=SHARDED)
    killed = program(tmp_path, "at_step(10, sends(signal.SIGKILL), rank=1)")
    assert ranks(2, killed, *shared, "--batch_size", "2").returncode != 0
    folder = only_run(tmp_path)
    assert (folder / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    unsharded = forks.run(ROOT / "train.py", "--resume", folder)
    assert (unsharded.returncode, "trained with FSDP, start it with FSDP" in unsharded.stderr) == (2, True)
    ranks(4, ROOT / "train.py", "--resume", folder, "--batch_size", "1").check_returncode()
    assert_similar(folder, whole)
    shutil.rmtree(folder / "model")  # killed during the last evaluation
    ranks(4, ROOT / "train.py", "--resume", folder).check_returncode()
    assert_similar(folder, whole)
    forks.run(ROOT / "generate.py", "--model", folder / "model", *GENERATE).check_returncode()


def with_peft(ranks, program, *args):
    """In a new process: transformers, when it is imported, looks for peft, which has a separate folder."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    variables = {
        "PYTHONPATH": f"{Path(sys.prefix) / 'lora'}{os.pathsep}{ROOT}",
        **(SHARDED if ranks > 1 else {}),
    }
    command = [*map(str, [sys.executable, *launcher, program, *args])]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_learns_alone(ranks, tmp_path, texts, model_folder):
    """Guards against an adapter that a resumption loses, and a merge that changes head, norms or logits."""
    more = ["--model", str(model_folder), "--lora_rank", "4", "--exit_loss", "distill"]
    more += ["--num_steps", "20", "--learning_rate", "3e-2"]
    if ranks > 1:
        more += ["--batch_size", "2"]
    ways = {}
    for name, step in (("whole", 99), ("parts", 10)):
        (tmp_path / name).mkdir()
        killed = program(tmp_path, f"at_step({step}, sends(signal.SIGKILL))")
        result = with_peft(ranks, killed, *arguments(tmp_path / name, texts, *more))
        assert (result.returncode == 0) == (name == "whole"), result.stderr
        ways[name] = only_run(tmp_path / name)
    assert {path.name for path in ways["parts"].glob("checkpoint-8/*model*")} == (
        {"adapter_model.safetensors"} if ranks == 1 else {"pytorch_model_fsdp_0"}
    )
    result = with_peft(ranks, ROOT / "train.py", "--resume", ways["parts"])
    assert result.returncode == 0, result.stderr
    pandas.testing.assert_frame_equal(log(ways["parts"]), log(ways["whole"]), check_exact=ranks == 1)
    assert_learns(log(ways["whole"]), 0.1)
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = weights(ways["parts"])
    changed = {name for name, value in before.items() if not torch.equal(value.bfloat16(), after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    adapter = load_file(ways["parts"] / "adapter" / "adapter_model.safetensors")
    for name in changed:
        a, b = (adapter[f"base_model.model.{name.replace('weight', f'lora_{ab}.weight')}"] for ab in "AB")
        assert_close(after[name], before[name] + 2 * b @ a, computed_in=torch.bfloat16, roundings=1)
    config = json.loads((ways["parts"] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder.resolve())
    if ranks == 1:  # Guards against weights that stay frozen after a merge, and an adapter of an adapter.
        again = arguments(tmp_path, texts, "--model", str(ways["parts"] / "adapter"))
        assert with_peft(1, ROOT / "train.py", *again).returncode == 0
        result = with_peft(1, ROOT / "train.py", *again, "--lora_rank", "2")
        assert result.returncode == 2
        assert "adapter is an adapter, take the merged model" in result.stderr


@pytest.mark.parametrize(
    "env", [pytest.param({}, marks=pytest.mark.slow, id="data"), pytest.param(SHARDED, id="fsdp")]
)
def test_two_ranks_learn_what_one_does(env, tmp_path):
    """Guards against drops by rank, a mean of means, and a rank that waits where another skips a layer."""
    rows = [{"prompt": f"what is {i} ", "response": "x" * (1 + 7 * (i % 4)) + str(i)} for i in range(60)]
    flags = [*arguments(tmp_path, write_rows(tmp_path / "pairs.jsonl", rows)), *DROPPING, "--num_steps", "4"]
    shared = ["--batch_size", "1", "--gradient_accumulation", "2"]
    outputs = [["--output_dir", str(tmp_path / name / "logs")] for name in ("one", "two")]
    assert train.main([*flags, *outputs[0]]) == 0
    forks.run_ranks(2, ROOT / "train.py", *flags, *shared, *outputs[1], env=env).check_returncode()
    assert_similar(only_run(tmp_path / "two"), only_run(tmp_path / "one"))
