"""Self-speculative decoding behind `model.generate` of transformers.

    model.generate(**inputs, custom_generate=self_speculative_generate, exit_layer=8, num_speculations=6)

Whatever `generate` prepares from its arguments counts: generation config, logits processors, stopping
criteria, streamer. A text-generation pipeline takes the same arguments. An argument that would make the text
differ from that of `generate` is refused by its name. `assistant_early_exit` and `num_assistant_tokens` are
exit layer and draft length here too. Other arguments that only say how transformers is to draft, such as
`assistant_model` or `prompt_lookup_num_tokens`, change no text and are ignored.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers import GenerationConfig as TransformersConfig
from transformers.generation import GenerateDecoderOnlyOutput

from self_speculation.config import GenerationConfig
from self_speculation.drafts.registry import driving_flags
from self_speculation.generator_base import Request
from self_speculation.model.overrides import check_followed
from self_speculation.strategies import make_strategy

# What `generate` can return besides ids, and nothing here computes.
_NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# Ways to decode that `generate` has, and that have no drafts to verify.
_OTHER_WAYS = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "assistant_ensemble_weight")

# What `generate` passes on to a model: it is used here, or makes no difference to the text.
_HONOURED = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", *_NOT_RETURNED}

# Processors that remember what they were last called with: a rejected draft would stay in their memory.
_WITH_MEMORY = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config (SynthID)",
}

# Processors of transformers that treat each row of a batch in its own way.
_ROW_BY_ROW = (
    RepetitionPenaltyLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)


def self_speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: TransformersConfig,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `generate(..., custom_generate=self_speculative_generate)` calls.

    Args:
        input_ids: [B, P], padding on the left where the attention mask says so. The model sees each prompt
            without its padding; processors and criteria see it with its padding, as `generate` shows it.
        logits_processor: those of a caller must depend on their arguments alone: they are called for drafts
            too, and again for the same position where a draft was rejected. An error that they raise for a
            draft is raised here only if the text gets there. They and criteria may treat each
            row of a batch in its own way, but not by what is in another row.
        stopping_criteria: `stop_strings` never get here: `generate` keeps the tokenizer from a callable; pass
            `StopStringCriteria(tokenizer, strings)`.
        exit_layer, num_speculations, and whatever else says how drafts are made: see `GenerationConfig`. By
            the names of transformers, assistant_early_exit and num_assistant_tokens (its default: 20).
            generation_strategy is "self_speculative" unless it is "adaptive", which needs none of them.

    Returns:
        What `generate` returns: [B, P + longest output] ids, outputs padded on the right; sampled ones are of
        the same distribution, by other random numbers. The dictionary of `return_dict_in_generate` holds the
        ids alone.

    Raises:
        ValueError: an argument that cannot be honoured, by name; an exit layer that the model does not have;
            something around all of its layers, such as hooks or tuned prompts, see `check_followed`.

    Warns:
        UserWarning: a text ends with the model's context, beyond which `generate` would go on.
    """
    check_followed(model)
    if streamer is None:
        streamer = _streamer_of_the_caller()
    mask = kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    for is_given, refusal in _refusals(generation_config, logits_processor, seen, streamer, kwargs):
        if is_given:
            raise ValueError(f"self_speculative_generate: {refusal}")

    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    max_length = min(limits, default=generation_config.max_length)
    drafting = {name: kwargs[name] for name in driving_flags() if name in kwargs}
    early = generation_config.assistant_early_exit
    if early is not None and drafting.get("generation_strategy") != "adaptive":
        length = generation_config.num_assistant_tokens  # 20 where nobody says otherwise
        drafting = {"exit_layer": early, "num_speculations": length, **drafting}
    config = GenerationConfig(
        max_steps=max(1, max_length - input_ids.shape[1]),  # a criterion can only end what has begun
        sample=generation_config.do_sample,
        temperature=1.0,  # it is among the processors, like top-k and top-p
        top_p=1.0,
        **{"generation_strategy": "self_speculative", **drafting},
    )
    of_ids = [criterion for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
    others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    if streamer is not None and not hasattr(streamer, "delete"):
        # One of transformers expects each token by itself, and an end id too: the engine shows an end id
        # where a criterion ends the text with it.
        put = streamer.put
        streamer = SimpleNamespace(put=lambda ids: [put(id_) for id_ in ids.split(1)], end=streamer.end)
        of_ids, others = [], [*of_ids, *others]
    end_ids = [id_ for criterion in of_ids for id_ in criterion.eos_token_id.tolist()]
    requests = [
        _request(row, input_ids, seen[row], logits_processor, others, end_ids, streamer)
        for row in range(len(input_ids))
    ]
    end_together = not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    new = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(output) for output in _answers(model, config, requests, end_together)],
        batch_first=True,
        padding_value=_padding(generation_config),
    )
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


def _request(
    row: int,
    input_ids: Tensor,
    seen: Tensor,
    processors: Sequence[Callable],
    criteria: Sequence[Callable],
    end_ids: list[int],
    streamer: Any,
) -> Request:
    """A row of a batch, as a request of its own.

    Processors and criteria are called for one row at a time. Those that may treat the rows of a batch
    differently are called with a batch of the same size that holds this row B times; what they return for its
    index counts.

    Args:
        row: its index in the batch.
        input_ids: [B, P] prompts with padding.
        seen: [P] booleans: the row's ids that the model sees.
    """
    batch_size = len(input_ids)
    processors = [_asking_about(row, processor) for processor in processors]
    padded, prompt = input_ids[row, None], input_ids[row, seen].tolist()

    def repeated(ids: Tensor) -> Tensor:
        """[1, n] the row's prompt and output -> [B, P + output] with its padding, B times the same."""
        return torch.cat([padded.to(ids.device), ids[:, len(prompt) :]], dim=1).expand(batch_size, -1)

    def process(ids: Tensor, scores: Tensor) -> Tensor:  # [1, n], [1, V] -> [1, V]
        ids = repeated(ids)
        for processor in processors:
            if batch_size > 1 and _may_treat_rows_differently(processor):
                scores = processor(ids, scores.repeat(batch_size, 1))[row, None]
            else:
                scores = processor(ids[:1], scores)
        return scores

    def is_over(ids: Tensor, _scores: Tensor) -> bool:
        ids = repeated(ids)
        # A criterion answers once for all rows, or once for each. `generate` shows it no scores unless it
        # returns them.
        answers = (torch.as_tensor(criterion(ids, None)).flatten() for criterion in criteria)
        return any(answer.expand(batch_size)[row] for answer in answers)

    processor, criterion = process if processors else None, is_over if criteria else None
    return Request(prompt, processor, criterion, streamer, eos_token_ids=end_ids)


def _asking_about(row: int, processor: Any) -> Callable:
    """`prefix_allowed_tokens_fn` asked about one row of a batch alone: for the others it may raise, since the
    ids that it would be shown are not theirs.
    """
    if type(processor) is not PrefixConstrainedLogitsProcessor:
        return processor
    allowed, per_prompt = processor._prefix_allowed_tokens_fn, processor._num_beams

    def allowed_in_row(prompt: int, ids: Tensor) -> list[int]:
        return allowed(prompt, ids) if prompt == row // per_prompt else [0]

    return PrefixConstrainedLogitsProcessor(allowed_in_row, per_prompt)


def _may_treat_rows_differently(processor: Callable) -> bool:
    """A caller's own may look at all rows of a batch; most of those of transformers do not."""
    is_own = type(processor).__module__ != LogitsProcessor.__module__
    return is_own or isinstance(processor, _ROW_BY_ROW)


def _answers(
    model: PreTrainedModel, config: GenerationConfig, requests: Sequence[Request], end_together: bool
) -> list[list[int]]:
    """The ids that follow each prompt; an id that ended them is the last.

    Args:
        end_together: whether rows that a criterion has ended go on until all have ended, as those of
            `generate` do where no id ends them.
    """
    strategy = make_strategy(config.generation_strategy)
    outputs: list[list[int]] = [[] for _ in requests]
    waiting = dict(enumerate(requests))
    while waiting:
        rows, ended_by_criterion = [*waiting], []
        for place, result in strategy.generate_batch(model, waiting.values(), config, len(waiting)):
            if isinstance(result, Exception):
                raise result
            row, end_id = rows[place], result.end_token_id
            outputs[row] += result.predicted_tokens if end_id is None else [*result.predicted_tokens, end_id]
            if result.stop_reason == "stopping_criteria":
                ended_by_criterion.append(row)
            elif result.stop_reason == "context":
                warnings.warn(f"row {row} ends with the model's context, before its max_length", stacklevel=3)
        longest = max(map(len, outputs))
        waiting = {
            row: replace(
                requests[row],
                prompt=[*requests[row].ids, *outputs[row]],
                stopping_criteria=MaxLengthCriteria(len(requests[row].ids) + longest),
            )
            for row in ended_by_criterion
            if end_together and len(outputs[row]) < longest
        }
    return outputs


def _refusals(
    config: TransformersConfig, processors: Sequence[Callable], seen: Tensor, streamer: Any, kwargs: dict
) -> Iterator[tuple[Any, str]]:
    """Each argument with which the result would not be that of `generate`: whether it was given, and what to
    say of it.

    Args:
        seen: [B, P] booleans: ids that the model sees.
    """
    yield config.num_beams > 1, "num_beams: beam search has no drafts to verify"
    for name in _OTHER_WAYS:
        yield getattr(config, name, None), f"{name}: is another way to decode"
    no_such_cache = "cache_implementation quantized: there is no such cache here, and it changes the text"
    yield config.cache_implementation == "quantized", no_such_cache
    for kind, name in _WITH_MEMORY.items():
        remembers = f"{name}: its logits processor remembers what it was called with, drafts among it"
        yield any(type(processor) is kind for processor in processors), remembers
    for name in _NOT_RETURNED:
        yield config.return_dict_in_generate and getattr(config, name), f"{name}: is not kept"
    yield streamer is not None and len(seen) > 1, f"streamer: takes one row, not {len(seen)}"
    yield kwargs.get("inputs_embeds") is not None, "inputs_embeds: prompts must be token ids"
    if (cache := kwargs.get("cache")) is not None:
        # The attribute is how transformers marks a cache that the caller passed.
        is_passed = getattr(cache, "_is_user_defined", False) or cache.get_seq_length()
        yield is_passed, "cache: is neither read nor filled"
    yield not seen[:, -1].all(), "attention_mask: padding must be on the left, prompts must have a token"
    if (positions := kwargs.get("position_ids")) is not None:
        differ = (positions != seen.long().cumsum(-1) - 1)[seen].any()
        yield differ, "position_ids: must be those that follow from the attention mask"
    for name in kwargs.keys() - _HONOURED - {*driving_flags()}:
        yield kwargs[name] is not None, f"{name}: does not reach the model"


def _padding(config: TransformersConfig) -> int:
    """The id after the end of a row: the pad token, or where there is none, the first end id."""
    given = [ids for ids in (config.pad_token_id, config.eos_token_id) if ids is not None]
    return int(torch.as_tensor(given[0]).flatten()[0]) if given else 0


def _streamer_of_the_caller() -> Any:
    """The `streamer` that `generate` was called with.

    transformers 5.24 does not hand it on to a callable; it is a variable of the `generate` that called
    `self_speculative_generate`, which called this. A test tells when it hands it on.
    """
    caller = sys._getframe(2)
    is_generate = caller.f_globals.get("__name__") == GenerationMixin.__module__
    return caller.f_locals.get("streamer") if is_generate else None


def _signature() -> inspect.Signature:
    """With every flag of the drafts: `generate` hands on those of its arguments that it finds there."""
    parameters = dict(inspect.signature(self_speculative_generate).parameters)
    rest = parameters.pop("kwargs")
    for name in driving_flags():
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return inspect.Signature([*parameters.values(), rest])


self_speculative_generate.__signature__ = _signature()  # type: ignore[attr-defined]
