"""Loading: what is read, and the one line that a person gets when it cannot be."""

import copy
import json
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import assert_close, generate, tiny_llama
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import benchmark
from runs.program import run
from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    LoadingError,
    LoadingOptions,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.model.loading import default_model, load_config, resolve_device, resolve_dtype
from self_speculation.model.sources import hub_answers


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(model_folder, tmp_path / "model")


def refusal(model, **options):
    with pytest.raises(LoadingError) as caught:
        load_model_and_tokenizer(model, LoadingOptions(**options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_loads_as_the_model_it_was_saved_from(model_folder, text_model):
    model, tokenizer = load_model_and_tokenizer(str(model_folder))
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer.encode("a man", return_tensors="pt")
    assert_close(model(ids).logits, text_model(ids).logits)


def test_dtype_and_model_args_are_passed_on(model_folder):
    model, _ = load_model_and_tokenizer(
        str(model_folder), LoadingOptions({"attn_implementation": "eager"}, dtype="bfloat16")
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_the_seed_is_set(model_folder):
    draws = []
    for _ in range(2):
        load_model_and_tokenizer(str(model_folder), LoadingOptions(seed=7))
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_half_is_what_the_device_computes_in(monkeypatch):
    """Guards against a silent fallback, and against float16 on a CPU, which is emulated there."""
    computes = [True, False]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: computes.pop(0))
    assert resolve_dtype("half", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(
        LoadingError, match="dtype 'half': this processor does not compute in bfloat16; use float32"
    ):
        resolve_dtype("half", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    assert resolve_dtype("half", torch.device("cuda")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"


def test_unknown_device_and_dtype(model_folder):
    assert refusal(str(model_folder), device="tpu") == (
        "device 'tpu': not on this machine; use auto, cpu, cuda, cuda:N or mps"
    )
    assert "dtype 'int3': must be one of auto, half, float32" in refusal(str(model_folder), dtype="int3")
    assert resolve_device("cpu") == torch.device("cpu")


def pickled(folder):
    """Unpickling runs whatever code the file asks for."""
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


SPOILT = [
    (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    (pickled, "no safetensors weights"),
    (cut_short, "corrupt or cut short"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 5000), "corrupt or cut short"),
    (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        "model type 'gpt2' is not supported; supported are llama",
    ),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (without_tokenizer, "no tokenizer in there, such as tokenizer.json: save it"),
    (
        lambda folder: tiny_llama(vocab_size=100).save_pretrained(folder),
        "tokens, but the model knows only 100: it is that of another model",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_a_spoilt_folder(folder, spoil, message):
    spoil(folder)
    assert message in refusal(str(folder))


def test_paths_that_are_no_model(tmp_path):
    assert "no such folder" in refusal(str(tmp_path / "nowhere"))
    assert "no such folder" in refusal("./nowhere")
    assert "no such file" in refusal("nowhere.gguf")
    for name, message in (
        ("own.csv", "is a file; must be a hub id, a folder or a .gguf file"),
        ("x.gguf", "not a GGUF file"),
    ):
        (tmp_path / name).write_text("a,b and more")
        assert message in refusal(str(tmp_path / name))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 6}, {"hidden_size": 64}])
def test_a_config_that_contradicts_the_weights(folder, change):
    """transformers alone would fill the gaps with random numbers and go on."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert str(folder) in refusal(str(folder))


def hub_error(kind, status=404):
    if kind is errors.LocalEntryNotFoundError:
        return kind("cannot reach")
    return kind("no", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (errors.GatedRepoError, "ask for it at https://huggingface.co/a/b, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "neither a local folder nor a model on the hub"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached: check the network or name a folder"),
    ],
)
def test_what_the_hub_answers(kind, advice, monkeypatch):
    """transformers wraps these in OSErrors of several lines."""

    def answer(*_, **__):
        raise OSError("several\nlines") from hub_error(kind)

    monkeypatch.setattr("self_speculation.model.loading.AutoConfig.from_pretrained", answer)
    assert advice in refusal("a/b")


def test_an_unreachable_hub_for_real():
    with pytest.raises(LoadingError, match="the hub cannot be reached"):
        load_config("facebook/layerskip-llama3.2-1B")


@pytest.fixture
def no_network(monkeypatch):
    """The hub is a port that nobody listens at; waiting before another try fails the test."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("it waits to try again")
    )


@pytest.mark.usefixtures("no_network")
def test_without_a_network_it_fails_at_once(capsys):
    """Guards against half a minute of tries, each with its raw error, before the line that matters."""
    with pytest.raises(LoadingError, match="not in the local cache, and the hub cannot be reached"):
        load_config("a/b")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_cache_is_enough(model_folder, tmp_path, monkeypatch):
    """Guards against a check of the network that shuts out what was downloaded before."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    shutil.copytree(model_folder, snapshot)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = load_model_and_tokenizer("a/b")
    assert model.config.num_hidden_layers == 4
    assert tokenizer.encode("def")


@pytest.mark.parametrize(("error", "answers"), [(404, True), (401, True), (503, False), (None, False)])
def test_what_counts_as_an_answer_of_the_hub(error, answers, monkeypatch):
    def ask(*_, **__):
        raise ConnectionError if error is None else hub_error(errors.HfHubHTTPError, error)

    monkeypatch.setattr("self_speculation.model.sources.get_hf_file_metadata", ask)
    assert hub_answers("a/b") == answers


def test_no_code_of_a_repository_is_executed(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusal(str(folder))
    assert not (tmp_path / "ran").exists()


def test_the_default_model_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr("self_speculation.model.loading._BUNDLED", (tmp_path / "nowhere",))
    with pytest.raises(LoadingError, match=r"gone from .*nowhere: name one"):
        default_model()


def test_the_bundled_model_is_small_complete_and_in_bf16():
    """Guards against a checkpoint that lacks its tokenizer, is in fp32, or has the rests of a run in it."""
    files = {file.name: file for file in Path(default_model()).iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "exits.png"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} == set(files)
    assert sum(file.stat().st_size for file in files.values()) < 30e6
    with safe_open(files["model.safetensors"], "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    model, tokenizer = load_model_and_tokenizer(default_model())
    assert len(tokenizer) == model.config.vocab_size


def test_a_token_that_was_added_to_the_tokenizer_alone(folder):
    """As many a Llama 2 has it for padding: no matter, until a prompt has it."""
    model, tokenizer = load_model_and_tokenizer(str(folder))
    tokenizer.add_tokens(["<pad>"])
    generator = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("autoregressive"))
    generator.generate("a man", GenerationConfig(max_steps=2))
    with pytest.raises(ValueError, match="but the model knows only"):
        generator.generate("a<pad>", GenerationConfig(max_steps=2))


def with_a_hole(folder):
    """A weight of the last layer is not a number."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative", "adaptive"])
def test_logits_that_are_not_numbers(folder, strategy, sample):
    """argmax takes NaN for the largest, and a draw among NaN falls anywhere."""
    model, tokenizer = load_model_and_tokenizer(str(with_a_hole(folder)))
    layers = {"exit_layer": 2, "num_speculations": 2} if strategy == "self_speculative" else {}
    config = GenerationConfig(generation_strategy=strategy, sample=sample, max_steps=4, **layers)
    with pytest.raises(FloatingPointError, match=r"not numbers \(NaN\)"):
        HuggingfaceLlamaGenerator(tokenizer, model, make_strategy(strategy)).generate("a", config)


def test_the_scripts_say_so_in_a_line(folder, common, capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: benchmark.main([*common, "--model", str(with_a_hole(folder))]))
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: the model's logits are not numbers (NaN): its weights are damaged, or need "
                         "--dtype float32")  # fmt: skip


def test_numbers_that_end_in_the_middle():
    """NaN that comes from a token of the output is found at its end."""
    model = copy.deepcopy(tiny_llama(num_layers=3))
    tokens = generate(model, [5, 6, 7], eos=[], max_steps=12).predicted_tokens
    later = next(token for token in tokens[1:] if token not in (5, 6, 7, tokens[0]))
    model.get_input_embeddings().weight.data[later] = torch.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        generate(model, [5, 6, 7], eos=[], max_steps=12, exit_layer=1, num_speculations=2)


def test_code_of_a_repository_runs_when_asked_for_alone(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "import transformers\n"
        "class Model(transformers.LlamaForCausalLM): pass\n"
    )
    load_model_and_tokenizer(str(folder))  # by the class of transformers itself
    assert not (tmp_path / "ran").exists()
    load_model_and_tokenizer(str(folder), LoadingOptions(trust_remote_code=True))
    assert (tmp_path / "ran").exists()


def test_compiled_passes_on_a_cpu_are_refused(model_folder):
    """Guards against a minute of compiling for decoding that is slower than without."""
    with pytest.raises(LoadingError, match="compile True: needs a GPU; on a CPU decoding is faster without"):
        load_model_and_tokenizer(str(model_folder), LoadingOptions(device="cpu", compile=True))
