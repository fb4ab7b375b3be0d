"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache, and verification starts from the hidden states that the draft left
in place, so no layer sees the same token at the same position twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output, read
from self_speculation.decoding.sampling import Sampler, Verdict, verify_draft
from self_speculation.decoding.tally import Tally
from self_speculation.drafts.costs import Costs
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.table import Parts, make_drafter, make_source
from self_speculation.generator_base import DecodingStrategy
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, forward_early, prefill


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Rounds of at most k drafted tokens and one verification; the output is what the full model alone would
    generate.
    """

    name: GenerationStrategyName = "self_speculative"

    make_source = staticmethod(make_source)

    @torch.inference_mode()
    def prepare(self, model: PreTrainedModel, config: GenerationConfig, context: int) -> None:  # noqa: ARG002
        """Copy the layers that draft, where they do so in fewer bits. Raises what `quantized` does."""
        if config.draft_weights != "exact":
            make_drafter(make_decoder(model, 1, 1), config.exit_layer, config.draft_weights)

    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> None:
        longest = min(config.longest_draft, output.remaining)  # longer drafts would never be made
        decoder = make_decoder(model, len(output.prompt), output.max_length, max_width=longest + 1)
        sampler = Sampler.of(config)
        costs = self.costs(model, config, (len(output.prompt) + output.max_length) // 2)
        source = self.make_source(Parts(model, decoder, sampler, config, output.prompt, costs))
        output.emit(prefill(decoder, output.history(), len(decoder.layers)).logits[0], sampler)
        speculate(decoder, output, sampler, source, longest)

    def costs(self, model: PreTrainedModel, config: GenerationConfig, context: int) -> Costs:  # noqa: ARG002
        """What sources weigh their drafts by, in the middle of a generation, after so many positions."""
        return Costs.estimated(model, config.exit_layer, config.draft_weights)


def speculate(
    decoder: Decoder, output: Output, sampler: Sampler, source: DraftSource, num_speculations: int
) -> None:
    """Rounds of draft, verification and commitment until the output ends.

    Reads from the device: one in each round, and those of the source.
    """
    output.tally = Tally()
    while output.remaining:
        # A round emits one token more than it drafts.
        draft = source.draft(output, min(num_speculations, output.remaining - 1))
        target = target_logits(decoder, output, draft)
        verdict = verify_draft(draft.tokens, draft.probabilities, target.logits, sampler)
        found = read_verdict(verdict, draft, target, sampler)
        decoder.cache.rollback(len(draft.tokens) - found.num_accepted)
        output.place(verdict.next_token, found.num_accepted)
        output.commit(found.tokens, target.logits, len(draft.tokens), draft.source)
        source.learn(draft, found.num_accepted, found.agreement)


@dataclass(frozen=True)
class TargetLogits:
    logits: Tensor  # [k+1, V], processed
    probed: Tensor | None  # [k+1, V], processed, of the exit that the draft asked to be read


def target_logits(decoder: Decoder, output: Output, draft: Draft) -> TargetLogits:
    """The model's own logits after each token of a draft, and before the first one, by the layers that have
    not seen it, in one pass.
    """
    k, layer = len(draft.tokens), draft.exit_layer
    inputs = output.history(k)[:, -(k + 1) :]  # [1, k+1] ids
    if layer:
        states = draft.exit_hidden
        if len(states) == k:  # the last guess has not been through the first layers: nothing came of it
            states = [*states, forward_early(decoder, output.last(k), layer, num_logits=0).hidden]
        inputs = torch.cat(states, dim=1)  # [1, k+1, H]
    probed = None
    if draft.probe:
        early = decoder.run(inputs, layer, draft.probe, k + 1)
        inputs, layer = early.hidden, draft.probe
        # A copy: a compiled pass may write its next output to the same place.
        probed = output.process(early.logits[0]).clone()
    logits = output.process(decoder.run(inputs, layer, len(decoder.layers), k + 1).logits[0])
    return TargetLogits(logits, probed)


@dataclass(frozen=True)
class ReadVerdict:
    num_accepted: int
    tokens: list[int]  # those accepted, and the target's own after them
    agreement: list[float]  # of a probed exit, up to the first position that was rejected


def read_verdict(verdict: Verdict, draft: Draft, target: TargetLogits, sampler: Sampler) -> ReadVerdict:
    """The round's one read from the device. Raises what `read` does."""
    k = len(draft.tokens)
    numbers = [verdict.num_accepted, verdict.next_token, draft.tokens]
    if target.probed is not None:
        numbers.append(sampler.agreement(target.probed, target.logits))
    accepted, next_token, *rest = read(numbers, target.logits)
    m = int(accepted)
    return ReadVerdict(m, [int(token) for token in (*rest[:m], next_token)], rest[k:][: m + 1])
