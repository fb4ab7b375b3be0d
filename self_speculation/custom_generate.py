"""Self-speculative decoding behind `model.generate` of transformers.

    model.generate(**inputs, custom_generate=self_speculative_generate, exit_layer=8, num_speculations=6)

Whatever `generate` prepares from its arguments counts: generation config, logits processors, stopping
criteria, streamer. A text-generation pipeline takes the same arguments.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers import GenerationConfig as TransformersConfig
from transformers.generation import GenerateDecoderOnlyOutput

from self_speculation.config import GenerationConfig
from self_speculation.drafts.table import driving_flags
from self_speculation.strategies import make_strategy

# What `generate` can return besides ids, and nothing here computes.
_NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


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
        input_ids: [B, P], padding on the left where the attention mask says so. Rows are done one by one.
        exit_layer, num_speculations, and whatever else says how drafts are made: see `GenerationConfig`.
            generation_strategy is "self_speculative" unless it is "adaptive", which needs none of them.

    Returns:
        What `generate` returns: [B, P + longest output] ids, outputs padded on the right.

    Raises:
        ValueError: beams, embeddings as input, a cache that holds something, scores or states asked for; an
        exit layer that the model does not have.
    """
    cache = kwargs.get("cache")
    for refused, why in (
        (generation_config.num_beams > 1, "num_beams: beam search has no drafts to verify"),
        (kwargs.get("inputs_embeds") is not None, "inputs_embeds: prompts must be token ids"),
        (cache is not None and cache.get_seq_length() > 0, "cache: must be empty"),
        *((getattr(generation_config, name), f"{name}: is not kept") for name in _NOT_RETURNED),
    ):
        if refused:
            raise ValueError(f"self_speculative_generate: {why}")
    if streamer is None:
        # transformers 5.24 does not hand it on to a callable; it is a variable of the calling `generate`.
        frame = inspect.currentframe()
        streamer = frame.f_back.f_locals.get("streamer") if frame is not None and frame.f_back else None

    drafting = {name: kwargs[name] for name in driving_flags() if name in kwargs}
    # Temperature, top-k and top-p are among the processors.
    config = GenerationConfig(
        max_steps=generation_config.max_length - input_ids.shape[1],
        sample=generation_config.do_sample,
        temperature=1.0,
        top_p=1.0,
        **{"generation_strategy": "self_speculative", **drafting},
    )
    ends = generation_config.eos_token_id
    end_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    mask = kwargs.get("attention_mask")
    outputs = []
    for index, row in enumerate(input_ids):
        prompt = row if mask is None else row[mask[index].bool()]
        result = make_strategy(config.generation_strategy).generate_token_ids(
            model, prompt.tolist(), end_ids, config, logits_processor, criteria, streamer
        )
        end = [] if result.end_token_id is None else [result.end_token_id]
        outputs.append(torch.tensor(result.predicted_tokens + end, dtype=torch.long))
    padding = generation_config.pad_token_id or 0
    new = torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=padding)
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


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
