"""What a reader should know before trusting a figure: sentences for below a table, none where all is well."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from measures.metrics import Pace, answer_pace, decode_pace, ratio_of_totals, with_tokens
from measures.timed_runs import BASELINE
from runs.records import Record

# Totals and median of the examples differ by much from this on, as a ratio.
_MUCH = 1.1
# What an answer that loops ends with: the same text so many times, and so many characters of it at least.
_TIMES, _CHARACTERS = 3, 24
_WIDTH = 80


def on_speedup(records: Sequence[Record], baseline: str, compared: Record) -> list[str]:
    """About a comparison of two strategies.

    Args:
        compared: what `metrics.speedup` says of the records.
    """
    remarks = []
    if not compared["decode_speedup_examples"]:
        return ["no example has an answer of two tokens by both strategies: there is nothing to compare"]
    interval = compared["decode_speedup_interval"]
    if interval is None:
        remarks.append("fewer than five examples: too few to tell a gain from chance")
    elif interval[0] <= 1 <= interval[1]:
        remarks.append(
            "these examples do not tell which strategy is faster: the median speed-up, decode, is somewhere "
            f"from {interval[0]:.2f} to {interval[1]:.2f} (confidence 90 %)"
        )
    for name, key, pace in (
        ("prefill included", "speedup", answer_pace),
        ("decode", "decode_speedup", decode_pace),
    ):
        median, total = compared[key], compared[f"{key}_of_totals"]
        if max(median / total, total / median) > _MUCH:
            why = _why_totals_differ(with_tokens(records, baseline, pace), baseline, pace, median)
            remarks.append(f"totals, {name}, say {total:.2f} and the median example {median:.2f}: {why}")
    return remarks


def on_throughput(compared: Record) -> list[str]:
    """About a comparison of two strategies on batches.

    Args:
        compared: what `metrics.throughput_ratio` says.
    """
    if not compared["throughput_ratio_examples"]:
        return ["both strategies give no tokens: there is nothing to compare"]
    interval = compared["throughput_ratio_interval"]
    if interval is None:
        return ["fewer than five windows: too few to tell a gain from chance; more --num_samples make more"]
    if interval[0] <= 1 <= interval[1]:
        return [
            "these examples do not tell which strategy is faster: the median ratio of throughputs is "
            f"somewhere from {interval[0]:.2f} to {interval[1]:.2f} (confidence 90 %)"
        ]
    return []


def on_batch_sizes(records: Sequence[Record]) -> list[str]:
    """Where a run went on with another batch size."""
    sizes = sorted({record.get("batch_size", 1) for record in records})
    if len(sizes) == 1:
        return []
    listed = ", ".join(map(str, sizes))
    return [f"the run had batches of {listed}: its throughput is that of none of them"]


def _why_totals_differ(records: Sequence[Record], baseline: str, pace: Pace, median: float) -> str:
    """Names the examples that took too long for their length, if without a few such the two agree."""
    by_delay = sorted(records, key=lambda record: -max(_delays(record, records, baseline, pace)))
    for number in range(1, len(records) // 3 + 1):
        rest = ratio_of_totals(by_delay[number:], baseline, pace)
        if max(median / rest, rest / median) <= _MUCH:
            delayed = ", ".join(str(record["index"]) for record in by_delay[:number])
            seconds = sum(sum(_delays(record, records, baseline, pace)) for record in by_delay[:number])
            return (
                f"{number} of {len(records)} examples ({delayed}) took {seconds:.1f} s more than their "
                f"length explains, as when the machine is held up; without them totals say {rest:.2f}"
            )
    return "the speed-up differs from example to example, and in totals the slow and long ones count for more"


def _delays(record: Record, records: Sequence[Record], baseline: str, pace: Pace) -> list[float]:
    """Seconds that each side took beyond its usual pace."""
    delays = []
    for prefix in ("", baseline):
        usual = statistics.median(seconds / tokens for tokens, seconds in (pace(r, prefix) for r in records))
        tokens, seconds = pace(record, prefix)
        delays.append(max(0.0, seconds - tokens * usual))
    return delays


def on_predictions(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """About predicted cells of a sweep that were measured too, in this order; one with answers at least.

    A machine that is slower now than while the costs were measured makes all times longer, those of plain
    decoding too; the speed-ups, and so the choice, stay.
    """
    pairs = [pair for pair in pairs if pair[1]["speedup"] and pair[1]["tokens_per_second_median"]]
    if not pairs:
        return []

    def error(key: str) -> float:
        """Of what was predicted, the median cell."""
        return statistics.median(predicted[key] / measured[key] for predicted, measured in pairs) - 1

    ours, plain = error("tokens_per_second_median"), error(f"{BASELINE}tokens_per_second_median")
    remarks = [
        f"predicted tokens/s are {ours:+.0%} off, those of plain decoding {plain:+.0%}, the speed-up "
        f"{error('speedup'):+.0%}. What is off in both is the pace of the machine, which is another now than "
        "in the calibration; all cells share it, so the choice stays. An error of the speed-up may change it"
    ]
    apart = [
        f"{predicted['exit_layer']}/{predicted['num_speculations']}"
        for predicted, measured in pairs
        if _above(predicted, measured) or _above(measured, predicted)
    ]
    if apart:
        remarks.append(
            f"beyond what noise explains, measured and predicted speed-up differ at {', '.join(apart)} "
            "(exit/drafted): trust the measured one, or measure again when the machine is quieter"
        )
    return remarks


def _above(first: Record, second: Record) -> bool:
    """Whether the least that the first speed-up may be is more than the second can be."""
    low, high = first["speedup_low"], second["speedup_high"]
    return low is not None and high is not None and low > high


def on_text(
    predictions: Sequence[str], prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """About answers whose scores say little of the model."""
    remarks = []
    if looping := sum(map(loops, predictions)):
        remarks.append(
            f"{looping} of {len(predictions)} answers end in a loop, the same text again and again: scores "
            "of text say little of these, and what repeats is easy to draft"
        )
    if tokenizer.chat_template and not any(_before_a_message(tokenizer) in prompt for prompt in prompts):
        remarks.append(
            "the model has a chat template and the prompts come without it: scores are those of a text that "
            "goes on, not of an answer; eval.py --apply_chat_template True asks as in a chat"
        )
    return remarks


def lines(remarks: Sequence[str]) -> list[str]:
    """For a terminal, an empty line before each."""
    indented = [
        textwrap.fill(f"note: {remark}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for remark in remarks
    ]
    return [line for text in indented for line in ("", text)]


def loops(text: str) -> bool:
    """Whether a text ends with the same part several times in a row; the last time may be cut short."""
    for period in range(1, len(text) // _TIMES + 1):
        length = max(_TIMES * period, _CHARACTERS)
        if length <= len(text) and text[-length:-period] == text[period - length :]:
            return True
    return False


def _before_a_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template writes last before the words of a user, such as <|im_start|>user."""
    chat = str(tokenizer.apply_chat_template([{"role": "user", "content": "WORDS"}], tokenize=False))
    return "".join(chat.partition("WORDS")[0].split()[-1:])
