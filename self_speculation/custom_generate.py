"""Self-speculative decoding behind `model.generate` of transformers.

    model.generate(**inputs, custom_generate=self_speculative_generate, exit_layer=8, num_speculations=6)

Whatever `generate` prepares from its arguments counts: generation config, logits processors, stopping
criteria, streamer. A text-generation pipeline takes the same arguments. What would give another text than
`generate` gives is refused by its name. Arguments that only say how transformers is to draft, such as
`assistant_model` or `prompt_lookup_num_tokens`, change no text and are not needed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from self_speculation.drafts.table import driving_flags
from self_speculation.generator_base import Request
from self_speculation.results import GenerationStrategyResult
from self_speculation.strategies import make_strategy

# What `generate` can return besides ids, and nothing here computes.
_NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# Ways to decode that `generate` has, and that have no drafts to verify.
_OTHER_WAYS = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "assistant_ensemble_weight")

# What `generate` tells the model, and is either used here or makes no difference.
_KNOWN = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", *_NOT_RETURNED}

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
            without it; processors and criteria are shown what `generate` shows them: rows with their padding,
            all B of them where they may tell one from another (then each row stands in the place of all).
        logits_processor: those of a caller must depend on their arguments alone: they are called for drafts
            too, and again for the same position where a draft was rejected.
        stopping_criteria: `stop_strings` never get here: `generate` keeps the tokenizer from a callable; pass
            `StopStringCriteria(tokenizer, strings)`.
        exit_layer, num_speculations, and whatever else says how drafts are made: see `GenerationConfig`.
            generation_strategy is "self_speculative" unless it is "adaptive", which needs none of them.

    Returns:
        What `generate` returns: [B, P + longest output] ids, outputs padded on the right; sampled ones are of
        the same distribution, by other random numbers. The dictionary of `return_dict_in_generate` holds the
        ids alone.

    Raises:
        ValueError: an argument that cannot be honoured, by name; an exit layer that the model does not have.
    """
    if streamer is None:
        streamer = _streamer_of_the_caller()
    batch_size = len(input_ids)
    mask = kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    for refused in _refused(generation_config, logits_processor, seen, streamer, kwargs):
        raise ValueError(f"self_speculative_generate: {refused}")

    drafting = {name: kwargs[name] for name in driving_flags() if name in kwargs}
    most = stopping_criteria.max_length or generation_config.max_length
    # Temperature, top-k and top-p are among the processors.
    config = GenerationConfig(
        max_steps=max(1, most - input_ids.shape[1]),  # a criterion can only end what has begun
        sample=generation_config.do_sample,
        temperature=1.0,
        top_p=1.0,
        **{"generation_strategy": "self_speculative", **drafting},
    )
    end_ids = [id for c in stopping_criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist()]
    criteria = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    rows = [
        Row(index, batch_size, input_ids[index], seen[index], logits_processor, criteria)
        for index in range(batch_size)
    ]
    answers = partial(_answers, model, config, end_ids)
    outputs = answers(rows, streamer=streamer)
    longest = max(map(len, outputs))
    if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        # Then `generate` goes on with rows that a criterion has ended, until it has ended all.
        going_on = [replace(row, criteria=[], length=longest) for row in rows]
        outputs = answers(going_on, before=outputs)
    new = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(output) for output in outputs],
        batch_first=True,
        padding_value=_padding(generation_config),
    )
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


@dataclass(frozen=True)
class Row:
    """One row of a batch, and how what was given for the batch is called for it alone."""

    index: int
    batch_size: int
    shown: Tensor  # [P] ids, padding included
    seen: Tensor  # [P] booleans: ids that the model sees
    processors: Sequence[Callable]
    criteria: Sequence[Callable]
    length: int | None = None  # of the output, where it is given

    @cached_property
    def prompt(self) -> list[int]:
        """The ids that the model sees."""
        return self.shown[self.seen].tolist()

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: all of them, over a history [1, n] as the model sees it and scores [1, V]."""
        ids = self._history(ids)
        for processor in self.processors:
            if self.batch_size > 1 and _can_tell_rows_apart(processor):
                everywhere = scores.repeat(self.batch_size, 1)
                scores = processor(self._in_place_of_all(ids), everywhere)[self.index, None]
            else:
                scores = processor(ids, scores)
        return scores

    @property
    def all_criteria(self) -> list[Callable]:
        """For a history as the model sees it."""
        of_length = [] if self.length is None else [MaxLengthCriteria(len(self.prompt) + self.length)]
        return [*([self.ends] if self.criteria else []), *of_length]

    def ends(self, ids: Tensor, _scores: Tensor) -> bool:
        """A stopping criterion: whether any of them is met."""
        ids = self._in_place_of_all(self._history(ids))
        for criterion in self.criteria:
            met = torch.as_tensor(criterion(ids, None))  # `generate` has scores only where it returns them
            if met.flatten()[self.index if met.numel() > 1 else 0]:
                return True
        return False

    def _history(self, ids: Tensor) -> Tensor:
        """[1, n] prompt and output as the model sees them -> [1, P + output] as `generate` shows them."""
        num_seen = len(self.prompt)
        if num_seen == len(self.shown):
            return ids
        return torch.cat([self.shown[None].to(ids.device), ids[:, num_seen:]], dim=1)

    def _in_place_of_all(self, ids: Tensor) -> Tensor:
        """[1, n] -> [B, n]"""
        return ids.expand(self.batch_size, -1)


def _answers(
    model: PreTrainedModel,
    config: GenerationConfig,
    end_ids: list[int],
    rows: Sequence[Row],
    before: Sequence[list[int]] | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """The ids that follow each row's prompt; an id that ended them is the last.

    Args:
        before: what they begin with.

    Warns:
        UserWarning: a text ends with the model's context, beyond which `generate` would go on.
    """
    own = streamer if streamer is None or hasattr(streamer, "delete") else _TokenByToken(streamer)
    outputs = [[] for _ in rows] if before is None else [*before]
    unfinished = [row for row in rows if row.length is None or len(outputs[row.index]) < row.length]
    requests = [
        Request(
            [*row.prompt, *outputs[row.index]],
            eos_token_ids=end_ids,
            logits_processors=[row.process] if row.processors else None,
            stopping_criteria=row.all_criteria,
            streamer=own,
        )
        for row in unfinished
    ]
    strategy = make_strategy(config.generation_strategy)
    for place, result in strategy.generate_batch(model, requests, config, batch_size=len(rows)):
        if isinstance(result, Exception):
            raise result
        index = unfinished[place].index
        outputs[index] = outputs[index] + result.predicted_tokens
        if result.end_token_id is not None:
            outputs[index].append(result.end_token_id)
        if result.stop_reason == "context":
            warnings.warn(f"row {index} ends with the model's context, before its max_length", stacklevel=2)
        if isinstance(own, _TokenByToken):
            own.finish(result)
    return outputs


class _TokenByToken:
    """Tells a streamer of transformers what `generate` tells it: each token by itself, an end id too."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, ids: Tensor) -> None:
        for id_ in ids.split(1):
            self._streamer.put(id_)

    def end(self) -> None:
        """Nothing: `finish` has one token more to show."""

    def finish(self, result: GenerationStrategyResult) -> None:
        if result.end_token_id is not None:
            self._streamer.put(torch.tensor([result.end_token_id]))
        self._streamer.end()


def _refused(
    config: TransformersConfig,
    processors: Sequence[Callable],
    seen: Tensor,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Iterator[str]:
    """What there is that would give something else than `generate` gives: its name, and why.

    Args:
        seen: [B, P] booleans: ids that the model sees.
    """
    if config.num_beams > 1:
        yield "num_beams: beam search has no drafts to verify"
    for name in _OTHER_WAYS:
        if getattr(config, name, None):
            yield f"{name}: is another way to decode"
    if config.cache_implementation == "quantized":
        yield "cache_implementation quantized: there is no such cache here, and it changes the text"
    for processor in processors:
        if (argument := _WITH_MEMORY.get(type(processor))) is not None:
            yield f"{argument}: its logits processor remembers what it was called with, drafts among it"
    if config.return_dict_in_generate:
        yield from (f"{name}: is not kept" for name in _NOT_RETURNED if getattr(config, name))
    if streamer is not None and len(seen) > 1:
        yield f"streamer: takes one row, not {len(seen)}"
    if kwargs.get("inputs_embeds") is not None:
        yield "inputs_embeds: prompts must be token ids"
    cache = kwargs.get("cache")
    # The attribute is how transformers marks a cache that the caller passed.
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        yield "cache: is neither read nor filled"
    if not seen[:, -1].all():
        yield "attention_mask: padding must be on the left, prompts must have a token"
    positions = kwargs.get("position_ids")
    if positions is not None and (positions != seen.long().cumsum(-1) - 1)[seen].any():
        yield "position_ids: must be those that follow from the attention mask"
    for name in kwargs.keys() - _KNOWN - {"inputs_embeds", *driving_flags()}:
        if kwargs[name] is not None:
            yield f"{name}: does not reach the model"


def _can_tell_rows_apart(processor: Callable) -> bool:
    """Whether a processor needs to be called with a whole batch: a caller's own may well look at all rows."""
    is_own = type(processor).__module__ != LogitsProcessor.__module__
    return is_own or isinstance(processor, _ROW_BY_ROW)


def _padding(config: TransformersConfig) -> int:
    """The id after the end of a row: the pad token, or where there is none, the first end id."""
    for ids in (config.pad_token_id, config.eos_token_id):
        if ids is not None:
            return int(torch.as_tensor(ids).flatten()[0])
    return 0


def _streamer_of_the_caller() -> Any:
    """The `streamer` that `generate` was called with.

    transformers 5.24 does not hand it on to a callable; it is a variable of the `generate` that called
    `self_speculative_generate`, which called this. A test tells when it hands it on.
    """
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    if frame is None or frame.f_globals.get("__name__") != GenerationMixin.__module__:
        return None
    return frame.f_locals.get("streamer")


def _signature() -> inspect.Signature:
    """With every flag of the drafts: `generate` hands on those of its arguments that it finds there."""
    *own, rest = inspect.Signature.from_callable(self_speculative_generate).parameters.values()
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in driving_flags()
        if name not in {parameter.name for parameter in own}
    ]
    return inspect.Signature([*own, *flags, rest])


self_speculative_generate.__signature__ = _signature()  # type: ignore[attr-defined]
