"""Which rows of a step's hidden states the heads read: of each request, the row of its last accepted token.

Contract: plain lists, no server and no tensors. A server verifies, of every request in the batch, its drafts and one token
more; the rows of the requests lie one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class SampleRows(NamedTuple):
    """Rows to read.

    Attributes:
        requests: Places in the batch of the requests that go on.
        rows: The row of each of them.
    """

    requests: list[int]
    rows: list[int]


def sample_rows(sampled: Sequence[Sequence[int]], num_drafts: Sequence[int] | None, num_rows: int) -> SampleRows:
    """Finds the row after which each request goes on.

    Args:
        sampled: Tokens of each request that this step added; none where its prompt is not read to the end yet.
        num_drafts: Drafts of each request that this step verified; None where no request had one.
        num_rows: Rows of hidden states: a request's drafts and one more, request after request.

    Raises:
        RuntimeError: The numbers contradict each other, so that a row would be another request's.
    """
    drafts = [0] * len(sampled) if num_drafts is None else num_drafts
    if len(drafts) != len(sampled) or sum(drafts) + len(drafts) != num_rows:
        raise RuntimeError(
            f"found {num_rows} hidden states for {len(sampled)} requests with {sum(drafts)} drafts, expected one more than "
            "drafts of each request: this server's batches are not known to MedusaDrafter"
        )
    requests, rows, first = [], [], 0
    for place, (tokens, count) in enumerate(zip(sampled, drafts, strict=True)):
        if len(tokens) > count + 1:
            raise RuntimeError(
                f"found {len(tokens)} new tokens of a request with {count} drafts, expected one more at most"
            )
        if tokens:
            requests.append(place)
            rows.append(first + len(tokens) - 1)
        first += count + 1
    return SampleRows(requests, rows)
