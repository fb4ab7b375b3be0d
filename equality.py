"""Whether a server gives equal answers: alone, again, among others, in a stream, without drafts, by a seed.

    python equality.py --url http://127.0.0.1:8000 --num_samples 50 --clients 8
    python equality.py --url http://127.0.0.1:8080 --chat True --no_drafts '{"speculative.n_max": 0}'

A client of OpenAI's protocol, for any server; it loads no model. The installed package has it as the command
self-speculation-equality. Each prompt is asked greedily and sampled by
a seed, in each way of --ways. The table has the share of equal answers of each pair of ways, with the 90 %
confidence interval. Where answers have log-probabilities, a greedy difference is a near-tie if the tokens at
the first place that differs are about as likely.

The exit status is 0 if all answers to a prompt are equal, and 1 if some differ or are missing.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the installed package has the imported modules there

from arguments import parse, refuse
from data import DataArguments, DataError, load_examples
from measures.equality import EqualityArguments, Measurement
from runs.failures import check_writable
from runs.program import run


def main(argv: Sequence[str] | None = None) -> int:
    data_args, args = parse(__doc__ or "", DataArguments, EqualityArguments, args=argv)
    check_writable("output_dir", args.output_dir)
    try:
        examples = load_examples(data_args, args.seed)
    except DataError as error:
        refuse(str(error))
    return Measurement(data_args, args, examples).run()


command = partial(run, main)  # of the installed package

if __name__ == "__main__":
    run(main)
