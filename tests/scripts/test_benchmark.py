"""benchmark.py and correctness.py: files, tables and verdicts."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import needs_operators
from helpers import about, no_pictures, only_run, records_of, refused, small_run, watch, write_rows

import benchmark
import correctness
import generate
import self_speculation.self_speculation_generator as self_speculation_generator
from measures import timed_runs
from measures.comparison import find_difference
from measures.correctness import CompareIds
from runs.description import heading
from runs.records import Run
from self_speculation import HuggingfaceLlamaGenerator, Sampler
from self_speculation.backends.sampling import gumbel_noise, leading_matches, noise_key

SPECULATION = ["--exit_layer", "2", "--num_speculations", "3"]


@pytest.fixture
def common(model_folder, tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    return [*small_run(model_folder, tmp_path, 5, 12), "--template", "def {message}"]


def test_benchmark_writes_files_that_others_can_read(model_folder, tmp_path, capsys):
    """Guards against a run without the machine, records out of order, and a table that lacks a figure."""
    flags = ["--compare", "True", "--text_quality", "True", *SPECULATION, "--sample", "False"]
    assert benchmark.main([*small_run(model_folder, tmp_path, 5, 12), *flags]) == 0
    run = about(only_run(tmp_path))
    records = records_of(only_run(tmp_path))
    facts = {"libraries", "device", "dtype", "threads", "num_layers", "processor"}
    assert facts | {"num_ranks", "version", "commit"} <= run.keys()
    assert (run["status"], run["arguments"]["exit_layer"]) == ("finished", 2)
    assert run["began"] <= run["ended"]
    assert records["index"].tolist() == [0, 1, 2, 3, 4]
    assert records["prompt"].str.startswith("add").all()
    metrics = run["metrics"]
    assert metrics["comparison"]["identical_outputs"] == 5
    assert metrics["speed"]["num_tokens"] == records["num_tokens"].sum()
    assert {"rouge1", "bleu", "exact_match", "edit_distance"} <= metrics["text"].keys()
    table = capsys.readouterr().out
    assert table.startswith(f"{heading(run)}\n\n5 examples ")
    speeds = {"tokens/s, all tokens by wall time", "tokens/s, decode, median answer", "ms to first token"}
    ratios = {"speed-up, median of examples", "middle half of examples", "acceptance rate"}
    assert all(name in table for name in speeds | ratios)
    assert "The speed-up is the median over examples of the ratio of tokens/s of whole answers." in table
    assert (only_run(tmp_path) / "benchmark.png").stat().st_size > 10_000


def test_figures_say_what_they_are(common, tmp_path, monkeypatch, capsys):
    """Guards against figures of an early exit or a busy machine that do not say so."""
    monkeypatch.setattr("runs.description.most_threads", lambda model: 2)  # examples end with one thread
    assert benchmark.main([*common, "--exit_layer", "2"]) == 0
    output = capsys.readouterr().out
    run = about(only_run(tmp_path))
    assert " by the early exit at layer 2 alone, not by the full model, " in " ".join(output.split())
    assert ", down to 1 of 2 threads, 1 rank" in " ".join(output.split())  # that of pictures, too
    assert (run["threads_used"], "acceptance" in run["metrics"]) == (1, False)


def test_examples_draw_their_own_samples(common, tmp_path):
    """Guards against the same random numbers for each example."""
    path = write_rows(tmp_path / "same.jsonl", [{"prompt": "def", "response": ""}] * 3)
    assert benchmark.main([*common, "--data_path", path, "--temperature", "5"]) == 0
    assert len(set(map(tuple, records_of(only_run(tmp_path))["tokens"]))) == 3


def test_repeats_have_other_seeds_and_a_spread(common, tmp_path, capsys):
    """Guards against the same samples in each repeat, and a spread of examples in the place of repeats."""
    flags = ["--num_samples", "2", "--repeats", "3", "--batch_size", "2", "--temperature", "5", "--compare"]
    assert benchmark.main([*common, *flags, "True", *SPECULATION]) == 0
    metrics = about(only_run(tmp_path))["metrics"]
    records = records_of(only_run(tmp_path))
    assert (metrics["num_examples"], len(metrics["repeats"]), records["prompt"].nunique()) == (6, 3, 2)
    assert len(set(map(tuple, records["tokens"]))) == 6
    rates = [repeat["acceptance"]["acceptance_rate"] for repeat in metrics["repeats"]]
    output = capsys.readouterr().out
    assert re.search(r"\n2 examples, 3 times each ", output)
    assert re.search(rf"\nacceptance rate, of 3 repeats +{min(rates):.1%}-{max(rates):.1%}\n", output)
    assert re.search(r"\nspeed-up, of 3 repeats +\d+\.\d\d-\d+\.\d\d\n", output)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--draft_weights", "int4", "--top_k", "9"], marks=needs_operators),
        ["--no_repeat_ngram_size", "3", "--stop_token_ids", *map(str, range(30, 40)), "--repeats", "2"],
    ],
)
def test_rejection_sampling_is_compared_in_the_rounds_of_decoding(flags, common, tmp_path, capsys):
    """Guards against another answer, noise, cache or end of rounds in the replay of the rounds."""
    common += ["--temperature", "1", "--generation_strategy", "self_speculative", *SPECULATION]
    assert benchmark.main([*common, "--max_steps", "24", "--rejection_sampling", "True", *flags]) == 0
    records = records_of(only_run(tmp_path))
    for drafts, (replayed,) in records[["drafts", "rejection"]].to_numpy():
        done = [sum(row[name] * row["rounds"] for row in drafts) for name in ("drafted", "accepted")]
        assert done == [replayed["num_drafted"], replayed["num_accepted"]]
    acceptance = about(only_run(tmp_path))["metrics"]["acceptance"]
    rates = acceptance["by_rejection"]
    assert 0 < acceptance["acceptance_rate"] < rates["acceptance_rate_reached"] < 1
    shown = f"  by rejection sampling{rates['acceptance_rate']:>29.1%}\n"
    assert shown in capsys.readouterr().out


def test_prompts_go_through_the_chat_template(common, model_folder, tmp_path, monkeypatch):
    """Guards against a prompt without the template or the variables, and special tokens twice."""
    shutil.copytree(model_folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ x }}, {{ y }}: {{ messages[0].content }}")
    model = ["--model", str(tmp_path / "chat"), "--chat", "--chat_template_kwargs"]
    asked = set()

    def note(_, prompt, special_tokens=True):
        if isinstance(prompt, str):
            asked.add((prompt, special_tokens))

    watch(monkeypatch, HuggingfaceLlamaGenerator, "encode", note)
    assert benchmark.main([*common, "--num_samples", "12", *model, "x=1, y=false"]) == 0
    assert asked == {(f"1, False: def add{i}(a, b):", False) for i in range(12)}
    asked.clear()
    assert generate.main([*model, '{"x": [1], "z": null}', "--prompt", "def", "--max_steps", "2"]) == 0
    assert asked == {("[1], : def", False)}


def test_prompts_beyond_the_context_are_left_out_and_counted(common, tmp_path, capsys):
    """Guards against prompts that are cut, or that disappear without a word."""
    rows = [{"prompt": "x" * n, "response": ""} for n in (5, 4000, 300, 7)]
    args = [*common, "--data_path", write_rows(tmp_path / "long.jsonl", rows)]
    assert benchmark.main(args) == 0
    assert "left out 2 of 4 examples: prompts of more than 255 tokens" in capsys.readouterr().err
    assert len(records_of(only_run(tmp_path))) == 2
    error = refused(benchmark.main, [*args, "--n_shot", "2", "--random_shuffle", "False"], capsys)
    assert "--n_shot 2: with solved examples every prompt has more than the 255 tokens" in error


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            [*SPECULATION, "--draft_weights", "int4", "--prompt_lookup", "2", "--stop_words", "b"],
            marks=needs_operators,
        ),
        ["--generation_strategy", "adaptive", "--no_repeat_ngram_size", "3"],
    ],
    ids=["int4 and lookup", "adaptive"],
)
def test_every_source_of_drafts(flags, common, tmp_path, capsys):
    """Guards against a flag that a script drops on the way, and rounds without their source."""
    args = [*common, "--sample", "False", *flags]
    assert correctness.main([*args, "--reference", "transformers"]) == 0
    output = capsys.readouterr().out
    report = about(only_run(tmp_path))
    assert output.startswith(f"{heading(report)}\n")
    assert "\npassed: 5 of 5 outputs identical, 0 near-ties, 0 differences" in output
    assert {"outputs": 5, "identical": 5, "differences": 0}.items() <= report["metrics"].items()
    other = ["--output_dir", str(tmp_path / "benchmark" / "logs")]
    assert benchmark.main([*args, "--compare", "True", *other]) == 0
    metrics = about(only_run(tmp_path / "benchmark"))["metrics"]
    assert metrics["comparison"]["identical_outputs"] == 5
    drafts = metrics["acceptance"]
    assert sum(each["rounds"] for each in drafts["drafts_by_source"].values()) == drafts["num_verifications"]
    assert drafts["num_drafted"] > 0 or "adaptive" in flags  # on a busy machine none may pay


def accepts_everything(drafted, tokens, lengths):  # noqa: ARG001
    return [*lengths]


def mixes_rows_up(drafted, tokens, lengths):
    accepted = leading_matches(drafted, tokens, lengths)
    tokens.append(tokens.pop(0))
    return accepted


@pytest.mark.parametrize(("rule", "batch_size"), [(accepts_everything, "1"), (mixes_rows_up, "3")])
def test_correctness_catches_a_wrong_accept_rule(common, rule, batch_size, monkeypatch, capsys):
    """Guards against a comparison that always passes, or that decodes both sides alone or both in a batch."""
    monkeypatch.setattr(self_speculation_generator, "leading_matches", rule)
    requests = watch(monkeypatch, CompareIds, "_request")
    assert correctness.main([*common, *SPECULATION, "--batch_size", batch_size]) == 1
    output = capsys.readouterr().out
    found = {line.split(", ")[1] for line in output.splitlines() if line.endswith(": DIFFERENCE")}
    assert found >= {"greedy", "sample 1", "sample 2"}
    assert len({request.seed for _, request in requests}) == 5 * 4  # each example and sample has one
    assert "\nFAILED: " in output


@needs_operators
def test_correctness_counts_positions_with_other_bits(common, monkeypatch, capsys):
    """Guards against a count that is always 0."""
    monkeypatch.setattr(correctness, "_SAMPLED", 1)
    args = [*common, *SPECULATION, "--temperature", "1"]
    assert correctness.main(args) == 0
    assert re.search(r"\n0 of \d+ positions .*\npassed: 10 of ", capsys.readouterr().out)
    target = self_speculation_generator.verify
    bit = 1 + torch.finfo(torch.float32).eps

    def other(*args):
        logits, hidden = target(*args)
        return bit * logits, hidden

    monkeypatch.setattr(self_speculation_generator, "verify", other)
    assert correctness.main(args) == 1
    assert re.search(r"\n[1-9]\d* of \d+ positions .*\nFAILED: 10 of ", capsys.readouterr().out)


def test_sides_take_turns_by_windows(model_folder, tmp_path, monkeypatch, capsys):
    """Guards against a side that always goes first, ratios of times that overlap, and needless drafts."""
    sides = watch(monkeypatch, timed_runs, "_measured")
    monkeypatch.setattr(timed_runs, "_BATCHES_IN_TURN", 1)
    args = [*small_run(model_folder, tmp_path, 8, 16), "--sample", "False", "--batch_size", "2"]
    assert benchmark.main([*args, "--compare", "True", *SPECULATION]) == 0
    turns = [prefix for ((prefix, *_), *_), _ in sides]
    assert turns == ["autoregressive_", "", "", "autoregressive_"] * 2  # 4 windows of two
    metrics = about(only_run(tmp_path))["metrics"]
    records = records_of(only_run(tmp_path))
    compared = metrics["comparison"]
    assert metrics["speed"]["total_time"] == pytest.approx(records["wall_time"].sum())
    assert (compared["speedup_windows"], compared["identical_outputs"]) == (4, 8)
    assert set(records["window"]) == {0, 2, 4, 6}
    assert correctness.main(args) == 0
    assert "\npassed: 8 of 8 outputs identical" in capsys.readouterr().out


def test_near_ties_are_told_from_differences(text_model):
    """Guards against a real difference that is excused as rounding, and rounding that fails a run."""
    prompt = [5, 6, 7]
    logits = text_model(torch.tensor([prompt])).logits[0, -1]
    best, second, *_, worst = logits.argsort(descending=True).tolist()
    wide = find_difference(text_model, prompt, [best, 9], [second, 9])
    assert (wide["position"], wide["near_tie"]) == (0, False)

    def level(_, scores, roundings=1):
        """Makes the two best logits all but equal."""
        gap = roundings * torch.finfo(torch.float32).eps * float(logits.abs().max())
        return scores.scatter(1, torch.tensor([[second]]), float(scores.max()) - gap)

    for roundings, near in ((1, True), (14, True), (20, False)):
        apart = partial(level, roundings=roundings)
        assert find_difference(text_model, prompt, [best], [second], [apart])["near_tie"] == near
    for other in ([worst], []):  # the second one just stops
        assert not find_difference(text_model, prompt, [best], other, [level])["near_tie"]
    assert find_difference(text_model, prompt, [best], [best]) is None
    # Passes by torch round keys and values to other neighbours: more than 16 roundings of a float32.
    apart = partial(level, roundings=1000)
    for dtype, near in (("float32", False), ("float16", True), ("bfloat16", True)):
        found = find_difference(text_model, prompt, [best], [second], [apart], cache_dtype=dtype)
        assert found["near_tie"] == near


def test_near_ties_of_samples(text_model):
    """Guards against a token at the edge of the nucleus, or behind by a bit, that fails a run on a GPU."""
    prompt = [5, 6, 7]
    sampler = Sampler(temperature=0.7, top_p=0.9)
    logits = text_model(torch.tensor([prompt])).logits[:, -1]
    keys = [torch.tensor([noise_key(seed, 0)]) for seed in range(99)]
    (one, seed), (other, _), *_ = {int(sampler(logits, key)): seed for seed, key in enumerate(keys)}.items()
    compare = partial(find_difference, text_model, prompt, [one], [other], sampler=sampler, seed=seed)
    assert not compare()["near_tie"]

    def tie(_, scores):
        """The two ids have the same logit + noise."""
        noise = sampler.temperature * gumbel_noise(keys[seed], torch.tensor([[one, other]]))[0]
        return scores.index_fill(1, torch.tensor([other]), float(scores[0, one] + noise[0] - noise[1]))

    assert compare(processors=[tie])["near_tie"]


QUESTIONS = [
    {"question_id": 241, "category": "summarization", "turns": ["Summarize: he has"]},
    {"question_id": 82, "category": "writing", "turns": ["a letter", "shorter"]},
    {"question_id": 81, "category": "stem", "turns": ["why", "how"]},
]


@pytest.fixture
def asked(common, tmp_path):
    """Flags of a script over the given questions."""
    path = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    flags = ["--dataset", "spec_bench", "--data_path", path, "--template", "{message}", "--sample", "False"]
    return [*common, "--generation_strategy", "self_speculative", *SPECULATION, *flags]


def test_answers_and_turns_of_spec_bench(asked, tmp_path, monkeypatch):
    """Guards against files that Spec-Bench's speed.py cannot read, turns that do not see earlier turns, and
    answers that are kept only after other conversations have begun.
    """
    seen = watch(monkeypatch, HuggingfaceLlamaGenerator, "encode")
    order = []
    watch(monkeypatch, timed_runs, "_measured", lambda _, window, *__: order.extend(window))
    watch(monkeypatch, Run, "append", lambda *_: order.append("kept"))
    file = tmp_path / "answers" / "adaptive.jsonl"
    assert benchmark.main([*asked, "--compare", "True", "--answer_file", str(file)]) == 0
    paths = (file, file.with_stem("adaptive-autoregressive"))
    drafted, plain = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert [row["question_id"] for row in drafted] == [81, 82, 241]
    assert [row["category"] for row in plain] == ["stem", "writing", "summarization"]
    for row, other in zip(drafted, plain, strict=True):
        (choice,) = row["choices"]
        (expected,) = other["choices"]
        assert [choice[n] for n in ("turns", "new_tokens")] == [expected[n] for n in ("turns", "new_tokens")]
        assert min(choice["wall_time"]) > 0
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        assert sum(choice["accept_lengths"]) == len(expected["accept_lengths"])  # all but the first tokens
    answer, _ = drafted[0]["choices"][0]["turns"]
    between = " ".join(map(str, order)).split("kept")
    assert [len({*indices.split()}) for indices in between] == [1, 1, 1, 0]
    history = f"user: why\nassistant: {answer}\nuser: how\nassistant:"
    assert history in [prompt for (_, prompt, *_), _ in seen]
    speed = about(only_run(tmp_path))["metrics"]["speed"]
    for figure, name in (("num_tokens", "new_tokens"), ("total_time", "wall_time")):
        assert speed[figure] == pytest.approx(sum(sum(row["choices"][0][name]) for row in drafted))


def test_turns_without_room_are_counted(asked, tmp_path, capsys):
    """Guards against an error in the middle of a run, and a question that loses a turn without a word."""
    write_rows(tmp_path / "question.jsonl", [QUESTIONS[2] | {"turns": ["why", "x" * 300]}])
    assert benchmark.main(asked) == 0
    assert "no room for the later turns of 1 conversation\n" in capsys.readouterr().out
    assert correctness.main(asked) == 0
    assert "correctness.py asks the first turn of each conversation only" in capsys.readouterr().err
