"""What is looked up, in predicted outputs and texts."""

from unittest.mock import Mock

import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from self_speculation import GenerationConfig, Request
from self_speculation.drafts import ngram
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.ngram import NgramDrafts, NgramIndex
from self_speculation.requests.sequence import Sequence


def by_scanning(ids, longest):
    """What the index finds, by a scan of all positions."""
    for n in range(min(longest, len(ids) - 1), min(2, longest) - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                return n, start + n
    return 0, 0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 32), st.integers(1, 8))
def test_the_index_finds_what_a_scan_finds(ids, longest, step):
    """Guards against an n-gram that finds itself, an old occurrence, and a shorter match."""
    index = NgramIndex([], longest)
    for start in range(0, len(ids), step):
        index.extend(ids[start : start + step])
        assert index.locate() == by_scanning(index.ids, longest)


def sequence(*prompt, prediction=(), processor=None):
    request = Request([*prompt], processor, prediction=[*prediction])
    return Sequence(request, GenerationConfig(max_steps=99), 199, torch.device("cpu"))


def longest_match(text, *sources):
    return DraftComposer(tiny_llama(), sources, None)._look_up(text, 3)


def test_what_a_grammar_forbids_is_not_drafted():
    """Guards against a verification of tokens that it must reject."""
    text = sequence(7, 1, 2, 3, 7, 1, processor=Mock(count_allowed=lambda output, draft: 1))
    assert longest_match(text, NgramDrafts(2)) == ("n-grams", 2, [2])


def found_in(text, k=2):
    """What an index finds that has read the output token by token."""
    drafts = NgramDrafts(4)
    begun = sequence(*text.prompt_ids, prediction=text.prediction)
    for token in text.output_ids:
        drafts.find(begun, k)
        begun.output_ids.append(token)
    return drafts.find(begun, k)


def test_a_match_goes_on_beyond_the_longest_ngram():
    """Guards against the last of many lines that begin alike, in place of the next one, and against a draft
    that ends with the text.
    """
    line = [1, 2, 3, 4, 5]
    text = sequence(8, *line, 10, *line, 20, *line, 30, 9)
    text.output_ids += [8, *line]
    assert found_in(text).ids == [10, 1]
    text.output_ids += [10, *line]
    assert found_in(text).ids == [20, 1]
    assert found_in(sequence(9, 1, 2, 1, 2), k=5).ids == [1, 2, 1, 2, 1]


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
        text.output_ids += more
        match = found_in(text)
        if expected is None:
            assert match is None
        else:
            assert (match.source_name, match.matched) == ("prediction", matched)
            assert match.ids[: len(expected)] == expected


def test_a_prediction_with_equal_lines_goes_on_after_the_place_where_the_output_left_it():
    """Guards against the last of several equal lines, which skips all that is between, and against the first
    one, which goes back.
    """
    predicted = [1, 2, 10, 11, 1, 2, 20, 21, 1, 2, 30, 31]
    for output, expected in (([99, 1, 2], 10), ([1, 2, 99, 1, 2], 20), ([*predicted[:6], 99, 1, 2], 30)):
        text = sequence(5, prediction=predicted)
        text.output_ids += output
        assert found_in(text)[::2] == ("prediction", [expected, expected + 1])
    text = sequence(5, prediction=predicted)
    text.output_ids += [*predicted[:10], 99, 1, 2]  # none is left
    assert found_in(text).ids == [30, 31]


def test_a_prediction_is_drafted_first_also_if_the_prompt_has_it():
    """Guards against a prediction that waits for two tokens, and one that counts as the prompt."""
    predicted = [10, 11, 12, 13, 14]
    text = sequence(5, *predicted, 6, prediction=predicted)
    text.output_ids += predicted[:1]
    assert found_in(text) == ("prediction", 3, [11, 12])
    text.output_ids += [99, 12, 13]
    assert found_in(text)[::2] == ("prediction", [14, ngram._END])
    assert found_in(sequence(5, *predicted, 6, 10, 11)).source_name == "n-grams"
