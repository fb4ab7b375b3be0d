"""Layers that see the last positions only. Ids are compared in test_self_speculation_generator.py."""

import pytest
from conftest import ADAPTIVE, LAYERS, answer_of, ids_of, in_batch, transformers_generate
from test_llama_model_utils import WINDOW, WINDOWED, family, pieces_match_the_whole, windowed

from self_speculation import Request, make_strategy, release
from self_speculation.passes.runners import capture_decoding, fuse

PROMPTS = [[5 + 7 * i % 50 for i in range(length)] for length in (3, 40, WINDOW)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_pieces(model_type, attention):
    """Guards against positions out of the window in chunks of prompts, drafts, verifications and training."""
    pieces_match_the_whole(windowed(model_type, attention))


def test_captured_passes(graphs):
    """Guards against masks of one position in all replays, and of one window in all layers."""
    model = windowed("qwen2", head_dim=64).float()
    fuse(model)
    capture_decoding(model)
    expected = [transformers_generate(model, prompt, 4, eos=-1) for prompt in PROMPTS]
    found = in_batch(model, map(Request, PROMPTS), 2, max_steps=4, **LAYERS)
    assert [found[row].predicted_tokens for row in range(len(PROMPTS))] == expected
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
    model, strategy = windowed("mistral", head_dim=64).float(), make_strategy("autoregressive")
    if captured:
        request.getfixturevalue("graphs")
        fuse(model)
        capture_decoding(model)
    for window in (WINDOW, 20, 20):
        if model.config.sliding_window != window:
            model.config.sliding_window = window
            release(model)
        answer = answer_of(strategy, model, Request(PROMPTS[1]), max_steps=6, reuse_cache=True)
        expected = transformers_generate(model, PROMPTS[1], 6, eos=-1)
        assert answer.predicted_tokens == expected
    assert answer.num_cached_tokens == len(PROMPTS[1]) - 1
