"""Other software that reads .gguf files, and is not installed here."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks.peers import PEERS, find_peer
from self_speculation import GenerationConfig


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_cannot_run_is_refused(name, monkeypatch, capsys):
    """Guards against a traceback, or minutes of measuring before it."""
    for module, model, why in (
        (None, "x.gguf", "needs the package"),
        (Mock(), "x", "reads .gguf files alone"),
    ):
        monkeypatch.setitem(sys.modules, PEERS[name].module, module)
        with pytest.raises(SystemExit):
            find_peer(name, Path(model))
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--peers {name}: {why}" in line


def test_openvino_gets_the_same_work(monkeypatch):
    """Guards against a peer with other threads, limits or ends, or one that keeps what it read before."""
    library, asked = Mock(), []

    def generate(ids, _):
        asked.append(ids)
        metrics = Mock(get_ttft=lambda: SimpleNamespace(mean=500.0))
        return SimpleNamespace(tokens=[[7, 8, 2]], perf_metrics=metrics)

    library.LLMPipeline.return_value.generate = generate
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array.tolist()))
    config = GenerationConfig(max_steps=9, num_speculations=4, sample=False)
    sides = PEERS["openvino"].sides(library, Path("x.gguf"), [2], config, Path())
    assert [*sides] == ["openvino", "openvino, lookup"]
    for side in sides.values():
        answers = side([[5, 9], [4]])
        assert (answers.ids, answers.prefill_time, answers.num_first) == ([[7, 8, 2]] * 2, 1.0, 2)
    assert asked == [[[5, 9]], [[4]]] * 2
    plain, lookup = library.LLMPipeline.call_args_list
    assert plain.args == lookup.args == ("x.gguf", "CPU")
    assert plain.kwargs["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert lookup.kwargs == plain.kwargs | {"prompt_lookup": True}
    assert library.SchedulerConfig().enable_prefix_caching is False
    settings = library.GenerationConfig()
    assert (settings.max_new_tokens, settings.do_sample, settings.stop_token_ids) == (9, False, {2})
    assert settings.num_assistant_tokens == 4
