"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache, and verification starts from the hidden states that the draft left
behind, so no layer sees the same token at the same position twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Sampler, Verdict, verify_draft
from self_speculation.drafts.sources import Draft, make_source
from self_speculation.generator_base import DecodingStrategy
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, forward_early, prefill


@dataclass(frozen=True)
class Verification:
    verdict: Verdict
    logits: Tensor  # [k+1, V], processed, that it was judged by
    agreement: Tensor | None  # [k+1] chances that guesses of the probed exit would have been accepted


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Rounds of at most k drafted tokens and one verification; the output is what the full model alone would
    generate.
    """

    name: GenerationStrategyName = "self_speculative"

    make_source = staticmethod(make_source)

    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> dict[str, Any]:
        # Longer drafts would never be made.
        num_speculations = min(config.longest_draft, output.remaining)
        decoder = make_decoder(model, output.prompt_length, output.max_length, max_width=num_speculations + 1)
        sampler = Sampler.of(config)
        source = self.make_source(model, decoder, sampler, config, output.history()[0].tolist())
        drafted, judged, accepted = ([0] * num_speculations for _ in range(3))
        by_source: Counter[tuple[str, int]] = Counter()

        logits = output.process(prefill(decoder, output.history(), len(decoder.layers)).logits[0])  # [1, V]
        token = sampler(logits).tokens  # [1]
        output.place(token, 0)
        output.commit(token.tolist(), logits)
        while output.remaining:
            # A round emits one token more than it drafts.
            draft = source.draft(output, min(num_speculations, output.remaining - 1))
            verified = self.verify(decoder, output, sampler, draft)
            verdict = verified.verdict
            # The round's only read from the device.
            m, next_token, *guesses = torch.stack(
                [verdict.num_accepted, verdict.next_token, *draft.tokens]
            ).tolist()
            k = len(guesses)
            decoder.cache.rollback(k - m)
            output.place(verdict.next_token, m)
            taken = output.commit([*guesses[:m], next_token], verified.logits)
            source.learn(draft, m, () if verified.agreement is None else verified.agreement[: m + 1].tolist())

            for i in range(k):
                drafted[i] += 1
                # one beyond the accepted ones, unless the output has ended
                judged[i] += i < min(m + 1, taken)
                accepted[i] += i < min(m, taken)
            for index, count in enumerate((1, k, min(m, taken))):
                by_source[draft.source, index] += count
        return {
            "acceptance_rate": sum(accepted) / sum(drafted) if sum(drafted) else None,
            "num_verifications": sum(n for (_, index), n in by_source.items() if index == 0),
            "drafted_by_position": tuple(n for n in drafted if n),
            "judged_by_position": tuple(j for j, n in zip(judged, drafted, strict=True) if n),
            "accepted_by_position": tuple(a for a, n in zip(accepted, drafted, strict=True) if n),
            "drafts_by_source": {
                source: (by_source[source, 0], by_source[source, 1], by_source[source, 2])
                for source, index in by_source
                if index == 0
            },
        }

    @staticmethod
    def verify(decoder: Decoder, output: Output, sampler: Sampler, draft: Draft) -> Verification:
        """Judge a draft by the layers that have not seen it, in one pass; read a probed exit on the way."""
        k, layer = len(draft.tokens), draft.exit_layer
        inputs = output.history(k)[:, -(k + 1) :]  # [1, k+1] ids
        if layer:
            # The last guess has not been through the first layers yet: nothing was drafted from it.
            last = forward_early(decoder, output.last(num_drafted=k), layer, num_logits=0).hidden
            inputs = torch.cat([*draft.exit_hidden, last], dim=1)  # [1, k+1, H]
        probed = None
        if draft.probe:
            probed = decoder.run(inputs, layer, draft.probe, k + 1)
            inputs, layer = probed.hidden, draft.probe
        logits = output.process(decoder.run(inputs, layer, len(decoder.layers), k + 1).logits[0])  # [k+1, V]
        agreement = None if probed is None else sampler.agreement(output.process(probed.logits[0]), logits)
        return Verification(
            verify_draft(draft.tokens, draft.probabilities, logits, sampler), logits, agreement
        )
