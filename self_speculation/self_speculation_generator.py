"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache, and verification starts from the hidden states that the draft left
behind, so no layer sees the same token at the same position twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.compiled import make_decoder
from self_speculation.generator_base import DecodingStrategy, GenerationConfig, GenerationStrategyName
from self_speculation.llama_model_utils import Decoder, forward_early, forward_remainder, prefill
from self_speculation.output import Output
from self_speculation.sampling import Sampler, Verdict, verify_draft


@dataclass(frozen=True)
class Draft:
    """k guesses of the exit layer, k >= 0."""

    tokens: Tensor  # [k]
    probabilities: Tensor | None  # [k, V] what they were drawn from; None when greedy
    exit_hidden: list[Tensor]  # k of [1, 1, H], of the token before each guess


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Rounds of k drafted tokens and one verification; the output is what the full model alone would
    generate.
    """

    name: GenerationStrategyName = "self_speculative"

    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> dict[str, Any]:
        exit_layer = config.exit_layer
        num_speculations = min(config.num_speculations, output.remaining)  # longer drafts would never be made
        decoder = make_decoder(model, output.prompt_length, output.max_length, max_width=num_speculations + 1)
        sampler = config.sampler()
        drafted, judged, accepted = ([0] * num_speculations for _ in range(3))
        num_verifications = 0

        logits = output.process(prefill(decoder, output.history(), len(decoder.layers)).logits[0])  # [1, V]
        token = sampler(logits).tokens  # [1]
        output.place(token, 0)
        output.commit(token.tolist(), logits)
        while output.remaining:
            k = min(num_speculations, output.remaining - 1)  # a round emits at most k+1 tokens
            draft = self.draft(decoder, output, sampler, exit_layer, k)
            verdict, logits = self.verify(decoder, output, sampler, exit_layer, draft)
            # The round's only read from the device.
            m, next_token, *guesses = torch.stack(
                [verdict.num_accepted, verdict.next_token, *draft.tokens]
            ).tolist()
            decoder.cache.rollback(k - m)
            output.place(verdict.next_token, m)
            taken = output.commit([*guesses[:m], next_token], logits)

            num_verifications += 1
            for i in range(k):
                drafted[i] += 1
                judged[i] += i < min(
                    m + 1, taken
                )  # one beyond the accepted ones, unless the output has ended
                accepted[i] += i < min(m, taken)
        return {
            "acceptance_rate": sum(accepted) / sum(drafted) if sum(drafted) else None,
            "num_verifications": num_verifications,
            "drafted_by_position": tuple(n for n in drafted if n),
            "judged_by_position": tuple(j for j, n in zip(judged, drafted, strict=True) if n),
            "accepted_by_position": tuple(a for a, n in zip(accepted, drafted, strict=True) if n),
        }

    @staticmethod
    def draft(decoder: Decoder, output: Output, sampler: Sampler, exit_layer: int, k: int) -> Draft:
        """Guess k tokens with layers 0..exit_layer-1, one pass each."""
        probabilities: list[Tensor] = []
        exit_hidden: list[Tensor] = []
        for i in range(k):
            early = forward_early(decoder, output.last(num_drafted=i), exit_layer)
            choice = sampler(output.process(early.logits[0], i))  # of [1, V]
            output.propose(choice.tokens, i)
            exit_hidden.append(early.hidden)
            if choice.probabilities is not None:
                probabilities.append(choice.probabilities)
        return Draft(output.drafted(k), torch.cat(probabilities) if probabilities else None, exit_hidden)

    @staticmethod
    def verify(
        decoder: Decoder, output: Output, sampler: Sampler, exit_layer: int, draft: Draft
    ) -> tuple[Verdict, Tensor]:
        """Judge a draft by the remaining layers in one pass; also the logits [k+1, V] it was judged by."""
        k = len(draft.tokens)
        # The last guess has not been through the first layers yet: nothing was drafted from it.
        last = forward_early(decoder, output.last(num_drafted=k), exit_layer, num_logits=0).hidden
        exit_hidden = torch.cat([*draft.exit_hidden, last], dim=1)  # [1, k+1, H]
        logits = output.process(forward_remainder(decoder, exit_hidden, exit_layer).logits[0])  # [k+1, V]
        return verify_draft(draft.tokens, draft.probabilities, logits, sampler), logits
