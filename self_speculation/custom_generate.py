"""Self-speculative decoding in `model.generate` of transformers.

    model.generate(**inputs, custom_generate=self_speculative_generate, exit_layer=8, num_speculations=6)

Text-generation pipelines take the same arguments. The generation config, logits processors, stopping criteria
and streamer of `generate` take effect. `assistant_early_exit` and `num_assistant_tokens` set exit layer and
draft length. An argument that would change the text raises an error that names it. Other arguments about
drafts, such as `assistant_model` and `prompt_lookup_num_tokens`, are ignored: they do not change the text.
"""

import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from self_speculation.backends.unsupported_hooks import check_followed
from self_speculation.config import GenerationConfig
from self_speculation.drafts.registry import draft_flags
from self_speculation.engine.generation_strategy import single_result
from self_speculation.engine.strategies import make_strategy
from self_speculation.requests.request import Request

# Outputs of `generate` that are not computed here.
_NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# Other decoding methods of `generate`.
_METHODS = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "assistant_ensemble_weight")

# Arguments of the model that are used here, or do not change the text.
_ACCEPTED = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", *_NOT_RETURNED}

# Rules of our sampler, which applies the last one of this list first, as transformers does.
_RULES = {
    transformers.MinPLogitsWarper: "min_p",
    transformers.TopPLogitsWarper: "top_p",
    transformers.TopKLogitsWarper: "top_k",
    transformers.TemperatureLogitsWarper: "temperature",
}

# Processors with a state, which rejected drafts would change.
_STATEFUL = {
    transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    transformers.SynthIDTextWatermarkLogitsProcessor: "watermarking_config (SynthID)",
}


def self_speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: transformers.GenerationConfig,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Called by `generate(..., custom_generate=self_speculative_generate)`.

    Args:
        input_ids: [1, P] one prompt, as in the drafts of `generate` itself; `generate_batch` of
            `HuggingfaceLlamaGenerator` takes several.
        logits_processor: called for drafted tokens, too; an error there is raised if the output gets there.
        stopping_criteria: `generate` does not pass `stop_strings` on: use `StopStringCriteria(tokenizer,
            strings)`.
        kwargs: exit_layer, num_speculations (by default `assistant_early_exit` and `num_assistant_tokens`)
            and the other options of drafts, see `GenerationConfig`. generation_strategy is "self_speculative"
            or "adaptive".

    Returns:
        As `generate`: [1, P + output] ids. Sampled ids have the same distribution, but other noise:
        `torch.manual_seed` gives one text, with any drafts. After `fuse(model)` a CPU computes them in
        float32, also from weights in 16 bits, `generate` in the model's dtype, so the ids may differ.

    Raises:
        ValueError: an argument that would change the text, by name; an exit layer that the model does not
            have; code around all layers of the model, see `check_followed`.

    Warns:
        UserWarning: the output ends at the model's context length, where `generate` goes on.
    """
    check_followed(model)
    if streamer is None:
        streamer = _generate_streamer()
    for is_given, refusal in _refusals(generation_config, logits_processor, input_ids, kwargs):
        if is_given:
            raise ValueError(f"self_speculative_generate: {refusal}")
    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    max_length = min(limits, default=generation_config.max_length)
    drafting = {name: kwargs[name] for name in draft_flags() if name in kwargs}
    early = generation_config.assistant_early_exit
    if early is not None and drafting.get("generation_strategy") != "adaptive":
        length = generation_config.num_assistant_tokens  # 20 by default
        drafting = {"exit_layer": early, "num_speculations": length, **drafting}
    eos_criteria = [criterion for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
    criteria = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    processors = [*logits_processor]
    rules = {"temperature": 1.0, "top_p": 1.0}  # those of the config are processors
    if generation_config.do_sample and not criteria:  # a criterion sees processed logits
        processors, found = _split_rules(processors)
        rules |= found
    config = GenerationConfig(
        max_steps=max(1, max_length - input_ids.shape[1]),  # criteria are checked after the first token
        sample=bool(generation_config.do_sample),
        **{"generation_strategy": "self_speculative", **drafting, **rules},
    )
    if streamer is not None and not hasattr(streamer, "delete"):
        # Streamers of transformers expect one token at a time, and end ids. A strategy streams an end id only
        # if a criterion ends the output.
        put = streamer.put
        streamer = SimpleNamespace(put=lambda ids: [put(id_) for id_ in ids.split(1)], end=streamer.end)
        criteria = [*eos_criteria, *criteria]
        eos_criteria = []
    end_ids = [id_ for criterion in eos_criteria for id_ in criterion.eos_token_id.tolist()]
    request = Request(input_ids[0].tolist(), processors, criteria, streamer, eos_token_ids=end_ids)
    strategy = make_strategy(config.generation_strategy)
    result = single_result(strategy.generate_batch(model, [request], config, batch_size=1))
    if result.stop_reason == "context":
        warnings.warn("the output ends with the model's context, before its max_length", stacklevel=2)
    end_id = [] if result.end_token_id is None else [result.end_token_id]
    sequences = torch.cat([input_ids, input_ids.new_tensor([[*result.predicted_tokens, *end_id]])], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


def _split_rules(
    processors: list[LogitsProcessor],
) -> tuple[list[LogitsProcessor], dict[str, Any]]:
    """The processors without the last ones that are rules of our sampler, and these rules by their names: as
    processors they sort the vocabulary for every token, drafted ones too.
    """
    left = [*processors]
    rules: dict[str, Any] = {}
    for kind, name in _RULES.items():
        if not left or type(left[-1]) is not kind:
            continue
        # Our rules keep one token at least, and forbid the tokens that they leave out.
        is_removed = getattr(left[-1], "filter_value", -math.inf) == -math.inf
        if is_removed and getattr(left[-1], "min_tokens_to_keep", 1) == 1:
            rules[name] = getattr(left.pop(), name)
    return left, rules


def _refusals(
    config: transformers.GenerationConfig,
    processors: Iterable[LogitsProcessor],
    input_ids: Tensor,
    kwargs: dict,
) -> Iterator[tuple[object, str]]:
    """For each argument that would change the text: whether it is given, and the message."""
    rows, length = input_ids.shape
    yield config.num_beams > 1, "num_beams: beam search has no drafts to verify"
    yield rows > 1, f"takes one prompt, not {rows}; HuggingfaceLlamaGenerator.generate_batch takes several"
    for name in _METHODS:
        yield getattr(config, name, None), f"{name}: is another decoding method"
    yield config.cache_implementation == "quantized", "cache_implementation quantized: would change the text"
    kinds = {type(processor) for processor in processors}
    for kind, name in _STATEFUL.items():
        yield kind in kinds, f"{name}: its logits processor keeps a state, which drafts would change"
    for name in _NOT_RETURNED:
        yield config.return_dict_in_generate and getattr(config, name), f"{name}: is not computed"
    yield kwargs.get("inputs_embeds") is not None, "inputs_embeds: prompts must be token ids"
    # transformers sets the attribute on a cache that the caller passed.
    yield getattr(kwargs.get("cache"), "_is_user_defined", False), "cache: is neither read nor filled"
    mask = kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    yield mask is not None and not mask.all(), "attention_mask: one prompt needs no padding"
    is_moved = positions is not None and positions.flatten().tolist() != [*range(length)]
    yield is_moved, "position_ids: must be those from 0"
    for name in kwargs.keys() - _ACCEPTED - {*draft_flags()}:
        yield kwargs[name] is not None, f"{name}: does not reach the model"


def _generate_streamer() -> BaseStreamer | None:
    """The `streamer` of the calling `generate`."""
    # transformers 5.24 passes a callable only keywords that `generate` has no parameter for, and it has one.
    caller = sys._getframe(2)
    is_generate = caller.f_globals.get("__name__") == transformers.GenerationMixin.__module__
    return caller.f_locals.get("streamer") if is_generate else None


def _signature() -> inspect.Signature:
    """The signature with all draft options: `generate` passes only arguments of the signature."""
    parameters = dict(inspect.signature(self_speculative_generate).parameters)
    rest = parameters.pop("kwargs")
    for name in draft_flags():
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return inspect.Signature([*parameters.values(), rest])


self_speculative_generate.__signature__ = _signature()  # type: ignore[attr-defined]
