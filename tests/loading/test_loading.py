"""Loading a model, and the one line that explains why it cannot be loaded."""

import copy
import importlib
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
from conftest import (
    PROMPT,
    assert_close,
    generator_of,
    ids_of,
    in_batch,
    needs_operators,
    tiny_llama,
    transformers_generate,
)
from helpers import error_line
from huggingface_hub import errors
from safetensors.torch import load_file

from arguments import ModelArguments
from runs.startup import load_generator
from self_speculation import GenerationConfig, LoadingError, LoadingOptions, Request, load_model_and_tokenizer
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.backends.runners import activation_dtype, eager_runner
from self_speculation.config import default_model
from self_speculation.loading.loading import load_config, resolve_dtype
from self_speculation.loading.sources import hub_answers
from self_speculation.machine.progress import shown_by
from self_speculation.models.families import context_length
from self_speculation.weights.kernels import cpu_operators


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of a model's folder that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def refusal(model, **options):
    return error_line(LoadingError, load_model_and_tokenizer, model, LoadingOptions(**options))


def test_a_folder_loads_as_the_model_it_was_saved_from(model_folder, text_model):
    """Guards against random weights, a model in training mode, and options that are ignored."""
    draws = []
    for seed in (7, 8, 7):
        model, tokenizer = load_model_and_tokenizer(str(model_folder), LoadingOptions(seed=seed))
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[2] != draws[1]
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer.encode("a man", return_tensors="pt")
    assert_close(model(ids).logits, text_model(ids).logits)
    assert isinstance(eager_runner(model), InPlaceRunner) == (cpu_operators().variant is not None)
    model, _ = load_model_and_tokenizer(str(model_folder), LoadingOptions(fuse=False))
    assert not isinstance(eager_runner(model), InPlaceRunner)


@pytest.mark.parametrize("shows", [False, True])
def test_loading_prints_nothing_unless_a_script_shows_progress(shows, model_folder, capsys):
    """Guards against a bar of transformers in a library that prints nothing, or against none in a script."""
    transformers.utils.logging.enable_progress_bar()  # train.py turns it off
    with shown_by(lambda *_: nullcontext(print)) if shows else nullcontext():
        load_model_and_tokenizer(str(model_folder))
    printed = capsys.readouterr()
    assert (printed.out, "Loading weights" in printed.err) == ("", shows)
    assert shows or not printed.err
    assert transformers.utils.logging.is_progress_bar_enabled()


@needs_operators
@pytest.mark.parametrize(
    ("saved", "options", "weights", "activations"),
    [
        ("bfloat16", {}, "bfloat16", "float32"),
        ("float16", {}, "float16", "float32"),
        ("float32", {}, "float32", "float32"),
        ("float32", {"dtype": "bfloat16"}, "bfloat16", "float32"),
        ("bfloat16", {"dtype": "float32"}, "float32", "float32"),
        ("float32", {"model_args": {"dtype": "float16"}}, "float16", "float32"),
        ("bfloat16", {"fuse": False}, "float32", "float32"),
    ],
)
def test_auto_keeps_16_bits_of_the_checkpoint(saved, options, weights, activations, folder, text_model):
    """Guards against a format that was not asked for."""
    copy.deepcopy(text_model).to(getattr(torch, saved)).save_pretrained(folder)
    model, _ = load_model_and_tokenizer(str(folder), LoadingOptions(device="cpu", **options))
    assert (model.dtype, activation_dtype(model)) == (getattr(torch, weights), getattr(torch, activations))


@needs_operators
def test_a_checkpoint_that_operators_do_not_have_is_loaded_in_float32(folder, text_model, capsys):
    """Guards against the output of another model, and against a change of format without a warning, such as
    one that vanishes together with the progress of loading.
    """
    copy.deepcopy(text_model).bfloat16().save_pretrained(folder)
    arguments = ModelArguments(model=str(folder), device="cpu", model_args="attn_implementation=eager")
    model = load_generator(arguments, GenerationConfig()).model
    assert model.dtype == activation_dtype(model) == torch.float32
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "in float32" in line]
    assert line.startswith("warning: model ")
    assert "since a layer is not one that our operators have" in line


def test_half_is_a_format_that_the_device_computes_in(monkeypatch):
    """Guards against float16 on a CPU, which emulates it, and against bfloat16 on a card that does."""
    assert resolve_dtype("half", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    assert resolve_dtype("half", torch.device("cuda")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    put(folder / "config.json", json.dumps(config | settings))


def put(file, text):
    file.write_text(text)


def pickled(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    return folder


def cut_short(folder):
    os.truncate(folder / "model.safetensors", 9000)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_rope_scaling_as_model_cards_write_it(folder):
    """Guards against a base that is forgotten, and against a context that stays as short as it was."""
    settings = json.loads((folder / "config.json").read_text())
    prompt = [5 + 7 * i % 50 for i in range(300)]
    del settings["rope_parameters"]
    scaling = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    for in_config, model_args in (({}, scaling), (scaling, {})):
        (folder / "config.json").write_text(json.dumps({**settings, "rope_theta": 5e5, **in_config}))
        options = LoadingOptions({"attn_implementation": "sdpa", **model_args}, dtype="float32")
        model, _ = load_model_and_tokenizer(str(folder), options)
        assert (model.config.rope_parameters["rope_theta"], context_length(model.config)) == (5e5, 1024)
        assert ids_of(model, prompt, max_steps=8) == transformers_generate(model, prompt, 8, -1)


def scaled(scaling):
    return {"model_args": {"rope_scaling": scaling}}


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# By their messages: what is done to a folder, or another path, and options.
REFUSED = {
    "no safetensors weights": (pickled, {}),
    "corrupt or cut short": (cut_short, {}),
    "not a valid JSON file": (lambda folder: put(folder / "config.json", "{"), {}),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), {}),
    "model type 'gpt2' is not supported; supported are llama": (
        lambda folder: put(folder / "config.json", '{"model_type": "gpt2"}'), {},
    ),
    "config and weights do not fit: 18 tensors are missing": (
        lambda folder: change_config(folder, num_hidden_layers=6), {},
    ),
    "do not fit: some tensors have another shape": (lambda folder: change_config(folder, hidden_size=64), {}),
    "no tokenizer in there, such as tokenizer.json: save it": (without_tokenizer, {}),
    "tokens, but the model knows only 100: it is that of another model": (
        lambda folder: tiny_llama(vocab_size=100).save_pretrained(folder), {},
    ),
    "is a file; must be a hub id, a folder or a .gguf file": (lambda folder: folder / "config.json", {}),
    "nowhere': no such folder": (lambda folder: folder / "nowhere", {}),
    "'./nowhere': no such folder": (lambda folder: "./nowhere", {}),
    "no such file": (lambda folder: "nowhere.gguf", {}),
    "device 'cuda:99': not on this machine; use auto, cpu, cuda, cuda:N, mps or split": (
        str,
        {"device": "cuda:99"},
    ),
    "compile True: needs a GPU; on a CPU decoding is faster": (str, {"device": "cpu", "compile": True}),
    "whose rope_type is one of linear, llama3, yarn": (str, scaled({"rope_type": "dynamic", "factor": 4.0})),
    "model_args rope_scaling 'yarn': must be a dictionary": (str, scaled("yarn")),
    "factor": (str, scaled({"rope_type": "yarn"})),
    "are quantised already": (
        lambda folder: change_config(folder, quantization_config=NF4), {"quantization": "int8"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_loaded_is_refused(folder, message):
    """Guards against unpickling, which runs any code, random weights, errors of several lines or without what
    is allowed, a rotation that depends on the length of a sequence, asking the hub for a mistyped path, and a
    flag that transformers ignores with a warning.
    """
    change, options = REFUSED[message]
    assert message in refusal(str(change(folder) or folder), **options)


def hub_error(kind, status=404):
    client = importlib.import_module(errors.Response.__module__)  # httpx or, with hub 2, httpx2
    return kind("no", response=client.Response(status, request=client.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (errors.GatedRepoError, "ask for it at https://huggingface.co/a/b, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "neither a local folder nor a model on the hub"),
    ],
)
def test_errors_of_the_hub_become_advice(kind, advice, monkeypatch):
    """Guards against transformers' OSErrors of several lines around an error of the hub."""
    error = OSError("several\nlines")
    error.__cause__ = hub_error(kind)
    monkeypatch.setattr(
        "self_speculation.loading.loading.AutoConfig.from_pretrained", Mock(side_effect=error)
    )
    assert advice in refusal("a/b")


def test_without_a_network(model_folder, tmp_path, monkeypatch, capsys):
    """Guards against half a minute of attempts, each with a raw error, before the one line, against a check
    of the network that refuses models of the local cache, and against a second check of seconds.
    """
    constants = huggingface_hub.constants
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("it tries again"))
    with pytest.raises(LoadingError, match="not in the local cache, and the hub cannot be reached"):
        load_config("a/b")
    assert capsys.readouterr().err == ""
    shutil.copytree(model_folder, tmp_path / "models--a--b" / "snapshots" / "0")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0")
    asked = Mock(side_effect=hub_answers)
    monkeypatch.setattr("self_speculation.loading.sources.hub_answers", asked)
    model, tokenizer = load_model_and_tokenizer("a/b")
    asked.assert_called_once()
    load_model_and_tokenizer("a/b", config=load_config("a/b"))
    assert asked.call_count == 2
    assert model.config.num_hidden_layers == 4
    assert tokenizer.encode("def")


@pytest.mark.parametrize(("error", "answers"), [(404, True), (401, True), (503, False), (None, False)])
def test_the_hub_answers_if_it_is_up(error, answers, monkeypatch):
    """Guards against a missing or private model that counts as a missing network."""
    raised = ConnectionError if error is None else hub_error(errors.HfHubHTTPError, error)
    monkeypatch.setattr("self_speculation.loading.sources.get_hf_file_metadata", Mock(side_effect=raised))
    assert hub_answers("a/b") == answers


def test_code_of_a_repository_needs_permission(folder, tmp_path):
    """Guards against arbitrary code that runs without `trust_remote_code`."""
    code = "import transformers\nclass Model(transformers.LlamaForCausalLM): pass\n"
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code}")
    change_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    load_model_and_tokenizer(str(folder))  # by the class of transformers
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "code.Model"})
    refusal(str(folder))
    assert not (tmp_path / "ran").exists()
    change_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "code.Model"})
    load_model_and_tokenizer(str(folder), LoadingOptions(trust_remote_code=True))
    assert (tmp_path / "ran").exists()


def test_the_bundled_model_is_small_complete_and_in_bf16():
    """Guards against a checkpoint without a tokenizer, in fp32, or with leftovers of a training run."""
    files = {file.name: file for file in Path(default_model()).iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} == set(files)
    assert sum(file.stat().st_size for file in files.values()) < 30e6
    assert {weight.dtype for weight in load_file(files["model.safetensors"]).values()} == {torch.bfloat16}
    model, tokenizer = load_model_and_tokenizer(default_model())
    assert len(tokenizer) == model.config.vocab_size


def test_a_token_without_an_embedding_is_refused(model_folder):
    """Guards against an IndexError, and against refusing a Llama 2 whose tokenizer has one more token for
    padding: only a prompt with that token is refused.
    """
    model, tokenizer = load_model_and_tokenizer(str(model_folder))
    tokenizer.add_tokens(["<pad>"])
    generator = generator_of(tokenizer, model)
    generator.generate("a man", GenerationConfig(max_steps=2))
    with pytest.raises(ValueError, match="but the model knows only"):
        generator.generate("a<pad>", GenerationConfig(max_steps=2))


def test_a_split_model_with_layers_on_disk_gives_the_same_ids(text_model, model_folder, tmp_path):
    """Guards against fused layers over weights that are not there, and states that stay on another device."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    arguments = {"device_map": places, "offload_folder": str(tmp_path)}
    model, _ = load_model_and_tokenizer(str(model_folder), LoadingOptions(arguments, device="split"))
    assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    requests = [Request(PROMPT), Request(PROMPT[:3])]
    for case in ({"exit_layer": 2}, {"exit_layer": 2, "num_speculations": 5, "prompt_lookup": 3}):
        ours, whole = (in_batch(each, requests, 2, max_steps=10, **case) for each in (model, text_model))
        assert [ours[row].predicted_tokens for row in range(2)] == [
            whole[row].predicted_tokens for row in range(2)
        ]
