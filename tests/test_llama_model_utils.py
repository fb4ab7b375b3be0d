"""Passes over ranges of layers give the logits of transformers, for every supported family."""

import inspect
from unittest.mock import patch

import pytest
import torch
from conftest import ADAPTIVE, assert_close, generate, ids_of, tiny_llama, transformers_generate
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from self_speculation.backends.card_runner import FusedLayer, FusedRunner
from self_speculation.backends.full_forward import hidden_after_each_layer
from self_speculation.backends.runner import PREFILL_CHUNK, ModelRunner
from self_speculation.backends.runners import fuse
from self_speculation.llama_model_utils import (
    crop_past_key_values,
    forward,
    forward_early,
    forward_remainder,
)
from self_speculation.models.families import (
    FAMILIES,
    LLAMA_LAYOUT,
    attention_types,
    context_length,
    experts_per_token,
)

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


OF_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def is_dense(model_type):
    return experts_per_token(CONFIG_MAPPING[model_type]()) is None


def family(model_type, attention="sdpa", **config):
    torch.manual_seed(0)
    experts = {} if is_dense(model_type) else OF_EXPERTS
    settings = CONFIG_MAPPING[model_type](**{**SHAPE, **experts, **config})
    model = AutoModelForCausalLM.from_config(
        settings, dtype=torch.float64, attn_implementation=attention
    ).eval()
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    if experts:
        model.set_experts_implementation("eager")  # the default has no kernel in float64
    return model


KINDS = [kind for kind in FAMILIES if not is_dense(kind)]


def mixture(kind, **config):
    """With the kernel that transformers picks."""
    model = family(kind, **config).float()
    model.set_experts_implementation("grouped_mm")
    return model


WINDOW = 7
# Those of a family that has them: windows in every second layer, or in all.
SETTINGS = {
    "sliding_window": WINDOW, "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def window_settings(model_type):
    known = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    return {name: value for name, value in SETTINGS.items() if name in known}


def has_windows(model_type):
    config = CONFIG_MAPPING[model_type](num_hidden_layers=4, **window_settings(model_type))
    return any(kind.window for kind in attention_types(config))


WINDOWED = [*filter(has_windows, FAMILIES)]


def windowed(model_type, attention="sdpa", **settings):
    return family(model_type, attention, **window_settings(model_type), **settings)


def pieces_match_the_whole(model):
    """Prompt in chunks, draft, verification and rollback give the logits of one pass of transformers; by
    transformers' layers and by fused ones.
    """
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 12))
    with torch.inference_mode():
        expected = model(ids).logits
    compare_pieces(ModelRunner(model), ids, expected)
    can_fuse = model.config.model_type in LLAMA_LAYOUT and model.config._attn_implementation == "sdpa"
    fuse(model)
    runner = FusedRunner(model)
    assert all(isinstance(layer, FusedLayer) == can_fuse for layer in runner.layers)
    compare_pieces(runner, ids, expected)


def compare_pieces(runner, ids, expected):
    model = runner.model
    with torch.inference_mode():
        again_by_transformers = model(ids).logits
        whole = forward(runner, runner.new_cache(12, 12), ids, 12).logits
        cache = runner.new_cache(prompt_length=6, num_positions=12)
        prompt = torch.cat(
            [forward(runner, cache, part, 3).logits for part in ids[:, :6].split(3, 1)], 1
        )  # chunks
        hidden = [forward_early(runner, cache, ids[:, i : i + 1], 2).hidden for i in range(6, 9)]
        last = forward_early(runner, cache, ids[:, 9:10], 2, num_logits=0)
        assert last.logits.numel() == 0
        states = torch.cat([*hidden, last.hidden], 1)
        before = states.clone()
        verified = forward_remainder(runner, cache, states, 2).logits
        assert torch.equal(states, before)
        cache.rollback(2)
        again = forward(runner, cache, ids[:, 8:12], num_logits=4).logits
        *_, trained_on = hidden_after_each_layer(model, ids)
        trained_on = model.lm_head(model.model.norm(trained_on))
    for logits, positions in (
        (again_by_transformers, slice(None)),
        (whole, slice(None)),
        (torch.cat([prompt, verified], 1), slice(10)),
        (again, slice(8, None)),
        (trained_on, slice(None)),
    ):
        # Norms and eager attention of transformers are in fp32 whatever the model is in.
        assert_close(logits, expected[:, positions], computed_in=torch.float32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type):
    """Guards against support for a family that scales embeddings, caps logits or has other arguments."""
    pieces_match_the_whole(family(model_type))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_family_with_windows(model_type, attention):
    """Guards against positions out of the window in prompts and their chunks, drafts, verifications and
    training.
    """
    pieces_match_the_whole(windowed(model_type, attention))


def test_settings_of_another_family():
    """Guards against a window, or experts, of a config whose family has none: a Llama that was converted
    from Mistral or Mixtral keeps the settings of windows, and the new `forward` ignores them.
    """
    kept = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4, "num_experts_per_tok": 2}
    model = family("llama", **kept)
    prompt = [5 + 7 * i % 50 for i in range(40)]
    pieces_match_the_whole(model)
    expected = transformers_generate(model, prompt, eos=-1, use_cache=False)
    assert ids_of(model, prompt, **ADAPTIVE) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"attention": "eager", "num_key_value_heads": 1},
        {"attention": "eager"},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 0.5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda config: config.get("rope_type", "-".join(config)),
)  # fmt: skip
def test_heads_biases_norms_and_scaled_rotary_embeddings(config):
    """Guards against keys of another group of heads, an untied head, biases or an epsilon that are left out,
    and a table of rotations that differs from those of each pass.
    """
    if "rope_type" in config:
        config = {"rope_parameters": {"rope_theta": 10000.0, **config}}
    model = family("llama", **config)
    tied = config.get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    pieces_match_the_whole(model)


def test_longrope_ends_at_its_original_context():
    """Guards against outputs beyond it, where other factors would apply to cached positions, too."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    model = family(
        "llama", rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, **factors}
    )
    assert context_length(model.config) == 32
    pieces_match_the_whole(model)
    with pytest.raises(ValueError, match="context of 32 tokens"):
        generate(model, [5] * 32)


def test_rotary_tables_without_memory_are_made_by_the_next_pass():
    """Guards against a server whose every prompt fails after one for whose tables there was no memory."""
    runner = ModelRunner(family("llama"))
    ids = torch.arange(40)[None]
    expected = forward(ModelRunner(runner.model), runner.new_cache(40, 40), ids).logits
    rotary = runner.model.model.rotary_emb
    with patch.object(rotary, "forward", side_effect=MemoryError), pytest.raises(MemoryError):
        forward(runner, runner.new_cache(40, 40), ids)
    assert torch.equal(forward(runner, runner.new_cache(40, 40), ids).logits, expected)


def test_no_layer_sees_a_token_twice_at_the_same_position():
    """Guards against a verification that runs the draft's layers again, a prompt that is read twice, a pass
    as long as the prompt, and logits of all of it.
    """
    model = tiny_llama(agreement="always", max_position_embeddings=3 * PREFILL_CHUNK)
    modules = [*model.model.layers, model.lm_head]
    widths = {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, n=n: widths.setdefault(n, []).append(output.shape[1])
        )
        for n, module in enumerate(modules)
    ]
    prompt = [5] * (2 * PREFILL_CHUNK + 3)
    result = generate(model, prompt, max_steps=13, eos=[], exit_layer=2, num_speculations=3)
    for hook in hooks:
        hook.remove()
    assert result.acceptance_rate == 1
    assert [sum(widths[n]) for n in range(4)] == [len(prompt) + 12] * 4  # every token but the last
    assert widths[0][:3] == [PREFILL_CHUNK, PREFILL_CHUNK, 3]
    assert max(widths[4]) == 4  # of the head


def test_other_architectures_and_attention_are_refused_by_name():
    """Guards against wrong tokens of a model that only looks like a Llama, or that ignores our masks."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"model type 'gpt2' is not supported; supported are llama, mistral"):
        generate(model, [1, 2])
    model = family("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' is not supported; supported are sdpa, eager"):
        generate(model, [1, 2])
    model = family("gemma3_text", final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"final_logit_softcapping 30\.0 of a gemma3_text model"):
        generate(model, [1, 2])


@pytest.mark.parametrize("length", [3, 6, 9])
def test_caches_of_this_library_and_tuples_are_cropped_too(length):
    """Guards against scripts for the paper's code that roll back by this function and fail."""
    runner = ModelRunner(tiny_llama())
    ids = torch.tensor([[5, 9, 4, 7, 7, 3]])
    kept = min(length, 6)
    with torch.inference_mode():
        cache = runner.new_cache(prompt_length=6, num_positions=12)
        forward(runner, cache, ids)
        assert crop_past_key_values(cache, length) is cache
        assert cache.lengths() == [kept]
        following = forward(runner, cache, ids[:, :1]).logits
        again = torch.cat([ids[:, :kept], ids[:, :1]], 1)
        assert_close(following, forward(runner, runner.new_cache(12, 12), again).logits)
    pairs = [(torch.rand(1, 2, 6, 8), torch.rand(1, 2, 6, 8)) for _ in range(2)]
    for cropped, whole in zip(crop_past_key_values(pairs, length), pairs, strict=True):
        assert all(torch.equal(part, of[:, :, :kept]) for part, of in zip(cropped, whole, strict=True))


@pytest.mark.parametrize("length", [3, 6, 9])
def test_a_cache_of_transformers_is_cropped_to_a_length(length):
    """Guards against transformers' `crop`, whose argument is the number to remove."""
    model = tiny_llama()
    cache = DynamicCache()
    ids = torch.tensor([[5, 9, 4, 7, 7, 3]])
    with torch.inference_mode():
        model(ids, cache=cache)
        assert crop_past_key_values(cache, length) is cache
        kept = min(length, 6)
        assert cache.get_seq_length() == kept
        following = model(ids[:, :1], cache=cache).logits
        assert_close(following, model(torch.cat([ids[:, :kept], ids[:, :1]], 1)).logits[:, -1:])
