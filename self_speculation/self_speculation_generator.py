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
from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Verdict, verify_draft
from self_speculation.decoding_strategy import Decoding, DecodingStrategy
from self_speculation.drafts.costs import Costs
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.table import Parts, make_drafter, make_source
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.transfers import on_device


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Rounds of at most k drafted tokens and one verification; the output is what the full model alone would
    generate.
    """

    name: GenerationStrategyName = "self_speculative"

    make_source = staticmethod(make_source)

    @torch.inference_mode()
    def prepare(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        context: int,  # noqa: ARG002
        num_rows: int = 1,  # noqa: ARG002
    ) -> None:
        """Make the copies that drafts need, of layers or of the head. Raises what `make_drafter` does."""
        if config.draft_weights != "exact" or config.draft_vocabulary is not None:
            decoder = make_decoder(model, 1, 1)
            make_drafter(decoder, config.exit_layer, config.draft_weights, config.draft_vocabulary)

    def begin(
        self, model: PreTrainedModel, rows: Rows, first: Output, config: GenerationConfig, batch_size: int
    ) -> Decoding:
        longest = rows.longest_draft
        costs = self.costs(model, config, (len(first.prompt) + first.max_length) // 2, batch_size)
        most = first.max_length + longest
        decoder = make_decoder(model, len(first.prompt), most, longest + 1, batch_size)
        source = self.make_source(Parts(model, decoder, config, costs))
        return Decoding(decoder, len(decoder.layers), lambda: speculate(decoder, rows, source, longest))

    def costs(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        context: int,  # noqa: ARG002
        num_rows: int = 1,  # noqa: ARG002
    ) -> Costs:
        """What sources weigh their drafts by, in the middle of a generation, after so many positions."""
        return Costs.estimated(model, config.exit_layer, config.draft_weights, config.draft_vocabulary)


def speculate(decoder: Decoder, rows: Rows, source: DraftSource, num_speculations: int) -> None:
    """Rounds of draft, verification and commitment until a row ends.

    Reads from the device: one in each round, and those of the source.
    """
    while rows.all_go_on:
        draft = source.draft(rows, num_speculations)
        target = target_logits(decoder, rows, draft)
        verdict = judge(rows, draft, target)
        found = read_verdict(rows, draft, target, verdict)
        decoder.cache.rollback([draft.tokens.shape[1] - accepted for accepted in found.num_accepted])
        rows.commit(found.tokens, verdict.next_token[:, None], target.logits, draft.lengths, draft.sources)
        source.learn(rows, draft, found.num_accepted, found.agreement)


@dataclass(frozen=True)
class TargetLogits:
    logits: Tensor  # [B, k+1, V], processed
    probed: Tensor | None  # [B, k+1, V], processed, of the exit that the draft asked to be read


def target_logits(decoder: Decoder, rows: Rows, draft: Draft) -> TargetLogits:
    """The model's own logits after each token of a draft, and before the first one, by the layers that have
    not seen it, in one pass.
    """
    k, layer = draft.tokens.shape[1], draft.exit_layer
    inputs = torch.cat((rows.last, draft.tokens), 1)  # [B, k+1] ids
    if layer:
        states = draft.exit_hidden
        if len(states) == k:  # the last guess has not been through the first layers: nothing came of it
            states = [*states, forward_early(decoder, inputs[:, -1:], layer, num_logits=0).hidden]
        inputs = torch.cat(states, dim=1)  # [B, k+1, H]
    else:
        decoder.cache.forget_draft()
    counts = [length + 1 for length in draft.lengths]
    probed = None
    if draft.probe:
        early = decoder.run(inputs, layer, draft.probe, k + 1)
        inputs, layer = early.hidden, draft.probe
        # A copy: a compiled pass may write its next output to the same place.
        probed = rows.process(early.logits, counts=counts).clone()
    logits = rows.process(decoder.run(inputs, layer, len(decoder.layers), k + 1).logits, counts=counts)
    return TargetLogits(logits, probed)


def judge(rows: Rows, draft: Draft, target: TargetLogits) -> Verdict:
    """By the accept rule, and each row's own random numbers."""
    k = draft.tokens.shape[1]
    lengths = None  # all drafts have k tokens
    if min(draft.lengths) < k:
        lengths = on_device(draft.lengths, draft.tokens.device)
    return verify_draft(
        draft.tokens, draft.probabilities, target.logits, rows.sampler, lengths, rows.numbers(k)
    )


@dataclass(frozen=True)
class ReadVerdict:
    num_accepted: list[int]  # [B]
    tokens: list[list[int]]  # of each row: those accepted, and the target's own after them
    agreement: list[list[float]]  # of a probed exit, up to the first position that was rejected


def read_verdict(rows: Rows, draft: Draft, target: TargetLogits, verdict: Verdict) -> ReadVerdict:
    """The round's one read from the device."""
    k = draft.tokens.shape[1]
    numbers = [verdict.num_accepted, verdict.next_token, draft.tokens]
    if target.probed is not None:
        numbers.append(rows.sampler.agreement(target.probed, target.logits))
    decided_by = target.logits.take_along_dim(verdict.num_accepted[:, None, None], 1)[:, 0]  # [B, V]
    counts, next_tokens, drafted, *agreement = rows.read(numbers, decided_by)
    accepted = [int(m) for m in counts]
    tokens = [[*map(int, drafted[row * k :][:m]), int(next_tokens[row])] for row, m in enumerate(accepted)]
    seen = [of_all[row * (k + 1) :][: m + 1] for of_all in agreement for row, m in enumerate(accepted)]
    return ReadVerdict(accepted, tokens, seen or [[] for _ in accepted])
