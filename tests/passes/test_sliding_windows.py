"""Layers that see the last positions only. Ids are compared in test_self_speculation_generator.py."""

import pytest
from conftest import ADAPTIVE, ids_of, transformers_generate
from test_llama_model_utils import WINDOW, WINDOWED, family, pieces_match_the_whole, windowed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_pieces(model_type, attention):
    """Guards against positions out of the window in chunks of prompts, drafts, verifications and training."""
    pieces_match_the_whole(windowed(model_type, attention))


def test_settings_of_another_family():
    """Guards against a window, or experts, of a config whose family has none: a Llama that was converted
    from Mistral or Mixtral keeps their settings, and its own `forward` ignores them.
    """
    kept = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4, "num_experts_per_tok": 2}
    model = family("llama", **kept)
    pieces_match_the_whole(model)
    prompt = [5 + 7 * i % 50 for i in range(40)]
    expected = transformers_generate(model, prompt, eos=-1, use_cache=False)
    assert ids_of(model, prompt, **ADAPTIVE) == expected
