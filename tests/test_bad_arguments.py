"""The library refuses wrong kinds of arguments in one line that says what is allowed."""

from dataclasses import replace

import pytest
import torch
from conftest import own_llama, tiny_llama
from helpers import error_line
from transformers import GPT2Config, GPT2LMHeadModel

from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    LoadingError,
    LoadingOptions,
    Request,
    fuse,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.llama_model_utils import forward_early
from self_speculation.loading.loading import load_config

CONFIG = GenerationConfig(max_steps=4)


def generator(tokenizer):
    return HuggingfaceLlamaGenerator(tokenizer, tiny_llama(vocab_size=len(tokenizer)))


def strategy(ids=(5, 9, 4), config=CONFIG):
    return make_strategy("autoregressive").generate_token_ids(tiny_llama(), ids, [2], config)


def speculate(exit_layer, num_speculations=2, name="self_speculative", **settings):
    """The strategy object overrides the name in the config."""
    config = GenerationConfig(exit_layer=exit_layer, num_speculations=num_speculations, **settings)
    return lambda _: make_strategy(name).generate_token_ids(tiny_llama(), [5], [], config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))


REFUSALS = {
    "sample 'False': must be True or False": lambda _: GenerationConfig(sample="False"),
    "sample 1: must be True or False": lambda _: GenerationConfig(sample=1),
    "max_steps '10': must be an integer": lambda _: GenerationConfig(max_steps="10"),
    "max_steps True: must be an integer": lambda _: GenerationConfig(max_steps=True),
    "max_steps 2.0: must be an integer": lambda _: GenerationConfig(max_steps=2.0),
    "temperature '0.5': must be a number": lambda _: GenerationConfig(temperature="0.5"),
    "top_p None: must be a number": lambda _: GenerationConfig(top_p=None),
    "no_repeat_ngram_size '2': must be an integer": lambda _: GenerationConfig(no_repeat_ngram_size="2"),
    "stop_words 'return': must be a list of texts": lambda _: GenerationConfig(stop_words="return"),
    "stop_words [5]: must be a list of texts": lambda _: GenerationConfig(stop_words=[5]),
    "stop_token_ids 2: must be a list of integers": lambda _: GenerationConfig(stop_token_ids=2),
    "stop_token_ids ['2']: must be a list of": lambda _: GenerationConfig(stop_token_ids=["2"]),
    "draft_weights 4: must be one of exact, int4": lambda _: GenerationConfig(draft_weights=4),
    "generation_strategy ['adaptive']: must be one of autoregressive, self_speculative, adaptive": lambda _: (
        GenerationConfig(generation_strategy=["adaptive"])
    ),
    "dtype 'fp16': must be one of auto, half, float32, bfloat16": lambda _: LoadingOptions(dtype="fp16"),
    "model_args 'a=b': must be a dictionary": lambda _: LoadingOptions(model_args="a=b"),
    "seed None: must be an integer": lambda _: LoadingOptions(seed=None),
    "fuse 'no': must be True or False": lambda _: LoadingOptions(fuse="no"),
    "max_step: GenerationConfig has no such field; did you mean max_steps?": lambda _: (
        GenerationConfig(max_step=3)
    ),
    "top_z: GenerationConfig has no such field; did you mean top_p?": lambda _: replace(CONFIG, top_z=3),
    "colour: LoadingOptions has no such field: it has model_args, ": lambda _: LoadingOptions(colour=3),
    "model None: must be a hub id, a folder or a .gguf file": lambda _: load_model_and_tokenizer(None),
    "model 3: must be a hub id, a folder or a .gguf file": lambda _: load_config(3),
    "streamer: must have put(ids) and end(), not int": lambda tokenizer: (
        generator(tokenizer).generate("def", CONFIG, streamer=3)
    ),
    "logits_processors: must be a function or a list of them, not int": lambda _: Request([5], 3),
    "options: must be a LoadingOptions, not dict": lambda _: load_model_and_tokenizer("x", {"dtype": "half"}),
    "config: must be a GenerationConfig, not dict": lambda _: Request([5], config={"max_steps": 3}),
    "tokenizer: must be a PreTrainedTokenizerBase, not LlamaForCausalLM": lambda tokenizer: (
        HuggingfaceLlamaGenerator(tiny_llama(), tokenizer)
    ),
    "generation_strategy: must be a GenerationStrategy of make_strategy(name), not str": lambda tokenizer: (
        HuggingfaceLlamaGenerator(tokenizer, tiny_llama(), "adaptive")
    ),
    "generation_config: must be a GenerationConfig, not dict": lambda tokenizer: (
        generator(tokenizer).generate("def", {"max_steps": 4})
    ),
    "the prompt must be a text or a list of token ids; generate_batch takes": lambda tokenizer: (
        generator(tokenizer).generate(b"def", CONFIG)
    ),
    "prompts: must be a list of prompts; generate takes a single one": lambda tokenizer: (
        list(generator(tokenizer).generate_batch("def", CONFIG))
    ),
    "prompts: must be a list of prompts;": lambda tokenizer: (
        list(generator(tokenizer).generate_batch(None, CONFIG))
    ),
    "batch_size: must be a int, not str": lambda tokenizer: (
        list(generator(tokenizer).generate_batch(["def"], CONFIG, "2"))
    ),
    "batch_size 0: must be at least 1": lambda tokenizer: (
        list(generator(tokenizer).generate_batch(["def"], CONFIG, 0))
    ),
    "the prompt must be a list of token ids, since a strategy has no tokenizer": lambda _: strategy("def"),
    "generation_config: must be a GenerationConfig, not NoneType": lambda _: strategy(config=None),
    "model: must be one of transformers, not a Linear": lambda _: fuse(torch.nn.Linear(2, 2)),
    "model type 'gpt2' is not supported; supported are llama, mistral": lambda _: fuse(gpt2()),
    "runner: must be a ModelRunner, as docs/moving.md shows, not LlamaForCausalLM": lambda _: (
        forward_early(own_llama(), torch.tensor([[5]]), None, 2, None)
    ),
    "exit_layer 4: must be between 1 and 3, the model has 4 layers; with draft_weights int4": speculate(4),
    "exit_layer 5: must be between 1 and 4": speculate(5, draft_weights="int4"),
    "exit_layer 4: must be between 1 and 3, the model has 4 layers; -1 is full depth": (
        speculate(4, -1, "autoregressive")
    ),
    "exit_layer: self_speculative needs one between 1 and the last but one layer": speculate(-1),
    "num_speculations: self_speculative needs at least 1": speculate(2, -1),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSALS)
def test_what_is_refused(line, byte_tokenizer):
    """Guards against arguments that mean something else, and against errors that name insides."""
    assert error_line((ValueError, TypeError, LoadingError), REFUSALS[line], byte_tokenizer).startswith(line)


def test_what_is_taken(byte_tokenizer):
    """Guards against refusals of what programs pass: tuples, numbers of numpy, whole numbers for any."""
    numpy = pytest.importorskip("numpy")
    config = GenerationConfig(
        max_steps=numpy.int64(4),
        temperature=1,
        top_p=numpy.float32(0.5),
        stop_words=("x",),
        stop_token_ids=[3],
    )
    assert len(strategy(torch.tensor([5, 9]), config).predicted_tokens) <= 4
    assert generator(byte_tokenizer).generate([5, 9], config).num_tokens_generated <= 4
    assert list(generator(byte_tokenizer).generate_batch([], config)) == []


def test_the_strategy_is_the_config_s(byte_tokenizer):
    """Guards against plain decoding where the config asks for drafts."""
    config = GenerationConfig(
        max_steps=30, generation_strategy="self_speculative", exit_layer=2, num_speculations=3, sample=False
    )
    result = generator(byte_tokenizer).generate("def add", config).generation_strategy_result
    assert result.acceptance_rate is not None


def test_help_explains_the_fields():
    """Guards against a list of names."""
    assert (
        "\n        sample: Sample tokens; False: greedy, always the most likely token.\n"
        in GenerationConfig.__doc__
    )
    assert "        seed: Seed of all random generators." in LoadingOptions.__doc__
