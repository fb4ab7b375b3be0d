"""Where the last tokens of a text stood before: an index that grows by a constant time for each token."""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """For every run of 1..n tokens, where the token stands that followed its last occurrence.

    Args:
        longest: n.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # run -> position of the token that followed it

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            # The runs that end before this token have a follower only now, so that none finds itself.
            position = len(self._ids)
            for n in range(1, min(self.longest, position) + 1):
                self._followed_at[tuple(self._ids[position - n :])] = position
            self._ids.append(token)

    def lookup(self, num_tokens: int) -> tuple[int, list[int]]:
        """How many of the last tokens stood somewhere before, as many as possible, and what followed there.

        >>> index = NgramIndex(3)
        >>> index.extend([7, 1, 2, 3, 9, 1, 2])
        >>> index.lookup(2)
        (2, [3, 9])

        Returns:
            (0, []) where not even the last token did. What followed may be the last tokens themselves, again
            and again: a repetition goes on.
        """
        for n in range(min(self.longest, len(self._ids) - 1), 0, -1):
            position = self._followed_at.get(tuple(self._ids[-n:]))
            if position is not None:
                period = len(self._ids) - position
                return n, [self._ids[position + i % period] for i in range(num_tokens)]
        return 0, []
