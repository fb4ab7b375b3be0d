"""One output on its way to a streamer: committed tokens, and drafted ones until they are verified."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


class OutputStream:
    """Passes the tokens of one sequence to its streamer.

    Args:
        streamer: see `Request`; None: nobody listens. One with `delete` gets drafts.
        end_ids: a draft is not shown from such a token on.
    """

    def __init__(self, streamer: Any, end_ids: Collection[int]) -> None:
        self._streamer, self._end_ids = streamer, end_ids
        self._num_shown = 0  # drafted tokens
        self._has_draft_ended = False

    @property
    def shows_draft(self) -> bool:
        """Whether to stream the next drafted token."""
        return hasattr(self._streamer, "delete") and not self._has_draft_ended

    def show_drafted(self, id_: int) -> None:
        self._has_draft_ended = id_ in self._end_ids
        if not self._has_draft_ended:
            self._num_shown += 1
            self._streamer.put(torch.tensor([id_]), is_draft=True)

    def commit(self, tokens: Sequence[int]) -> None:
        """Delete the draft, and stream these tokens."""
        num_shown, self._num_shown, self._has_draft_ended = self._num_shown, 0, False
        if num_shown:
            self._streamer.delete(num_shown, is_draft=True)
        if tokens and self._streamer is not None:
            self._streamer.put(torch.tensor(tokens))

    def end(self) -> None:
        """Delete a draft that is still shown, and end the stream."""
        self.commit(())
        if self._streamer is not None:
            self._streamer.end()
