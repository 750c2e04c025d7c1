"""The row of each request's last accepted token, against a batch that is walked through token by token."""

from __future__ import annotations

import random

import pytest

from axolotl_medusa.serving.sample_rows import sample_rows


def test_requests_without_drafts_have_their_own_row():
    assert sample_rows([[5], [6], [7]], [0, 0, 0], 3) == ([0, 1, 2], [0, 1, 2])
    assert sample_rows([[5], [6]], None, 2) == ([0, 1], [0, 1])


def test_rejected_drafts_are_passed_over():
    # Three requests with 3, 0 and 2 drafts: all rejected, none there, one accepted.
    assert sample_rows([[9], [8], [7, 6]], [3, 0, 2], 8) == ([0, 1, 2], [0, 4, 6])


def test_request_whose_prompt_is_not_read_to_the_end_gets_no_drafts():
    assert sample_rows([[9, 9], [], [7]], [1, 0, 0], 4) == ([0, 2], [1, 3])


def test_as_many_rows_as_requests_are_not_taken_for_no_drafts():
    # Four rows of three requests with one draft among them: the number of rows alone would not say it.
    assert sample_rows([[1, 2], [3], [4]], [1, 0, 0], 4) == ([0, 1, 2], [1, 2, 3])


def naive(sampled, drafts):
    """Lists (request, how many of its tokens are known before the row's) row by row, and looks each request up."""
    table = [(request, place) for request, count in enumerate(drafts) for place in range(count + 1)]
    kept = [request for request, tokens in enumerate(sampled) if tokens]
    return kept, [table.index((request, len(sampled[request]) - 1)) for request in kept]


def test_random_batches_equal_the_naive_search():
    generator = random.Random(0)
    for _ in range(300):
        drafts = [generator.randint(0, 4) for _ in range(generator.randint(1, 9))]
        sampled = [[1] * generator.randint(0, count + 1) for count in drafts]
        assert sample_rows(sampled, drafts, sum(drafts) + len(drafts)) == naive(sampled, drafts)


@pytest.mark.parametrize(
    ("sampled", "drafts", "rows"),
    [([[1], [2]], [1, 0], 2), ([[1]], [0, 0], 2), ([[1], [2]], None, 3), ([[1, 2]], [0], 1)],
)
def test_numbers_that_contradict_each_other_are_refused(sampled, drafts, rows):
    with pytest.raises(RuntimeError, match="expected one more"):
        sample_rows(sampled, drafts, rows)
