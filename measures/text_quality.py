"""How good a model's answers are: compared with references, or as programs that have to pass their tests."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import rapidfuzz
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from runs.records import Record
from self_speculation.decoding.stopping import StopWords

# What follows a finished function in the output of a model, after the paper of the Codex models.
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
    """Share of HumanEval problems whose tests a completion passes; runs each in a process of its own.

    Models go on writing: of a completion, what comes after the end of the function is cut.

    Args:
        problems: rows of HumanEval.
        timeout: seconds for each.
    """
    answers = [StopWords(None, HUMAN_EVAL_ENDS).cut(prediction) for prediction in predictions]
    jobs = "".join(json.dumps([*pair, timeout]) + "\n" for pair in zip(problems, answers, strict=True))
    runner = Path(__file__).with_name("run_programs.py")
    command, pipe = [sys.executable, str(runner)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(jobs)
        process.stdin.close()  # it reads all of them before it begins
        passed = [
            json.loads(line) for line in tqdm(process.stdout, desc="running answers", total=len(answers))
        ]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return statistics.mean(passed)
