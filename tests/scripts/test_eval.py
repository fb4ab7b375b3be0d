"""eval.py against the harness's own Hugging Face model, on tasks whose data is here."""

import copy
import json
import re

import forks
import pandas
import pytest
import torch
import yaml
from conftest import ROOT, assert_close, tiny_llama
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_script
from measures.harness_model import HarnessModel, request_config
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, fuse, make_strategy
from self_speculation.model.linear import Float16Linear, works

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
        "--model", str(model), "--tasks", tasks, "--include_path", str(folder), "--log_samples",
        "--output_path", str(tmp_path / "logs"), "--device", "cpu", *more,
    ]  # fmt: skip


def samples(tmp_path):
    """task -> what the harness logged of each document, in order."""
    found = {}
    for path in (tmp_path / "logs").glob("*/samples_*.jsonl"):
        frame = pandas.read_json(path, lines=True).sort_values("doc_id")
        found[path.name.split("_")[1]] = frame["resps"].tolist()
    return found


def saved(tmp_path):
    """What the harness wrote about the run."""
    (path,) = (tmp_path / "logs").glob("*/results_*.json")
    return json.loads(path.read_text())


def results(tmp_path):
    return saved(tmp_path)["results"]


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
def test_scores_are_those_of_the_harness(strategy, model_folder, task_folder, reference, tmp_path, capsys):
    """Guards against answers or prompts cut in another place, and against log-likelihoods of a draft."""
    assert eval_script.main(arguments(model_folder, ",".join(TASKS), task_folder, tmp_path, *strategy)) == 0
    ours, (functions, rest) = samples(tmp_path), reference
    theirs = [sample["resps"] for sample in functions["samples"]["functions"]]
    assert [ours["functions"][i] for i in (0, 2, 3, 4, 5)] == theirs
    for task, metric in (("lines", "acc,none"), ("text", "byte_perplexity,none")):
        assert results(tmp_path)[task][metric] == pytest.approx(rest["results"][task][metric], rel=1e-5)
    assert results(tmp_path)["functions"]["exact_match,none"] == 0
    captured = capsys.readouterr()
    table, said = captured.out.split("\n\n", 1)
    assert "|functions|" in table
    assert re.match(r"float32, .*, 1 thread, 1 rank\n", table)
    assert captured.err.count("windows of texts: 0it") == 1
    assert captured.err.count("Running loglikelihood requests:   0%") == 1  # of lines, not of each text
    (line,) = [line for line in said.splitlines() if "tokens/s" in line]
    assert line.startswith("functions: 6 answers, greedy, ")
    assert ("acceptance rate" in line) == bool(strategy)
    assert f"results are in {tmp_path / 'logs'}" in said


def test_an_early_exit_is_evaluated_as_it_is(model_folder, task_folder, tmp_path):
    """Log-likelihoods and answers of a model cut off after its second layer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "cut")
    early, cut = tmp_path / "early", tmp_path / "cut"
    for destination, path, more in ((early, model_folder, ["--exit_layer", "2"]), (cut, cut, [])):
        assert eval_script.main(arguments(path, ",".join(TASKS), task_folder, destination, *more)) == 0
    assert samples(early)["functions"] == samples(cut)["functions"]
    for task, metric in (("lines", "acc,none"), ("text", "byte_perplexity,none")):
        assert results(early)[task][metric] == pytest.approx(results(cut)[task][metric], rel=1e-5)
    assert saved(early)["config"]["model_args"]["exit_layer"] == 2


@pytest.mark.slow
def test_two_ranks_score_as_one(model_folder, task_folder, tmp_path):
    """Sampled answers too. Guards against draws that depend on the rank, or on what was drawn before, and
    against answers that are counted twice.
    """
    tasks = "functions,sampled,lines,text"
    one, two = tmp_path / "one", tmp_path / "two"
    assert eval_script.main(arguments(model_folder, tasks, task_folder, one, *SPECULATION)) == 0
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
    ran = forks.run_ranks(2, program, *arguments(model_folder, tasks, task_folder, two, *SPECULATION))
    assert ran.returncode == 0, ran.stderr
    assert samples(one)["functions"] == samples(two)["functions"]
    assert samples(one)["sampled"] == samples(two)["sampled"]
    for task, metrics in results(one).items():
        for metric, value in metrics.items():
            assert results(two)[task][metric] == (pytest.approx(value) if isinstance(value, float) else value)
    assert ran.stdout.count("functions: 6 answers") == ran.stdout.count("sampled: 6 answers") == 1


def test_requests_are_honoured_and_flags_win(model_folder, task_folder, tmp_path, monkeypatch):
    """A group with two tasks that ask for different things, then the same with flags given, which the harness
    says that it used.
    """
    records = []
    monkeypatch.setattr("measures.evaluation._show", records.extend)

    def longest():
        by_task = pandas.DataFrame(records).groupby("task")["num_tokens"].max().to_dict()
        records.clear()
        return by_task

    common = arguments(model_folder, "both", task_folder, tmp_path, *SPECULATION)
    assert eval_script.main(common) == 0
    assert not saved(tmp_path)["config"]["gen_kwargs"]
    assert longest() == {"functions": 20, "sampled": 7}
    flags = ["--max-steps", "3", "--no_sample", "--gen_kwargs", "top_k=3"]
    assert eval_script.main([*common, *flags, "--output_path", str(tmp_path / "flags" / "logs")]) == 0
    used = saved(tmp_path / "flags")["config"]["gen_kwargs"]
    assert used == {"max_gen_toks": 3, "do_sample": False, "top_k": 3}
    answers = samples(tmp_path / "flags")
    assert answers["functions"] == answers["sampled"]
    assert longest() == {"functions": 3, "sampled": 3}


def test_numbers_end_answers_too(model_folder, task_folder, tmp_path):
    """The harness reads `until=5` as a number. Guards against an AttributeError where texts are expected."""
    common = arguments(model_folder, "functions", task_folder, tmp_path, "--limit", "1")
    assert eval_script.main([*common, "--gen_kwargs", "until=5"]) == 0
    config = request_config({"until": [5, 0, ""]}, GenerationConfig(), None)
    assert config.stop_words == ["5", "0"]


def test_sampling_can_be_asked_for(model_folder, task_folder, tmp_path):
    """Guards against the temperature of 0 that the harness means greedy decoding by, and against seeds that
    change nothing.
    """
    answers = []
    for seed, more in (("1", ["--temperature", "5"]), ("2", ["--temperature", "5"]), ("1", [])):
        folder = tmp_path / str(len(answers))
        flags = ["--sample", "True", "--seed", seed, *more]
        assert eval_script.main(arguments(model_folder, "functions", task_folder, folder, *flags)) == 0
        answers.append(samples(folder)["functions"])
        assert saved(folder)["config"]["fewshot_seed"] == int(seed)
    assert answers[0] != answers[1]
    assert saved(folder)["config"]["gen_kwargs"]["temperature"] == 0.6


def test_an_interrupted_evaluation_goes_on_from_its_cache(
    model_folder, task_folder, tmp_path, monkeypatch, capsys
):
    """Guards against answers that are generated again, or taken from another exit layer's cache."""
    cache = ["--use_cache", str(tmp_path / "cache" / "answers")]
    common = arguments(model_folder, "functions,lines", task_folder, tmp_path, *cache)
    calls = []
    answer = HarnessModel._answer

    def interrupted(self, asked, record):
        calls.append(asked.request.doc_id)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(self, asked, record)

    monkeypatch.setattr(HarnessModel, "_answer", interrupted)
    assert eval_script.main(common) == 130
    assert "the same command goes on with what --use_cache kept" in capsys.readouterr().err
    assert eval_script.main([*common, "--output_path", str(tmp_path / "again" / "logs")]) == 0
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert len(samples(tmp_path / "again")["functions"]) == 6
    other = ["--exit_layer", "1", "--output_path", str(tmp_path / "e" / "logs")]
    assert eval_script.main([*common, *other]) == 0
    assert len(calls) == 7 + 6


def test_only_answers_are_wanted(model_folder, task_folder, tmp_path):
    """Guards against metrics, and a mode of the harness's, that are not passed on."""
    common = arguments(model_folder, "functions", task_folder, tmp_path, "--predict_only")
    assert eval_script.main(common) == 0
    assert len(samples(tmp_path)["functions"]) == 6
    assert "exact_match,none" not in results(tmp_path)["functions"]


def test_chat_template_and_shots(model_folder, task_folder, tmp_path):
    """Guards against flags about prompts that do not reach the harness."""
    shots = ["--apply_chat_template", "--num_fewshot", "1", "--system_instruction", "Be brief."]
    assert eval_script.main(arguments(model_folder, "functions", task_folder, tmp_path, *shots)) == 0
    (path,) = (tmp_path / "logs").glob("*/samples_*")
    prompt = json.loads(path.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("system: Be brief.\nuser: ")
    assert prompt.count("user: ") == 2
    assert prompt.endswith("assistant:")


def test_flags_of_a_file(model_folder, task_folder, tmp_path, monkeypatch):
    """--config; what the command line says goes before it. Guards against --output_dir in place of the file's
    path, and against flags in place of all that the file asks of generation.
    """
    file = tmp_path / "flags.yaml"
    asked = {"tasks": ["functions"], "limit": 3, "output_path": str(tmp_path / "logs"), "log_samples": True}
    more = {"include_path": str(task_folder), "gen_kwargs": "temperature=0.7,max_gen_toks=4"}
    file.write_text(yaml.safe_dump({**asked, **more}))
    monkeypatch.chdir(tmp_path)
    flags = [
        "--config",
        file,
        "--model",
        model_folder,
        "--limit",
        "2",
        "--sample",
        "True",
        "--max_steps",
        "3",
    ]
    assert eval_script.main([*map(str, flags)]) == 0
    assert len(samples(tmp_path)["functions"]) == 2
    used = saved(tmp_path)["config"]["gen_kwargs"]
    assert used == {"temperature": 0.7, "max_gen_toks": 3, "do_sample": True}


def test_a_file_may_not_choose_the_model(tmp_path, capsys):
    """Guards against settings of --config that are ignored: which model answers is said by our flags."""
    file = tmp_path / "flags.yaml"
    file.write_text("tasks: [functions]\nmodel: hf\n")
    with pytest.raises(SystemExit) as exit:
        eval_script.main(["--config", str(file), "--output_dir", str(tmp_path)])
    assert exit.value.code == 2
    assert "has model, which are flags of eval.py" in capsys.readouterr().err


def test_results_are_written_below_the_output_dir(model_folder, task_folder, tmp_path):
    """The paper's scripts have this flag. Guards against hours of work that are only shown."""
    flags = ["--model", model_folder, "--tasks", "lines", "--include_path", task_folder, "--output_dir"]
    assert eval_script.main([*map(str, flags), str(tmp_path / "logs")]) == 0
    assert "acc,none" in results(tmp_path)["lines"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "function"], "Tasks not found: function"),
        (["--max_step", "3"], "unknown argument '--max_step'; did you mean --max_steps?"),
        (["--num_fewshots", "3"], "unknown argument '--num_fewshots'; did you mean --num_fewshot?"),
        (["--limit", "x"], "--limit/-L: invalid float value: 'x'"),
        (["--tasks", "functions", "--gen_kwargs", "num_beams=2"], "--gen_kwargs num_beams=2: supported are"),
        (["--tasks", "functions", "--gen_kwargs", "{x"], "Invalid JSON: {x"),
        (["--tasks", "functions", "--gen_kwargs", "top_p=1.5"], "--gen_kwargs top_p 1.5: must be"),
        (["--tasks", "functions", "--batch_size", "auto:x"], "--batch_size auto:x: must be a number from 1"),
        (["--tasks", "functions", "--exit_layer", "4"], "--exit_layer 4: must be between 1 and 3"),
        (["--tasks", "functions", "--cache_requests", "x"], "--cache_requests: invalid value 'x' (choose"),
        (["--tasks", "functions", "--verbosity", "loud"], "Unknown level: 'LOUD'"),
        (["--tasks", "functions", "--limit", "1", "--samples", '{"functions": [0]}'], "--limit must be None"),
        (["--tasks", "functions", "--config", "no/such"], "--config no/such: Config file not found"),
        (["--tasks", "functions", "--output_path", "/dev/null/x"], "--output_path /dev/null/x: cannot be"),
        (["--tasks", "functions", "--use_cache", "x", "--parallel", "tensor"], "--use_cache: not with"),
        ([], "No tasks specified"),
    ],
)
def test_bad_usage_is_refused_before_the_model_is_loaded(
    flags, message, model_folder, task_folder, tmp_path, monkeypatch, capsys
):
    """Guards against a traceback, and against minutes of loading before a word about a typo."""
    monkeypatch.setattr("measures.evaluation.load_generator", lambda *_: pytest.fail("it was loaded"))
    common = ["--model", model_folder, "--include_path", task_folder, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as exit:
        eval_script.main([*map(str, common), *flags])
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        ("beams", [], "beams asks for num_beams=4: supported are max_gen_toks, "),
        ("lines,beams", [], "beams asks for num_beams=4: supported are max_gen_toks, "),
        ("functions", ["--max_steps", "256"], "functions asks for max_gen_toks 256: must be below the 256 "),
    ],
)
def test_what_a_task_asks_for_is_refused_by_name(
    tasks, flags, message, model_folder, task_folder, tmp_path, capsys
):
    """Guards against settings that are ignored, and against a traceback after other tasks."""
    with pytest.raises(SystemExit) as exit:
        eval_script.main(arguments(model_folder, tasks, task_folder, tmp_path, *flags))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_mistakes_of_the_program_are_not_explained_away(model_folder, task_folder, tmp_path, monkeypatch):
    """Guards against a ValueError of our own that reads as one of the harness about its flags."""
    monkeypatch.setattr(HarnessModel, "_answer", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        eval_script.main(arguments(model_folder, "functions", task_folder, tmp_path))


def test_help_has_the_flags_of_both(capsys):
    """Guards against flags that work and that nobody can find."""
    with pytest.raises(SystemExit) as exit:
        eval_script.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--exit_layer", "--tuned", "--num_fewshot", "--predict_only"))


def test_the_tasks_that_come_with_the_repository(model_folder, tmp_path, monkeypatch, capsys):
    """Guards against data that is found from one working directory only."""
    monkeypatch.chdir(tmp_path)
    tasks = "python_functions,python_lines,python_text"
    common = arguments(model_folder, tasks, ROOT / "eval_tasks", tmp_path, "--limit", "2")
    assert eval_script.main(common) == 0
    assert "python_functions: 2 answers" in capsys.readouterr().out
    assert set(results(tmp_path)) == {"python_functions", "python_lines", "python_text"}


@pytest.mark.parametrize("depth", [-1, 2])
def test_likelihoods_of_weights_in_16_bits_are_those_of_float32(depth, byte_tokenizer):
    """Guards against scores by the layers of transformers, which round to the model's own format."""
    model = copy.deepcopy(tiny_llama(vocab_size=len(byte_tokenizer))).to(torch.float16)
    exact = copy.deepcopy(model).float()
    if not works(Float16Linear, torch.device("cpu"), torch.float32):
        pytest.skip("torch without FBGEMM")
    fuse(model, fp32_activations=True)
    assert fuse(model) == 4  # which changes nothing
    strategy = make_strategy("autoregressive")
    config = GenerationConfig(exit_layer=depth, generation_strategy="autoregressive")
    ids = torch.tensor([[5, 9, 4, 7], [3, 8, 0, 0]])
    asked = []
    for each in (model, exact):
        generator = HuggingfaceLlamaGenerator(byte_tokenizer, each, strategy)
        asked.append(HarnessModel(generator, config, seed=1)._model_call(ids))
    assert asked[0].dtype == torch.float32
    assert_close(asked[0][0], asked[1][0], roundings=200)
    assert_close(asked[0][1, :2], asked[1][1, :2], roundings=200)
