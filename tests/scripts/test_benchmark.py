"""benchmark.py and correctness.py as their users run them."""

import json
import shutil

import forks
import numpy
import pandas
import pytest
import torch
from conftest import ROOT
from distributions import accepts_everything, resamples_from_the_target
from helpers import custom_data, no_calibration, only_run, untimed
from transformers import MistralConfig, MistralForCausalLM

import benchmark
import correctness
import self_speculation.self_speculation_generator as self_speculation_generator
import sweep
from measures.comparison import find_difference, same_distribution
from runs.heading import heading
from self_speculation import HuggingfaceLlamaGenerator, Verification
from self_speculation.decoding.sampling import verify_draft

SPECULATION = ["--exit_layer", "2", "--num_speculations", "3"]


@pytest.fixture
def common(model_folder, tmp_path):
    """Flags for a small run of its own."""
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--num_samples", "5",
        "--max_steps", "12", "--template", "def {message}", "--dataset", "custom_jsonl",
        "--data_path", custom_data(tmp_path),
    ]  # fmt: skip


def test_benchmark_writes_files_that_others_can_read(common, tmp_path, capsys):
    assert benchmark.main([*common, "--compare", "True", *SPECULATION, "--sample", "False"]) == 0
    with open(only_run(tmp_path) / "run.json") as file:
        run = json.load(file)
    assert run["status"] == "finished"
    assert run["arguments"]["exit_layer"] == 2
    assert {"libraries", "device", "dtype", "threads", "dataset_fingerprint", "num_layers"} <= run.keys()
    assert {"processor", "num_ranks", "version", "commit"} <= run.keys()
    assert run["began"] <= run["ended"]
    records = pandas.read_json(only_run(tmp_path) / "records.jsonl", lines=True)
    assert records["index"].tolist() == [0, 1, 2, 3, 4]
    assert records["prompt"].str.startswith("def add").all()
    metrics = run["metrics"]
    assert metrics["comparison"]["identical_outputs"] == 5
    assert metrics["speed"]["num_tokens"] == records["num_tokens"].sum()
    assert metrics["comparison"]["predicted_decode_speedup"] > 0
    assert {"rouge1", "rouge2", "rougeL", "bleu", "exact_match", "edit_distance"} == metrics["text"].keys()
    table = capsys.readouterr().out
    assert table.startswith(f"{heading(run)}\n\n5 examples ")
    assert all(len(line) <= 100 for line in table.splitlines() if "run.json" not in line)
    for name in (
        "tokens/s, all tokens by wall time",
        "tokens/s, decode, median answer",
        "ms to first token",
        "acceptance rate",
        "speed-up, median of examples",
        "speed-up, decode",
        "formula allows",
    ):
        assert name in table


def test_an_autoregressive_benchmark_does_not_speak_of_acceptance(common, tmp_path, capsys):
    assert benchmark.main([*common, "--verbose"]) == 0
    assert "acceptance" not in json.loads((only_run(tmp_path) / "run.json").read_text())["metrics"]
    output = capsys.readouterr().out
    assert "acceptance" not in output
    assert "--- 0\ndef add" in output


def test_what_prompts_begin_with_is_read_once(common, tmp_path):
    """Guards against shots that every prompt reads again, and against a prompt that the warm-up has read."""
    shots = [*common, "--n_shot", "2", "--sample", "False"]
    for name, reuse in (("whole", "False"), ("rest", "True")):
        assert benchmark.main([*shots, "--output_dir", str(tmp_path / name), "--reuse_cache", reuse]) == 0
    whole, rest = (
        pandas.read_json(next((tmp_path / name).glob("*/records.jsonl")), lines=True)
        for name in ("whole", "rest")
    )
    assert whole["tokens"].tolist() == rest["tokens"].tolist()
    assert (whole["num_cached_tokens"] == 0).all()
    first, *others = sorted(rest["num_cached_tokens"])
    assert first == 0
    assert min(others) >= 20  # of some 40


def test_sampled_outputs_are_not_counted_as_identical(common, tmp_path, capsys):
    """Guards against "identical outputs 0 of 5", which looks like a fault, where two samples were drawn."""
    assert benchmark.main([*common, "--compare", "True", *SPECULATION, "--sample", "True"]) == 0
    assert "identical outputs" not in capsys.readouterr().out
    run = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert run["metrics"]["comparison"]["identical_outputs"] is None


def test_pass_at_1_is_computed_only_when_asked(endless_folder, tmp_path, capsys):
    args = ["--model", str(endless_folder), "--output_dir", str(tmp_path / "logs"), "--max_steps", "5"]
    args += ["--num_samples", "2"]
    benchmark.main(args)
    assert "pass at 1" not in capsys.readouterr().out
    benchmark.main([*args, "--execute_code", "True"])
    captured = capsys.readouterr()
    assert "pass at 1" in captured.out
    assert "running the programs that the model wrote" in captured.err
    with pytest.raises(SystemExit):  # an answer in a chat is no rest of a program
        benchmark.main([*args, "--execute_code", "True", "--chat", "True"])
    assert "--execute_code True: runs continuations of prompts" in capsys.readouterr().err


CHAT = "user: def add{}(a, b):\nassistant:"


@pytest.mark.parametrize("script", [benchmark, correctness, sweep])
def test_prompts_go_through_the_chat_template(script, common, tmp_path, byte_tokenizer, monkeypatch):
    """Guards against a script that asks without the template, and special tokens that it has already."""
    no_calibration(monkeypatch)
    asked = set()
    encode = HuggingfaceLlamaGenerator.encode

    def watch(self, prompt, *args, **kwargs):
        ids = encode(self, prompt, *args, **kwargs)
        asked.add(tuple(ids))
        return ids

    monkeypatch.setattr(HuggingfaceLlamaGenerator, "encode", watch)
    more = ["--exit_layer_last", "2", "--num_speculations_last", "1"] if script is sweep else []
    more += SPECULATION if script is correctness else []
    assert script.main([*common, *more, "--sample", "False", "--chat", "True"]) == 0
    texts = [CHAT.format(i) for i in range(12)]
    expected = {tuple(byte_tokenizer.encode(text, add_special_tokens=False)) for text in texts}
    assert len(asked & expected) == 5
    assert asked <= expected
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["arguments"]["chat"] is True


def test_a_model_without_a_chat_template(common, model_folder, tmp_path, monkeypatch, capsys):
    """Guards against a refusal after minutes of loading, and a run with both kinds of prompts."""
    assert benchmark.main(common) == 0
    with pytest.raises(SystemExit):
        benchmark.main([*common, "--chat", "True", "--resume", str(only_run(tmp_path))])
    assert "that run had --chat False, this one has True" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setattr("self_speculation.model.loading._load", lambda *_: pytest.fail("weights were read"))
    for script in (benchmark, sweep):
        with pytest.raises(SystemExit) as exit:
            script.main([*common, "--model", str(bare), "--chat", "True", "--sample", "False"])
        assert exit.value.code == 2
        said = "error: --chat True: the model's tokenizer has no chat template\n"
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "True"], "--exit_layer: self_speculative needs one between 1 and 3"),
        (["--execute_code", "True"], "--execute_code True: only human_eval has programs to run"),
        (["--data_path", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
    ],
)
def test_wrong_usage_of_the_benchmark(common, args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main([*common, *args])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [benchmark, correctness, sweep])
def test_drafts_in_four_bits_without_fused_layers(script, common, capsys):
    """Guards against a traceback from the warm-up, with status 1."""
    args = [*common, "--sample", "False", "--fuse", "False", "--draft_weights", "int4"]
    if script is not sweep:
        args += [*SPECULATION, "--generation_strategy", "self_speculative"]
    with pytest.raises(SystemExit) as exit:
        script.main(args)
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("error: --draft_weights int4: not with --fuse False")


def test_a_sliding_window_shorter_than_max_steps(byte_tokenizer, common, tmp_path, capsys):
    """Guards against `every prompt has more than the -256 tokens` by the default --max_steps."""
    folder = tmp_path / "window"
    config = MistralConfig(**text_shape(byte_tokenizer), sliding_window=256, max_position_embeddings=1024)
    MistralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    args = [*common, "--model", str(folder)]
    assert benchmark.main(args) == 0
    with pytest.raises(SystemExit) as exit:
        benchmark.main([*args, "--max_steps", "512"])
    assert exit.value.code == 2
    said = "--max_steps 512: leaves no room for a prompt in the model's sliding window of 256 positions"
    assert said in capsys.readouterr().err


def text_shape(tokenizer):
    return {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip


def test_two_ranks_give_the_records_of_one(common, tmp_path):
    """Guards against draws that depend on the rank, and examples that are done twice or not at all."""
    args = [*common, "--generation_strategy", "self_speculative", *SPECULATION]
    assert benchmark.main([*args, "--output_dir", str(tmp_path / "one")]) == 0
    result = forks.run_ranks(2, ROOT / "benchmark.py", *args)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens/s, decode") == 1
    assert ", 2 ranks, batch size 1\n" in result.stdout
    (one,) = (tmp_path / "one").iterdir()
    assert untimed(only_run(tmp_path)) == untimed(one)
    # What is printed for both is what both give: guards against the pace of a single rank.
    speed = json.loads((only_run(tmp_path) / "run.json").read_text())["metrics"]["speed"]
    assert f"tokens/s, 2 ranks together{speed['tokens_per_second']:>26.2f}" in result.stdout
    records = pandas.read_json(only_run(tmp_path) / "records.jsonl", lines=True)
    slowest = records.groupby("rank")["wall_time"].sum().max()
    assert speed["tokens_per_second"] == pytest.approx(records["num_tokens"].sum() / slowest)


def test_prompts_beyond_the_context_are_left_out_and_counted(common, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "x" * n, "response": ""} for n in (5, 4000, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmark.main([*common, "--data_path", str(path)]) == 0
    assert "left out 1 of 3 examples: prompts of more than 255 tokens" in capsys.readouterr().err
    assert len(untimed(only_run(tmp_path))) == 2
    with pytest.raises(SystemExit):
        benchmark.main([*common, "--data_path", str(path), "--n_shot", "2", "--random_shuffle", "False"])
    assert "every prompt has more than the 255 tokens" in capsys.readouterr().err


def test_correctness_passes_and_reports(common, tmp_path, capsys):
    args = [*common, *SPECULATION, "--sample", "False", "--reference", "transformers"]
    args += ["--stop_words", "b", "--no_repeat_ngram_size", "3"]
    assert correctness.main(args) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("passed: 5 of 5 examples identical, 0 near-ties, 0 differences")
    report = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert output.startswith(f"{heading(report)}\n")
    assert report["metrics"] == {"examples": 5, "identical": 5, "near_ties": 0, "differences": 0}


@pytest.mark.slow
def test_correctness_passes_when_sampling(common, tmp_path, capsys):
    args = [*common, *SPECULATION, "--samples_per_prompt", "100", "--sampled_prompts", "2", "--top_k", "8"]
    assert correctness.main(args) == 0
    captured = capsys.readouterr()
    assert "distributions are compared" in captured.err
    verdict = captured.out.splitlines()[-1]
    assert verdict.startswith("passed: chi-square tests of the first drafted token")
    assert "false alarms: 1 run in 1000" in verdict
    assert captured.out.count("kinds of tokens in 100 samples") == 2
    found = json.loads((only_run(tmp_path) / "run.json").read_text())["metrics"]
    assert 1e-3 < found["p_value"] <= 1
    assert len(untimed(only_run(tmp_path))) == 2


def test_samples_of_one_distribution_fail_as_rarely_as_stated():
    """Guards against a test that fails right programs, or that finds nothing: rare tokens are many here."""
    chance = numpy.random.default_rng(0)
    weights = 1 / numpy.arange(1, 101) ** 1.5

    def p_value(tilt):
        samples = []
        for sign in (1, -1):
            shifted = weights * (1 + sign * tilt * numpy.where(numpy.arange(100) % 2, 1, -1))
            samples.append(chance.choice(100, 200, p=shifted / shifted.sum()).tolist())
        return same_distribution(*samples).p_value

    alike = [p_value(0) for _ in range(400)]
    for level in (0.01, 0.05, 0.2):
        assert sum(p < level for p in alike) / len(alike) <= level + 0.03
    assert sum(p_value(0.5) < 1e-3 for _ in range(50)) >= 48


def accepts_one_too_many(draft_tokens, *rest):
    honest = verify_draft(draft_tokens, *rest)
    return Verification((honest.num_accepted + 1).clamp(max=draft_tokens.shape[1]), honest.next_token)


def test_correctness_catches_a_wrong_accept_rule_by_ids(common, monkeypatch, capsys):
    monkeypatch.setattr(self_speculation_generator, "verify_draft", accepts_one_too_many)
    assert correctness.main([*common, *SPECULATION, "--sample", "False"]) == 1
    output = capsys.readouterr().out
    assert "DIFFERENCE" in output
    assert output.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.parametrize(
    "drafts",
    [
        ["--generation_strategy", "adaptive"],
        [*SPECULATION, "--draft_weights", "int4", "--prompt_lookup", "2", "--draft_confidence", "auto"],
    ],
    ids=["adaptive", "int4 and lookup"],
)
def test_every_source_of_drafts(common, drafts, tmp_path, capsys):
    """Guards against a flag of drafting that a script drops on the way."""
    assert correctness.main([*common, "--sample", "False", *drafts]) == 0
    assert "passed: 5 of 5 examples identical" in capsys.readouterr().out
    common[common.index("--output_dir") + 1] = str(tmp_path / "benchmark")
    assert benchmark.main([*common, "--sample", "False", "--compare", "True", *drafts]) == 0
    (folder,) = (tmp_path / "benchmark").iterdir()
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    assert metrics["comparison"]["identical_outputs"] == 5
    sources = metrics["acceptance"]["drafts_by_source"]
    assert sum(counts["rounds"] for counts in sources.values()) == metrics["acceptance"]["num_verifications"]
    assert "rounds: accepted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "num_samples"),
    [(accepts_everything, "200"), pytest.param(resamples_from_the_target, "800", marks=pytest.mark.slow)],
)
def test_correctness_catches_a_wrong_accept_rule_by_distribution(
    common, rule, num_samples, monkeypatch, capsys
):
    """Guards against a comparison of a strategy with itself. The subtler rule takes more samples."""
    monkeypatch.setattr(self_speculation_generator, "verify_draft", rule)
    sampling = ["--temperature", "1", "--top_p", "1", "--top_k", "2", "--samples_per_prompt", num_samples]
    sampling += ["--exit_layer", "3", "--num_speculations", "1", "--sampled_prompts", "1"]
    assert correctness.main([*common, *sampling]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED: ")


def test_near_ties_are_told_from_differences(text_model):
    """Only a choice between tokens that the model itself can hardly tell apart is excused."""
    prompt = [5, 6, 7]
    logits = text_model(torch.tensor([prompt])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    worst = int(logits.argmin())
    wide = find_difference(text_model, prompt, [best, 9], [second, 9])
    assert (wide.position, wide.best_tokens, wide.near_tie) == (0, (best, second), False)

    def level(_, scores):
        """Makes the two best logits all but equal."""
        return scores.scatter(1, torch.tensor([[second]]), float(scores.max()) - 1e-7)

    assert find_difference(text_model, prompt, [best], [second], [level]).near_tie
    assert not find_difference(text_model, prompt, [best], [worst], [level]).near_tie
    assert not find_difference(text_model, prompt, [best], [], [level]).near_tie  # it just stops
    assert find_difference(text_model, prompt, [best], [best]) is None
