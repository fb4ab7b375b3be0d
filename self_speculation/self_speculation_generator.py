"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache. Verification starts from the hidden states at the exit layer,
which the draft kept (the paper's exit query cache): no layer processes a token twice. Drafts of n-grams, of
a copy of the layers, or of several sources for different rows are verified by all layers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from self_speculation.config import GenerationStrategyName
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import amax, leading_matches
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.draft import Draft
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner, PassRange, forward, forward_early
from self_speculation.scheduler import Decoding, DecodingStrategy
from self_speculation.transfers import AsyncRead


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

    The composer of its drafts has an `AdaptivePolicy`. The picks depend on time, the output does not.
    """

    name: GenerationStrategyName = "adaptive"


def speculate(runner: ModelRunner, cache: KVCache, batch: Batch, composer: DraftComposer) -> None:
    """One round: draft, verify, learn, roll back, commit.

    Between two rounds the cache holds all tokens of a row but the last. The round reads from the device once,
    besides the reads of the draft source.
    """
    draft = composer.draft(batch, cache, batch.draft_limits())  # k tokens, k <= K
    if draft is None:
        logits = forward(runner, cache, batch.last).logits  # [B, 1, V]
        cache.rollback(0)  # keeps what it has appended
        batch.sample_and_commit(logits[:, 0])
        batch.commit_unread()  # the next round looks for these tokens
        return
    logits, hidden = target_logits(runner, cache, batch, draft)  # [B, k+1, V], [B, k+1, H]
    tokens = batch.sample(logits)  # [B, k+1], the target's own, by the noise of their positions
    accepted = leading_matches(draft.tokens, tokens, draft.lengths)  # [B]
    read = AsyncRead([amax(logits), tokens, accepted])
    batch.show_drafts()  # a GPU verifies meanwhile
    largest, ids, num_accepted = read.wait()
    batch.check(largest)  # for NaN
    composer.learn(draft, counts := [*map(int, num_accepted)], hidden)
    k = draft.tokens.shape[1]
    cache.rollback([k - count for count in counts])
    rows = [[*map(int, ids[row * (k + 1) :][: count + 1])] for row, count in enumerate(counts)]
    batch.commit(rows, tokens.gather(1, accepted[:, None]), logits, draft.lengths, draft.sources)


def target_logits(runner: ModelRunner, cache: KVCache, batch: Batch, draft: Draft) -> tuple[Tensor, Tensor]:
    """[B, k+1, V] processed logits of the full model: [:, i] for drafted token i, [:, k] for the token after;
    and [B, k+1, H] the states that they follow from, after the last layer.

    The layers that did not draft run once, over all k+1 tokens. The layers that drafted still miss the last
    drafted token, so they run over it. Drops what a draft has cached that verification cannot use.
    """
    k, layer = draft.tokens.shape[1], draft.exit_layer
    inputs = torch.cat((batch.last, draft.tokens), 1) if k else batch.last  # [B, k+1] ids
    if layer:  # the first layers drafted
        last = forward_early(runner, cache, inputs[:, -1:], layer, num_logits=0).hidden
        inputs = torch.cat([*draft.exit_hidden, last], dim=1)  # [B, k+1, H]
    else:
        cache.rollback_draft()
    result = runner.run(cache, inputs, layer, len(runner.layers), k + 1)
    logits = batch.process(result.logits, counts=[length + 1 for length in draft.lengths])
    return logits, result.hidden
