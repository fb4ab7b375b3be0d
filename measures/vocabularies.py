"""What drafts by a few rows of the head would do, read off a predicted sweep and the tokens of its outputs.

A guess counts as right where the whole head's is and its token is among those rows. (Where the whole head
guesses a token that is not, the next best one may be right: that is not counted.) Each output is judged by
what the others wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from measures.replay import predicted_cell
from runs.records import Record
from self_speculation.drafts.costs import Costs
from self_speculation.model.vocabulary import Vocabulary

# Rows of the head that are tried, as far as it has more.
NUMBERS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

# Cells that they are tried for.
_BEST_CELLS = 5


def written(records: Sequence[Record]) -> Counter[int]:
    """How often each id was output."""
    return Counter(id_ for record in records for id_ in record["tokens"])


def best_with_a_vocabulary(
    records: Sequence[Record],
    cells: Sequence[Record],
    costs: Costs,
    vocabulary_size: int,
    bytes_of_head: float,
) -> Record | None:
    """The fastest of the best cells with so many rows; None where the vocabulary is small.

    Args:
        cells: rows of the sweep, the fastest first.
        bytes_of_head: that a draft reads of each weight of the head, for each of the model's own.
    """
    counts, rows = written(records), []
    for number in (number for number in NUMBERS if number < vocabulary_size):
        narrowed = [_narrowed(record, counts, number, vocabulary_size) for record in records]
        cheaper = costs.with_share_of_head(number / vocabulary_size, bytes_of_head)
        rows += [
            predicted_cell(narrowed, cheaper, cell["exit_layer"], cell["num_speculations"])
            | {"draft_vocabulary": number}
            for cell in cells[:_BEST_CELLS]
        ]
    return max(rows, key=lambda row: row["speedup"], default=None)


def _narrowed(record: Record, counts: Mapping[int, int], number: int, vocabulary_size: int) -> Record:
    """A record in which no exit guesses what could not be drafted."""
    tokens, vocabulary = record["tokens"], Vocabulary()
    vocabulary.add(Counter(counts) - Counter(tokens))
    known = vocabulary.likely(number, vocabulary_size).known
    seen, drafted = set(record.get("prompt_ids", [])), []
    for token in tokens:
        drafted.append(token in known or token in seen)
        seen.add(token)
    matches = {
        layer: "".join("01"[match == "1" and can] for match, can in zip(guessed, drafted, strict=True))
        for layer, guessed in record["matches"].items()
    }
    return {**record, "matches": matches}
