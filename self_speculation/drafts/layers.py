"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Choice
from self_speculation.drafts.draft import Draft, DraftSource, PerOutput
from self_speculation.drafts.threshold import Threshold
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.model.short_head import ShortHead

Confidences = Sequence[Sequence[float]]  # [B][k] the probabilities of drafted tokens


class LayerDrafts(DraftSource):
    """Guesses of the first layers: each pass gives every row one more token.

    Reads from the device: one for each drafted token if its probability decides whether another one follows,
    or if drafts are shown, or both; otherwise none. A GPU begins the next pass of the model's own layers
    before that is decided. If the draft ends there, the pass is not lost: it took the last guess through the
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
        self._goes_on: Callable[[Rows, Confidences], Sequence[bool]] | None = None
        if self._thresholds is not None:
            self._goes_on = self._by_thresholds
        self._runs_ahead = self._keeps_cache and drafter.rotary.device.type == "cuda"

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        if isinstance(self._drafter.head, ShortHead):
            self._drafter.head.see(rows.outputs)
        rooms = rows.rooms(k, wanted)
        inputs, reading = rows.last, None
        choices: list[Choice] = []
        exit_hidden: list[Tensor] = []
        lengths = [0] * len(rooms)
        confidences: list[list[float]] = [[] for _ in rooms]

        def end_where_unlikely() -> None:
            """Read the last confidences, and leave no room where a draft ends with them."""
            if self._goes_on is None or reading is None:
                return
            new = [row for row, length in enumerate(lengths) if len(confidences[row]) < length]
            for row in new:
                confidences[row].append(reading.wait()[len(rows) + row])
            if new and max(rooms) > max(lengths):
                for row, goes_on in enumerate(self._goes_on(rows, confidences)):
                    rooms[row] = rooms[row] if goes_on else lengths[row]

        # The token whose low probability ends a draft stays in it: dropping tokens by what they are would
        # change the distribution of the output.
        for i in range(max(rooms)):
            if not self._runs_ahead:
                end_where_unlikely()
                if i >= max(rooms):
                    break
            early = forward_early(self._drafter, inputs, self._exit_layer)
            exit_hidden.append(early.hidden)
            end_where_unlikely()
            going = [i < room for room in rooms]
            if not any(going):
                break
            choice, logits = rows.choose(early.logits[:, 0], i, going)
            choices.append(choice)
            lengths = [length + goes for length, goes in zip(lengths, going, strict=True)]
            reading = rows.propose(choice.tokens, i, going, self._confidence(choice, logits))
            inputs = choice.tokens[:, None]
        end_where_unlikely()  # nothing depends on the last confidences, but they are learnt from
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

    def end_drafts_by(self, goes_on: Callable[[Confidences], bool]) -> None:
        self._goes_on = lambda rows, confidences: [goes_on(confidences)] * len(rows)

    def _by_thresholds(self, rows: Rows, confidences: Confidences) -> list[bool]:
        assert self._thresholds is not None
        pairs = zip(rows.outputs, confidences, strict=True)
        return [bool(own) and self._thresholds[output].goes_on(own) for output, own in pairs]

    def _confidence(self, choice: Choice, logits: Tensor) -> Tensor | None:
        """[B] the probabilities of the tokens chosen by logits [B, V]; None where nobody asks."""
        if self._goes_on is None:
            return None
        probabilities = choice.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        # If processors forbid every token of a short head, there is no distribution: no confidence either.
        return probabilities.gather(1, choice.tokens[:, None])[:, 0].nan_to_num(0.0)
