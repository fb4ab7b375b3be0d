"""The index of n-grams, and examples in docstrings."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from self_speculation.drafts import ngram
from self_speculation.drafts.ngram import NgramIndex
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


@pytest.mark.parametrize("module", [ngram, experts])
def test_examples_of_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
