"""The heading names model, data, strategy, settings and machine, in lines that fit a terminal."""

import dataclasses

from arguments import BatchArguments, DataArguments, GenerationConfig, ModelArguments
from runs.heading import citation, heading, machine, threads_used

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


def test_a_citation_names_all_that_its_figure_holds_for():
    """Guards against a figure in a paper without its settings, even default ones, its versions or its
    machine, and a template that breaks the line.
    """
    made_by = {"version": "1.0", "commit": "abc", "libraries": {"torch": "2.1", "transformers": "5.2"}}
    data = DataArguments(template="a\n{message}")
    groups = (ModelArguments(), GenerationConfig(max_steps=9), data, BatchArguments())
    assert citation(run(*groups, **made_by), "speed-up 2 over x") == (
        "speed-up 2 over x; a/b, human_eval, template a {message}, autoregressive, sampled at temperature "
        "0.6, top_p 0.9, top_k 0, at most 9 new tokens; weights in bfloat16, products in float32, a "
        "processor, 2 threads, 1 rank, batch size 1; self-speculation 1.0, commit abc, torch 2.1, "
        "transformers 5.2"
    )
    greedy = (ModelArguments(), GenerationConfig(sample=False), DataArguments())
    assert "autoregressive, greedy, at most 512" in citation(run(*greedy, **made_by), "")


def test_threads_that_were_used():
    """Guards against all threads of a machine in a figure that had fewer."""
    assert threads_used([2, 2], 2, "example") == ""
    assert threads_used([2, 1], 2, "example") == "1 of 2 threads in 1 of 2 examples"
    assert threads_used([3, 16, 12, 3], 16, "turn") == "3 to 12 of 16 threads in 3 of 4 turns"
    assert machine(run(threads_used="1 of 2 threads in 1 of 1 turn")) == (
        "weights in bfloat16, products in float32, a processor, 1 of 2 threads in 1 of 1 turn, 1 rank"
    )


def test_machines(tmp_path):
    """Guards against the host's threads beside a GPU, and a path where a name is enough."""
    (tmp_path / "tiny").mkdir()
    facts = {"device": "a GPU", "computed_in": "bfloat16", "model": str(tmp_path / "tiny"), "num_ranks": 2}
    assert heading(run(DataArguments(), **facts)) == "tiny, human_eval\nbfloat16, a GPU, 2 ranks"


def test_long_values_are_wrapped():
    """Guards against a line that a terminal or a picture cuts."""
    data = DataArguments(data_path="x/" * 99, template="{message} " * 30)
    said = heading(run(ModelArguments(), GenerationConfig(), data))
    assert max(map(len, said.splitlines())) <= 100
