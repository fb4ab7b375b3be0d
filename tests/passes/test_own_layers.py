"""Layers of this library compute what the model's own compute, over the same memory, and always the model's
current weights. test_llama_model_utils.py compares every family with transformers.
"""

import copy
import gc
import weakref
from functools import partial

import torch
from conftest import (
    ADAPTIVE,
    LAYERS,
    PROMPT,
    ids_of,
    tiny_llama,
    transformers_generate,
)
from test_runners import replaced_data, written
from transformers import AutoModelForCausalLM

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.passes.fused_layers import FusedLayer, FusedRunner
from self_speculation.passes.runners import fuse


def test_each_request_of_a_batch_uses_current_weights(model):
    """Guards against a scheduler that keeps its first weights after its batch was empty."""
    fuse(model)
    strategy, config = make_strategy("autoregressive"), GenerationConfig(sample=False, max_steps=12)
    answers = strategy.generate_batch(model, [Request(PROMPT)] * 2, config, batch_size=1)
    for change in (written, replaced_data):
        assert next(answers)[1].predicted_tokens == transformers_generate(model, PROMPT, 12, -1)
        change(model)


def test_unused_parts_are_freed(model):
    """Guards against caches that keep a model, or a layer that was removed from it, in memory for ever, also
    if a hook has the model.
    """
    fuse(model)
    ids_of(model, max_steps=3)
    pruned = weakref.ref(model.model.layers[3])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    ids_of(model, max_steps=6, **ADAPTIVE, draft_weights="int4")
    gc.collect()
    assert pruned() is None

    own = copy.deepcopy(model)
    fuse(own)
    own.model.layers[0].register_forward_hook(partial(lambda model, *_: None, own))
    fuse(own)
    ids_of(own, max_steps=6, **LAYERS)
    whole = weakref.ref(own)
    del own
    gc.collect()
    assert whole() is None


def test_inference_mode_and_autocast(model):
    """Guards against parameters that cannot be set because they were made in inference mode, and against
    products in the format of the caller's autocast.
    """
    with torch.inference_mode():
        made = type(model)(model.config).eval()
        made.load_state_dict(model.state_dict())
    plain = ids_of(model, max_steps=12)
    for each in (made, model):
        fuse(each)
        assert isinstance(FusedRunner(each).layers[0], FusedLayer)
        with torch.autocast("cpu", torch.bfloat16):
            for drafts in ({}, LAYERS, ADAPTIVE):
                assert ids_of(each, max_steps=12, **drafts) == plain


def test_all_weights_are_saved(model, tmp_path):
    """Guards against projections that share a storage: code that saves a model keeps only one of those."""
    fuse(model)
    FusedRunner(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in tiny_llama().state_dict().items())
