"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache, and verification goes on from the exit states that the draft kept,
so no layer sees the same token at the same position twice. Where something else drafts, such as a copy of the
layers or a lookup, all layers verify.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Verdict, verify_draft
from self_speculation.decoding_strategy import Decoding, DecodingStrategy
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.table import Parts, make_source
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
    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        """Make ahead of time the copies that drafts need, of layers or of the head. Raises what `make_source`
        does.
        """
        self.make_source(Parts(make_decoder(model, 1, 1), config))

    def begin(self, decoder: Decoder, rows: Rows, config: GenerationConfig) -> Decoding:
        return Decoding(rows, decoder, len(decoder.layers), self.make_source(Parts(decoder, config)))

    def round(self, decoding: Decoding) -> None:
        speculate(decoding.decoder, decoding.rows, decoding.source, decoding.rows.longest_draft)


def speculate(decoder: Decoder, rows: Rows, source: DraftSource, k: int) -> None:
    """One round of all rows: draft, verify, commit.

    Reads from the device: one, besides those of the source.
    """
    draft = source.draft(rows, k)
    logits = target_logits(decoder, rows, draft)  # [B, k+1, V]
    verdict = judge(rows, draft, logits)  # [B] accepted, [B] next token
    read = read_verdict(rows, draft, logits, verdict)
    source.learn(rows, draft, read.num_accepted)
    decoder.cache.rollback([draft.tokens.shape[1] - accepted for accepted in read.num_accepted])
    rows.commit(read.tokens, verdict.next_token[:, None], logits, draft.lengths, draft.sources)


def target_logits(decoder: Decoder, rows: Rows, draft: Draft) -> Tensor:
    """[B, k+1, V] the full model's processed logits for the place of each drafted token, and for the one
    after them. One pass, through the layers that have not seen the draft.
    """
    k, layer = draft.tokens.shape[1], draft.exit_layer
    inputs = torch.cat((rows.last, draft.tokens), 1)  # [B, k+1] ids
    if layer:
        states = draft.exit_hidden
        if len(states) == k:  # the last guess has not been through the first layers: none was made from it
            states = [*states, forward_early(decoder, inputs[:, -1:], layer, num_logits=0).hidden]
        inputs = torch.cat(states, dim=1)  # [B, k+1, H]
    else:
        decoder.cache.forget_draft()
    logits = decoder.run(inputs, layer, len(decoder.layers), k + 1).logits
    return rows.process(logits, counts=[length + 1 for length in draft.lengths])


def judge(rows: Rows, draft: Draft, logits: Tensor) -> Verdict:
    """Apply the accept rule, with each row's own random numbers."""
    k = draft.tokens.shape[1]
    lengths = None  # all drafts have k tokens
    if min(draft.lengths) < k:
        lengths = on_device(draft.lengths, draft.tokens.device)
    return verify_draft(draft.tokens, draft.probabilities, logits, rows.sampler, lengths, rows.numbers(k))


class ReadVerdict(NamedTuple):
    num_accepted: list[int]  # [B]
    tokens: list[list[int]]  # of each row: the accepted ones, then one of the target's own


def read_verdict(rows: Rows, draft: Draft, logits: Tensor, verdict: Verdict) -> ReadVerdict:
    """Copy the verdict to the host, in one read; each row learns where its logits are no numbers."""
    k = draft.tokens.shape[1]
    numbers = rows.read([verdict.num_accepted, verdict.next_token, draft.tokens], logits)
    counts, next_tokens, drafted = numbers
    accepted = [int(m) for m in counts]
    tokens = [[*map(int, drafted[row * k :][:m]), int(next_tokens[row])] for row, m in enumerate(accepted)]
    return ReadVerdict(accepted, tokens)
