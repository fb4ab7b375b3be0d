"""eval.py against the harness's Hugging Face model, on tasks whose data is here."""

import builtins
import copy
import errno
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import ROOT, assert_close, generator_of, needs_operators, own_llama
from helpers import SPECULATION, refused, run_program, watch, write_rows
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_script
from measures.harness_model import SelfSpeculativeLM
from runs.failures import Failed
from self_speculation import fuse
from self_speculation.engine.scheduler import Scheduler

ALL = "functions,python_lines,python_text"

pytestmark = pytest.mark.usefixtures("few_files_are_read")


PROMPTS = ("def add(a, b):", "", "x = 1\n" * 200, "class Stop:", "def add(a", "Once upon")
GREEDY = {"until": ["\n\n", "Human"], "max_gen_toks": 20, "do_sample": False}
SAMPLED = {"until": ["\n"], "max_new_tokens": 7, "do_sample": True, "temperature": 2.0, "top_k": 5}
TASKS = {
    "functions": {"generation_kwargs": GREEDY},
    "sampled": {"generation_kwargs": SAMPLED, "repeats": 2},
    "beams": {"generation_kwargs": {"num_beams": 4}},
    "marked": {"generation_kwargs": GREEDY, "unsafe_code": True},
}
# As tasks with lm_eval's `code_eval`: their module ends with a warning of many lines unless it may run.
PROGRAMS = """
import os

if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
    raise ValueError("#####\\nWARNING\\nset HF_ALLOW_CODE_EVAL")


def passed(references, predictions):
    exec(f"length = len({predictions[0]!r})", found := {})
    return float(found["length"] > 0)
"""
RUNS_PROGRAMS = """
include: python_functions.yaml
task: programs
unsafe_code: true
metric_list: [{metric: !function programs.passed, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Tasks of the repository with few rows; one prompt is longer than the model's context, one is empty."""
    folder = Path(shutil.copytree(ROOT / "eval_tasks", tmp_path_factory.mktemp("of") / "tasks"))
    for name in ("python_lines", "python_text"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.open().readlines()[:4]))
    rows = [{"prompt": text, "response": "return a"} for text in PROMPTS]
    write_rows(folder / "python_functions.jsonl", rows)
    for name, config in TASKS.items():
        task_settings = {"include": "python_functions.yaml", "task": name, **config}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task_settings))
    (folder / "programs.py").write_text(PROGRAMS)
    (folder / "programs.yaml").write_text(RUNS_PROGRAMS)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["functions", "sampled"]}))
    return folder


class Written:
    """The files of the harness below a folder."""

    def __init__(self, folder):
        (path,) = folder.glob("*/results_*.json")
        saved = json.loads(path.read_text())
        self.results = saved["results"]
        self.config = saved["config"]
        self.generation = saved.get("generation")  # the harness's command has none
        scores = [(task, *score) for task, of in self.results.items() for score in of.items()]
        self.scores = {(task, name): value for task, name, value in scores if isinstance(value, float)}
        self.answers = {}
        self.prompts = {}  # of each task, by document
        for path in folder.glob("*/samples_*.jsonl"):
            frame = pandas.read_json(path, lines=True).sort_values("doc_id")
            task = path.name.split("_")[1]
            self.answers[task] = frame["resps"].tolist()
            self.prompts[task] = [each["gen_args_0"]["arg_0"] for each in frame["arguments"]]


@pytest.fixture
def arguments(model_folder, task_folder, tmp_path):
    def of(tasks, *flags, model=model_folder, to="logs"):
        return [
            "--model", str(model), "--tasks", tasks, "--include_path", str(task_folder),
            "--output_path", str(tmp_path / to), "--device", "cpu", "--bootstrap_iters", "0", *flags,
        ]  # fmt: skip

    return of


@pytest.fixture
def evaluated(arguments, tmp_path):
    """Runs eval.py."""

    def run(tasks, *flags, to="logs", **kwargs):
        assert eval_script.main(arguments(tasks, *flags, to=to, **kwargs)) == 0
        return Written(tmp_path / to)

    return run


def test_scores_are_those_of_the_harness(evaluated, model_folder, task_folder, tmp_path, capsys):
    """Guards against answers or prompts cut elsewhere or mixed up, and log-likelihoods of a draft."""
    model = HFLM(str(model_folder), device="cpu")
    common = {"task_manager": TaskManager(include_path=str(task_folder), include_defaults=False)}
    common["bootstrap_iters"] = 0
    # It cannot answer an empty prompt, the second one, where the tokenizer adds nothing to it.
    answered = [0, 2, 3, 4, 5]
    functions = simple_evaluate(model, tasks=["functions"], samples={"functions": answered}, **common)
    rest = simple_evaluate(model, tasks=["python_lines", "python_text"], **common)
    capsys.readouterr()
    ours = evaluated(ALL, *SPECULATION, "--batch_size", "2")
    theirs = [sample["resps"] for sample in functions["samples"]["functions"]]
    assert [ours.answers["functions"][i] for i in answered] == theirs
    for task, metric in (("python_lines", "acc,none"), ("python_text", "byte_perplexity,none")):
        assert ours.results[task][metric] == pytest.approx(rest["results"][task][metric], rel=1e-5)
    printed = capsys.readouterr().out
    assert ("|functions " in printed, printed.endswith(f"results are in {tmp_path / 'logs'}\n")) == (
        True,
        True,
    )
    speed = ours.generation["speed"]
    drafts = ours.generation["acceptance"]
    assert (ours.generation["num_answers"], drafts["num_drafted"] > drafts["num_accepted"] > 0) == (6, True)
    assert f"\n6 answers, {speed['num_tokens']} tokens in {speed['total_time']:.1f} s: " in printed
    assert (
        f"{speed['tokens_per_second']:.2f} tokens/s by wall time, first passes too\nacceptance rate "
        in printed
    )
    assert f"mean accepted length {drafts['mean_accepted_length']:.2f}\n" in printed


def test_only_answers_have_a_speed(evaluated, capsys):
    """Guards against figures of nothing, and drafts of decoding that has none."""
    assert evaluated("python_lines").generation is None
    assert " tokens/s " not in capsys.readouterr().out
    assert {*evaluated("functions", to="plain").generation} == {"num_answers", "speed"}
    assert "acceptance" not in capsys.readouterr().out


def test_an_early_exit_scores_as_the_first_layers_alone(model_folder, evaluated, tmp_path):
    """Guards against log-likelihoods or answers of the full model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "cut")
    cut = evaluated(ALL, model=tmp_path / "cut", to="first")
    early = evaluated(ALL, "--exit_layer", "2")
    assert early.answers["functions"] == cut.answers["functions"]
    assert early.scores == pytest.approx(cut.scores, rel=1e-5)
    assert early.config["model_args"]["exit_layer"] == 2


@pytest.mark.slow
def test_two_ranks_score_as_one(arguments, evaluated, tmp_path):
    """Guards against draws that depend on the rank or on earlier ones, and answers counted twice."""
    tasks = f"{ALL},sampled"
    one = evaluated(tasks, *SPECULATION, to="one")
    code = (
        "import functools, eval, lm_eval.tasks as tasks; from runs.program import run\n"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)\n"
        "run(eval.main)\n"
    )
    ran = run_program(2, tmp_path, code, *arguments(tasks, *SPECULATION))
    assert ran.returncode == 0, ran.stderr
    two = Written(tmp_path / "logs")
    assert all(one.answers[task] == two.answers[task] for task in ("functions", "sampled"))
    assert one.scores == pytest.approx(two.scores)
    assert ran.stdout.count("results are in") == 1


def test_flags_override_the_settings_of_tasks(evaluated, monkeypatch):
    """Guards against settings of another task, flags that are overridden, and samples that are all alike."""
    limits = set()

    def note(_, context, max_length, **__):
        limits.add(max_length - context.shape[1])

    watch(monkeypatch, SelfSpeculativeLM, "_model_generate", note)
    sampled = evaluated("both", *SPECULATION)
    assert not sampled.config["gen_kwargs"]
    assert any(first != second for ((first, second),) in sampled.answers["sampled"])
    assert limits == {20, 7}
    limits.clear()
    flags = ["--max-steps", "3", "--no_sample", "--stop_words", "Human", "--gen_kwargs", "top_k=3"]
    greedy = evaluated("both", *SPECULATION, *flags, to="flags")
    used = {"max_gen_toks": 3, "do_sample": False, "until": ["Human"], "top_k": 3}
    assert greedy.config["gen_kwargs"] == used
    assert greedy.answers["functions"] == [[answers[:1]] for (answers,) in greedy.answers["sampled"]]
    assert limits == {3}
    flags = ["--sample", "True", "--gen_kwargs", "until=5", "--seed"]
    sampled = [evaluated("functions", *flags, seed, to=seed) for seed in ("1", "2")]
    assert [each.config["model_args"]["seed"] for each in sampled] == [1, 2]
    assert sampled[0].config["gen_kwargs"]["temperature"] == 0.6
    assert sampled[0].answers != sampled[1].answers


def test_an_interrupted_evaluation_goes_on_from_its_cache(
    arguments, evaluated, tmp_path, monkeypatch, capsys
):
    """Guards against answers that are generated again, and answers of another exit layer."""
    cache = ["--use_cache", str(tmp_path / "cache" / "answers")]
    answered = []

    def interrupts(_, context, **__):
        answered.append(context.tolist())
        if len(answered) == 4:
            raise KeyboardInterrupt

    watch(monkeypatch, SelfSpeculativeLM, "_model_generate", interrupts)
    assert eval_script.main(arguments("functions", *cache)) == 130
    assert "the same command goes on with what --use_cache kept" in capsys.readouterr().err
    assert len(evaluated("functions", *cache).answers["functions"]) == 6
    assert len(answered) == 7
    assert answered[4] == answered[3]
    evaluated("functions", *cache, "--exit_layer", "1", to="early")
    assert len(answered) == 7 + 6


@pytest.mark.parametrize("place", ["results", "samples"])
def test_results_that_cannot_be_written_are_an_error(place, arguments, tmp_path, monkeypatch, capsys):
    """Guards against a full disk that the harness only warns of, and JSON that is cut short."""

    def is_full(path, *_, **__):
        if Path(str(path)).name.startswith(f"{place}_"):
            Path(path).touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    watch(monkeypatch, builtins, "open", is_full)  # of samples
    watch(monkeypatch, Path, "write_text", is_full)
    flags = ["--log_samples", "True"]
    with pytest.raises(Failed, match=f"cannot write {tmp_path}/logs: No space left on device"):
        eval_script.main(arguments("python_lines", *flags))
    assert "|python_lines" in capsys.readouterr().out
    assert not [*(tmp_path / "logs").iterdir()]


def test_flags_about_prompts_and_metrics_reach_the_harness(evaluated):
    """Guards against flags of lm_eval that work there and are dropped here."""
    shots = ["--apply_chat_template", "--num_fewshot", "1", "--system_instruction", "Be brief."]
    found = evaluated("functions", *shots, "--predict_only")
    prompt = found.prompts["functions"][0]
    assert prompt.startswith("system: Be brief.\nuser: ")
    assert (prompt.count("user: "), prompt.endswith("assistant:")) == (2, True)
    assert "exact_match,none" not in found.results["functions"]


def test_answers_run_as_programs_only_if_that_is_confirmed(arguments, evaluated, monkeypatch, capsys):
    """Guards against tasks that no flag lets run, a row of # as the error, and no warning."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    for task in ("marked", "programs"):
        line = refused(eval_script.main, arguments(task), capsys)
        assert f"--tasks {task}: answers run as programs, which needs --confirm_run_unsafe_code True" in line
    found = evaluated("programs", "--confirm_run_unsafe_code", "True")
    assert 0 < found.scores["programs", "passed,none"] <= 1
    assert "Nothing confines these programs." in capsys.readouterr().err


def test_what_cannot_run_is_refused_by_name(arguments, model_folder, capsys):
    """Guards against settings that are ignored, and a traceback out of the harness or after other tasks."""
    for tasks, flags, message in (
        ("python_lines,beams", ["--batch_size", "auto"], "beams asks for num_beams=4: supported are "),
        ("python_lines,functions", ["--max_steps", "256"], "functions asks for max_steps 256: must be below"),
    ):
        assert message in refused(eval_script.main, arguments(tasks, *flags), capsys)
    for settings, message in (
        ({"layer": 2}, "--model_args layer: GenerationConfig has no such field"),
        ({"top_p": 0.5}, "--model_args top_p: a setting of tasks, use --gen_kwargs"),
        ({"exit_layer": "2"}, "--model_args exit_layer '2': must be an integer"),
        ({"generation_strategy": "self_speculative"}, "--exit_layer: self_speculative needs one"),
    ):
        make = functools.partial(SelfSpeculativeLM, str(model_folder), **settings)
        assert message in refused(lambda _, make=make: make(), [], capsys)


def test_mistakes_of_the_program_are_not_explained_away(arguments, monkeypatch):
    """Guards against a ValueError of ours that reads as an error of the harness about flags."""
    monkeypatch.setattr(Scheduler, "step", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        eval_script.main(arguments("functions"))


@pytest.mark.slow
def test_the_harness_own_command_knows_the_model(model_folder, tmp_path):
    """Guards against a model that the harness does not find, and flags of eval.py alone."""
    settings = f"pretrained={model_folder},exit_layer=2,num_speculations=3"
    command = [sys.executable, "-m", "measures.harness_model", "run", "--model", "self_speculative"]
    command += ["--model_args", f"{settings},generation_strategy=self_speculative", "--limit", "2"]
    command += ["--tasks", "python_functions", "--include_path", "eval_tasks", "--log_samples"]
    done = subprocess.run([*command, "--output_path", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|python_functions|" in done.stdout
    assert Written(tmp_path).config["model"] == "self_speculative"


@needs_operators
@pytest.mark.parametrize("depth", [-1, 2])
def test_likelihoods_of_weights_in_16_bits_are_those_of_float32(depth, byte_tokenizer, monkeypatch):
    """Guards against log-likelihoods by transformers' layers, which round to 16 bits."""
    model = own_llama(vocab_size=len(byte_tokenizer)).to(torch.float16)
    exact = copy.deepcopy(model).float()
    fuse(model)
    ids = torch.tensor([[5, 9, 4, 7], [3, 8, 0, 0]])
    asked = []
    for each in (model, exact):
        generator = generator_of(byte_tokenizer, each)
        monkeypatch.setattr("measures.harness_model.load_generator", lambda *_, it=generator: it)
        logits = SelfSpeculativeLM(exit_layer=depth)._model_call(ids)
        asked.append(torch.cat([logits[0], logits[1, :2]]))
    assert asked[0].dtype == torch.float32
    assert_close(*asked, roundings=200)
