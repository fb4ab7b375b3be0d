"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Choice
from self_speculation.drafts.draft import Draft, DraftSource, PerOutput
from self_speculation.drafts.threshold import Threshold
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.transfers import Reading


class LayerDrafts(DraftSource):
    """Guesses of the first layers, one pass each over all rows.

    Reads from the device: none, but one for each drafted token where a threshold decides whether another
    follows, or where drafts are shown; one, not two, where both is so. A GPU begins the next pass before the
    threshold is asked: if that ends the draft, verification finds its last token's first layers done.

    Args:
        drafter: what runs the layers.
        exit_layer: so many layers.
        copied_in: the format of a copy of the layers; empty: they are the model's own. Those leave in the
            cache, and as exit states, what verification can go on from. What a copy leaves is less exact, and
            forgotten.
        threshold: makes what says when an output's draft stops before k; None: it never does. Passes go on
            until all have stopped.
    """

    def __init__(
        self,
        drafter: Decoder,
        exit_layer: int,
        copied_in: str = "",
        threshold: Callable[[], Threshold] | None = None,
    ) -> None:
        self._drafter, self._exit_layer, self._keeps_cache = drafter, exit_layer, not copied_in
        self.name = f"exit {exit_layer}, {copied_in}" if copied_in else f"exit {exit_layer}"
        self._thresholds = None if threshold is None else PerOutput(lambda output: threshold())
        self._runs_ahead = drafter.rotary.device.type == "cuda"

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        rooms = rows.rooms(k, wanted)
        inputs, reading = rows.last, None
        choices: list[Choice] = []
        exit_hidden: list[Tensor] = []
        lengths = [0] * len(rooms)
        confidences: list[list[float]] = [[] for _ in rooms]
        confident = [True] * len(rooms)

        # The token that ends a draft is part of it: to leave it out for what it is would change the
        # distribution of the output.
        def goes_on(i: int) -> list[bool]:
            """Which drafts get an i-th token, when what was read is known."""
            if reading is not None:
                self._hear(rows, reading, lengths, confidences, confident)
            return [is_confident and i < room for is_confident, room in zip(confident, rooms, strict=True)]

        for i in range(max(rooms)):
            if not self._runs_ahead and not any(goes_on(i)):
                break
            early = forward_early(self._drafter, inputs, self._exit_layer)
            exit_hidden.append(early.hidden)
            going = goes_on(i)
            if not any(going):
                break
            choice, logits = rows.choose(early.logits[:, 0], i, going)
            choices.append(choice)
            lengths = [length + goes for length, goes in zip(lengths, going, strict=True)]
            reading = rows.propose(choice.tokens, i, going, self._confidence(choice, logits))
            inputs = choice.tokens[:, None]
        goes_on(0)  # nothing depends on the last confidences, but they are learnt from
        tokens, probabilities = rows.joined(choices, self._drafter.config.vocab_size)
        return Draft(
            rows.sampler,
            [self.name] * len(rooms),
            tokens,
            probabilities,
            lengths,
            self._exit_layer if self._keeps_cache else 0,
            exit_hidden if self._keeps_cache else [],
            confidences,
        )

    def learn(self, rows: Rows, draft: Draft, num_accepted: Sequence[int]) -> None:
        if self._thresholds is None:
            return
        for row, output in enumerate(rows.outputs):
            if draft.sources[row] == self.name:
                self._thresholds[output].learn(draft.confidences[row], num_accepted[row])

    def _hear(
        self,
        rows: Rows,
        reading: Reading,
        lengths: Sequence[int],
        confidences: list[list[float]],
        confident: list[bool],
    ) -> None:
        """Ask the thresholds of outputs whose last confidence has been read and not been heard."""
        if self._thresholds is None:
            return
        for row, output in enumerate(rows.outputs):
            if len(confidences[row]) < lengths[row]:
                confidences[row].append(reading.wait()[len(rows) + row])
                confident[row] = self._thresholds[output].goes_on(confidences[row])

    def _confidence(self, choice: Choice, logits: Tensor) -> Tensor | None:
        """[B] the probabilities of the tokens chosen by logits [B, V], if anybody asks for them."""
        if self._thresholds is None:
            return None
        probabilities = choice.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        # Where processors forbid all that a short head knows, there is no distribution, and no confidence.
        return probabilities.gather(1, choice.tokens[:, None])[:, 0].nan_to_num(0.0)
