"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache. Verification starts from the hidden states at the exit layer,
which the draft kept (the paper's exit query cache): no layer processes a token twice. Drafts of n-grams, of
a copy of the layers, or of several sources for different rows are verified by all layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from self_speculation.config import GenerationStrategyName
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import Verification, verify_draft
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.draft import Draft
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner, PassRange, forward, forward_early
from self_speculation.scheduler import Decoding, DecodingStrategy
from self_speculation.transfers import AsyncRead, on_device


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Drafts up to k tokens each round and verifies them in one pass. The output is the full model's."""

    name: GenerationStrategyName = "self_speculative"
    has_drafts = True

    def passes(self, decoding: Decoding) -> Iterator[PassRange]:
        return decoding.composer.passes(decoding.runner, decoding.batch.longest_draft)

    def decode_round(self, decoding: Decoding) -> None:
        speculate(decoding.runner, decoding.cache, decoding.batch, decoding.composer)


class AdaptiveGenerationStrategy(SelfSpeculativeGenerationStrategy):
    """Picks exit layer, draft length and draft source in each round, by acceptance and time.

    The composer of its drafts has an `AdaptivePolicy`. The picks depend on time, so a seed does not reproduce
    sampled outputs; their distribution is unchanged.
    """

    name: GenerationStrategyName = "adaptive"


def speculate(runner: ModelRunner, cache: KVCache, batch: Batch, composer: DraftComposer) -> None:
    """One round: draft, verify, learn, roll back, commit.

    Between two rounds the cache holds all tokens of a row but the last. The round reads from the device once,
    besides the reads of the draft source.
    """
    numbers = batch.draw_numbers()
    draft = composer.draft(batch, cache, batch.draft_limits(), numbers.draft)  # k tokens, k <= K
    if draft is None:
        logits = forward(runner, cache, batch.last).logits  # [B, 1, V]
        cache.rollback(0)  # keeps what it has appended
        batch.sample_and_commit(logits[:, 0], numbers.verify)
        batch.commit_unread()  # the next round looks for these tokens
        return
    logits = target_logits(runner, cache, batch, draft)  # [B, k+1, V]
    verification = verify(batch, draft, logits, numbers.verify)  # [B] accepted, [B] next token
    batch.show_drafts()  # a GPU verifies meanwhile
    num_accepted, tokens = read_verification(batch, draft, logits, verification)  # on the host
    composer.learn(draft, num_accepted)
    k = draft.tokens.shape[1]
    cache.rollback([k - accepted for accepted in num_accepted])
    batch.commit(tokens, verification.next_token[:, None], logits, draft.lengths, draft.sources)


def target_logits(runner: ModelRunner, cache: KVCache, batch: Batch, draft: Draft) -> Tensor:
    """[B, k+1, V] processed logits of the full model: [:, i] for drafted token i, [:, k] for the token after.

    The layers that did not draft run once, over all k+1 tokens. The layers that drafted still miss the last
    drafted token, so they run over it. Drops what a draft has cached that verification cannot use.
    """
    k, layer = draft.tokens.shape[1], draft.exit_layer
    inputs = torch.cat((batch.last, draft.tokens), 1) if k else batch.last  # [B, k+1] ids
    if layer:  # the first layers drafted
        states = draft.exit_hidden
        if len(states) == k:  # the last column has no state yet
            states = [*states, forward_early(runner, cache, inputs[:, -1:], layer, num_logits=0).hidden]
        inputs = torch.cat(states, dim=1)  # [B, k+1, H]
    else:
        cache.rollback_draft()
    logits = runner.run(cache, inputs, layer, len(runner.layers), k + 1).logits
    return batch.process(logits, counts=[length + 1 for length in draft.lengths])


def verify(batch: Batch, draft: Draft, logits: Tensor, numbers: Tensor | None) -> Verification:
    """Apply the accept rule to all rows, by `RandomNumbers.verify`."""
    k = draft.tokens.shape[1]
    if numbers is not None:
        numbers = torch.cat((numbers[:, :k], numbers[:, -1:]), 1)  # [B, k+1]
    lengths = None  # all drafts have k tokens
    if min(draft.lengths) < k:
        lengths = on_device(draft.lengths, draft.tokens.device)
    return verify_draft(draft.tokens, draft.probabilities, logits, batch.sampler, lengths, numbers)


def read_verification(
    batch: Batch, draft: Draft, logits: Tensor, verification: Verification
) -> tuple[list[int], list[list[int]]]:
    """[B] accepted, and [B] lists of accepted tokens and the next one. One read, which also checks the logits
    for NaN.
    """
    k = draft.tokens.shape[1]
    read = AsyncRead([logits.amax(-1), verification.next_token, verification.num_accepted, draft.tokens])
    largest, *ids = read.wait()
    batch.check(largest)
    next_tokens, num_accepted, drafted = (list(map(int, numbers)) for numbers in ids)
    tokens = [[*drafted[row * k :][:m], next_tokens[row]] for row, m in enumerate(num_accepted)]
    return num_accepted, tokens
