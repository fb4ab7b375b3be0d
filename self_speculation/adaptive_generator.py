"""Self-speculative decoding without numbers to tune: each round is what promises most tokens for its time.

After Zarch et al., DEL (arXiv 2504.05598). Beyond it, what rounds take is learnt while they are made,
lookups are rounds among others, and a plain step is one as well, so that nothing is lost where nothing can be
guessed.
"""

from __future__ import annotations

from self_speculation.config import GenerationStrategyName
from self_speculation.drafts.registry import make_adaptive
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy


class AdaptiveGenerationStrategy(SelfSpeculativeGenerationStrategy):
    """Chooses exit layer, draft length and lookups round by round; see the module.

    Since decisions depend on time, sampled outputs differ from run to run in spite of a seed; their
    distribution does not.
    """

    name: GenerationStrategyName = "adaptive"

    make_source = staticmethod(make_adaptive)
