"""Times the text of an output, token by token: ids to characters, stop words, the pieces of a stream.

    python benchmarks/texts.py

Outputs have 100,000 characters. *early* and *late* are microseconds of a processor for a token, the mean over
the first and the last thousand: a token costs time by the text alone, however much came before. The last line
is one JSON object.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.workloads import texts
from self_speculation import default_model
from self_speculation.text.texts import OutputReader
from serving.streaming import Delta, DeltaStreamer

WORD = 256  # characters, the most that the server takes
# 128 of them, the most of a request.
NEVER = [f"{i:03}".ljust(WORD, "\x01") for i in range(128)]
ALMOST = [f"{i:03}".rjust(WORD, "=") for i in range(128)]
AGAIN = [f"={i:03}".ljust(WORD, "=") for i in range(128)]
MANY_LENGTHS = [f"{'=' * length}{length}" for length in range(2, WORD, 2)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--characters", type=int, default=100_000, help="of an output")
    size = parser.parse_args(argv).characters
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    code = "".join(itertools.islice(itertools.cycle(texts()["code"]), 1 + size // 100))[:size]
    byte = tokenizer.encode("é", add_special_tokens=False)[-1]  # the second of two
    outputs: dict[str, tuple[list[int], Iterable[str]]] = {
        "code, no stop words": (tokenizer.encode(code), []),
        "code, 4 short ones": (tokenizer.encode(code), ["\n\n\n\n", "<end>", "###", "Human:"]),
        "code, 128 that never begin": (tokenizer.encode(code), NEVER),
        "'=', 128 that always begin": (tokenizer.encode("=" * size), ALMOST),
        "'=', 128 that begin at each": (tokenizer.encode("=" * size), AGAIN),
        "'=', 128 of all lengths": (tokenizer.encode("=" * size), MANY_LENGTHS),
        "bytes of no character": ([byte] * size, ["<end>"]),
    }
    rows = []
    print(f"{'':<30}{'tokens':>9}{'early':>9}{'late':>9}")
    for name, (ids, words) in outputs.items():
        times = token_times(tokenizer, ids, words)
        sample = max(1, min(1000, len(times) // 2))
        early = 1e6 * sum(times[:sample]) / sample
        late = 1e6 * sum(times[-sample:]) / sample
        rows.append(
            {"output": name, "tokens": len(ids), "early_us": round(early, 1), "late_us": round(late, 1)}
        )
        print(f"{name:<30}{len(ids):9}{early:9.1f}{late:9.1f}")
    print(json.dumps({"characters": size, "rows": rows}))


def token_times(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], words: Iterable[str]) -> list[float]:
    """Seconds of a processor for each token: the check of stop words, then the stream."""
    pieces = list[Delta]()
    reader = OutputReader(tokenizer, words)
    streamer = DeltaStreamer(tokenizer, pieces.append)
    streamer.begin(reader)
    output = list[int]()
    times = list[float]()
    for id_ in ids:
        output.append(id_)
        began = time.thread_time()
        reader(output)
        streamer.put([id_])
        times.append(time.thread_time() - began)
    return times


if __name__ == "__main__":
    main()
