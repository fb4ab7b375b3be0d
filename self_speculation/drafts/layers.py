"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Choice
from self_speculation.drafts.draft import Draft, DraftSource, PerOutput
from self_speculation.drafts.threshold import Threshold
from self_speculation.model.decoder import Decoder, forward_early


class LayerDrafts(DraftSource):
    """Guesses of the first layers: each pass gives every row one more token.

    Reads from the device: one for each drafted token if a threshold decides whether another one follows, or
    if drafts are shown, or both; otherwise none. A GPU begins the next pass before the threshold is asked. If
    the draft ends there, a pass of the model's own layers is not lost: it took the last guess through the
    first layers, which verification needs anyway.

    Args:
        drafter: runs the layers: the model's decoder, or one over a copy of them.
        exit_layer: how many layers draft.
        copied_in: the format of a copy of the layers; empty: they are the model's own. Verification goes on
            from the cache and the exit states that the model's own layers leave. What a copy leaves is less
            exact, and forgotten.
        threshold: makes, for one output, what decides where its draft stops before k tokens; None: drafts
            never stop early. Passes go on until the drafts of all rows have stopped.
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

        def hear() -> None:
            """Let thresholds see the last confidences, once these are read, and leave no room where a draft
            ends with them.
            """
            if self._thresholds is None or reading is None:
                return
            for row, output in enumerate(rows.outputs):
                if len(confidences[row]) < lengths[row]:
                    confidences[row].append(reading.wait()[len(rows) + row])
                    if not self._thresholds[output].goes_on(confidences[row]):
                        rooms[row] = lengths[row]

        # The token whose low probability ends a draft stays in it: dropping tokens by what they are would
        # change the distribution of the output.
        for i in range(max(rooms)):
            if not self._runs_ahead:
                hear()
                if i >= max(rooms):
                    break
            early = forward_early(self._drafter, inputs, self._exit_layer)
            exit_hidden.append(early.hidden)
            hear()
            going = [i < room for room in rooms]
            if not any(going):
                break
            choice, logits = rows.choose(early.logits[:, 0], i, going)
            choices.append(choice)
            lengths = [length + goes for length, goes in zip(lengths, going, strict=True)]
            reading = rows.propose(choice.tokens, i, going, self._confidence(choice, logits))
            inputs = choice.tokens[:, None]
        hear()  # nothing depends on the last confidences, but they are learnt from
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

    def _confidence(self, choice: Choice, logits: Tensor) -> Tensor | None:
        """[B] the probabilities of the tokens chosen by logits [B, V]; None where no threshold needs them."""
        if self._thresholds is None:
            return None
        probabilities = choice.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        # If processors forbid every token of a short head, there is no distribution: no confidence either.
        return probabilities.gather(1, choice.tokens[:, None])[:, 0].nan_to_num(0.0)
