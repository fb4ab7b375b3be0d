"""The index of n-grams, and examples in docstrings."""

import doctest
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from self_speculation import GenerationConfig, Request
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts import ngram
from self_speculation.drafts.ngram import NgramDrafts, NgramIndex, one_hot
from self_speculation.model import experts


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
        assert index.lookup(num_tokens) == by_scanning(ids[: len(index)], longest, num_tokens)


def sequence(*prompt, processor=None):
    request = Request([*prompt], processor)
    return Sequence(request, GenerationConfig(max_steps=9), 99, torch.device("cpu"))


def test_an_output_is_indexed_once():
    """Guards against tokens that are indexed again in each round."""
    drafts, text = NgramDrafts(2, 50), sequence(7, 1, 2)
    for token in (3, 9, 1, 2):
        text.tokens.append(token)
        assert drafts.lookup(text, 2) == by_scanning(text.ids, 2, 2)


def test_what_a_grammar_forbids_is_not_drafted():
    """Guards against a verification of tokens that it must reject."""
    allows_one = Mock(count_allowed=lambda output, draft: 1)
    text = sequence(7, 1, 2, 3, 7, 1, processor=allows_one)
    assert NgramDrafts(2, 50).lookup(text, 3) == (2, [2])


def test_a_copied_token_has_all_of_q():
    """Guards against a residual that still has it."""
    assert one_hot(torch.tensor([[3, 0]]), 5).tolist() == [[[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]]


@pytest.mark.parametrize("module", [ngram, experts])
def test_examples_of_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
