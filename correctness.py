"""Does self-speculative decoding give what autoregressive decoding gives, token by token?

    python correctness.py --sample False --exit_layer 8 --num_speculations 4 --num_samples 50

With --batch_size N, so does a batch what its rows give alone? With --sample True it compares distributions
instead. Exit status 1 where there is a difference that rounding
cannot explain.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence

from arguments import (
    BatchArguments,
    CorrectnessArguments,
    DataArguments,
    GenerationConfig,
    ModelArguments,
    parse,
    refuse,
)
from data import Example, mismatch

Flags = tuple[ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments, BatchArguments]


def flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line; a mistake that can be seen without the model ends the program."""
    groups = (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments, BatchArguments)
    model_args, config, data_args, args, batch = parse(__doc__ or "", *groups, args=argv)
    if args.reference == "transformers" and not config.greedy:
        refuse("--reference transformers: compares ids, so it needs --sample False")
    if wrong := mismatch(data_args):
        refuse(wrong)
    # A batch may also be compared without drafts.
    no_drafts = batch.batch_size > 1 and config.exit_layer == config.num_speculations == -1
    if config.generation_strategy == "autoregressive" and not no_drafts:
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    return model_args, config, data_args, args, batch


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flags()

import math
import sys
import zlib
from typing import Any

import pandas
import torch
from scipy.stats import combine_pvalues
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import NoRepeatNGramLogitsProcessor

from measures.comparison import RARE, detectable_shift, find_difference, same_distribution
from measures.remarks import lines
from measures.timed_runs import Question, answers, windows
from runs.examples import Job, OneByOne, prepare, run_examples
from runs.failures import named
from runs.program import run
from runs.records import Record, Run
from runs.startup import autoregressive
from self_speculation import GenerationStrategyResult, HuggingfaceLlamaGenerator, Prompt
from self_speculation.decoding.stopping import StopWords
from self_speculation.model.families import context_length

# Chance that a right program fails a run with --sample True, over all its tests together.
FALSE_ALARM = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    model_args, config, data_args, args, batch = flags(argv)
    generator, examples, open_run = prepare("correctness", model_args, config, data_args, args, batch)
    if config.greedy:
        return run_examples(Ids(generator, config, examples, args, batch.batch_size), open_run)
    print("--sample True: ids differ from run to run, so distributions are compared", file=sys.stderr)
    job = Distributions(generator, config, examples, args, model_args.seed, batch.batch_size)
    return run_examples(job, open_run)


class Ids(Job):
    """Greedy: the ids must be equal, up to near-ties."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        examples: list[Example],
        args: CorrectnessArguments,
        batch_size: int,
    ) -> None:
        self._speculative, self._config, self._examples, self._args = generator, config, examples, args
        self.num_steps, self.batch_size = len(examples), batch_size
        self._plain, self._plain_config = autoregressive(generator, config)
        n = config.no_repeat_ngram_size
        self._processors = [NoRepeatNGramLogitsProcessor(n)] if n else []

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record]]:
        prompts = {index: self._speculative.encode(self._examples[index].prompt) for index in indices}
        questions = [Question(index, prompt, seed=0) for index, prompt in prompts.items()]
        for window in windows(questions, self.batch_size, num_sides=1):
            for index, result in answers(self._speculative, self._config, window, self.batch_size):
                with named(self.name(index)):
                    tokens = _with_end(result.generation_strategy_result)
                    record = self._compared(prompts[index], tokens)
                yield index, record

    def _compared(self, prompt: list[int], tokens: list[int]) -> Record:
        """With what the prompt gives alone."""
        references = {"autoregressive": _tokens(self._plain, prompt, self._plain_config)}
        if self._args.reference == "transformers":
            references["transformers"] = self._by_transformers(prompt)
        return {
            "num_tokens": len(tokens),
            "differences": [
                difference
                for name, reference in references.items()
                if (difference := self._difference(prompt, tokens, name, reference))
            ],
        }

    def progress(self, records: Sequence[Record]) -> str:
        return f"{sum(not record['differences'] for record in records)} of {len(records)} identical"

    def conclude(self, run: Run, records: list[Record]) -> int:
        found = [(record["index"], d) for record in records for d in record["differences"]]
        real = [d for _, d in found if not d["near_tie"]]
        identical = sum(not record["differences"] for record in records)
        run.finish(
            records,
            {
                "examples": len(records),
                "identical": identical,
                "near_ties": len(found) - len(real),
                "differences": len(real),
            },
        )
        for index, d in found:
            print(
                f"example {index}, token {d['position']}, against {d['reference']}: "
                f"{'near-tie' if d['near_tie'] else 'DIFFERENCE'}\n"
                f"  best logits {d['best_logits'][0]:.6g} and {d['best_logits'][1]:.6g}, "
                f"gap {d['gap'] or 0:.3g}, bound {d['bound']:.3g}\n"
                f"  {self._strategy}: {d['text']!r}\n  {d['reference']}: {d['reference_text']!r}"
            )
        print(f"report: {run.folder}/run.json, records.jsonl")
        verdict = "FAILED" if real else "passed"
        print(
            f"{verdict}: {identical} of {len(records)} examples identical, {len(found) - len(real)} near-ties"
            f", {len(real)} differences that rounding does not explain"
        )
        return 1 if real else 0

    @property
    def _strategy(self) -> str:
        name = self._config.generation_strategy.replace("_", "-")
        return name if self.batch_size == 1 else f"{name}, batches of {self.batch_size}"

    def _difference(
        self, prompt: list[int], tokens: list[int], name: str, reference: list[int]
    ) -> Record | None:
        found = find_difference(self._speculative.model, prompt, tokens, reference, self._processors)
        if found is None:
            return None
        shown = slice(found.position, found.position + 12)
        gap = found.gap if found.gap is None or math.isfinite(found.gap) else None  # JSON knows no infinity
        decode = self._speculative.tokenizer.decode
        return {
            "reference": name,
            **dataclasses.asdict(found),
            "gap": gap,
            "near_tie": found.near_tie,
            "tokens": tokens[shown],
            "reference_tokens": reference[shown],
            "text": decode(tokens[shown]),
            "reference_text": decode(reference[shown]),
        }

    @torch.inference_mode()
    def _by_transformers(self, prompt: list[int]) -> list[int]:
        model, config = self._speculative.model, self._config
        stop = StopWords(self._speculative.tokenizer, config.stop_words or [], prompt)
        end_ids = [*self._speculative.eos_token_ids, *(config.stop_token_ids or [])]
        room = context_length(model.config) - len(prompt)

        def ends(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.tensor([stop(ids[0, len(prompt) :].tolist())], device=ids.device)

        ids = torch.tensor([prompt], device=model.device)
        # The model's own defaults, such as a repetition penalty, are not among the flags.
        own, model.generation_config = model.generation_config, TransformersGenerationConfig()
        try:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=min(config.max_steps, room),
                eos_token_id=end_ids or None,
                pad_token_id=end_ids[0] if end_ids else 0,
                no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
                stopping_criteria=[ends] if config.stop_words else None,
            )
        finally:
            model.generation_config = own
        return output[0, len(prompt) :].tolist()


class Distributions(OneByOne):
    """Sampling: each of the first tokens of an answer must be distributed alike."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        examples: list[Example],
        args: CorrectnessArguments,
        seed: int,
        batch_size: int,
    ) -> None:
        self._speculative = generator
        # Longer than what is compared, so that no draft is cut short at the end of the output.
        self._config = dataclasses.replace(
            config, max_steps=args.sampled_tokens + max(0, config.longest_draft)
        )
        self._plain, self._plain_config = autoregressive(generator, self._config)
        self._examples, self._args, self._seed = examples[: args.sampled_prompts], args, seed
        self._samples = args.samples_per_prompt
        self.num_steps, self.batch_size = len(self._examples), batch_size

    def measure(self, index: int) -> Record:
        prompt = self._speculative.encode(self._examples[index].prompt)
        results = [
            self._draw(self._speculative, self._config, prompt, f"{index}"),
            self._draw(self._plain, self._plain_config, prompt, f"{index}, reference"),
        ]
        samples = [[_with_end(result) for result in each] for each in results]
        tests = [
            same_distribution(*([_token(output, i) for output in outputs] for outputs in samples))
            for i in range(self._args.sampled_tokens)
        ]
        return {
            "p_values": [test.p_value for test in tests],
            "num_kinds": [test.num_kinds for test in tests],
            "num_judged": sum(sum(result.judged_by_position or ()) for result in results[0]),
            "num_accepted": sum(result.num_accepted or 0 for result in results[0]),
        }

    def _draw(
        self, side: HuggingfaceLlamaGenerator, config: GenerationConfig, prompt: list[int], name: str
    ) -> list[GenerationStrategyResult]:
        """Outputs of one strategy, each by random numbers of its own, so that no batch size changes them.

        Args:
            name: of these outputs among all that are drawn.
        """
        seeds = [zlib.crc32(f"{self._seed}, {name}, {i}".encode()) for i in range(self._samples)]
        prompts = [Prompt(prompt, seed=seed) for seed in seeds]
        results = dict(side.generate_batch(prompts, config, self.batch_size))
        return [results[i].generation_strategy_result for i in range(self._samples)]

    def progress(self, records: Sequence[Record]) -> str:
        return f"smallest p-value {min(p for record in records for p in record['p_values']):.3g}"

    def conclude(self, run: Run, records: list[Record]) -> int:
        # Prompts are independent, so their p-values combine; those of the tokens of one output would not.
        combined = [
            float(combine_pvalues(p).pvalue) for p in zip(*(r["p_values"] for r in records), strict=True)
        ]
        threshold = FALSE_ALARM / len(combined)
        failed = sum(p < threshold for p in combined)
        shift = self._detectable_shift(records, threshold)
        run.finish(
            records,
            {"p_values": combined, "threshold": threshold, "failed": failed, "detectable_shift": shift},
        )
        table = pandas.DataFrame(
            [*(record["p_values"] for record in records), combined],
            index=[*(f"example {record['index']}" for record in records), "all together"],
            columns=[f"token {i + 1}" for i in range(len(combined))],
        )
        print("p-values")
        print(table.to_string(float_format="{:.3g}".format, line_width=100))
        print("\n".join([*lines([self._power(shift, records)]), ""]))
        print(f"report: {run.folder}/run.json, records.jsonl")
        print(
            f"{'FAILED' if failed else 'passed'}: {failed} of {len(combined)} chi-square tests below "
            f"{threshold:.2g}, smallest p-value {min(combined):.3g} (false alarm of a run: {FALSE_ALARM})"
        )
        return 1 if failed else 0

    def _detectable_shift(self, records: Sequence[Record], threshold: float) -> float | None:
        """The least shift that would be found at any token; the first is not drafted."""
        # A run that began before kinds were counted goes on with --resume: as many as there can be at most.
        most = [self._samples // RARE + 1] * self._args.sampled_tokens
        by_token = zip(*(record.get("num_kinds", most) for record in records), strict=True)
        shifts = [detectable_shift(kinds, self._samples, threshold) for kinds in [*by_token][1:]]
        return None if None in shifts else max(shift for shift in shifts if shift is not None)

    def _power(self, shift: float | None, records: Sequence[Record]) -> str:
        """What this many samples can find, and whether that is enough for the crudest of wrong rules."""
        if shift is None:
            return "power: too few samples to find any wrong rule with a chance of 90 %"
        judged = sum(record.get("num_judged", 0) for record in records)
        crudest = 1 - sum(record.get("num_accepted", 0) for record in records) / judged if judged else None
        said = (
            f"power: a wrong rule that shifts {shift:.1%} of a drafted token's probability (total variation) "
            f"on every prompt is found here with a chance of 90 %; one that shifts less, less often. Tokens "
            f"expected fewer than {RARE} times in {self._samples} samples count as one. Four times as many "
            "--samples_per_prompt find half the shift"
        )
        if crudest is None:
            return said
        found = "less than that, and so not sure to be found" if crudest < shift else "more than that"
        return f"{said}. A rule that accepts every draft shifts up to {crudest:.1%} here: {found}"


def _tokens(generator: HuggingfaceLlamaGenerator, prompt: list[int], config: GenerationConfig) -> list[int]:
    return _with_end(generator.generate(prompt, config).generation_strategy_result)


def _with_end(result: GenerationStrategyResult) -> list[int]:
    """Ids of an answer, with the one that ended it."""
    return result.predicted_tokens + ([] if result.end_token_id is None else [result.end_token_id])


def _token(output: list[int], position: int) -> Any:
    return output[position] if position < len(output) else None


if __name__ == "__main__":
    run(main)
