"""Load the model that the flags name."""

import functools
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from typing import NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from arguments import GenerationConfig, ModelArguments, refuse
from runs.description import counted
from runs.failures import reason
from runs.program import enable_collector
from runs.status import log_if_slow, print_status
from self_speculation import HuggingfaceLlamaGenerator, LoadingError, load_model_and_tokenizer, make_strategy
from self_speculation.backends.copies import check_family, why_no_copies
from self_speculation.backends.runners import bytes_made, capture_where_possible
from self_speculation.config import LoadingWarning
from self_speculation.loading.loading import load_config, resolve_device
from self_speculation.machine.threads import ThreadGovernor, adjust_threads, govern_threads
from self_speculation.text.texts import Thinking
from self_speculation.weights.kernels import cpu_operators


def autoregressive(
    generator: HuggingfaceLlamaGenerator, config: GenerationConfig
) -> tuple[HuggingfaceLlamaGenerator, GenerationConfig]:
    """The baseline of comparisons: the same model and settings at full depth, one token per pass."""
    plain = replace(config, generation_strategy="autoregressive", exit_layer=-1)
    strategy = make_strategy("autoregressive")
    return HuggingfaceLlamaGenerator(generator.tokenizer, generator.model, strategy), plain


def encode_chat(
    generator: HuggingfaceLlamaGenerator,
    messages: Sequence[Mapping[str, object]],
    template_kwargs: Mapping[str, object],
) -> tuple[list[int], Thinking | None]:
    """The ids of a conversation, and how the next answer thinks. Raises ValueError if the template fails."""
    text = generator.render_chat(messages, template_kwargs)
    ids = generator.encode(text, special_tokens=False)  # the template adds them
    return ids, Thinking.of(generator.tokenizer, text)


def read_config(model_args: ModelArguments) -> PretrainedConfig:
    """Read the config of --model without weights; an error ends the program in one line with status 2."""
    try:
        return load_config(model_args.model_name, model_args.loading_options())
    except LoadingError as error:
        _refuse_to_load(model_args, error)


def load_generator(
    model_args: ModelArguments, config: GenerationConfig, chat: bool = False
) -> HuggingfaceLlamaGenerator:
    """Load --model and make the strategy of --generation_strategy.

    An error ends the program in one line, with status 1 if memory is short, else with status 2; with `chat`
    also a tokenizer without a chat template.
    """
    logging.set_verbosity_error()
    governor = set_threads(model_args.threads)  # before loading: it sees who else is there
    model_config = read_config(model_args)
    options = model_args.loading_options()
    try:
        config.check_depth(model_config.num_hidden_layers)
        check_family(config.draft_weights, model_config)
        with warnings.catch_warnings(record=True) as warned:
            if resolve_device(model_args.device).type == "cpu":
                with log_if_slow("building the operators of this processor, once"):
                    operators = cpu_operators()
                if operators.variant is None:
                    slow = "decoding is slower, weights take 4 bytes each"
                    print_status(f"warning: products by {operators}: {slow}")
            # transformers shows progress only at a terminal; errors are raised.
            with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
                model, tokenizer = load_model_and_tokenizer(
                    model_args.model_name, options, model_config, chat
                )
        for warning in warned:
            if issubclass(warning.category, LoadingWarning):
                print_status(f"warning: {warning.message}")
        if options.quantization != "none":
            print_status(f"quantization {options.quantization}: the text is that of the rounded model")
        if model_args.compile is None and model.device.type == "cuda":
            print_status(captured(model))
        strategy = make_strategy(config.generation_strategy)
        with log_if_slow("preparing the layers that draft"):
            strategy.prepare(model, config)
        if config.is_adaptive and config.draft_weights != "exact" and (few := why_no_copies(model)):
            print_status(f"--draft_weights {config.draft_weights}: not used, {few}")
        if copies := bytes_made(model):
            print_status(f"weights made for drafts take {copies / 2**30:.2f} GiB")
    except (LoadingError, ValueError) as error:
        _refuse_to_load(model_args, error)
    if model_args.threads is None and model.device.type == "cpu":
        govern_threads(model, governor)
        adjust_threads(model)
    enable_collector()
    return HuggingfaceLlamaGenerator(tokenizer, model, strategy)


def captured(model: PreTrainedModel) -> str:
    """Capture a model's passes where that is possible. Says what it costs, or why they are not."""
    if (why := capture_where_possible(model)) is not None:
        return f"decoding passes are not captured as CUDA graphs, since {why}"
    costs = "each takes tenths of a second and a few MB of the card when it first runs"
    return f"decoding passes are captured as CUDA graphs: {costs}; --compile False leaves it"


def set_threads(number: int | None) -> ThreadGovernor:
    """Set the number of --threads; None leaves it. The governor's number is at most this one."""
    if number is not None:
        torch.set_num_threads(number)
    governor = ThreadGovernor(on_fewer=tell_of_fewer_threads)
    if number is not None and number > (there := governor.num_processors):
        why = "more threads than processors wait for each other"
        print_status(f"warning: --threads {number}: there are {counted(there, 'processor')}, {why}")
    return governor


@functools.cache  # once for each governor
def tell_of_fewer_threads(governor: ThreadGovernor) -> None:
    """Print that other programs use processors, and how many threads are left; for a `ThreadGovernor`."""
    used = f"other programs use {governor.num_taken:.1f} of {governor.num_processors} processors"
    threads = f"{governor.num_threads} of {governor.most} threads"
    # An answer may be growing on the same terminal.
    print_status(f"\n{used}: {threads} compute while they do, which takes longer")


def _refuse_to_load(model_args: ModelArguments, error: Exception) -> NoReturn:
    if (why := reason(error)) is not None:
        refuse(f"--model {model_args.model_name}: {why}", status=1)
    given = f" (with --model_args {model_args.model_args!r})" if model_args.model_args else ""
    refuse(f"--{error}{given}")
