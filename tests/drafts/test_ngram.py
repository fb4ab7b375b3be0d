"""The index of what stood where, and what it finds."""

import math

from hypothesis import given
from hypothesis import strategies as st

from self_speculation.drafts.ngram import NgramIndex


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 32), st.integers(1, 8))
def test_any_lookup_finds_what_a_search_finds(ids, longest, wanted):
    index = NgramIndex(longest)
    index.extend(ids)
    found = (0, [])
    for n in range(min(longest, len(ids) - 1), 0, -1):
        places = [i + n for i in range(len(ids) - n) if ids[i : i + n] == ids[-n:]]
        if places:
            behind = ids[places[-1] :]
            found = n, (behind * math.ceil(wanted / len(behind)))[:wanted]
            break
    assert index.lookup(wanted) == found


def by_scanning(ids, longest, num_tokens):
    """What the index is for, by looking at every place."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                followed = ids[start + n :]
                while len(followed) < num_tokens:
                    followed = followed + ids[start + n :]
                return n, followed[:num_tokens]
    return 0, []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_the_index_finds_what_a_scan_finds(ids, longest, num_tokens, step):
    """Guards against a run that finds itself, an old place or a short match that is preferred."""
    index = NgramIndex(longest)
    for start in range(0, len(ids), step):
        index.extend(ids[start : start + step])
        assert index.lookup(num_tokens) == by_scanning(ids[: len(index)], longest, num_tokens)


def test_a_repetition_is_guessed_to_its_end():
    index = NgramIndex(3)
    index.extend([1, 2, 3, 1, 2, 3, 1])
    assert index.lookup(7) == (3, [2, 3, 1, 2, 3, 1, 2])
