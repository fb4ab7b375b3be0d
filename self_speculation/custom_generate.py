"""Self-speculative decoding in `model.generate` of transformers.

    model.generate(**inputs, custom_generate=self_speculative_generate, exit_layer=8, num_speculations=6)

Text-generation pipelines take the same arguments. The generation config, logits processors, stopping criteria
and streamer of `generate` take effect. `assistant_early_exit` and `num_assistant_tokens` set exit layer and
draft length. An argument that would change the text raises an error that names it. Other arguments about
drafts, such as `assistant_model` and `prompt_lookup_num_tokens`, are ignored: they do not change the text.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
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
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from self_speculation.config import GenerationConfig
from self_speculation.decoding.request import Request
from self_speculation.drafts.registry import draft_flags
from self_speculation.passes.unsupported_hooks import check_followed
from self_speculation.strategies import make_strategy

# Outputs of `generate` that are not computed here.
_NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# Other decoding methods of `generate`.
_METHODS = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "assistant_ensemble_weight")

# Arguments of the model that are used here, or do not change the text.
_ACCEPTED = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", *_NOT_RETURNED}

# Processors with a state, which rejected drafts would change.
_STATEFUL = {
    transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    transformers.SynthIDTextWatermarkLogitsProcessor: "watermarking_config (SynthID)",
}

# Processors that hold data of each row of a batch.
_BY_ROW = {
    transformers.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    transformers.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    transformers.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
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
        input_ids: [B, P], padded on the left where the attention mask is 0. Processors and criteria see the
            padding, the model does not.
        logits_processor, stopping_criteria: called with one row at a time, so those of a caller must depend
            on the ids and logits of that row only. Processors are called for drafted tokens, too; an error
            there is raised if the output gets there. `generate` does not pass `stop_strings` on: use
            `StopStringCriteria(tokenizer, strings)`.
        kwargs: exit_layer, num_speculations (by default `assistant_early_exit` and `num_assistant_tokens`)
            and the other options of drafts, see `GenerationConfig`. generation_strategy is "self_speculative"
            or "adaptive".

    Returns:
        As `generate`: [B, P + longest output] ids, padded on the right. Sampled ids have the same
        distribution, but other noise: `torch.manual_seed` gives one text, with any drafts. After
        `fuse(model)` a CPU computes them in float32, also from weights in 16 bits. `generate` computes in the
        model's dtype, so its ids may differ.

    Raises:
        ValueError: an argument that would change the text, by name; an exit layer that the model does not
            have; code around all layers of the model, see `check_followed`.

    Warns:
        UserWarning: an output ends at the model's context length, where `generate` goes on.
    """
    check_followed(model)
    if streamer is None:
        streamer = _generate_streamer()
    batch_size, mask = len(input_ids), kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    given = (generation_config, logits_processor, stopping_criteria, seen, streamer, kwargs)
    for is_given, refusal in _refusals(*given):
        if is_given:
            raise ValueError(f"self_speculative_generate: {refusal}")
    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    max_length = min(limits, default=generation_config.max_length)
    drafting = {name: kwargs[name] for name in draft_flags() if name in kwargs}
    early = generation_config.assistant_early_exit
    if early is not None and drafting.get("generation_strategy") != "adaptive":
        length = generation_config.num_assistant_tokens  # 20 by default
        drafting = {"exit_layer": early, "num_speculations": length, **drafting}
    config = GenerationConfig(
        max_steps=max(1, max_length - input_ids.shape[1]),  # criteria are checked after the first token
        sample=bool(generation_config.do_sample),
        temperature=1.0,  # a processor applies it, like top-k and top-p
        top_p=1.0,
        **{"generation_strategy": "self_speculative", **drafting},
    )
    eos_criteria = [criterion for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
    others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    if streamer is not None and not hasattr(streamer, "delete"):
        # Streamers of transformers expect one token at a time, and end ids. A strategy streams an end id only
        # if a criterion ends the output.
        put = streamer.put
        streamer = SimpleNamespace(put=lambda ids: [put(id_) for id_ in ids.split(1)], end=streamer.end)
        eos_criteria, others = [], [*eos_criteria, *others]
    end_ids = [id_ for criterion in eos_criteria for id_ in criterion.eos_token_id.tolist()]
    requests = []
    for row in range(batch_size):
        prompt = input_ids[row, seen[row]].tolist()
        calls = _calls_for_row(row, input_ids[row, None], len(prompt), logits_processor, others)
        requests.append(Request(prompt, *calls, streamer, eos_token_ids=end_ids))
    outputs: list[Tensor] = [input_ids] * batch_size
    strategy = make_strategy(config.generation_strategy)
    for row, result in strategy.generate_batch(model, requests, config, batch_size):
        if isinstance(result, Exception):
            raise result
        if result.stop_reason == "context":
            warnings.warn(f"row {row} ends with the model's context, before its max_length", stacklevel=2)
        end_id = [] if result.end_token_id is None else [result.end_token_id]
        outputs[row] = torch.tensor([*result.predicted_tokens, *end_id])
    padding = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    new = torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=padding)
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


def _calls_for_row(
    row: int,
    padded: Tensor,
    prompt_length: int,
    processors: Iterable[LogitsProcessor],
    criteria: Iterable[StoppingCriteria],
) -> tuple[Callable | None, Callable | None]:
    """A processor and a criterion that call those of the batch with this row, [1, P], and its padding.

    Args:
        prompt_length: without padding.
    """
    processors = [_without_padding(row, processor) for processor in processors]

    def call(function: Callable, ids: Tensor, logits: Tensor | None) -> Tensor:
        ids = torch.cat([padded.to(ids.device), ids[:, prompt_length:]], dim=1)
        result = torch.as_tensor(function(ids, logits))
        if result.numel() != (1 if logits is None else logits.numel()):
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(f"self_speculative_generate: {name} holds data of other rows than it is given")
        return result

    def process(ids: Tensor, logits: Tensor) -> Tensor:  # [1, n], [1, V] -> [1, V]
        for processor in processors:
            logits = call(processor, ids, logits)
        return logits

    def is_over(ids: Tensor, _logits: Tensor) -> bool:
        return any(bool(call(criterion, ids, None)) for criterion in criteria)  # `generate` has no logits

    return process if processors else None, is_over if criteria else None


def _without_padding(row: int, processor: LogitsProcessor) -> LogitsProcessor:
    """A penalty of repetitions holds the length of each row's padding: the same one, for this row."""
    if type(processor) is not transformers.RepetitionPenaltyLogitsProcessor:
        return processor
    ignored = processor.prompt_ignore_length
    ignored = ignored[row, None] if isinstance(ignored, Tensor) else ignored
    return transformers.RepetitionPenaltyLogitsProcessor(processor.penalty, ignored)


def _refusals(
    config: transformers.GenerationConfig,
    processors: Iterable[LogitsProcessor],
    criteria: Iterable[StoppingCriteria],
    seen: Tensor,
    streamer: BaseStreamer | None,
    kwargs: dict,
) -> Iterator[tuple[object, str]]:
    """For each argument that would change the text: whether it is given, and the message.

    Args:
        seen: [B, P] booleans: the ids that the model sees.
    """
    yield config.num_beams > 1, "num_beams: beam search has no drafts to verify"
    for name in _METHODS:
        yield getattr(config, name, None), f"{name}: is another decoding method"
    yield config.cache_implementation == "quantized", "cache_implementation quantized: would change the text"
    kinds, rows = {type(processor) for processor in processors}, len(seen)
    for kind, name in _STATEFUL.items():
        yield kind in kinds, f"{name}: its logits processor keeps a state, which drafts would change"
    for kind, name in _BY_ROW.items():
        yield rows > 1 and kind in kinds, f"{name}: takes one row, its logits processor has data of each"
    others = [criterion for criterion in criteria if type(criterion) is not MaxLengthCriteria]
    all_end_together = rows > 1 and others and not any(hasattr(each, "eos_token_id") for each in others)
    yield all_end_together, "stopping_criteria: without eos_token_id, all rows of a batch would end together"
    for name in _NOT_RETURNED:
        yield config.return_dict_in_generate and getattr(config, name), f"{name}: is not computed"
    yield streamer is not None and rows > 1, f"streamer: takes one row, not {rows}"
    yield kwargs.get("inputs_embeds") is not None, "inputs_embeds: prompts must be token ids"
    # transformers sets the attribute on a cache that the caller passed.
    yield getattr(kwargs.get("cache"), "_is_user_defined", False), "cache: is neither read nor filled"
    yield not seen[:, -1].all(), "attention_mask: padding must be on the left, prompts must have a token"
    if (positions := kwargs.get("position_ids")) is not None:
        differ = (positions != seen.long().cumsum(-1) - 1)[seen].any()
        yield differ, "position_ids: must be those that follow from the attention mask"
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
