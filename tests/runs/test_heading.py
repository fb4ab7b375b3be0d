"""What stands above a table is what was run, in lines that fit a terminal."""

import dataclasses

import pytest

from arguments import BatchArguments, DataArguments, GenerationConfig, ModelArguments
from runs.heading import heading

MACHINE = {
    "model": "a/b", "dtype": "bfloat16", "computed_in": "float32", "device": "cpu",
    "processor": "a processor", "threads": 2, "num_ranks": 1,
}  # fmt: skip


def run(*groups, **facts):
    arguments = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    return {**MACHINE, **facts, "arguments": arguments}


ADAPTIVE = {"generation_strategy": "adaptive", "draft_weights": "int4", "stop_words": ["a\n"]}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "autoregressive, sampled (temperature 0.6, top_k 0, top_p 0.9), at most 512 tokens"),
        ({"exit_layer": 3, "temperature": 0}, "autoregressive, exit_layer 3, greedy, at most 512 tokens"),
        (
            {**ADAPTIVE, "sample": False, "max_steps": 9},
            "adaptive, stop_words ['a\\n'], draft_weights int4, greedy, at most 9 tokens",
        ),
    ],
)
def test_what_generates_by_what(settings, says):
    """Guards against a setting that changes the figures and is not said, and one that says nothing."""
    config = GenerationConfig(**settings)
    groups = (ModelArguments(fuse=False), config, DataArguments(n_shot=2, num_samples=5), BatchArguments(8))
    assert heading(run(*groups)).splitlines() == [
        "a/b, fuse False, human_eval, n_shot 2",
        says,
        "bfloat16 computed in float32, a processor, 2 threads, 1 rank, batch size 8",
    ]


def test_a_gpu_a_folder_and_several_ranks(tmp_path):
    """Guards against the threads of a host that waits for its GPU, and a path where a name is enough."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    said = heading(
        run(DataArguments(), device="a GPU", computed_in="bfloat16", model=str(folder), num_ranks=2)
    )
    assert said.splitlines() == ["tiny, human_eval", "bfloat16, a GPU, 2 ranks"]


def test_long_values_are_wrapped():
    """Guards against lines that a terminal breaks anywhere."""
    said = heading(
        run(
            ModelArguments(),
            GenerationConfig(),
            DataArguments(data_path="x/" * 99, template="{message} " * 30),
        )
    )
    assert max(map(len, said.splitlines())) <= 100


def test_what_a_table_shows_itself_is_left_out():
    """Guards against the first cell of a sweep as the setting of all."""
    config = GenerationConfig(
        generation_strategy="self_speculative", exit_layer=1, num_speculations=1, max_steps=7
    )
    said = heading(run(config), left_out=("exit_layer", "num_speculations", "max_steps"))
    assert said.splitlines()[1].startswith("self_speculative, sampled")
    assert "tokens" not in said
