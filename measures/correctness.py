"""The work of correctness.py: compare ids and logits with drafts and without."""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import LogitsProcessorList

from measures.comparison import find_difference, with_end
from runs.description import Record, counted, heading
from runs.examples import Encoded, Experiment
from runs.records import Run
from runs.startup import autoregressive
from self_speculation import GenerationResult, Request
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.backends.runners import is_captured, make_runner
from self_speculation.backends.sampling import Sampler
from self_speculation.models.families import context_length
from self_speculation.requests.request import config_processors
from self_speculation.text.texts import OutputReader


@dataclass
class LogitsOfPositions:
    """A stopping criterion that is never met. It keeps a checksum of the logits of each output token."""

    checksums: list[int] = field(default_factory=list)

    def __call__(self, _ids: torch.Tensor, logits: torch.Tensor) -> bool:
        self.checksums.append(zlib.crc32(logits.contiguous().view(torch.uint8).numpy().data))
        return False


@dataclass
class CompareIds(Experiment):
    """Each prompt has a greedy output and sampled ones. Ids must be equal with drafts and without, up to
    near-ties. Where passes are in place, the logits must be equal, too, to the bit. A record is an output.
    """

    reference: str
    num_seeds: int  # sampled outputs of each prompt

    unit = "output"

    def __post_init__(self) -> None:
        model = self.generator.model
        self._is_in_place = isinstance(make_runner(model), InPlaceRunner)

    @property
    def names(self) -> Sequence[str]:
        return [name for name in super().names for _ in range(self.num_seeds + 1)]

    def _request(self, index: int) -> Request:
        """The request of an output: of each example the greedy one first, then the sampled ones."""
        example_index, nth = divmod(index, self.num_seeds + 1)
        config = self.config if nth else dataclasses.replace(self.config, sample=False)
        criteria = LogitsOfPositions() if self._is_in_place else None
        seed = self.seed + example_index + (nth << 32)
        request = self.request(example_index)
        return dataclasses.replace(request, seed=seed, config=config, stopping_criteria=criteria)

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        requests = [self._request(index) for index in indices]
        found = self.generator.generate_batch(requests, self.config, self.batch_size)
        if is_captured(self.generator.model):  # the reference takes the cache of captured passes
            found = iter([*found])
        for i, result in found:
            record: Record | Exception
            try:
                record = self._compared(indices[i], requests[i], result)
            except Exception as error:
                record = error
            yield indices[i], record

    def _compared(self, index: int, request: Request, result: GenerationResult | Exception) -> Record:
        if isinstance(result, Exception):
            raise result
        example_index, nth = divmod(index, self.num_seeds + 1)
        example = self.examples[example_index]
        other = self._request(index)
        tokens = with_end(result.generation_strategy_result)
        generator, config = autoregressive(self.generator, request.config)
        plain = generator.generate(dataclasses.replace(other, config=config), config)
        references = {"decoding without drafts": with_end(plain.generation_strategy_result)}
        if self.reference == "transformers" and not nth:
            references["transformers"] = self._by_transformers(example)
        processors = config_processors(self.config, len(example.ids))
        decode = self.generator.tokenizer.decode
        differences = []
        for name, reference in references.items():
            found = find_difference(
                self.generator.model,
                example.ids,
                tokens,
                reference,
                processors,
                Sampler.of(config),
                request.seed,
                config.cache_dtype,
            )
            if found is not None:
                shown = slice(found["position"], found["position"] + 12)
                texts = {"text": decode(tokens[shown]), "reference_text": decode(reference[shown])}
                differences.append({"reference": name, **found, **texts})
        record = {
            "example": example_index,
            "sample": nth,
            "num_tokens": len(tokens),
            "differences": differences,
        }
        if self._is_in_place:
            pairs = zip(request.stopping_criteria.checksums, other.stopping_criteria.checksums, strict=False)
            record["other_bits"] = sum(mine != plain for mine, plain in pairs)
        return record

    def report(self, run: Run, records: list[Record]) -> int:
        found = [(record, d) for record in records for d in record["differences"]]
        near_ties = sum(d["near_tie"] for _, d in found)
        real = len(found) - near_ties
        identical = sum(not record["differences"] for record in records)
        positions = sum(record["num_tokens"] for record in records)
        other_bits = sum(record["other_bits"] for record in records) if self._is_in_place else None
        run.finish(records, {
            "examples": len(self.examples), "outputs": len(records), "identical": identical,
            "near_ties": near_ties, "differences": real, "positions": positions,
            "positions_with_other_bits": other_bits,
        })  # fmt: skip
        print(heading(run.description))
        name = self.config.generation_strategy.replace("_", "-")
        name += f", batches of {self.batch_size}" if self.batch_size > 1 else ""
        for record, d in found:
            kind = f"sample {record['sample']}" if record["sample"] else "greedy"
            print(
                f"example {record['example']}, {kind}, token {d['position']}, "
                f"against {d['reference']}: {'near-tie' if d['near_tie'] else 'DIFFERENCE'}\n"
                f"  gap of logits {d['gap'] or 0:.3g}, bound {d['bound']:.3g}\n"
                f"  {name}: {d['text']!r}\n  {d['reference']}: {d['reference_text']!r}"
            )
        print(f"report: {run.folder}/run.json, records.jsonl")
        if other_bits is not None:
            print(f"{other_bits} of {counted(positions, 'position')} with logits that differ in a bit")
        failed = bool(real or other_bits)
        verdict = "FAILED" if failed else "passed"
        print(
            f"{verdict}: {identical} of {counted(len(records), 'output')} identical, "
            f"{counted(near_ties, 'near-tie')}, {counted(real, 'difference')} that rounding does not explain"
        )
        return int(failed)

    @torch.inference_mode()
    def _by_transformers(self, example: Encoded) -> list[int]:
        model = self.generator.model
        config = self.config
        prompt = example.ids
        stop = OutputReader(self.generator.tokenizer, config.stop_words or [], prompt, example.thinking)
        end_ids = [*self.generator.eos_token_ids, *(config.stop_token_ids or [])]
        room = context_length(model.config) - len(prompt)

        def ends(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return torch.tensor([stop(ids[0, len(prompt) :].tolist())], device=ids.device)

        ids = torch.tensor([prompt], device=model.device)
        # Drop the model's defaults, like a repetition penalty: no flag has them.
        with patch.object(model, "generation_config", TransformersGenerationConfig()):
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=min(config.max_steps, room), eos_token_id=end_ids or None,
                logits_processor=LogitsProcessorList(config_processors(config, len(prompt))),
                stopping_criteria=[ends] if config.stop_words else None,
            )  # fmt: skip
        return output[0, len(prompt) :].tolist()
