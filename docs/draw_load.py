"""Draw what an operator watches: figures of /metrics while a server is under load for 80 seconds.

    python docs/draw_load.py docs/load.png --model FILE.gguf [other arguments of serve.py]

Three phases: one client, six clients with four slots, none. Needs requirements-dev.txt. Use an idle machine.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import requests
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.servers import SERVE, started

DEFAULT_ARGUMENTS = [
    *("--generation_strategy", "adaptive", "--draft_weights", "int4", "--sample", "False"),
    *("--batch_size", "4", "--max_steps", "48"),
]
PHASES = [(25, 1), (35, 6), (20, 0)]  # seconds, and clients
EVERY = 0.5  # seconds between two readings
WINDOW = 10  # seconds that a rate or a quantile is over
QUESTIONS = [
    "Explain how rainbows form.",
    "Write a Python function that adds two numbers.",
    "Tell me a joke.",
]
Reading = dict[str, float]  # by name and, of histograms, upper bound


def main() -> None:
    path, *arguments = sys.argv[1:]
    readings = list[tuple[float, Reading]]()
    with started("serve.py", [*SERVE, *DEFAULT_ARGUMENTS, *arguments]) as address:
        _ask(address, QUESTIONS[0])  # the first answer is slower
        begun = time.monotonic()
        load = threading.Thread(target=_load, args=(address, begun))
        load.start()
        while (now := time.monotonic() - begun) < sum(seconds for seconds, _ in PHASES):
            readings.append((now, _read(address)))
            time.sleep(EVERY)
        load.join()
    _draw(readings, path)


def _load(address: str, begun: float) -> None:
    """Run the clients of each phase."""
    end = 0.0
    for seconds, number in PHASES:
        end += seconds
        clients = [threading.Thread(target=_client, args=(address, begun + end, i)) for i in range(number)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        time.sleep(max(0.0, begun + end - time.monotonic()))


def _client(address: str, end: float, number: int) -> None:
    for question in itertools.cycle(QUESTIONS[number % 3 :] + QUESTIONS[: number % 3]):
        if time.monotonic() > end - 2:
            return
        _ask(address, question)


def _ask(address: str, question: str) -> None:
    body = {"messages": [{"role": "user", "content": question}]}
    requests.post(f"{address}/v1/chat/completions", json=body, timeout=600).raise_for_status()


def _read(address: str) -> Reading:
    found = Reading()
    for family in text_string_to_metric_families(requests.get(f"{address}/metrics", timeout=60).text):
        for sample in family.samples:
            bound = sample.labels.get("le")
            name = sample.name if bound is None else f"{sample.name} {bound}"
            found[name] = found.get(name, 0) + sample.value
    return found


def _rate(name: str, later: Reading, earlier: Reading) -> float:
    return later.get(name, 0) - earlier.get(name, 0)


def _quantile(part: float, name: str, later: Reading, earlier: Reading) -> float:
    """Of a histogram's new observations, as Prometheus estimates it: linear within a bucket."""
    buckets = [each for each in later if each.startswith(f"{name}_bucket ") and "Inf" not in each]
    total = part * _rate(f"{name}_count", later, earlier)
    below = 0.0
    lower = 0.0
    for bucket in sorted(buckets, key=lambda each: float(each.split()[1])):
        upto = _rate(bucket, later, earlier)
        upper = float(bucket.split()[1])
        if total and upto >= total:
            return lower + (upper - lower) * (total - below) / (upto - below)
        below, lower = upto, upper
    return float("nan")


def _draw(readings: list[tuple[float, Reading]], path: str) -> None:
    times = [now for now, _ in readings]

    def over_window(value: Callable[[Reading, Reading], float]) -> list[float]:
        ago = round(WINDOW / EVERY)
        return [value(later, readings[max(0, at - ago)][1]) for at, (_, later) in enumerate(readings)]

    def tokens(name: str) -> list[float]:
        return [each / WINDOW for each in over_window(lambda *both: _rate(f"vllm:{name}_total", *both))]

    def accepted(later: Reading, earlier: Reading) -> float:
        drafted = _rate("vllm:spec_decode_num_draft_tokens_total", later, earlier)
        right = _rate("vllm:spec_decode_num_accepted_tokens_total", later, earlier)
        return right / drafted if drafted else float("nan")

    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    (requests_, speed), (first, drafts) = axes
    for name, label in (("running", "in the batch (4 slots)"), ("waiting", "in the queue")):
        values = [reading[f"vllm:num_requests_{name}"] for _, reading in readings]
        requests_.step(times, values, where="post", label=label)
    requests_.set_title("Requests: num_requests_running, _waiting")
    speed.plot(times, tokens("generation_tokens"), label="of answers")
    speed.plot(times, tokens("prompt_tokens"), label="of prompts")
    speed.set_title("Tokens/s: generation_tokens_total, prompt_tokens_total")
    histogram = "vllm:time_to_first_token_seconds"
    for part in (0.5, 0.95):
        values = over_window(lambda *both, part=part: _quantile(part, histogram, *both))
        first.plot(times, values, label=f"{part:.0%} of requests are faster")
    first.set_title("Seconds to the first token: time_to_first_token_seconds")
    drafts.plot(times, over_window(accepted), label="accepted part of drafts")
    usage = [reading["vllm:kv_cache_usage_perc"] for _, reading in readings]
    drafts.plot(times, usage, label="keys and values in use")
    drafts.set_title("spec_decode_num_..., kv_cache_usage_perc")
    drafts.set_ylim(0, 1)
    for axis in axes.flat:
        axis.set_ylim(bottom=0, top=1.25 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8, ncols=2, loc="upper left")
    for axis in axes[1]:
        axis.set_xlabel(f"seconds; rates and quantiles over the last {WINDOW}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
