"""One model over several devices: the ids of one; and several processes: an end when a rank is lost."""

import re
import tempfile
import time

import forks
import psutil
import pytest
from conftest import ROOT, config_of, generator_of, tiny_llama
from helpers import TORCHRUN, small_run

from self_speculation import LoadingOptions, Request, load_model_and_tokenizer

CASES = {
    "early exit": {"exit_layer": 2},
    "lookups": {"exit_layer": 2, "num_speculations": 5, "prompt_lookup": 3},
}
PROMPTS = ["def add(a, b):", "Once upon a time there was a man."]


def ids_of(model, tokenizer):
    """The output ids of every case and prompt, alone and in a batch."""
    ids = {}
    for name, case in CASES.items():
        config = config_of(max_steps=10, **case)
        generator = generator_of(tokenizer, model, config.generation_strategy)
        for size in (1, 2):
            requests = [*map(Request, PROMPTS)]
            for index, result in generator.generate_batch(requests, config, batch_size=size):
                tokens = result.generation_strategy_result.predicted_tokens
                assert ids.setdefault(f"{name}: {PROMPTS[index]}", tokens) == tokens
    return ids


@pytest.fixture(scope="module")
def folder(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    byte_tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(byte_tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected_ids(folder):
    """By the layers of transformers, on one device."""
    return ids_of(*load_model_and_tokenizer(str(folder), LoadingOptions(fuse=False)))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_what_was_done_is_kept(endless_folder, tmp_path):
    """By the real torchrun. Guards against a rank 0 that waits for ever, or that does not name --resume."""
    args = [ROOT / "benchmark.py", *small_run(endless_folder, tmp_path, 10, 400)]
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


def test_a_split_model_with_layers_on_disk_gives_the_same_ids(folder, expected_ids, tmp_path):
    """Guards against fused layers over weights that are not there, and states that stay on another device."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    arguments = {"device_map": places, "offload_folder": str(tmp_path)}
    model, tokenizer = load_model_and_tokenizer(str(folder), LoadingOptions(arguments, device="split"))
    assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert ids_of(model, tokenizer) == expected_ids
