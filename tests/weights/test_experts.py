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
from self_speculation.drafts.costs import draft_ratio, relative_pass_cost
from self_speculation.loading import loading
from self_speculation.loading.sources import LoadingError
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.passes.runners import capture_decoding
from self_speculation.weights.experts import bytes_read, distinct_experts


def test_estimated_costs_know_which_experts_a_pass_reads():
    """Guards against a verification that seems as cheap as that of a dense model, against drafts that seem to
    read all experts, and against the same number for any mixture.
    """
    model = mixture("mixtral", num_local_experts=8)
    experts = model.model.layers[0].mlp.experts
    all_read, expert_bytes = bytes_read([model.model.layers[0]], model.config)
    assert expert_bytes == sum(weight.nbytes for weight in experts.parameters()) / 4
    rest = sum(weight.nbytes for weight in model.model.layers[0].parameters()) - 4 * expert_bytes
    assert all_read == expert_bytes + rest
    assert distinct_experts(2, 8, 1) == pytest.approx(2)
    assert distinct_experts(2, 8, 1000) == pytest.approx(8)

    cost, dense = (relative_pass_cost(ModelRunner(each)) for each in (model, family("llama").float()))
    of_all = 4 * expert_bytes / (4 * all_read + model.lm_head.weight.nbytes)
    assert cost(1) == 1.0
    assert cost(2) == pytest.approx(of_all * 1.75 * dense(2 / 1.75) + (1 - of_all) * dense(2), abs=0.03)
    assert dense(4) < cost(4)
    assert all(cost(n) < cost(n + 1) < cost(n) + 1.5 for n in range(1, 40))
    head = model.lm_head.weight.nbytes / all_read
    assert draft_ratio(model, 1, "exact") == pytest.approx((1 + head) / (4 + head))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_captured_passes_are_refused_by_name(kind):
    """Guards against copies that cost more than they save, and against a captured pass, which would replay
    the experts of the tokens that it was captured with.
    """
    model = mixture(kind)
    with pytest.raises(ValueError, match=f"draft_weights int4: there are no copies of a {kind} model"):
        generate(model, PROMPT, **COPY)
    with pytest.raises(ValueError, match=rf"compile True: not with a mixture of experts \({kind}\)"):
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
