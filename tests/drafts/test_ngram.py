"""What is looked up, in predicted outputs, texts and finished answers; and examples in docstrings."""

import doctest
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    ADAPTIVE,
    LAYERS,
    PROMPT,
    config_of,
    generate,
    generator_of,
    ids_of,
    in_batch,
    mixed_drafts,
    own_llama,
    tiny_llama,
)
from hypothesis import given
from hypothesis import strategies as st

from measures.timed_runs import warm_up
from self_speculation import GenerationConfig, Request
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts import ngram
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.ngram import _LONG, FinishedAnswers, NgramIndex, SharedDrafts, TextDrafts
from self_speculation.drafts.registry import forget_what_was_learnt
from self_speculation.weights import experts

LOOKUP = {**LAYERS, "prompt_lookup": 2}


@pytest.fixture
def equal_rounds(monkeypatch):
    """Each round takes a second, whatever the machine does: adaptive decoding drafts what is looked up."""
    monkeypatch.setattr("self_speculation.transfers.Stopwatch.stop", lambda _: (0.0, 1.0))


def by_scanning(ids, longest, num_tokens):
    """What the index finds, by a scan of all positions."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                followed = ids[start + n :]
                while len(followed) < num_tokens:
                    followed = followed + ids[start + n :]
                return n, followed[:num_tokens]
    return 0, []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 32), st.integers(1, 8), st.integers(1, 8))
def test_the_index_finds_what_a_scan_finds(ids, longest, num_tokens, step):
    """Guards against an n-gram that finds itself, an old occurrence, and a shorter match."""
    index = NgramIndex(range(longest, 0, -1))
    for start in range(0, len(ids), step):
        index.extend(ids[start : start + step])
        matched, position = index.locate(index.ids)
        found = (matched, index.follow(position, num_tokens)) if matched else (0, [])
        assert found == by_scanning(index.ids, longest, num_tokens)


def sequence(*prompt, prediction=(), processor=None):
    request = Request([*prompt], processor, prediction=[*prediction])
    return Sequence(request, GenerationConfig(max_steps=99), 199, torch.device("cpu"))


def longest_match(text, *sources):
    return DraftComposer(tiny_llama(), sources, None)._look_up(text, 3)


def test_what_a_grammar_forbids_is_not_drafted():
    """Guards against a verification of tokens that it must reject."""
    text = sequence(7, 1, 2, 3, 7, 1, processor=Mock(count_allowed=lambda output, draft: 1))
    assert longest_match(text, TextDrafts(2, 1)) == ("n-grams", 2, [2])


@pytest.mark.parametrize(("own", "expected"), [(2, "shared"), (6, "n-grams"), (8, "n-grams")])
def test_a_longer_match_goes_first(own, expected):
    """Guards against two tokens of the prompt that go before an answer that was the same."""
    answers, finished, ids = FinishedAnswers(100), sequence(1), [*range(3, 13)]
    finished.tokens += ids
    answers.add(finished)
    text = sequence(*ids[8 - own : 8], 40, 41, 42, *ids[:8])
    assert longest_match(text, TextDrafts(8, 1), SharedDrafts(answers, True)).source == expected


def found_in(text, k=2, longest=4, least=2):
    """What an index finds that has read the output token by token."""
    drafts, begun = TextDrafts(longest, least), sequence(*text.prompt, prediction=text.prediction)
    for token in text.tokens:
        drafts.find(begun, k)
        begun.tokens.append(token)
    return drafts.find(begun, k)


def test_a_match_goes_on_beyond_the_longest_ngram():
    """Guards against the last of many lines that begin alike, in place of the next one."""
    line = [1, 2, 3, 4, 5]
    text = sequence(8, *line, 10, *line, 20, *line, 30, 9)
    text.tokens += [8, *line]
    assert found_in(text).ids == [10, 1]
    text.tokens += [10, *line]
    assert found_in(text).ids == [20, 1]


def test_a_prediction_is_found_after_what_is_replaced_left_out_and_put_in():
    """Guards against a prediction that is lost at the first difference."""
    predicted = list(range(10, 60))
    text = sequence(5, prediction=predicted)
    for more, expected, matched in (
        (predicted[:20], [30, 31], 22),  # two for the beginning
        ([99], None, 0),  # replaced
        ([31, 32], [33, 34], 2),
        ([40, 41], [42, 43], 2),  # left out
        ([99, 98, 97, 42, 43], [44, 45], 2),  # put in
        (predicted[34:], [], 18),
    ):
        text.tokens += more
        match = found_in(text)
        if expected is None:
            assert match is None
        else:
            assert (match.source, match.matched) == ("prediction", matched)
            assert match.ids[: len(expected)] == expected


def test_a_prediction_is_drafted_first_also_if_the_prompt_has_it():
    """Guards against a prediction that waits for two tokens, and one that counts as the prompt."""
    predicted = [10, 11, 12, 13, 14]
    text = sequence(5, *predicted, 6, prediction=predicted)
    text.tokens += predicted[:1]
    assert found_in(text) == ("prediction", 3, [11, 12])
    text.tokens += [99, 12, 13]
    assert found_in(text)[::2] == ("prediction", [14, ngram._END])
    assert found_in(sequence(5, *predicted, 6, 10, 11)).source == "n-grams"


@pytest.mark.parametrize("module", [ngram, experts])
def test_examples_of_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.usefixtures("equal_rounds")
@mixed_drafts("prediction")
@pytest.mark.parametrize("how", [ADAPTIVE, LOOKUP])
def test_a_predicted_output_changes_no_ids(how):
    """Whatever is predicted: the answer itself, a variant of it, or something else."""
    model, shared = tiny_llama(), {"max_steps": 30, "eos": []}
    plain = ids_of(model, **shared)
    for prediction, least in ((plain, 16), ([*plain[:9], 1, *plain[12:]], 1), ([49] * 40, 0), ([], 0)):
        result = generate(model, PROMPT, prediction=prediction, **shared, **how)
        assert result.predicted_tokens == plain
        counts = result.drafts_by_source.get("prediction")
        accepted = counts.accepted if counts else 0
        assert accepted >= least if least else accepted == 0


@pytest.mark.usefixtures("equal_rounds")
@pytest.mark.parametrize("how", [ADAPTIVE, LOOKUP])
@pytest.mark.parametrize("unknown", [50, -1, 10**6])
def test_predicted_ids_that_the_model_lacks(how, unknown):
    """Guards against a prediction that fails the whole batch, and on a GPU ends the process."""
    model, shared = tiny_llama(), {"max_steps": 12}
    plain = ids_of(model, **shared)
    requests = [Request(PROMPT, prediction=[*plain[:5], unknown, *plain[6:]]), Request(PROMPT[:4])]
    found = in_batch(model, requests, 2, **shared, **how)
    assert found[0].predicted_tokens == plain
    assert found[1].predicted_tokens == ids_of(model, PROMPT[:4], **shared)
    assert found[0].drafts_by_source["prediction"].accepted


def answer(*ids, prompt=()):
    """A finished sequence."""
    return SimpleNamespace(prompt=prompt, ids_from=lambda position: list(ids[position:]))


@given(st.lists(st.integers(1, 15), min_size=1, max_size=20), st.integers(2, 40))
def test_it_keeps_the_last_answers(lengths, num_tokens):
    """Guards against memory that grows with every answer, and against an answer that pushes out itself."""
    kept = FinishedAnswers(num_tokens)
    answers = [list(range(100 * number, 100 * number + n)) for number, n in enumerate(lengths)]
    for ids in answers:
        kept.add(answer(*ids))
        ids = ids[: num_tokens // 2]
        for n in range(3, len(ids)):
            assert kept.find(ids[:n], 1) == (_LONG if n >= _LONG else 3, ids[n : n + 1])
    found = [ids[: num_tokens // 2] for ids in answers if kept.find(ids[:3], 1)[0]]
    assert sum(map(len, found)) <= num_tokens


def test_an_answer_is_found_by_the_end_of_its_prompt():
    """Guards against a repeated question whose first tokens are not drafted."""
    kept, ids = FinishedAnswers(100), [*range(20)]
    kept.add(answer(*ids, prompt=ids[:12]))
    assert kept.find(ids[:12], 2) == (_LONG, [12, 13])


def test_threads_share_it():
    """Guards against a lookup in the middle of an addition."""
    kept, ids = FinishedAnswers(400), [1, 2, 3, 4] * 50
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            adding = pool.submit(lambda: [kept.add(answer(*ids)) for _ in range(100)])
            while not adding.done():
                kept.find([1, 2, 3, 4, 1, 2, 3, 4], 4)
            adding.result()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.usefixtures("equal_rounds")
@mixed_drafts()
@pytest.mark.parametrize("how", [ADAPTIVE, LAYERS, LOOKUP])
def test_a_repeated_question_needs_fewer_rounds(how):
    """Guards against another output, and against an index that is lost between two schedulers."""
    model = own_llama()
    plain = ids_of(model, max_steps=40)
    settings = {"max_steps": 40, "eos": [], "shared_lookup": 200, **how}
    first, second = (generate(model, PROMPT, **settings) for _ in range(2))
    assert first.predicted_tokens == second.predicted_tokens == plain
    assert second.drafts_by_source["shared"].accepted > 20
    assert second.num_verifications < first.num_verifications / 2
    others = generate(own_llama(), PROMPT, **settings)
    assert others.num_verifications > 2 * second.num_verifications  # no answers of another model


def test_warm_ups_and_failures_teach_nothing():
    """Guards against a measured answer that is drafted from the warm-up's, a failed or a forgotten one."""
    model = own_llama()
    config = {**LAYERS, "shared_lookup": 200}
    warm_up([("", generator_of(None, model, "self_speculative"), config_of(**config))], PROMPT, 1)
    with pytest.raises(ZeroDivisionError):
        generate(
            model, PROMPT, eos=[], stop_checks=lambda ids: 1 / (30 - len(ids)) > 1, max_steps=40, **config
        )
    for _ in range(2):
        assert "shared" not in generate(model, PROMPT, max_steps=40, eos=[], **config).drafts_by_source
        forget_what_was_learnt(model)


@mixed_drafts("exit 2")
def test_rows_learn_from_rows_that_have_finished():
    """Guards against answers that are added only after the whole batch."""
    requests = [Request(PROMPT, eos_token_ids=[]) for _ in range(3)]
    settings = {"max_steps": 30, "shared_lookup": 200, **LAYERS}
    made = in_batch(own_llama(), requests, 2, **settings)
    assert made[0].predicted_tokens == made[1].predicted_tokens == made[2].predicted_tokens
    assert "shared" not in made[0].drafts_by_source
    assert made[2].drafts_by_source["shared"].accepted > 15
