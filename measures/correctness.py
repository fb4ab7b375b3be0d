"""The work of correctness.py: compare ids of greedy outputs, or samples of the first drafted token."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import combine_pvalues
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import LogitsProcessorList

from arguments import GenerationConfig
from measures.comparison import find_difference, same_distribution, with_end
from runs.examples import Encoded, Experiment
from runs.records import Record, Run, counted, heading
from runs.startup import autoregressive
from self_speculation import GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.decoding.request import config_processors
from self_speculation.decoding.texts import OutputReader
from self_speculation.families import context_length
from self_speculation.passes.captured_runner import is_captured

FALSE_ALARM = 1e-3  # chance that a correct program fails a run with --sample True
_FIRST_DRAFTED = 1  # the prompt's own pass gives token 0


@dataclass
class CompareIds(Experiment):
    """Greedy: the ids must be equal, up to near-ties."""

    reference: str

    def __post_init__(self) -> None:
        self._plain, self._plain_config = autoregressive(self.generator, self.config)

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        requests = self.requests(indices).values()
        found = self.generator.generate_batch(requests, self.config, self.batch_size)
        if is_captured(self.generator.model):  # the reference takes the cache of captured passes
            found = iter([*found])
        for i, result in found:
            try:
                if isinstance(result, Exception):
                    raise result
                yield indices[i], self._compared(self.examples[indices[i]], result)
            except Exception as error:
                yield indices[i], error

    def _compared(self, example: Encoded, result: GenerationResult) -> Record:
        tokens = with_end(result.generation_strategy_result)
        plain = self._plain.generate(example.request(), self._plain_config).generation_strategy_result
        references = {"decoding without drafts": with_end(plain)}
        if self.reference == "transformers":
            references["transformers"] = self._by_transformers(example)
        processors, decode = config_processors(self.config, len(example.ids)), self.generator.tokenizer.decode
        differences = []
        for name, reference in references.items():
            found = find_difference(self.generator.model, example.ids, tokens, reference, processors)
            if found is not None:
                shown = slice(found["position"], found["position"] + 12)
                differences.append({
                    "reference": name, **found,
                    "tokens": tokens[shown], "text": decode(tokens[shown]),
                    "reference_tokens": reference[shown], "reference_text": decode(reference[shown]),
                })  # fmt: skip
        return {"num_tokens": len(tokens), "differences": differences}

    def conclude(self, run: Run, records: list[Record]) -> int:
        found = [(record["index"], d) for record in records for d in record["differences"]]
        near_ties = sum(d["near_tie"] for _, d in found)
        real, identical = len(found) - near_ties, sum(not record["differences"] for record in records)
        counts = {"examples": len(records), "identical": identical, "near_ties": near_ties}
        run.finish(records, {**counts, "differences": real})
        print(heading(run.description))
        name = self.config.generation_strategy.replace("_", "-")
        name += f", batches of {self.batch_size}" if self.batch_size > 1 else ""
        for index, d in found:
            print(
                f"example {index}, token {d['position']}, against {d['reference']}: "
                f"{'near-tie' if d['near_tie'] else 'DIFFERENCE'}\n"
                f"  best logits {d['best_logits'][0]:.6g} and {d['best_logits'][1]:.6g}, "
                f"gap {d['gap'] or 0:.3g}, bound {d['bound']:.3g}\n"
                f"  {name}: {d['text']!r}\n  {d['reference']}: {d['reference_text']!r}"
            )
        print(f"report: {run.folder}/run.json, records.jsonl")
        print(
            f"{'FAILED' if real else 'passed'}: {identical} of {counted(len(records), 'example')} identical, "
            f"{counted(near_ties, 'near-tie')}, {counted(real, 'difference')} that rounding does not explain"
        )
        return 1 if real else 0

    @torch.inference_mode()
    def _by_transformers(self, example: Encoded) -> list[int]:
        model, config, prompt = self.generator.model, self.config, example.ids
        stop = OutputReader(self.generator.tokenizer, config.stop_words or [], prompt, example.thinking)
        end_ids = [*self.generator.eos_token_ids, *(config.stop_token_ids or [])]
        room = context_length(model.config) - len(prompt)

        def ends(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.tensor([stop(ids[0, len(prompt) :].tolist())], device=ids.device)

        ids = torch.tensor([prompt], device=model.device)
        # Drop the model's own defaults, like a repetition penalty: no flag has them.
        with patch.object(model, "generation_config", TransformersGenerationConfig()):
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=min(config.max_steps, room), eos_token_id=end_ids or None,
                logits_processor=LogitsProcessorList(config_processors(config, len(prompt))),
                stopping_criteria=[ends] if config.stop_words else None,
            )  # fmt: skip
        return output[0, len(prompt) :].tolist()


@dataclass
class CompareDistributions(Experiment):
    """Sampling: the first drafted token must have the distribution of plain decoding, on every prompt."""

    num_prompts: int  # that are compared, the first ones
    num_samples: int  # of each strategy, for each prompt

    def __post_init__(self) -> None:
        self.examples = self.examples[: self.num_prompts]
        # Room for a whole draft: max_steps cuts none short.
        max_steps = _FIRST_DRAFTED + 1 + max(0, self.config.longest_draft)
        self.config = dataclasses.replace(self.config, max_steps=max_steps)

    def measure(self, index: int) -> Record:
        example = self.examples[index]
        drafted = self._draw(self.generator, self.config, example, f"{index}")
        plain = self._draw(*autoregressive(self.generator, self.config), example, f"{index}, reference")
        p_value, num_kinds = same_distribution(drafted, plain)
        return {"p_value": p_value, "num_kinds": num_kinds}

    def _draw(
        self, side: HuggingfaceLlamaGenerator, config: GenerationConfig, example: Encoded, name: str
    ) -> list[int | None]:
        """A sample of the first drafted token; None stands for a completion that ended before it.

        Each completion has a seed of its own, made from `name`: no batch size changes it.
        """
        seeds = [zlib.crc32(f"{self.seed}, {name}, {i}".encode()) for i in range(self.num_samples)]
        requests = [example.request(seed) for seed in seeds]
        drawn: list[int | None] = []
        for _, result in side.generate_batch(requests, config, self.batch_size):
            if isinstance(result, Exception):
                raise result
            output = with_end(result.generation_strategy_result)
            drawn.append(output[_FIRST_DRAFTED] if len(output) > _FIRST_DRAFTED else None)
        return drawn

    def conclude(self, run: Run, records: list[Record]) -> int:
        p_value = float(combine_pvalues([record["p_value"] for record in records]).pvalue)
        failed = p_value < FALSE_ALARM
        run.finish(records, {"p_value": p_value, "false_alarm": FALSE_ALARM, "failed": failed})
        print(heading(run.description, left_out=("max_steps",)))  # __post_init__ replaces it
        for record in records:
            kinds, samples = counted(record["num_kinds"], "kind"), counted(self.num_samples, "sample")
            print(
                f"example {record['index']}: p-value {record['p_value']:.3g}, "
                f"{kinds} of tokens in {samples} of each strategy"
            )
        print(f"report: {run.folder}/run.json, records.jsonl")
        print(
            f"{'FAILED' if failed else 'passed'}: chi-square tests of the first drafted token: p-value "
            f"{p_value:.3g}; below {FALSE_ALARM} is a failure (false alarms: 1 run in {1 / FALSE_ALARM:.0f})"
        )
        return 1 if failed else 0
