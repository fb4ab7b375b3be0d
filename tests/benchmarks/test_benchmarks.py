"""The programs under benchmarks/ compare equal work, and their output parses."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas
import pytest
import torch
from conftest import generate, needs_operators, tiny_llama
from helpers import refused, watch
from transformers import AutoConfig, LlamaConfig

import generate as generate_script
from arguments import ModelArguments
from benchmarks import long_contexts, serving, side_by_side, synthetic, variants
from benchmarks.peers import (
    TRANSFORMERS,
    TransformersStrategy,
    fastest,
    find_llama_cpp,
    in_each_format,
    plain_copy,
)
from self_speculation import GenerationConfig, Request, default_model, make_strategy

OURS = ["without drafts", "self-speculative", "4-bit copy", "adaptive"]


@pytest.fixture
def measured(endless_folder, tmp_path, monkeypatch):
    """What side_by_side.py saves, on a tiny model."""
    monkeypatch.setattr(side_by_side, "bars", Mock())

    def run(*args):
        path = tmp_path / "new" / "saved"
        assert side_by_side.main(["--model", str(endless_folder), "--save", str(path), *map(str, args)]) == 0
        return json.loads(path.with_suffix(".json").read_text())

    return run


def test_first_tokens(measured):
    """Guards against a length that is not the prompt's, and answers of more than one token."""
    flags = ["--prompt_tokens", "20", "70", "--rounds", "2", "--max_steps", "1", "--batch_size", "2"]
    rows = measured(*flags)["rows"]
    assert [(row["workload"], row["side"]) for row in rows] == [
        (workload, side)
        for workload in ("20 tokens", "70 tokens", "all prompts")
        for side in ("transformers", "without drafts")
    ]
    assert all(row["ratio"] == 1 for row in rows[::2])
    assert all(row["first_ms"] > 0 and row["decode_tokens/s"] is None for row in rows)


@needs_operators
def test_side_by_side(measured, monkeypatch, capsys):
    """Guards against different outputs, different draft lengths (transformers reads the length from another
    place), padding that counts as tokens, a machine with threads that no turn had, and a table that is not
    the end.
    """
    monkeypatch.setattr("benchmarks.peers.in_each_format", lambda model: [plain_copy(model, torch.float32)])
    monkeypatch.setattr("runs.description.most_threads", lambda model: 2)  # turns end with one thread
    record = measured(
        "--exit_layer", "2", "--num_speculations", "3", "--max_steps", "9", "--rounds", "1",
        "--num_prompts", "3", "--batch_size", "1", "2", "--sample", "True",
    )  # fmt: skip
    rows = record["rows"]
    assert [(row["batch_size"], row["side"]) for row in rows] == [
        *[(1, side) for side in ("transformers", "transformers, exit", "transformers, lookup", *OURS)],
        *[(2, side) for side in ("transformers", *OURS)],
    ]
    assert all(row["same_ids"] == row["answers"] == 3 for row in rows)
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["side"] == "transformers")
    assert record["transformers_in"] == {"1": "float32", "2": "float32"}
    by_side = {row["side"]: row["tokens_per_verification"] for row in rows[:7]}
    assert by_side["transformers, exit"] == pytest.approx(by_side["self-speculative"], rel=0.1)
    assert by_side["transformers"] is by_side["without drafts"] is None
    drawn = side_by_side.bars.call_args.args
    assert list(drawn[0].index) == [f"{row['side']}, batch {row['batch_size']}" for row in rows]
    assert ", down to 1 of 2 threads, 1 rank" in " ".join(drawn[2].split())
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "adaptive"


def test_transformers_has_its_best_format(monkeypatch):
    """Guards against a peer in a format that is slow for it, or fast in decoding and slow in prefill."""
    models = in_each_format(tiny_llama())
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16, torch.float16]
    times = {"slow prefill": (2.5, 0.1), "slow decoding": (1.0, 2.0), "slower prefill": (3.0, 1.0)}
    sides = [(name, None, GenerationConfig()) for name in times]

    def speed(measured, name):
        ((*_, config),) = measured
        prefill, decoding = times[name]
        is_whole = config.max_steps == GenerationConfig().max_steps
        return {"tokens_per_second": 1 / (prefill + decoding * (1 if is_whole else 0.1))}

    monkeypatch.setattr("benchmarks.peers.measure_all", lambda sides, *_: sides)
    monkeypatch.setattr("benchmarks.peers.metrics.speed", speed)
    assert fastest(sides, [5], 1) is sides[1]


def test_a_peer_that_cannot_run_is_refused(monkeypatch, capsys):
    """Guards against a traceback, or minutes of measuring before it."""
    for module, why in ((None, "needs the package"), (Mock(), "reads .gguf files alone")):
        monkeypatch.setitem(sys.modules, "llama_cpp", module)
        assert f"--peers llama.cpp: {why}" in refused(find_llama_cpp, Path("x"), capsys)


def test_what_follows_the_end_of_a_padded_row_does_not_count():
    """Guards against a throughput of transformers that counts the padding of rows that have ended, and
    against prompts in decoding speed.
    """
    model = tiny_llama()
    prompts = [[5, 9, 4, 7], [7]]
    settings = GenerationConfig(max_steps=12, sample=False)
    ends = [generate(model, prompts[0], max_steps=12, eos=[]).predicted_tokens[4]]
    requests = [Request(ids, eos_token_ids=ends) for ids in prompts]
    padded, alone = (
        dict(strategy.generate_batch(model, requests, settings, 2))
        for strategy in (TransformersStrategy(TRANSFORMERS), make_strategy("autoregressive"))
    )
    for row in (0, 1):
        for name in ("predicted_tokens", "end_token_id", "num_decode_tokens"):
            assert getattr(padded[row], name) == getattr(alone[row], name)
    assert len(padded[0].predicted_tokens) <= 4
    assert padded[1].prefill_time == padded[0].prefill_time > 0


@needs_operators
def test_our_sides_by_kind_of_prompt(measured, endless_folder, monkeypatch, capsys):
    """Guards against a missing workload, kind of sampling or side, against sampled peers, and a copy without
    room that ends all other sides.
    """

    def no_room(sides, *_):
        if (sides[0][2].draft_weights, sides[0][2].exit_layer) == ("int4", 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    watch(monkeypatch, side_by_side, "warm_up", no_room)
    flags = ["--max_steps", "6", "--num_prompts", "1", "--exit_layer", "2", "--num_speculations", "2"]
    flags += ["--picking", "greedy", "sampled", "--workloads", "code", "repeat", "--rounds", "1"]
    rows = measured(*flags, "--draft_weights", "int4", "--peers", "none")["rows"]
    assert [(row["picking"], row["workload"]) for row in rows if row["side"] == "adaptive"] == [
        (picking, workload)
        for picking in ("greedy", "sampled")
        for workload in ("code", "repeat", "all prompts")
    ]
    assert len(rows) == 3 * 6
    assert all(row["ratio_to_plain"] >= row["ratio_to_plain_tenth"] > 0 for row in rows)
    assert all(row["answers"] == 1 + (row["workload"] == "all prompts") for row in rows)
    error = refused(side_by_side.main, ["--model", str(endless_folder), *flags], capsys)
    assert "--picking ['greedy', 'sampled']: sampled answers need --peers none" in error


def test_transformers_serves_in_its_best_way_for_each_number_of_clients():
    """Guards against a peer in a format, or without batching, that is slower than another one it has."""
    args = serving.ServingArguments(servers=["transformers"])
    ways = serving.commands(ModelArguments(), GenerationConfig(), args, Path("saved"))
    flags = {(way[way.index("--dtype") + 1], "--continuous-batching" in way) for way in ways.values()}
    assert flags == {(dtype, batching) for dtype in ("float16", "bfloat16") for batching in (False, True)}

    def row(server, *speeds):
        return {"server": server, "tokens/s": sum(speeds), "speeds": speeds}

    rows = [row(name, 20 + place, 30) for place, name in enumerate(ways)]
    ahead = serving.ahead(pandas.DataFrame([row("here", 46, 60), *rows]))
    assert (ahead["other"], ahead["high"]) == ([*ways][-1], 2.0)


def test_llama_server_has_the_same_file_and_a_slot_for_each_client(monkeypatch, capsys, tmp_path):
    """Guards against clients that wait for another server's slot, and a figure of another model."""
    monkeypatch.setattr("shutil.which", lambda name: name)
    args = serving.ServingArguments(servers=["llama-server"], clients=[1, 8], long_prompt=1000)
    (file := tmp_path / "a.gguf").touch()
    model = ModelArguments(model=str(file), threads=3)
    command = serving.commands(model, GenerationConfig(), args, Path("saved"))["llama-server"]
    given = {"--model": str(file), "--parallel": "9", "--ctx-size": str(9 * 3048), "--threads": "3"}
    assert dict(zip(command[1::2], command[2::2], strict=True)) == given
    for find, why in ((lambda name: name, "must be a .gguf file"), (lambda name: None, "is not in PATH")):
        monkeypatch.setattr("shutil.which", find)
        assert why in refused(serving.main, ["--servers", "llama-server"], capsys)


def test_long_contexts(endless_folder, tmp_path):
    """Guards against a format that is compared with itself, a logit of another position, and a picture
    without the other program.
    """
    path = tmp_path / "saved"
    sizes = ["--depths", "5", "40", "--rounds", "1", "--points", "3", "4"]
    prompts = [
        "--prompt_tokens",
        "30",
        "--num_prompts",
        "3",
        "--answer_tokens",
        "9",
        "--num_peer_prompts",
        "2",
    ]
    flags = ["--model", str(endless_folder), "--save", str(path), *sizes, *prompts]
    assert long_contexts.main(flags) == 0
    found = json.loads(path.with_suffix(".json").read_text())
    assert {(row["dtype"], row["depth"]) for row in found["depths"]} == {
        (dtype, depth) for dtype in long_contexts.DTYPES for depth in (5, 40)
    }
    assert all(row["ms"] > 0 for row in found["depths"])
    by_format = {row["format"]: row for row in found["answers"]}
    assert [row["answers"] for row in by_format.values()] == [3, 3, 2]
    assert 0 < by_format["float16"]["KL"] < by_format["bfloat16"]["KL"] < 0.01
    assert by_format["float16"]["tokens"] > 0.9
    assert path.with_suffix(".png").stat().st_size > 10_000


@needs_operators
def test_rows_that_share_a_prefix(endless_folder, capsys):
    """Guards against rows that share nothing, or less than they say."""
    flags = ["--rows", "4", "--shared", "641", "--rounds", "1", "--formats", "float32", "float16"]
    assert long_contexts.main(["--model", str(endless_folder), *flags]) == 0
    table = capsys.readouterr().out.rpartition("MiB\n")[2]
    sizes = {line.split()[0] + line.split()[1]: float(line.split()[-1]) for line in table.splitlines()}
    assert sizes["float32shared"] < 0.3 * sizes["float32not"]
    assert sizes["float16shared"] == pytest.approx(sizes["float32shared"] / 2, rel=0.01)


def test_figures_of_a_server():
    """Guards against a speed that depends on how long clients wait, time that counts for each request, and
    gaps between pieces of different answers.
    """
    times = ((0, 2, [1.0]), (10, 11, [10.5, 10.75]), (1, 3, []), (1.5, 2.5, [2.0]))
    rows = [{"round": 0, "tokens": 2, "began": a, "ended": b, "came": came} for a, b, came in times]
    found = serving.figures(pandas.DataFrame(rows))
    assert (found["answers"], found["tokens/s"], found["speeds"]) == (4, 2.0, [2.0])
    assert (found["first p50"], found["between max"]) == (500, 250)


def test_a_random_llama_agrees_as_often_as_wanted(monkeypatch, tmp_path, capsys):
    """Guards against early exits with another acceptance than those of a trained model, and a model that the
    scripts cannot load.
    """
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    _, agreement = synthetic.random_llama(config, 1, 0.5, torch.device("cpu"))
    assert agreement == pytest.approx(0.5, abs=0.05)
    config.vocab_size = 2 * AutoConfig.from_pretrained(default_model()).vocab_size  # more ids than tokens
    monkeypatch.setitem(synthetic.MODELS, "Llama-2-7B", config)
    monkeypatch.setattr(synthetic, "_POSITIONS", 100)
    assert synthetic.main(["--folder", str(tmp_path)]) == 0
    percent = int(re.search(r"its exit 1 agrees at (\d+)% of positions", capsys.readouterr().out)[1])
    assert percent == pytest.approx(90, abs=5)
    flags = ["--max_steps", "4", "--prompt", "def", "--sample", "False"]
    assert generate_script.main(["--model", str(tmp_path), *flags]) == 0


def test_pairs_of_turns():
    """Guards against the quotient of medians, which a busy minute decides, and texts of other pairs."""
    turns = [
        {"clients": clients, "pair": pair, "drafts": drafts, "speed": speed, "texts": ["a", text]}
        for clients, pair, drafts, speed, text in (
            (1, 1, False, 10.0, "b"), (1, 1, True, 12.0, "b"),
            (1, 2, True, 6.0, "c"), (1, 2, False, 4.0, "b"),
            (1, 3, True, 1.0, "b"), (1, 3, False, 1.0, "b"), (8, 1, False, 8.0, "b"), (8, 1, True, 4.0, "b"),
        )
    ]  # fmt: skip
    found = serving.gains(turns).to_dict("records")
    assert [(row["clients"], row["pairs"], row["x"], row["differ"]) for row in found] == [
        (1, 3, 1.2, 1), (8, 1, 0.5, 0),
    ]  # fmt: skip
    assert (found[0]["low"], found[0]["high"], found[0]["plain tokens/s"]) == (1.0, 1.5, 4.0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx_vnni", False), reason="a processor without")
def test_variants_of_operators(capsys):
    """Guards against a variant that is compared with itself, and passes whose bits depend on the variant."""
    model = ["--model", str(default_model())]
    assert "must be two of" in refused(variants.main, [*model, "--variants", "AVX2", "AVX2"], capsys)
    passes = ["--quantization", "int8", "--turns", "2", "--tokens", "1", "70"]
    assert variants.main([*model, *passes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:-1]] == [["1", "tokens"], ["70", "tokens"]]
    assert lines[-1] == "logits are equal in every bit"
