"""Speed, drafts, speed-up and texts of a run's records."""

import statistics
from collections.abc import Sequence

import numpy
import pandas

from runs.description import Record
from self_speculation.requests.results import DraftStats


def speed(records: Sequence[Record], prefix: str = "") -> Record:
    """Speed of the strategy whose fields have the prefix, in records of `timed_runs.measure_examples`.

    `total_time` [s] is the time of the slowest rank. So `tokens_per_second` is the speed of all ranks
    together, and `time_per_token` [s] is the inverse.
    `tokens_per_second_median` is over windows; a stall does not move it. `decode_tokens_per_second_median` is
    over completions: in a batch, of one row.
    """
    turns = [turn for record in records for turn in record.get("turns", [record])]
    completions = [without_prefix(turn, prefix) for turn in turns]
    num_tokens = sum(each["num_tokens"] for each in completions)
    decode = [
        each["num_decode_tokens"] / each["decode_time"] for each in completions if each["num_decode_tokens"]
    ]
    total_time = float(_sums(records, "rank", prefix, "wall_time").max())
    return {
        "tokens_per_second": num_tokens / total_time,
        "tokens_per_second_median": float(numpy.median(rates(records, prefix))),
        "decode_tokens_per_second_median": statistics.median(decode) if decode else None,
        "time_to_first_token_ms": 1000 * statistics.median(each["prefill_time"] for each in completions),
        "total_time": total_time,
        "time_per_token": total_time / num_tokens if num_tokens else None,
        "num_tokens": num_tokens,
    }


def speedup(records: Sequence[Record], baseline: str) -> Record:
    """Speed-up of one strategy over another: the median over windows of the ratio of tokens per second.

    Both answer a window one right after the other, so a busy machine slows down both. Sampled outputs differ
    in length, so times alone do not compare. Windows without tokens are left out. `speedup_interval` is the
    90 % confidence interval of the median. `baseline` is the prefix of the other strategy's fields.
    """
    from scipy.stats import quantile_test  # takes a second to import

    speedups = ratios(records, "", baseline)
    interval = None  # of fewer than five values
    if len(speedups) >= 5:
        found = quantile_test(speedups, p=0.5).confidence_interval(0.9)
        interval = (float(found.low), float(found.high))
    return {
        "speedup": float(numpy.median(speedups)) if len(speedups) else None,
        "speedup_quartiles": numpy.percentile(speedups, (25, 50, 75)).tolist() if len(speedups) else [],
        "speedup_interval": interval,
        "speedup_faster": int((speedups > 1).sum()),
        "speedup_windows": len(speedups),
        "identical_outputs": sum(record["tokens"] == record[f"{baseline}tokens"] for record in records),
    }


def without_prefix(record: Record, prefix: str) -> Record:
    """One strategy's fields of a record."""
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def _sums(records: Sequence[Record], by: str, prefix: str, *names: str) -> numpy.ndarray:
    """[len(names), n] sums of the fields `names` for each value of the field `by`."""
    rows = ((record[by], *(record[f"{prefix}{name}"] for name in names)) for record in records)
    return pandas.DataFrame(rows).groupby(0, sort=False).sum().to_numpy().T


def rates(records: Sequence[Record], prefix: str, decode: bool = False) -> numpy.ndarray:
    """[n] tokens per second of each window; `decode`: of tokens after the first, NaN without any."""
    if not decode:
        tokens, seconds = _sums(records, "window", prefix, "num_tokens", "wall_time")
        return tokens / seconds
    names = ("num_decode_tokens", "wall_time", "prefill_time")
    tokens, seconds, prefill = _sums(records, "window", prefix, *names)
    return numpy.where(tokens > 0, tokens, numpy.nan) / (seconds - prefill)


def ratios(records: Sequence[Record], prefix: str, baseline: str, decode: bool = False) -> numpy.ndarray:
    """[n] the ratio of the rates of two strategies, in each window in which both gave tokens."""
    compared, plain = (rates(records, each, decode) for each in (prefix, baseline))
    have_tokens = (compared > 0) & (plain > 0)
    return compared[have_tokens] / plain[have_tokens]


def draft_stats(records: Sequence[Record], prefix: str = "") -> DraftStats:
    """The sum over all records; empty for a strategy without drafts."""
    return DraftStats.from_rows(row for record in records for row in record.get(f"{prefix}drafts", ()))


def acceptance(records: Sequence[Record]) -> Record:
    """Counts of all drafts as JSON.

    `acceptance_rate` is the rate of all tokens, `acceptance_rate_mean` the mean over examples with drafts.
    `by_rejection` has the rates of `rejection.replay`: of the same rounds, and of the tokens that a draft has
    reached (`acceptance_rate_reached`, with this library's noise; `mean_of_minima`, by rejection sampling).
    """
    stats = draft_stats(records)
    replayed = pandas.DataFrame(row for record in records for row in record.get("rejection", ())).sum()
    by_rejection = {}
    if len(replayed) and replayed["num_reached"]:
        by_rejection["by_rejection"] = {
            "acceptance_rate": float(replayed["accepted_by_rejection"] / replayed["num_drafted"]),
            "acceptance_rate_reached": float(replayed["num_accepted"] / replayed["num_reached"]),
            "mean_of_minima": float(replayed["minima"] / replayed["num_reached"]),
        }
    rates = [rate for record in records if (rate := draft_stats([record]).acceptance_rate) is not None]
    return {
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_rate_mean": statistics.mean(rates) if rates else None,
        "mean_accepted_length": stats.mean_accepted_length,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "num_verifications": stats.num_verifications,
        "drafts_by_source": {source: counts._asdict() for source, counts in stats.by_source.items()},
        **by_rejection,
    }


def undecided(interval: Sequence[float] | None, unit: str) -> list[str]:
    """A warning unless the interval of a speed-up tells which side is faster; `unit` names the windows."""
    if interval is not None and not interval[0] <= 1 <= interval[1]:
        return []
    why = "there are fewer than five" if interval is None else "1.00 is in the 90 % confidence interval"
    return [f"these {unit} do not tell which strategy is faster: {why}"]


def text_quality(predictions: Sequence[str], references: Sequence[str]) -> Record:
    """Means over all examples: ROUGE F1, exact match, edit distance in characters; BLEU over the corpus."""
    import sacrebleu  # takes a second with those below
    from rapidfuzz.distance import Levenshtein
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = list(zip(predictions, references, strict=True))
    rouge = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {
        **{name: statistics.mean(score[name].fmeasure for score in rouge) for name in rouge[0]},
        "bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score,
        "exact_match": statistics.mean(one.strip() == other.strip() for one, other in pairs),
        "edit_distance": statistics.mean(Levenshtein.distance(*pair) for pair in pairs),
    }
