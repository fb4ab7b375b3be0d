"""Counts what became of drafts. Knows nothing of how they are made or judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import final

from self_speculation.results import SourceCounts


@final
class DraftStats:
    """The rounds of one generation, or of several."""

    def __init__(self) -> None:
        # (source, tokens drafted, accepted and emitted) -> rounds that ended so.
        self._rounds: Counter[tuple[str, int, int, int]] = Counter()

    def add(self, source: str, drafted: int, accepted: int, emitted: int) -> None:
        """One round.

        Args:
            source: what drafted.
            emitted: tokens that the output took; it may have ended inside the accepted ones.
        """
        self._rounds[source, drafted, accepted, emitted] += 1

    @property
    def num_verifications(self) -> int:
        return self._rounds.total()

    @property
    def num_emitted(self) -> int:
        return sum(n * emitted for (_, _, _, emitted), n in self._rounds.items())

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted and output / drafted; None where nothing was drafted."""
        drafted = sum(self.drafted_by_position)
        return sum(self.accepted_by_position) / drafted if drafted else None

    @property
    def drafted_by_position(self) -> tuple[int, ...]:
        """[i]: rounds that drafted an i-th token."""
        return self._by_position(lambda drafted, accepted, emitted: drafted)

    @property
    def judged_by_position(self) -> tuple[int, ...]:
        """[i]: rounds that looked at an i-th drafted token, which they do up to the first rejected one."""
        return self._by_position(lambda drafted, accepted, emitted: min(drafted, accepted + 1, emitted))

    @property
    def accepted_by_position(self) -> tuple[int, ...]:
        """[i]: rounds whose i-th drafted token was output."""
        return self._by_position(lambda drafted, accepted, emitted: min(accepted, emitted))

    @property
    def by_source(self) -> dict[str, SourceCounts]:
        """In the order of the sources' names, whichever came up first."""
        totals: dict[str, SourceCounts] = {}
        for (source, drafted, accepted, emitted), n in sorted(self._rounds.items()):
            before = totals.get(source, SourceCounts(0, 0, 0))
            totals[source] = SourceCounts(
                rounds=before.rounds + n,
                drafted=before.drafted + n * drafted,
                accepted=before.accepted + n * min(accepted, emitted),
            )
        return totals

    @property
    def rounds_by_length(self) -> dict[int, int]:
        """Tokens drafted -> rounds."""
        lengths: Counter[int] = Counter()
        for (_, drafted, _, _), n in self._rounds.items():
            lengths[drafted] += n
        return dict(lengths)

    def _by_position(self, reached: Callable[[int, int, int], int]) -> tuple[int, ...]:
        counts = [0] * max((drafted for _, drafted, _, _ in self._rounds), default=0)
        for (_, *outcome), n in self._rounds.items():
            for i in range(reached(*outcome)):
                counts[i] += n
        return tuple(counts)
