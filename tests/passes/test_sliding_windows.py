"""Layers that see the last positions only give the ids of transformers' `generate` far beyond the window."""

import inspect

import pytest
from conftest import ADAPTIVE, LAYERS, answer_of, ids_of, in_batch, transformers_generate
from test_llama_model_utils import family, pieces_match_the_whole
from transformers import CONFIG_MAPPING

from self_speculation import Request, make_strategy
from self_speculation.families import FAMILIES, attention_types
from self_speculation.passes.captured_runner import capture_decoding
from self_speculation.passes.fused_layers import fuse

WINDOW, MAX_STEPS = 7, 16
# Those of a family that has them: windows in every second layer, or in all.
SETTINGS = {
    "sliding_window": WINDOW, "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
WAYS = [{}, {**LAYERS, "prompt_lookup": 2}, ADAPTIVE]
PROMPTS = [[5 + 7 * i % 50 for i in range(length)] for length in (3, 40, WINDOW)]


def settings(model_type):
    known = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    return {name: value for name, value in SETTINGS.items() if name in known}


def has_windows(model_type):
    config = CONFIG_MAPPING[model_type](num_hidden_layers=4, **settings(model_type))
    return any(kind.window for kind in attention_types(config))


WINDOWED = [*filter(has_windows, FAMILIES)]


def windowed(model_type, attention="sdpa", **others):
    return family(model_type, attention, **settings(model_type), **others)


def gives_ids_of_transformers(model, ways=WAYS, batch_size=2, max_steps=MAX_STEPS):
    expected = [transformers_generate(model, prompt, max_steps, eos=-1) for prompt in PROMPTS]
    fuse(model)
    for how in ways:
        results = in_batch(model, map(Request, PROMPTS), batch_size, max_steps=max_steps, **how)
        assert [results[row].predicted_tokens for row in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_pieces(model_type, attention):
    """Guards against positions out of the window in chunks of prompts, drafts, verifications and training."""
    pieces_match_the_whole(windowed(model_type, attention))


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_ids(model_type, batch_size):
    """Guards against rows of other lengths, and against windows of the wrong layers."""
    gives_ids_of_transformers(windowed(model_type), batch_size=batch_size)


def test_captured_passes(graphs):
    """Guards against masks of one position in all replays, and of one window in all layers."""
    model = windowed("qwen2")
    capture_decoding(model)
    gives_ids_of_transformers(model, [LAYERS], max_steps=8)
    assert graphs.replayed


def test_settings_of_another_family():
    """Guards against a window, or experts, of a config whose family has none: a Llama that was converted
    from Mistral or Mixtral keeps their settings, and its own `forward` ignores them.
    """
    kept = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4, "num_experts_per_tok": 2}
    model = family("llama", **kept)
    pieces_match_the_whole(model)
    expected = transformers_generate(model, PROMPTS[1], eos=-1, use_cache=False)
    assert ids_of(model, PROMPTS[1], **ADAPTIVE) == expected


@pytest.mark.parametrize("captured", [False, True])
def test_another_window_discards_what_was_kept(captured, request):
    """Guards against kept prefixes and captured passes of a window that a user has changed since."""
    model, strategy = windowed("mistral"), make_strategy("autoregressive")
    if captured:
        request.getfixturevalue("graphs")
        capture_decoding(model)
    for window in (WINDOW, 20, 20):
        model.config.sliding_window = window
        answer = answer_of(strategy, model, Request(PROMPTS[1]), max_steps=6, reuse_cache=True)
        expected = transformers_generate(model, PROMPTS[1], 6, eos=-1)
        assert answer.predicted_tokens == expected
    assert answer.num_cached_tokens == len(PROMPTS[1]) - 1
