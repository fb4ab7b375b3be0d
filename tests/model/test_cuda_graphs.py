"""Compiled passes as CUDA graphs would run them, without a GPU and without a compiler.

A graph copies those of its inputs that may move, and writes its outputs to the same place each time it runs.
"""

import copy
from functools import partial

import pytest
import torch
from conftest import generate, tiny_llama
from test_llama_model_utils import family
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import reinplace
from transformers import RepetitionPenaltyLogitsProcessor

from self_speculation.model.compiled_runner import compile_decoding, make_runner
from self_speculation.model.fused_layers import fuse
from self_speculation.model.model_runner import PREFILL_CHUNK

PROMPT = [5, 9, 4, 7, 7, 3]


class Graphs:
    """In the place of `torch.compile`: what a pass has returned is lost when the next one runs."""

    def __init__(self):
        self.compiled = 0
        self.passes = set()  # (pass, rows and width) of those that ran
        self.static_bytes, self.copied_bytes = [], []  # by compilation
        self._compile, self._outputs = torch.compile, ()

    def __call__(self, run, **_):
        compiled = self._compile(run, fullgraph=True, dynamic=False, backend=self._backend)

        def replay(*inputs):
            self.passes.add((run, inputs[0].shape[:2]))
            inputs = [tensor.clone() for tensor in inputs]
            for lost in self._outputs:
                lost.fill_(torch.nan)
            self._outputs = compiled(*inputs)
            return self._outputs

        return replay

    def _backend(self, graph, inputs):
        self.compiled += 1
        moving = fixed = 0
        for node, tensor in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            known = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            fixed += tensor.nbytes if known else 0
            moving += 0 if known else tensor.nbytes
        self.static_bytes.append(fixed)
        self.copied_bytes.append(moving)
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("torch.compile", made := Graphs())
    return made


def lean_copy(num_layers=2, **config):
    model = copy.deepcopy(tiny_llama(num_layers, **config))
    fuse(model)
    return model


GREEDY = {
    "autoregressive": {},
    "early exit": {"exit_layer": 1},
    "self-speculative": {"exit_layer": 1, "num_speculations": 6},
    "lookups": {"exit_layer": 1, "num_speculations": 6, "prompt_lookup": 2},
    "confidence": {"exit_layer": 1, "num_speculations": 6, "draft_confidence": "0.2"},
    "processors": {
        "exit_layer": 1, "num_speculations": 6, "logits_processors": [RepetitionPenaltyLogitsProcessor(1.3)],
    },
    "adaptive": {"strategy": "adaptive"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_are_not_needed_once_they_are_overwritten(graphs, fused):
    """Guards against logits or hidden states that are looked at after the next pass, and against padding that
    is attended to: the ids would be others.
    """
    model = lean_copy() if fused else copy.deepcopy(tiny_llama(num_layers=2))
    settings = [{**extra, "max_steps": 40, "eos": []} for extra in GREEDY.values()]
    sampled = [
        {**s, "sample": True, "temperature": 0.7, "top_p": 0.9} for s in settings[:-1]
    ]  # adaptive: by time

    def answers():
        torch.manual_seed(0)
        return [generate(model, PROMPT, **s).predicted_tokens for s in (*settings, *sampled)]

    expected = answers()
    compile_decoding(model)
    assert answers() == expected
    assert graphs.compiled >= 9


def test_weights_are_not_copied(graphs):
    """Guards against weights that a graph copies before each replay, all of them for every token."""
    model = lean_copy(hidden_size=64, intermediate_size=256)
    compile_decoding(model)
    generate(model, PROMPT, max_steps=8, eos=[])
    generate(model, PROMPT, exit_layer=1, num_speculations=3, max_steps=12, eos=[])
    weights = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert len(graphs.static_bytes) > 2
    for static, copied in zip(graphs.static_bytes, graphs.copied_bytes, strict=True):
        assert static > weights
        assert copied < 0.01 * static


def test_one_compilation_for_each_shape(graphs):
    """Guards against a pass that is compiled anew for another prompt, or after a longer one."""
    model = lean_copy(num_layers=3, max_position_embeddings=4096)
    compile_decoding(model)
    for length in (10, 3000, 11, 700, PREFILL_CHUNK + 1, 3000):
        for exit_layer, k in ((1, 3), (2, 3), (2, 6)):
            prompt = [5 + i % 40 for i in range(length)]
            generate(model, prompt, exit_layer=exit_layer, num_speculations=k, max_steps=9, eos=[])
        if length == 3000:
            passes = len(graphs.passes)
    assert graphs.compiled == len(graphs.passes) == passes
    # of 10 and of 3,000 tokens: two draft passes with logits and two without, and verifications
    assert passes <= 2 * (4 + 2 * 4)


@pytest.mark.usefixtures("graphs")
def test_the_larger_cache_is_kept():
    """Guards against short prompts and long ones in turn that compile everything each time."""
    model = lean_copy(max_position_embeddings=8192)
    compile_decoding(model)
    places = [make_runner(model, n, n + 10).cache.capacity for n in (10, 1500, 10, 3000, 1500)]
    assert places == [1024, 2048, 2048, 4096, 4096]


@pytest.mark.usefixtures("graphs")
def test_the_end_of_the_context():
    """Guards against padding beyond the end of the cache."""
    model = lean_copy(max_position_embeddings=64)
    shared = {"exit_layer": 1, "num_speculations": 8, "max_steps": 100, "eos": []}
    expected = generate(model, PROMPT, **shared)
    compile_decoding(model)
    result = generate(model, PROMPT, **shared)
    assert result.predicted_tokens == expected.predicted_tokens
    assert len(result.predicted_tokens) == 64 - len(PROMPT)


@pytest.mark.parametrize(
    "model_type",
    ["glm4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm", "stablelm", "phi3"))],
)
def test_rotary_embeddings_of_a_part_of_a_head(graphs, model_type):
    """Guards against a cache as narrow as the part that is rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = family(model_type, rope_parameters=rope, num_hidden_layers=2).float()
    shared = {"max_steps": 8, "eos": [], "exit_layer": 1, "num_speculations": 3}
    expected = generate(model, PROMPT, **shared).predicted_tokens
    compile_decoding(model)
    assert make_runner(model, 1, 10).rotary.shape[2] == 4
    assert generate(model, PROMPT, **shared).predicted_tokens == expected
    assert graphs.compiled > 2


def test_a_static_cache_is_written_in_place(monkeypatch):
    """Guards against a cache that each pass copies as a whole, as Inductor has it, before torch 2.13, where a
    view of it is written to.
    """
    written = []

    def compiler(graph, _):
        reinplace.reinplace_inplaceable_ops_core(graph.graph)
        written.append([node.target for node in graph.graph.nodes])
        graph.recompile()
        return make_boxed_func(graph.forward)

    # What torch 2.13 has learnt.
    monkeypatch.setattr(reinplace, "_is_layout_preserving_view_copy_back", lambda *_: False, raising=False)
    backend = aot_autograd(
        fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )  # fmt: skip
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    model = lean_copy()
    expected = generate(model, PROMPT, max_steps=4, eos=[]).predicted_tokens
    compile_decoding(model)
    assert generate(model, PROMPT, max_steps=4, eos=[]).predicted_tokens == expected
    [targets] = written
    assert targets.count(torch.ops.aten.index_put_.default) == 4  # keys and values of two layers
    assert torch.ops.aten.copy_.default not in targets
