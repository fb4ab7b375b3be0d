"""Mixtures of experts: what passes cost, and what is refused by name."""

import pytest
from conftest import (
    COPY,
    PROMPT,
    generate,
)
from helpers import refused
from test_llama_model_utils import KINDS, OF_EXPERTS, family, mixture

import benchmark
from self_speculation.drafts.costs import draft_ratio
from self_speculation.loading import loading
from self_speculation.loading.sources import LoadingError
from self_speculation.passes.runners import capture_decoding


def test_drafts_of_a_mixture_read_some_of_its_experts():
    """Guards against drafts that seem to read all experts, and so nothing for the head."""
    model = mixture("mixtral", num_local_experts=8)
    layer, head = model.model.layers[0], model.lm_head.weight.nbytes
    experts = sum(weight.nbytes for weight in layer.mlp.experts.parameters())
    read = sum(weight.nbytes for weight in layer.parameters()) - 0.75 * experts
    assert draft_ratio(model, 1, "exact") == pytest.approx((read + head) / (4 * read + head))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_captured_passes_are_refused_by_name(kind):
    """Guards against copies that cost more than they save, and against a captured pass, which would replay
    the experts of the tokens that it was captured with.
    """
    model = mixture(kind)
    with pytest.raises(ValueError, match=f"draft_weights int4: there are no copies of a {kind} model"):
        generate(model, PROMPT, **COPY)
    with pytest.raises(ValueError, match=f"compile True: model type '{kind}' is not one of llama"):
        capture_decoding(model)


def test_copies_of_experts_are_refused_before_weights_are_loaded(common, tmp_path, monkeypatch, capsys):
    """Guards against minutes of loading before an error that the config alone shows."""
    family("olmoe", **OF_EXPERTS).config.save_pretrained(tmp_path / "model")  # there are no weights
    monkeypatch.setattr("runs.startup.load_model_and_tokenizer", lambda *_: pytest.fail("it was loaded"))
    flags = ["--generation_strategy", "adaptive", "--draft_weights", "int4", "--model"]
    line = refused(benchmark.main, [*common, *flags, str(tmp_path / "model")], capsys)
    assert "--draft_weights int4: there are no copies of a olmoe model" in line


def test_experts_of_a_gguf_file_are_refused_before_they_are_read(monkeypatch):
    """Guards against minutes of unpacking before an error about missing tensors."""
    monkeypatch.setattr(loading, "_header", lambda *_: object())
    monkeypatch.setattr(loading, "locate", lambda *_: ("", {}))
    monkeypatch.setattr(loading, "config_of", lambda *_: family("qwen3_moe").config)
    with pytest.raises(
        LoadingError, match=r"\.gguf': experts of a qwen3_moe model are read from safetensors"
    ):
        loading.load_config("some.gguf")
