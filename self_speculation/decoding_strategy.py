"""A strategy does one round for all sequences in flight; `Scheduler` does everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig
from self_speculation.generator_base import Callables, GenerationStrategy, Request, single_result
from self_speculation.results import GenerationStrategyResult
from self_speculation.scheduler import Scheduler, Stepper


class DecodingStrategy(Stepper, GenerationStrategy):
    """See the module."""

    def generate_token_ids(
        self,
        model: PreTrainedModel,
        input_ids: list[int],
        eos_token_ids: int | list[int] | None,
        generation_config: GenerationConfig,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
        streamer: Any = None,
        ends_text: Callable[[Sequence[int]], bool] | None = None,
    ) -> GenerationStrategyResult:
        request = Request(
            input_ids,
            logits_processors,
            stopping_criteria,
            streamer,
            eos_token_ids=eos_token_ids,
            ends_text=ends_text,
        )
        return single_result(self.generate_batch(model, [request], generation_config, batch_size=1))

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        scheduler: Scheduler[int] = Scheduler(self, model, generation_config, batch_size)
        waiting, may_have_more = enumerate(requests), True
        while may_have_more or scheduler.batch:
            while may_have_more and scheduler.has_room:
                if (request := next(waiting, None)) is None:
                    may_have_more = False
                else:
                    scheduler.add_request(*request)
            scheduler.step()
            yield from scheduler.pop_finished()

    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        """Make what is made once for a model, such as copies of layers, outside of an answer's time."""
