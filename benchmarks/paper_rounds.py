"""Acceptance by the paper's definition, for the flags of benchmark.py.

    python benchmarks/paper_rounds.py --dataset human_eval --num_samples 5 --max_steps 64 --sample False \\
        --generation_strategy self_speculative --exit_layer 3 --num_speculations 3

The rounds of the paper's algorithm: the first one also drafts the first token, from the prompt, and a draft
stops at an end id. This library takes the first token from the pass over the prompt, and drafts on after an
end id. A round of the last token drafts nothing. *paper_acceptance* is accepted / drafted tokens, the mean
of examples.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, RunArguments, parse, refuse
from data import DataArguments
from runs.description import Record
from runs.examples import Experiment, run_experiment
from runs.flags import read_examples
from runs.program import run
from runs.records import Run
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import make_runner
from self_speculation.machine.transfers import on_device


class PaperRounds(Experiment):
    """Decodes greedily by the paper's rounds."""

    @torch.inference_mode()
    def measure(self, index: int) -> Record:
        runner = make_runner(self.generator.model)
        eos = self.generator.eos_token_ids
        ids, drafted, accepted = decode(runner, self.examples[index].ids, eos, self.config)
        return {"ids": ids, "drafted": drafted, "accepted": accepted}

    def report(self, run: Run, records: list[Record]) -> int:
        shares = [record["accepted"] / record["drafted"] for record in records if record["drafted"]]
        acceptance = fmean(shares) if shares else None
        run.finish(records, {"paper_acceptance": acceptance})
        print(f"paper_acceptance {acceptance}\n\n{run.listing()}")
        return 0


def decode(
    runner: ModelRunner, prompt: list[int], eos: Sequence[int], config: GenerationConfig
) -> tuple[list[int], int, int]:
    """The output, and how many tokens were drafted and accepted."""
    cache = runner.new_cache(len(prompt), len(prompt) + config.max_steps + config.num_speculations)
    output: list[int] = []
    unread = prompt  # tokens that the cache lacks
    num_drafted = 0
    num_accepted = 0
    while len(output) < config.max_steps and not {*output[-1:]} & {*eos}:
        draft: list[int] = []
        states = []
        inputs = unread
        while True:
            early = runner.run(cache, on_device(inputs, runner.device)[None], 0, config.exit_layer)
            states.append(early.hidden)
            left = min(config.num_speculations, config.max_steps - len(output) - 1) - len(draft)
            if left <= 0 or {*draft[-1:]} & {*eos}:
                break
            draft.append(int(early.logits[0, -1].argmax()))
            inputs = draft[-1:]
        exit_hidden = torch.cat(states, 1)
        result = runner.run(cache, exit_hidden, config.exit_layer, num_logits=exit_hidden.shape[1])
        targets = result.logits[0, len(unread) - 1 :].argmax(-1).tolist()
        count = next((i for i, id_ in enumerate(draft) if id_ != targets[i]), len(draft))
        num_drafted += len(draft)
        num_accepted += count
        cache.rollback(len(draft) - count)
        for id_ in targets[: count + 1]:
            output.append(id_)
            if id_ in eos:
                break
        unread = targets[count : count + 1]
    return output, num_drafted, num_accepted


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, RunArguments)
    model_args, config, data_args, args = parse(__doc__ or "", *groups, args=argv)
    if not config.greedy or config.generation_strategy != "self_speculative":
        refuse("--generation_strategy self_speculative and --sample False: the rounds are greedy")
    examples = read_examples(model_args, data_args, args)
    return run_experiment("paper_rounds", PaperRounds, model_args, config, data_args, args, examples)


if __name__ == "__main__":
    run(main)
