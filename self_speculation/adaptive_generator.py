"""Self-speculative decoding without numbers to tune: each round is what promises most tokens for its time.

After Zarch et al., DEL (arXiv 2504.05598): exits are judged by what they would have had accepted, and drafts
end when they are no longer confident. Beyond it, costs are measured, not assumed, lookups are rounds among
others, and a plain step is one as well, so that nothing is lost where nothing can be guessed.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from self_speculation.clock import measure
from self_speculation.config import LONGEST_DRAFT, DraftWeights, GenerationConfig, GenerationStrategyName
from self_speculation.decoding.sampling import Sampler
from self_speculation.drafts.costs import Costs
from self_speculation.drafts.table import make_adaptive
from self_speculation.model.families import context_length
from self_speculation.model.prepared import prepared
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy

# Costs are measured at contexts of so many positions, doubled until a generation's fits.
_SHORTEST_CONTEXT = 64
_PATIENCE = 2.0  # seconds for that, about


class AdaptiveGenerationStrategy(SelfSpeculativeGenerationStrategy):
    """Chooses exit layer, draft length and lookups round by round; see the module.

    What a round costs is measured before the first answer of a model, and again where answers become much
    longer. It takes about two seconds, or ten passes or so of a model that takes longer for them. Since
    decisions depend on time, sampled outputs differ from run to run in spite of a seed; their distribution
    does not.
    """

    name: GenerationStrategyName = "adaptive"

    make_source = staticmethod(make_adaptive)

    def prepare(
        self, model: PreTrainedModel, config: GenerationConfig, context: int, num_rows: int = 1
    ) -> None:
        self.costs(model, config, context, num_rows)

    def costs(
        self, model: PreTrainedModel, config: GenerationConfig, context: int, num_rows: int = 1
    ) -> Costs:
        """As they were measured, or as they are now."""
        of_all = self._measured(model, config, context, num_rows)
        return of_all if num_rows == 1 else of_all.with_fewer_rows(self._measured(model, config, context, 1))

    def _measured(
        self, model: PreTrainedModel, config: GenerationConfig, context: int, num_rows: int
    ) -> Costs:
        # Two rounds must fit into the model's context, however small it is.
        most = context_length(model.config)
        longest = min(LONGEST_DRAFT, most // 2 - 1)
        measured_at = _SHORTEST_CONTEXT
        while measured_at < context:
            measured_at *= 2
        measured_at = min(measured_at, most - longest - 1)
        known, drafts = prepared(model).costs, (config.draft_weights, config.draft_vocabulary)
        # The rows of a batch have contexts of all lengths: that of the first one will do.
        key = (drafts, Sampler.of(config), measured_at if num_rows == 1 else 0, num_rows)
        if key not in known:
            exits = candidate_layers(model.config.num_hidden_layers, config.draft_weights)
            known[key] = measure(model, config, exits, measured_at, longest, _PATIENCE, num_rows=num_rows)
        return known[key]


def candidate_layers(num_layers: int, draft_weights: DraftWeights) -> list[int]:
    """From a twelfth of the layers to a third; with a copy in fewer bits, also all of them."""
    early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
    return sorted(early) if draft_weights == "exact" else [*sorted(early), num_layers]
