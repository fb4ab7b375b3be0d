"""The heading names model, data, strategy, settings and machine, in lines that fit a terminal."""

import dataclasses

from arguments import BatchArguments, GenerationConfig, ModelArguments
from data import DataArguments
from runs.heading import heading

MACHINE = {
    "model": "a/b", "dtype": "bfloat16", "computed_in": "float32", "device": "cpu",
    "processor": "a processor", "threads": 2, "num_ranks": 1,
}  # fmt: skip


def run(*groups, **facts):
    arguments = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    return {**MACHINE, **facts, "arguments": arguments}


def test_settings_other_than_defaults_are_named():
    """Guards against figures whose settings nobody knows, a column of the table in its heading, and a format
    that reads like a contradiction.
    """
    config = GenerationConfig(exit_layer=3, temperature=0)
    groups = (ModelArguments(fuse=False), config, DataArguments(n_shot=2, num_samples=5), BatchArguments(8))
    named, by = heading(run(*groups), left_out=("exit_layer",)).splitlines()
    assert named == "a/b, fuse False, human_eval, n_shot 2, autoregressive, temperature 0"
    assert by == "weights in bfloat16, products in float32, a processor, 2 threads, 1 rank, batch size 8"


def test_machines(tmp_path):
    """Guards against the host's threads beside a GPU, and a path where a name is enough."""
    (tmp_path / "tiny").mkdir()
    facts = {"device": "a GPU", "computed_in": "bfloat16", "model": str(tmp_path / "tiny"), "num_ranks": 2}
    assert heading(run(DataArguments(), **facts)) == "tiny, human_eval\nbfloat16, a GPU, 2 ranks"


def test_long_values_are_wrapped():
    """Guards against a line that a terminal or a picture cuts."""
    groups = (ModelArguments(model_args="a=" + "x/" * 99), DataArguments(template="{message} " * 30))
    said = heading(run(*groups, GenerationConfig()))
    assert max(map(len, said.splitlines())) <= 100
