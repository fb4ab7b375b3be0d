"""The programs under benchmarks/ compare equal work, and their output parses."""

import json
import signal
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import generate, tiny_llama
from helpers import watch
from transformers import LlamaConfig

from arguments import ModelArguments
from benchmarks import adaptive, gpu, serving, side_by_side, threads
from benchmarks.inspection import Judged, judge_greedy
from benchmarks.peers import PEERS, Peer, fastest, in_each_format
from benchmarks.sides import EARLY_EXIT, TRANSFORMERS, Answers, ours, theirs
from benchmarks.synthetic import random_llama
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, fuse
from self_speculation.model.model_runner import ModelRunner

OURS = ["without drafts", "self-speculative", "4-bit copy", "adaptive"]


@pytest.fixture
def measured(endless_folder, capsys):
    """The last line of a program's output, on a tiny model."""

    def run(program, *args):
        assert program.main(["--model", str(endless_folder), *map(str, args)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_first_tokens(measured):
    """Guards against a length that is not the prompt's, and a ratio to another side."""
    record = measured(side_by_side, "--prompt_tokens", "20", "70", "--rounds", "2")
    rows = record["rows"]
    sides = ("transformers, bfloat16", "here")
    assert [(row["tokens"], row["side"]) for row in rows] == [(n, side) for n in (20, 70) for side in sides]
    assert all(row["of transformers"] == 1 for row in rows[::2])


def test_side_by_side(measured, tmp_path, monkeypatch):
    """Guards against different outputs, different draft lengths (transformers reads its own elsewhere),
    padding that counts as tokens, and a peer that is not measured, or in batches that it does not take.
    """
    monkeypatch.setattr("benchmarks.peers._TRIES", 1)
    monkeypatch.setattr(side_by_side, "find_peer", lambda *_: "its module")
    side = {"peer": lambda prompts: Answers([[5] * 9 for _ in prompts], len(prompts), 0.1, 0.2)}
    peer = Peer("openvino_genai", "openvino-genai", lambda library, *_: {"its module": side}[library])
    monkeypatch.setitem(PEERS, "openvino", peer)
    monkeypatch.setattr(side_by_side, "bars", drawn := Mock())
    record = measured(
        side_by_side, "--exit_layer", "2", "--num_speculations", "3", "--max_steps", "9", "--rounds", "1",
        "--num_prompts", "3", "--batch_size", "1", "2", "--picture", tmp_path / "bars", "--peers", "openvino",
    )  # fmt: skip
    assert list(drawn.call_args.args[0].index) == [
        f"{row['side']}, batch {row['batch_size']}" for row in record["rows"]
    ]
    rows = [row for row in record["rows"] if row["side"] != "peer"]
    assert [row["batch_size"] for row in record["rows"] if row["side"] == "peer"] == [1]
    assert [(row["batch_size"], row["side"]) for row in rows] == [
        *[(1, side) for side in ("transformers", "transformers, exit", "transformers, lookup", *OURS)],
        *[(2, side) for side in ("transformers", *OURS)],
    ]
    assert all(row["same_ids"] == row["answers"] == 3 for row in rows)
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["side"] == "transformers")
    formats = record["transformers_in"]  # which is fastest depends on the machine
    for size in (1, 2):
        assert formats[str(size)]["transformers"] in ("float32", "bfloat16", "float16")
    by_side = {row["side"]: row["tokens_per_verification"] for row in rows[:7]}
    assert by_side["transformers, exit"] == pytest.approx(by_side["self-speculative"], rel=0.1)


def test_transformers_has_its_best_format():
    """Guards against a peer in a format that is slow for it, or fast in decoding and slow in prefill."""
    models = in_each_format(tiny_llama())
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16, torch.float16]
    times = {"slow prefill": (3.0, 1.0), "slow decoding": (1.0, 2.0)}  # of prefill and decoding

    def make(model):
        prefill, decoding = times[model]
        return lambda prompts: Answers([[5] * 9 for _ in prompts], 1, prefill, prefill + decoding)

    assert fastest([*times], make, [[5]]) == "slow decoding"


def test_what_follows_the_end_of_a_padded_row_does_not_count():
    """Guards against a throughput of transformers that counts the padding of rows that have ended."""
    model, prompts = tiny_llama(), [[5, 9, 4, 7], [7]]
    settings = GenerationConfig(max_steps=12, sample=False)
    ends = [generate(model, prompts[0], max_steps=12, eos=[]).predicted_tokens[4]]
    padded = theirs(TRANSFORMERS, model, ends, settings, 2)(prompts)
    alone = ours(model, ends, settings, 2)(prompts)
    assert padded.ids == alone.ids
    assert len(padded.ids[0]) <= 5
    assert padded.num_first == alone.num_first == 2


def test_adaptive(measured):
    """Guards against a missing workload, kind of sampling or side."""
    rows = measured(
        adaptive, "--max_steps", "6", "--num_prompts", "1", "--exit_layer", "2", "--num_speculations", "2",
        "--draft_weights", "int4", "--workloads", "code", "repeat",
    )["rows"]  # fmt: skip
    assert [(row["picking"], row["workload"]) for row in rows if row["side"] == "adaptive"] == [
        (picking, workload)
        for picking in ("greedy", "sampled")
        for workload in ("code", "repeat", "all prompts")
    ]
    assert len(rows) == 3 * 6
    assert all(row["x"] >= row["tenth"] > 0 and row["sums"] > 0 for row in rows)


def test_threads_beside_busy_programs(measured, monkeypatch):
    """Guards against a side that decodes with another number of threads than it is named for."""
    used = []
    watch(monkeypatch, HuggingfaceLlamaGenerator, "generate", lambda *_: used.append(torch.get_num_threads()))
    try:
        found = measured(threads, "--threads", 2, "--beside", 0, 1, "--rounds", 1, "--max_steps", 3)
    finally:
        torch.set_num_threads(1)
    assert [row["beside"] for row in found["rows"]] == [0, 1]
    assert all(row.keys() == {"beside", "2 threads", "1 thread", "default"} for row in found["rows"])
    assert used == [2, *[2, 1, 2] * 2]


def test_transformers_serves_in_its_best_way_for_each_number_of_clients():
    """Guards against a peer in a format, or without batching, that is slower than another one it has."""
    args = serving.ServingArguments(servers=["transformers"])
    ways = serving.commands(ModelArguments(), GenerationConfig(), args, Path("saved"))
    flags = {(way[way.index("--dtype") + 1], "--continuous-batching" in way) for way in ways.values()}
    assert flags == {(dtype, batching) for dtype in ("float16", "bfloat16") for batching in (False, True)}

    def row(server, *speeds):
        load = {"clients": 1, "long prompt": 0}
        return {"server": server, **load, "tokens/s": sum(speeds), "speeds": speeds}

    others = [row(name, 20 + place, 30) for place, name in enumerate(ways)]
    ahead = serving.who_is_ahead(row("here", 46, 60), *others)
    assert (ahead["other"], ahead["high"]) == ([*ways][-1], 2.0)


def test_time_without_an_open_request_does_not_count():
    """Guards against a speed that depends on how long clients wait, and against time that counts for each."""
    answers = [serving.Answer(began, (), ended) for began, ended in ((0, 2), (10, 11), (1, 3), (1.5, 2.5))]
    assert serving.Turn(answers, num_tokens=8).tokens_per_second == 2


@pytest.fixture
def dry(capsys, monkeypatch):
    """Runs gpu.py on the tiny model, by the passes of a GPU; its status, its lines and the JSON of the last
    one.
    """
    monkeypatch.setattr("self_speculation.model.captured_runner.InPlaceRunner", ModelRunner)
    monkeypatch.setattr("benchmarks.synthetic._HALVINGS", 2)  # the exit may agree at another rate

    def run(*args):
        status = gpu.main(["--dry", "True", "--prompts", "128", "--rounds", "1", *args])
        said = capsys.readouterr().out.splitlines()
        return status, said, json.loads(said[-1])

    return run


@pytest.fixture
def nothing_is_measured(monkeypatch):
    """A run without the seconds that its parts take."""

    def replace(measure):
        monkeypatch.setattr(gpu, "measure", measure)
        monkeypatch.setattr(gpu, "read_bandwidth", lambda device: 1e9)

    return replace


def test_parts_and_head_of_the_table_of_a_gpu(dry, nothing_is_measured):
    """Guards against compiled rows after the deadline, timed plans of cuDNN for new lengths, rows of one
    length, which need no mask, and a copy of some layers only.
    """
    order = []

    def measure(task, _):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        order.append((task.prompt, task.size, task.compiled))
        copied = task.strategy("4-bit copy")
        assert (copied.exit_layer, copied.num_speculations, copied.draft_weights) == (4, 3, "int4")
        for batch in task.batches:
            assert [len(ids) for ids in batch] == [max(1, task.prompt - row) for row in range(task.size)]

    nothing_is_measured(measure)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        status, said, record = dry("--prompts", "128", "160")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert status == 0
    assert order == [
        (length, size, compiled) for length in (8, 10) for size in (1, 8) for compiled in (False, True)
    ]
    work = record["work"]
    assert work["self-speculative"]["kernels"] > work["without drafts"]["kernels"] > 4 * 12
    assert f"without drafts, eager round: {work['without drafts']['kernels']} kernels" in "\n".join(said)


def test_gpu_keeps_what_it_has_when_it_ends_early(dry, nothing_is_measured):
    """Guards against the loss of the figures of an unfinished part, and a run without a deadline."""

    def measure(_, found):
        answers = gpu.Answers([[1, 2, 3]], 1, 1.0, 2.0)
        found["without drafts"].answers.append(answers)
        signal.raise_signal(signal.SIGINT)

    nothing_is_measured(measure)
    status, said, record = dry()
    assert (status, record["ended"]) == (130, "interrupted")
    assert [(row["side"], row["tokens/s"]) for row in record["rows"]] == [("without drafts", 2.0)]
    assert any(line.startswith("interrupted: 1 rows") for line in said)
    status, _, record = dry("--minutes", "0")
    assert (status, record["ended"], record["rows"]) == (0, "stopped after 0 minutes", [])


def test_gpu_goes_on_when_a_side_fails(dry, monkeypatch):
    """Guards against an error of one side (of a kernel, of memory, of a capture) that ends all others: it
    costs its own rows, and the exit status.
    """

    out_of_memory = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch"))
    sides = gpu.theirs

    def no_room(*args):
        if args[3].draft_weights == "int4":
            raise MemoryError("no room")

    monkeypatch.setattr(
        gpu, "theirs", lambda name, *rest: out_of_memory if name == EARLY_EXIT else sides(name, *rest)
    )
    watch(monkeypatch, gpu, "run_every_pass", no_room)
    monkeypatch.setattr(gpu, "capture_decoding", Mock(side_effect=ValueError("compile True: needs one GPU")))
    status, said, record = dry("--batch_size", "1")
    assert status == 1
    failed = {(row["compiled"], row["side"]): row["error"] for row in record["rows"] if row["error"]}
    assert failed == {
        (False, "transformers, exit"): "OutOfMemoryError: CUDA out of memory. Tried to allocate",
        (False, "4-bit copy"): "MemoryError: no room",
        **{(True, side): "ValueError: compile True: needs one GPU" for side in OURS},
    }
    whole = {row["side"]: row for row in record["rows"] if row["error"] is None}
    assert [*whole] == ["transformers", "without drafts", "self-speculative", "adaptive"]
    assert all(row["ids"]["equal"] + row["ids"]["near_ties"] == 16 for row in whole.values())
    assert all(row["tokens/s"] > 0 and row["x hf"] > 0 for row in whole.values())
    assert whole["without drafts"]["limit"] > 0
    assert 0 <= whole["self-speculative"]["accept"] <= 1
    assert all(len(line) <= 80 for line in said[:-1])


@pytest.mark.slow
def test_memory_does_not_grow():
    """Guards against memory kept of each answer: caches, rows, drafts, statistics of adaptive decoding."""
    model = tiny_llama()
    fuse(model)
    drafts = {"exit_layer": 1, "num_speculations": 3}
    kinds = [
        GenerationConfig(max_steps=24),
        GenerationConfig(max_steps=24, generation_strategy="self_speculative", **drafts, prompt_lookup=3),
        GenerationConfig(max_steps=24, generation_strategy="adaptive", draft_weights="int4"),
    ]
    sides = [ours(model, [], config, batch_size) for config in kinds for batch_size in (1, 3)]
    held = []
    for number in range(900):
        prompts = torch.randint(20, (3, 5 + number % 40)).tolist()
        sides[number % len(sides)](prompts)
        held.append(psutil.Process().memory_info().rss / 2**20)
    assert max(held[-100:]) - max(held[300:400]) < 8


def test_greedy_ids_are_judged_token_by_token():
    """Guards against a wrong token that counts as a near-tie: decoding and judging are both in fp32."""
    model, prompt = tiny_llama(), [5, 9, 4, 7]
    ids = generate(model, prompt, max_steps=12, eos=[]).predicted_tokens
    assert judge_greedy(model, prompt, ids) == Judged(equal=12)
    logits = model(torch.tensor([[*prompt, *ids[:5]]])).logits[0, -1]
    other = [*ids[:5], int(logits.argmin())]
    assert judge_greedy(model, prompt, other) == Judged(equal=5, wrong=1)


def test_a_random_llama_agrees_as_often_as_wanted():
    """Guards against early exits with another acceptance than those of a trained model."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    for wanted in (0.5, 0.9):
        _, agreement = random_llama(config, 1, wanted, torch.device("cpu"))
        assert agreement == pytest.approx(wanted, abs=0.05)
