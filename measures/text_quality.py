"""Text quality of completions against references."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import rapidfuzz
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from runs.records import Record


def text_quality(predictions: Sequence[str], references: Sequence[str]) -> Record:
    """Means over all examples: ROUGE F1, exact match, edit distance in characters; BLEU over the corpus."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = list(zip(predictions, references, strict=True))
    rouge = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {
        **{name: statistics.mean(score[name].fmeasure for score in rouge) for name in rouge[0]},
        "bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score,
        "exact_match": statistics.mean(
            prediction.strip() == reference.strip() for prediction, reference in pairs
        ),
        "edit_distance": statistics.mean(rapidfuzz.distance.Levenshtein.distance(*pair) for pair in pairs),
    }
