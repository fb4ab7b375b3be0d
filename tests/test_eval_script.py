"""eval.py against the harness's own Hugging Face model, on tasks whose data is here."""

import json
import logging

import forks
import lm_eval.evaluator
import pandas
import pytest
import yaml
from conftest import ROOT
from helpers import only_run
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_script
from measures.harness_model import request_config
from self_speculation import GenerationConfig

SPECULATION = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]
TASKS = ("functions", "lines", "text")


pytestmark = pytest.mark.usefixtures("few_files_are_read")


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Small tasks of each kind in YAML; a prompt is longer than the model's context, another is empty."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "functions": [
            {"prompt": prompt, "response": "return a"}
            for prompt in ("def add(a, b):", "", "x = 1\n" * 200, "class Stop:", "def add(a", "Once upon")
        ],
        "lines": [
            {"prompt": "def add(a, b):\n", "choices": ["    return a", "Once", "\tpass"], "answer": i % 3}
            for i in range(5)
        ],
        "text": [{"text": "Once upon a time there was a man. " * n} for n in (1, 3, 40)],
    }
    common = {"dataset_path": "json", "test_split": "test", "target_delimiter": ""}
    configs = {
        "functions": {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{response}}",
            "generation_kwargs": {"until": ["\n\n", "Human"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        },
        "lines": {
            "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
        },
        "text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }  # fmt: skip
    for name, config in configs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **files, **config}))
    sampled = {"until": ["\n"], "max_new_tokens": 7, "do_sample": True, "temperature": 2.0, "top_k": 5}
    variants = {
        "sampled": {"include": "functions.yaml", "task": "sampled", "generation_kwargs": sampled},
        "beams": {"include": "functions.yaml", "task": "beams", "generation_kwargs": {"num_beams": 4}},
        "both": {"group": "both", "task": ["functions", "sampled"]},
    }
    for name, config in variants.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def arguments(model, tasks, folder, tmp_path, *more):
    return [
        "--model", str(model), "--tasks", tasks, "--include_path", str(folder), "--bootstrap_iters", "0",
        "--output_dir", str(tmp_path / "logs"), "--device", "cpu", *more,
    ]  # fmt: skip


def samples(folder):
    """task -> what the harness logged of each document, in order."""
    found = {}
    for path in folder.glob("*/samples_*.jsonl"):
        frame = pandas.read_json(path, lines=True).sort_values("doc_id")
        found[path.name.split("_")[1]] = frame["resps"].tolist()
    return found


def results(folder):
    (path,) = folder.glob("*/results_*.json")
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def reference(model_folder, task_folder, few_files_are_read):  # noqa: ARG001
    """What `lm_eval --model hf` makes of the tasks."""
    model = HFLM(
        AutoModelForCausalLM.from_pretrained(model_folder),
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
    )
    tasks = TaskManager(include_path=str(task_folder), include_defaults=False)
    # It cannot answer an empty prompt, the second one, where the tokenizer adds nothing to it.
    without = {"functions": [0, 2, 3, 4, 5]}
    rest = simple_evaluate(model, tasks=["lines", "text"], task_manager=tasks, bootstrap_iters=0)
    functions = simple_evaluate(
        model, tasks=["functions"], samples=without, task_manager=tasks, bootstrap_iters=0
    )
    return functions, rest


@pytest.mark.parametrize("strategy", [[], SPECULATION], ids=["autoregressive", "self_speculative"])
def test_scores_are_those_of_the_harness(strategy, model_folder, task_folder, reference, tmp_path):
    """Guards against answers or prompts cut in another place, and against log-likelihoods of a draft."""
    assert eval_script.main(arguments(model_folder, ",".join(TASKS), task_folder, tmp_path, *strategy)) == 0
    folder = only_run(tmp_path)
    ours, (functions, rest) = samples(folder), reference
    theirs = [sample["resps"] for sample in functions["samples"]["functions"]]
    assert [ours["functions"][i] for i in (0, 2, 3, 4, 5)] == theirs
    for task, metric in (("lines", "acc,none"), ("text", "byte_perplexity,none")):
        assert results(folder)[task][metric] == pytest.approx(rest["results"][task][metric], rel=1e-5)
    assert results(folder)["functions"]["exact_match,none"] == 0
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert set(run["metrics"]["tasks"]) == {"functions"}
    records = pandas.read_json(folder / "records.jsonl", lines=True)
    assert records["num_tokens"].max() == 20
    assert ("acceptance" in run["metrics"]["tasks"]["functions"]) == bool(strategy)


def test_an_early_exit_is_evaluated_as_it_is(model_folder, task_folder, tmp_path):
    """Log-likelihoods and answers of a model cut off after its second layer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "cut")
    for name, path, more in (("early", model_folder, ["--exit_layer", "2"]), ("cut", tmp_path / "cut", [])):
        destination = tmp_path / name
        assert eval_script.main(arguments(path, ",".join(TASKS), task_folder, destination, *more)) == 0
    early, cut = (only_run(tmp_path / name) for name in ("early", "cut"))
    assert samples(early)["functions"] == samples(cut)["functions"]
    for task, metric in (("lines", "acc,none"), ("text", "byte_perplexity,none")):
        assert results(early)[task][metric] == pytest.approx(results(cut)[task][metric], rel=1e-5)


def test_two_ranks_score_as_one(model_folder, task_folder, tmp_path):
    """Sampled answers and shots too: draws do not depend on the rank, nor on what was drawn before."""
    tasks = "functions,sampled,lines,text"
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*SPECULATION, "--num_fewshot", "1"]
    assert eval_script.main(arguments(model_folder, tasks, task_folder, one, *flags)) == 0
    program = tmp_path / "program.py"  # that reads few files, too
    program.write_text(
        f"import functools, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import lm_eval.tasks\n"
        "manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)\n"
        "lm_eval.tasks.TaskManager = manager\n"
        "import eval\n"
        "from runs.program import run\n"
        "run(eval.main)\n"
    )
    ran = forks.run_ranks(2, program, *arguments(model_folder, tasks, task_folder, two, *flags))
    assert ran.returncode == 0, ran.stderr
    left, right = only_run(one), only_run(two)
    assert samples(left)["functions"] == samples(right)["functions"]
    assert samples(left)["sampled"] == samples(right)["sampled"]
    for task, metrics in results(left).items():
        for metric, value in metrics.items():
            assert results(right)[task][metric] == (
                pytest.approx(value) if isinstance(value, float) else value
            )
    assert len(pandas.read_json(right / "records.jsonl", lines=True)) == 12  # none twice


def test_requests_are_honoured_and_flags_win(model_folder, task_folder, tmp_path, capsys):
    """A group with two tasks that ask for different things, then the same with a flag given."""
    common = arguments(model_folder, "both", task_folder, tmp_path, *SPECULATION)
    assert eval_script.main(common) == 0
    records = pandas.read_json(only_run(tmp_path) / "records.jsonl", lines=True).groupby("task")["num_tokens"]
    assert records.max().to_dict() == {"functions": 20, "sampled": 7}
    assert "in place of" not in capsys.readouterr().err
    flags = ["--max_steps", "3", "--nosample", "--output_dir", str(tmp_path / "flags" / "logs")]
    assert eval_script.main([*common, *flags]) == 0
    said = capsys.readouterr().err
    assert "in place of the tasks' own generation settings: --max_steps 3, --sample False" in said
    folder = only_run(tmp_path / "flags")
    frame = pandas.read_json(folder / "records.jsonl", lines=True)
    assert frame["num_tokens"].max() == 3
    answers = frame.pivot(index="doc_id", columns="task", values="tokens")
    assert (answers["functions"] == answers["sampled"]).all()


def test_numbers_end_answers_too(model_folder, task_folder, tmp_path):
    """The harness reads `until=5` as a number. Guards against an AttributeError where texts are expected."""
    common = arguments(model_folder, "functions", task_folder, tmp_path, "--limit", "1")
    assert eval_script.main([*common, "--gen_kwargs", "until=5"]) == 0
    config = request_config({"until": [5, 0, ""]}, GenerationConfig())
    assert config.stop_words == ["5", "0"]


def test_git_does_not_complain(model_folder, task_folder, tmp_path, monkeypatch, capfd):
    """The harness asks git for a version. Guards against `fatal: not a git repository` outside of one."""
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lm_eval.evaluator.get_git_commit_hash)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert eval_script.main(arguments(model_folder, "lines", task_folder, tmp_path, "--limit", "1")) == 0
    assert "fatal" not in capfd.readouterr().err


def test_sampling_can_be_asked_for(model_folder, task_folder, tmp_path):
    """Guards against the temperature of 0 that the harness means greedy decoding by."""
    flags = ["--sample", "True", "--temperature", "5"]
    for seed in ("1", "2"):
        common = arguments(model_folder, "functions", task_folder, tmp_path / seed, *flags)
        assert eval_script.main([*common, "--torch_random_seed", seed, "--log_samples", "False"]) == 0
    left, right = (
        pandas.read_json(only_run(tmp_path / seed) / "records.jsonl", lines=True) for seed in ("1", "2")
    )
    assert (left["tokens"] != right["tokens"]).any()
    assert not samples(only_run(tmp_path / "1"))


def test_an_interrupted_evaluation_goes_on_from_its_cache(
    model_folder, task_folder, tmp_path, monkeypatch, capsys
):
    common = arguments(
        model_folder,
        "functions,lines",
        task_folder,
        tmp_path,
        "--use_cache",
        str(tmp_path / "cache" / "answers"),
    )
    calls = []
    answer = eval_script.HarnessModel._answer

    def interrupted(self, asked, measured):
        calls.append(asked.request.doc_id)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(self, asked, measured)

    monkeypatch.setattr(eval_script.HarnessModel, "_answer", interrupted)
    assert eval_script.main(common) == 130
    assert "the same command goes on with what --use_cache kept" in capsys.readouterr().err
    assert eval_script.main([*common, "--output_dir", str(tmp_path / "again" / "logs")]) == 0
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert len(samples(only_run(tmp_path / "again"))["functions"]) == 6
    # Answers of another exit are none of this one's.
    assert eval_script.main([*common, "--exit_layer", "1", "--output_dir", str(tmp_path / "e" / "logs")]) == 0
    assert len(calls) == 7 + 6


def test_only_answers_are_wanted(model_folder, task_folder, tmp_path):
    assert (
        eval_script.main(arguments(model_folder, "functions", task_folder, tmp_path, "--predict_only")) == 0
    )
    folder = only_run(tmp_path)
    assert len(samples(folder)["functions"]) == 6
    assert "exact_match,none" not in results(folder)["functions"]


def test_a_prompt_is_logged_where_that_is_asked_for(model_folder, task_folder, tmp_path, monkeypatch):
    """Guards against a level of the harness's log that hides what `--write_out` makes it say."""
    said = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logging.getLogger("lm_eval").addHandler(handler)
    common = arguments(model_folder, "functions", task_folder, tmp_path, "--limit", "1", "--predict_only")
    assert eval_script.main([*common, "--write_out", "True"]) == 0
    logged = [text for text in said if "document 0; context prompt" in text]
    assert eval_script.main(common) == 0
    logging.getLogger("lm_eval").removeHandler(handler)
    assert len(logged) == 1
    assert [text for text in said if "document 0; context prompt" in text] == logged


def test_chat_template_and_shots(model_folder, task_folder, tmp_path):
    shots = [
        "--apply_chat_template",
        "--num_fewshot",
        "1",
        "--system_instruction",
        "Be brief.",
        "--limit",
        "2",
    ]
    assert eval_script.main(arguments(model_folder, "functions", task_folder, tmp_path, *shots)) == 0
    prompt = pandas.read_json(only_run(tmp_path) / "records.jsonl", lines=True)["prompt"][0]
    assert prompt.startswith("system: Be brief.\nuser: ")
    assert prompt.count("user: ") == 2
    assert prompt.endswith("assistant:")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "function"], "--tasks function: no such task; near are functions"),
        (
            ["--tasks", "beams"],
            "--tasks beams: asks for num_beams=4 in generation; supported are max_gen_toks, ",
        ),
        (["--tasks", "functions", "--gen_kwargs", "num_beams=2"], "asks for num_beams=2"),
        (
            ["--tasks", "functions", "--gen_kwargs", "top_p=1.5"],
            "--tasks functions: asks for top_p 1.5: must be",
        ),
        (["--tasks", str(ROOT / "tests")], "no task in there"),
        (["--tasks", "functions", "--limit", "0"], "--limit 0.0: must be above 0"),
        (
            ["--tasks", "functions", "--batch_size", "auto:x"],
            "--batch_size 'auto:x': must be a number from 1, or auto",
        ),
        (["--tasks", "functions", "--include_path", "no/such"], "--include_path no/such: no such folder"),
        (["--tasks", "functions", "--exit_layer", "4"], "--exit_layer 4: must be between 1 and 3"),
        (["--tasks", "functions", "--check_integrity", "True"], "--check_integrity True: needs lm-eval from"),
        (["--tasks", "functions", "--cache_requests", "x"], "--cache_requests 'x': must be one of true, "),
        (["--tasks", "functions", "--verbosity", "loud"], "--verbosity 'loud': must be one of debug, "),
        ([], "required"),
    ],
)
def test_bad_usage_is_refused_before_the_model_is_loaded(
    flags, message, model_folder, task_folder, monkeypatch, capsys
):
    monkeypatch.setattr(eval_script, "load_generator", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as exit:
        eval_script.main(["--model", str(model_folder), "--include_path", str(task_folder), *flags])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_tasks_that_come_with_the_repository(model_folder, tmp_path, monkeypatch, capsys):
    """Guards against data that is found from one working directory only."""
    monkeypatch.chdir(tmp_path)
    tasks = "python_functions,python_lines,python_text"
    common = arguments(model_folder, tasks, ROOT / "eval_tasks", tmp_path, "--limit", "2")
    assert eval_script.main(common) == 0
    assert "python_functions: 2 answers" in capsys.readouterr().out
    assert set(results(only_run(tmp_path))) == {"python_functions", "python_lines", "python_text"}
