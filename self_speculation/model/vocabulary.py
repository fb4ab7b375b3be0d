"""Which ids a model writes, counted while it decodes, and the likely ones among all.

Numbers alone; knows nothing of weights.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Mapping, Sequence

# Counts are halved when they sum up to so many: what was written long ago counts less and less.
_HALVED_AT = 2**20

# A list is made anew when more than a share of the last ids are not in it, and some came after it was made.
_LAST, _FEW, _OUTSIDE = 1024, 256, 0.05


class Shortlist:
    """Some of the ids, in ascending order."""

    def __init__(self, ids: Sequence[int], made_at: int) -> None:
        self.ids, self.made_at = sorted(ids), made_at
        self.known = frozenset(ids)


class Vocabulary:
    """What one model has written in this process, or in a sweep before.

    Args:
        learns: whether what is written counts. It must not where an answer may not depend on others.
    """

    def __init__(self, learns: bool = True) -> None:
        self.learns = learns
        self.counts: Counter[int] = Counter()
        self._last: deque[int] = deque(maxlen=_LAST)
        self._num_written = 0
        self._lists: dict[int, Shortlist] = {}

    def count(self, ids: Sequence[int]) -> None:
        """These were written."""
        if not self.learns:
            return
        self.counts.update(ids)
        self._last.extend(ids)
        self._num_written += len(ids)
        if self.counts.total() > _HALVED_AT:
            self.counts = Counter({id_: n // 2 for id_, n in self.counts.items() if n > 1})

    def add(self, counts: Mapping[int, int]) -> None:
        """So often ids were written elsewhere: all lists are made anew."""
        self.counts.update(counts)
        self._lists.clear()

    def likely(self, number: int, vocabulary_size: int) -> Shortlist:
        """The ids that were written most, and where these are too few the first ids of the tokenizer, which
        learnt them first. The same list until what is written has changed enough.
        """
        made = self._lists.get(number)
        if made is None or self._has_changed(made):
            written = [id_ for id_, _ in self.counts.most_common(number) if id_ < vocabulary_size]
            first = itertools.filterfalse(set(written).__contains__, range(vocabulary_size))
            ids = [*written, *itertools.islice(first, number - len(written))]
            made = self._lists[number] = Shortlist(ids, self._num_written)
        return made

    def _has_changed(self, made: Shortlist) -> bool:
        if self._num_written - made.made_at < _FEW:
            return False
        outside = sum(id_ not in made.known for id_ in self._last)
        return outside > _OUTSIDE * len(self._last)
