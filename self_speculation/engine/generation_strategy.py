"""The interface of strategies: token ids in, token ids out."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from self_speculation.config import GenerationConfig
from self_speculation.requests.request import Callables, Request, as_list
from self_speculation.requests.results import GenerationStrategyResult

T = TypeVar("T")


class GenerationStrategy:
    """Base strategy. Override `generate_token_ids` or `generate_batch`: each calls the other."""

    def generate_token_ids(
        self,
        model: PreTrainedModel,
        input_ids: list[int],
        eos_token_ids: int | list[int] | None,
        generation_config: GenerationConfig,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
        streamer: BaseStreamer | None = None,
    ) -> GenerationStrategyResult:
        """Generate the continuation of `input_ids`.

        Args:
            eos_token_ids: end the output, as `generation_config.stop_token_ids` do.
            logits_processors, stopping_criteria, streamer: see `Request`.

        Raises:
            ValueError: an empty prompt, a prompt longer than the context, or an exit layer that the model
                does not have.
            FloatingPointError: the model's logits are NaN.
        """
        calls = (logits_processors, stopping_criteria, streamer)
        request = Request(input_ids, *calls, eos_token_ids=eos_token_ids)
        return single_result(self.generate_batch(model, [request], generation_config, batch_size=1))

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,  # noqa: ARG002
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        """Generate the continuation of each request, `batch_size` at a time; here: one after the other.

        Yields:
            The index of a finished request, and the result or the error.
        """
        if type(self).generate_token_ids is GenerationStrategy.generate_token_ids:
            raise NotImplementedError(f"{type(self).__name__} needs generate_token_ids or generate_batch")
        for index, request in enumerate(requests):
            config = request.config or generation_config
            result: GenerationStrategyResult | Exception
            try:
                processors = request.processors(config)
                criteria = as_list(request.stopping_criteria)
                length = len(request.prompt_ids)
                criteria += [_as_criterion(check, length) for check in as_list(request.stop_checks)]
                result = self.generate_token_ids(
                    model,
                    request.prompt_ids,
                    as_list(request.eos_token_ids),
                    config,
                    LogitsProcessorList(processors) if processors else None,
                    StoppingCriteriaList(criteria) if criteria else None,
                    request.streamer,
                )
            except Exception as error:
                result = error
            yield index, result


def _as_criterion(stop_check: Callable, num_prompt: int) -> Callable:
    return lambda ids, *_, **__: torch.tensor([stop_check(ids[0, num_prompt:].tolist())])


def single_result(results: Iterable[tuple[int, T | Exception]]) -> T:
    """The result of a batch of one. Raises the error if it is one."""
    [(_, result)] = results
    if isinstance(result, Exception):
        raise result
    return result
