"""One evaluation by lm_eval, with a model that generates by a strategy of this library."""

import sys
from dataclasses import asdict
from typing import Any

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table, setup_logging

from arguments import GenerationConfig, refuse
from data import one_line
from measures.harness_model import SelfSpeculativeLM, UnsupportedError, request_config
from runs.failures import reason
from runs.status import print_status

_LESS = "a smaller --batch_size, --dtype half, --quantization int8 or int4"
# Fields of the flags that `simple_evaluate` does not take.
_OURS = ("tasks", "include_path", "output_path", "verbosity")


def evaluate(settings: dict[str, Any], args: Any, gen_kwargs: dict[str, Any]) -> int:
    """Evaluate, print tables and save results; the exit status.

    Args:
        settings: arguments of `SelfSpeculativeLM`.
        args: an `EvalArguments`.
        gen_kwargs: override settings of tasks.
    """
    setup_logging(args.verbosity)
    tasks = lm_eval.tasks.TaskManager(include_path=args.include_path)
    for name in args.tasks:
        if not tasks.match_tasks([name]):
            own = "; tasks of this program need --include_path eval_tasks" * (not args.include_path)
            refuse(f"--tasks {name}: lm_eval has no such task{own}")
    try:
        request_config(gen_kwargs, GenerationConfig(), None)
    except UnsupportedError as error:
        refuse(f"--gen_kwargs {error}")
    tracker = EvaluationTracker(output_path=args.output_path)
    model = SelfSpeculativeLM(**settings, batch_size=args.batch_size)
    theirs = {name: value for name, value in asdict(args).items() if name not in _OURS}
    try:
        results = simple_evaluate(
            model,
            model_args=settings,
            tasks=tasks.match_tasks(args.tasks),
            evaluation_tracker=tracker,
            task_manager=tasks,
            **{**theirs, "gen_kwargs": gen_kwargs or None},
        )
    except KeyboardInterrupt:
        print_status(f"\ninterrupted; {_kept(args.use_cache)}")
        return 130
    except Exception as error:
        if (why := reason(error, _LESS)) is not None:
            print(f"\n{why}; {_kept(args.use_cache)}", file=sys.stderr)
            return 1
        if model.has_begun and not isinstance(error, UnsupportedError):
            raise
        refuse(f"lm_eval: {one_line(error)}")  # tasks or data sets
    if results is not None:  # at rank 0
        samples = results.pop("samples", {})
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, own in samples.items():
            tracker.save_results_samples(task_name=name, samples=own)
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        print(f"results are in {args.output_path}")
    return 0


def _kept(cache: str | None) -> str:
    if cache:
        return "the same command goes on with what --use_cache kept: all answers but sampled ones"
    return "--use_cache PATH would have kept answers to go on from"
