"""Self-speculative decoding: the first layers draft, the remaining layers verify (LayerSkip, arXiv
2404.16710, §3.3).

Draft and verification share one KV cache. Verification starts from the hidden states at the exit layer,
which the draft kept (the paper's exit query cache): no layer processes a token twice. Drafts of n-grams, of
a copy of the layers, or of several sources for different rows are verified by all layers.
"""

from itertools import accumulate

from torch import Tensor

from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.sampling import amax, leading_matches
from self_speculation.config import GenerationStrategyName
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.draft import Draft, concat_by_row
from self_speculation.engine.batch import Batch
from self_speculation.engine.replayed_rounds import replay_round
from self_speculation.engine.scheduler import DecodingStrategy, RoundInputs
from self_speculation.machine.transfers import AsyncRead, on_device


class SelfSpeculativeGenerationStrategy(DecodingStrategy):
    """Drafts tokens of each row and verifies all in one pass. The output is the full model's."""

    name: GenerationStrategyName = "self_speculative"
    has_drafts = True

    def decode_round(self, inputs: RoundInputs) -> None:
        assert inputs.composer is not None
        speculate(inputs.runner, inputs.cache, inputs.batch, inputs.composer)


class AdaptiveGenerationStrategy(SelfSpeculativeGenerationStrategy):
    """Picks exit layer, draft length and draft source in each round, by acceptance and time.

    The composer of the drafts has an `AdaptivePolicy`. The picks depend on time, the output does not.
    """

    name: GenerationStrategyName = "adaptive"


def speculate(runner: ModelRunner, cache: KVCache, batch: Batch, composer: DraftComposer) -> None:
    """One round: draft, verify, learn, roll back, commit.

    Between two rounds the cache holds all tokens of a row but the last. The round reads from the device once,
    besides the reads of the draft source.
    """
    limits = [sequence.draft_limit(batch.longest_draft) for sequence in batch.sequences]  # [B]
    plan = composer.plan(batch, limits)
    if replay_round(runner, cache, batch, len(runner.layers), composer, plan):
        if composer.needs_outcomes:
            batch.commit_queued()
        return
    if plan is None:
        logits = runner.run(cache, batch.last_tokens[:, None]).logits  # [B, 1, V]
        cache.rollback(0)  # keeps what it has appended
        batch.commit_previous_and_sample(logits[:, 0])
        batch.commit_queued()  # the next round looks them up
        return
    draft = composer.draft(batch, cache, plan)
    logits, hidden = verify(runner, cache, batch, draft)  # [N, V], [N, H]
    tokens = batch.sample(logits, draft.query_lengths)  # [N] of the target, by the noise of the positions
    read = AsyncRead([amax(logits), tokens, draft.tokens])
    batch.show_drafts()  # a GPU verifies meanwhile
    largest, ids, drafted = read.wait()
    batch.check(largest, draft.query_lengths)  # for NaN
    accepted = leading_matches(drafted, ids, draft.lengths)  # [B]
    composer.learn(draft, accepted, hidden)
    cache.rollback([length - number for length, number in zip(draft.lengths, accepted, strict=True)])
    starts = [*accumulate(draft.query_lengths[:-1], initial=0)]
    rows = [[*map(int, ids[at : at + number + 1])] for at, number in zip(starts, accepted, strict=True)]
    last_tokens = on_device([row[-1] for row in rows], tokens.device)
    batch.commit(rows, last_tokens, logits, starts, draft.lengths, draft.source_names)


def verify(runner: ModelRunner, cache: KVCache, batch: Batch, draft: Draft) -> tuple[Tensor, Tensor]:
    """Run the full model over the last output token and the draft of each row, N tokens together.

    If layers [:start_layer] have drafted, they run over each row's last drafted token alone, and the other
    layers over all tokens. Else the cached positions of the draft are dropped, and all layers run over all
    tokens.

    Returns:
        [N, V] processed logits, row by row; [N, H] states after the last layer, before the norm.
    """
    layer = draft.start_layer
    ones = [1] * len(batch)
    inputs = concat_by_row((batch.last_tokens, ones), (draft.tokens, draft.lengths))  # [N] ids
    if draft.exit_hidden is not None:  # the first layers drafted
        ends = on_device([end - 1 for end in accumulate(draft.query_lengths)], inputs.device)
        missing = runner.run_layers(cache, runner.embed(inputs[ends]), ones, 0, layer)
        hidden = concat_by_row((draft.exit_hidden, draft.lengths), (missing, ones))  # [N, H]
    else:
        cache.rollback_draft()
        hidden = runner.embed(inputs)
    hidden = runner.run_layers(cache, hidden, draft.query_lengths, layer, len(runner.layers))
    return batch.process(runner.logits(hidden), draft.query_lengths), hidden
