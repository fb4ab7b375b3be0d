"""Spec-Bench: conversations of several turns, answers in its format."""

import json

import pytest
from helpers import SPECULATION, about, no_pictures, only_run, small_run, watch, write_rows

import benchmark
import correctness
from self_speculation import HuggingfaceLlamaGenerator

QUESTIONS = [
    (241, "summarization", ["Summarize: he has"]),
    (82, "writing", ["a letter", "shorter"]),
    (81, "stem", ["why", "how"]),
    (161, "translation", ["one"]),
]


@pytest.fixture
def asked(model_folder, tmp_path, monkeypatch):
    """Flags of a script over four questions."""
    no_pictures(monkeypatch)
    names = ("question_id", "category", "turns")
    rows = [dict(zip(names, row, strict=True)) for row in QUESTIONS]
    path = write_rows(tmp_path / "question.jsonl", rows)
    flags = ["--dataset", "spec_bench", "--data_path", path, "--sample", "False"]
    return [*small_run(model_folder, tmp_path, 4, 9), *SPECULATION, *flags]


def test_answers_and_turns_of_spec_bench(asked, tmp_path, monkeypatch):
    """Guards against a file that its speed.py and equal.py cannot read, turns that do not see those before,
    and tokens, time or drafts of one turn alone.
    """
    seen = watch(monkeypatch, HuggingfaceLlamaGenerator, "encode")
    file = tmp_path / "answers" / "adaptive.jsonl"
    assert benchmark.main([*asked, "--compare", "True", "--answer_file", str(file)]) == 0
    paths = (file, file.with_stem("adaptive-autoregressive"))
    drafted, plain = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert [row["question_id"] for row in drafted] == [81, 82, 161, 241]
    assert {row["question_id"]: row["category"] for row in plain} == {n: kind for n, kind, _ in QUESTIONS}
    for row, other in zip(drafted, plain, strict=True):
        (choice,), (expected,) = row["choices"], other["choices"]
        assert [choice[n] for n in ("turns", "new_tokens")] == [expected[n] for n in ("turns", "new_tokens")]
        assert min(choice["wall_time"]) > 0
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        assert sum(choice["accept_lengths"]) == len(expected["accept_lengths"])  # all but the first tokens
    (first, _), (answer, _) = QUESTIONS[2][2], drafted[0]["choices"][0]["turns"]
    history = f"user: {first}\nassistant: {answer}\nuser: how\nassistant:"
    assert history in [prompt for (_, prompt, *_), _ in seen]
    metrics = about(only_run(tmp_path))["metrics"]
    assert metrics["text"] == {}
    tokens = sum(sum(row["choices"][0]["new_tokens"]) for row in drafted)
    assert metrics["speed"]["num_tokens"] == tokens
    seconds = sum(sum(row["choices"][0]["wall_time"]) for row in drafted)
    assert metrics["speed"]["total_time"] == pytest.approx(seconds)


def test_turns_without_room_are_counted(asked, tmp_path, capsys):
    """Guards against an error in the middle of a run, and a question that loses a turn without a word."""
    row = {"question_id": 1, "category": "stem", "turns": ["why", "x" * 300]}
    write_rows(tmp_path / "question.jsonl", [row])
    assert benchmark.main(asked) == 0
    assert "no room for the later turns of 1 conversation\n" in capsys.readouterr().out
    assert correctness.main(asked) == 0
    assert "correctness.py asks the first turn of each conversation only" in capsys.readouterr().err
