"""One model over several processes or devices: the ids of one, and an end when a rank is lost."""

import json
import re
import tempfile
import time

import forks
import psutil
import pytest
from conftest import ROOT, config_of, generator_of, tiny_llama
from helpers import TORCHRUN, error_line, run_program, small_run, write_program

from arguments import ModelArguments
from self_speculation import LoadingError, LoadingOptions, Request, load_model_and_tokenizer

CASES = {  # exchanges depend on the strategy, on who draws, and on what rows need after a pass
    "early exit": {"exit_layer": 2},
    "sampled": {"sample": True, "no_repeat_ngram_size": 2},
    "lookups": {"exit_layer": 2, "num_speculations": 5, "prompt_lookup": 3},
    "adaptive": {"generation_strategy": "adaptive"},
    "sampled, speculative": {"sample": True, "exit_layer": 1, "num_speculations": 2},
}  # fmt: skip
PROMPTS = ["def add(a, b):", "Once upon a time there was a man."]


TENSOR = """
from runs import ranks; ranks.join_as_one("tensor")
from self_speculation import *
model, tokenizer = load_model_and_tokenizer({!r}, LoadingOptions(parallel="tensor"))
{}
ranks.leave()
"""


def ids_of(model, tokenizer, cases=CASES):
    """The output ids of every case and prompt, from the same seed, alone and in a batch."""
    ids = {}
    for name, case in cases.items():
        config = config_of(max_steps=10, **case)
        generator = generator_of(tokenizer, model, config.generation_strategy)
        for size in (1, 2):
            requests = [Request(prompt, seed=1) for prompt in PROMPTS]
            for index, result in generator.generate_batch(requests, config, batch_size=size):
                tokens = result.generation_strategy_result.predicted_tokens
                assert ids.setdefault(f"{name}: {PROMPTS[index]}", tokens) == tokens
    return ids


@pytest.fixture(scope="module")
def folder(byte_tokenizer, tmp_path_factory):
    """A model whose heads four ranks can share."""
    folder = tmp_path_factory.mktemp("four-heads")
    byte_tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(byte_tokenizer), num_key_value_heads=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected_ids(folder):
    """By the layers of transformers, on one device."""
    return ids_of(*load_model_and_tokenizer(str(folder), LoadingOptions(fuse=False)))


@pytest.fixture
def tensor(folder, tmp_path):
    """Run code over the model on several ranks; the words that the first one prints."""

    def run(num_ranks, code):
        result = run_program(num_ranks, tmp_path, TENSOR.format(str(folder), code))
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()  # one voice

    return run


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_parallel_ids_are_those_of_one_process(num_ranks, tensor, expected_ids):
    """Guards against ranks that differ by their draws or clocks, and a cache of all heads on each."""
    ids, heads = tensor(
        num_ranks,
        "import json; from test_parallel import ids_of; print(json.dumps(ids_of(model, tokenizer)))\n"
        "print(model.model.layers[0].self_attn.k_proj.weight.to_local().shape[0] // 8)",
    )
    assert json.loads(ids) == expected_ids
    assert int(heads) == 4 // num_ranks


EXCHANGES = """
import psutil
import torch.distributed as dist
from types import SimpleNamespace
from torch.profiler import profile
from self_speculation.scheduler import Scheduler

available = psutil.virtual_memory().available
for free in (available if ranks.is_first() else 0, available):
    psutil.virtual_memory = lambda: SimpleNamespace(available=free)
    config = GenerationConfig(sample=False, max_steps=4)
    batch = make_strategy("autoregressive").generate_batch(model, [Request([5, 6, 7])] * 2, config, 2)
    print(*(type(result).__name__ for _, result in batch))

seen, broadcast = [], dist.broadcast_object_list
dist.broadcast_object_list = lambda *args, **kw: (seen.append(1), broadcast(*args, **kw))
drafts = {"exit_layer": 2, "num_speculations": 3}
for strategy, own in (("autoregressive", {}), ("self_speculative", drafts), ("adaptive", {})):
    config = GenerationConfig(sample=False, max_steps=30, **own)
    scheduler = Scheduler(make_strategy(strategy), model, config, 2)
    for key in range(2):
        scheduler.add_request(key, Request([5, 6, 7 + key]))
    seen.clear()
    with profile() as profiler:
        scheduler.step()
    print([event.name for event in profiler.events()].count("c10d::allreduce_"), len(seen))
"""


SAMPLED = """
from self_speculation.decoding import sampling

if not ranks.is_first():
    draw = sampling.draw
    sampling.draw = lambda weights, numbers: draw(weights, (numbers + 0.5) % 1)
drafts = {"exit_layer": 2, "num_speculations": 3}
for strategy, own in (("autoregressive", {}), ("self_speculative", drafts), ("adaptive", {})):
    config = GenerationConfig(sample=True, temperature=2.0, max_steps=20, **own)
    requests = [Request([5, 6, 7 + i], seed=i) for i in range(2)]
    batch = make_strategy(strategy).generate_batch(model, requests, config, 2)
    ids = [result.predicted_tokens for _, result in batch]
    of_ranks = [None] * 2
    dist.all_gather_object(of_ranks, ids)
    print(of_ranks[0] == of_ranks[1])
"""


def test_exchanges_of_ranks(tensor):
    """Guards against a rank that refuses a prompt by its own memory while the others wait in the first pass;
    in a round of two rows, against a broadcast for each token or row, and layers that sum more than twice;
    against ranks that wait for each other for ever, since one of them draws otherwise.
    """
    short, enough, plain, drafted, adaptive, *same_ids = map(str.split, tensor(2, EXCHANGES + SAMPLED))
    assert (short, enough) == (["MemoryError"] * 2, ["GenerationStrategyResult"] * 2)
    assert plain == [f"{1 + 4 * 2}", "0"]  # of the embedding, and two of each layer
    assert drafted == [f"{4 * (1 + 2 * 2) + 2 * 2}", "0"]
    assert adaptive[1] == "1"  # it drafts by time
    assert same_ids == [["True"]] * 3


@pytest.mark.slow
def test_one_rank_of_generate_reads_and_answers(folder):
    """Guards against ranks that wait for standard input, and an answer from each."""
    script = [ROOT / "generate.py", "--model", folder, "--max_steps", "8", "--sample", "False"]
    said = forks.run_ranks(2, *script, "--parallel", "tensor", input="def add(a")
    assert said.returncode == 0, said.stderr
    assert said.stdout == forks.run(*script, input="def add(a").stdout != ""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "tensor"])
def test_a_killed_rank_ends_the_run_and_what_was_done_is_kept(endless_folder, parallel, tmp_path):
    """By the real torchrun. Guards against a rank 0 that waits for ever, or that does not name --resume."""
    args = [ROOT / "benchmark.py", *small_run(endless_folder, tmp_path, 10, 400), "--parallel", parallel]
    with tempfile.TemporaryFile() as said:
        run = forks.Fork(TORCHRUN, "--nproc_per_node", 2, *args, stderr=said.fileno())
        try:
            while not list(tmp_path.glob("logs/*/records.jsonl")):
                time.sleep(0.1)
                assert run.poll() is None, forks.read(said)
            ranks = psutil.Process(run.pid).children()
            (victim,) = (process for process in ranks if process.environ().get("RANK") == "1")
            victim.kill()
            assert run.wait() == 1
        finally:
            run.end()
        errors = forks.read(said)
    ended, kept = "(another rank is gone|interrupted)", r"[1-9]\d* of 10 examples are kept"
    assert re.search(rf"{ended}; {kept}, go on with --resume \S+", errors), errors
    (path,) = tmp_path.glob("logs/*/records.jsonl")
    assert path.read_text()


def test_tensor_and_pipeline_refuse_what_they_cannot_do(model_folder, monkeypatch):
    """Guards against flags that are ignored, and a process that waits for ranks that nobody starts."""

    def said(**options):
        def load():
            load_model_and_tokenizer(str(model_folder), ModelArguments(**options).loading_options())

        return error_line((ValueError, LoadingError), load)

    assert said(parallel="tensor", device="cpu").startswith("device cpu: must be auto with --parallel tensor")
    assert said(parallel="pipeline", compile=True).startswith("compile True: not with --parallel pipeline")
    assert "parallel tensor: needs several processes, start it by torchrun" in said(parallel="tensor")
    monkeypatch.setattr("self_speculation.loading.loading.dist.is_initialized", lambda: True)
    monkeypatch.setattr("self_speculation.loading.loading.dist.get_world_size", lambda: 4)
    assert "parallel tensor: 4 ranks cannot share 2 heads" in said(parallel="tensor")


def test_pipeline_with_layers_on_disk_gives_the_same_ids(folder, expected_ids, tmp_path):
    """Guards against fused layers over weights that are not there, and states that stay on another device."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    arguments = {"device_map": places, "offload_folder": str(tmp_path)}
    model, tokenizer = load_model_and_tokenizer(str(folder), LoadingOptions(arguments, parallel="pipeline"))
    assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    few = {name: CASES[name] for name in ("early exit", "lookups")}
    assert ids_of(model, tokenizer, few).items() <= expected_ids.items()


FAILS = """
import os, sys
import torch
from runs import program
from self_speculation.passes.model_runner import ModelRunner

script = __import__(sys.argv.pop(1))
own, failing, calls = ModelRunner.run_layers, int(sys.argv.pop(1)), 0

def run_layers(self, cache, hidden, first, last):
    global calls
    calls += 1
    if calls > 12 and int(os.environ["RANK"]) == failing:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return own(self, cache, hidden, first, last)

ModelRunner.run_layers = run_layers
program.run(script.main)
"""


@pytest.mark.parametrize(("script", "failing"), [("generate", 1), ("benchmark", 0)])
def test_a_rank_without_memory_ends_all(script, failing, endless_folder, tmp_path):
    """Guards against ranks that wait in a pass for one that goes on with its next request. Nobody ends the
    others here, as torchrun does.
    """
    flags = ["--parallel", "tensor", "--sample", "False", "--prompt", "def"]
    if script == "benchmark":
        flags = [*small_run(endless_folder, tmp_path, 4, 40), *flags[:-2]]
    else:
        flags = ["--model", str(endless_folder), "--max_steps", "40", *flags]
    program = write_program(tmp_path, FAILS)
    with tempfile.TemporaryFile() as said:
        started = [
            forks.Fork(program, script, failing, *flags, env=variables, stderr=said.fileno())
            for variables in forks.environments(2)
        ]
        try:
            assert [process.wait() for process in started] == [1, 1]
        finally:
            for process in started:
                process.end()
        errors = forks.read(said)
    assert "Traceback" not in errors
    assert len(re.findall("out of memory; less takes a shorter prompt", errors)) == 1
    kept = re.findall(r"; [01] of 4 examples are kept, go on with --resume \S+logs", errors)
    assert len(kept) == (script == "benchmark")
