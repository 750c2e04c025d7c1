"""Heads as a chain: every row weighted by what it adds to the number of tokens that are accepted one after the other.

Contract: pure functions of tensors. A draft of N tokens is accepted up to its first wrong one. With q_i the probability that
head i gives its target, the expected length of the chain that starts at a position is `1 + Σ_m Π_{i ≤ m} q_i`, and the
gradient of that sum with respect to `log q_j` is `w_j = Σ_{m ≥ j} Π_{i ≤ m} q_i`: the weight of head j's row, which gets no
gradient itself. Smoothed, `(1 - α) q + α` in place of q, it is D-PACE (arXiv 2605.18810, eq. 7 and 8): without, the rows
of heads that are wrong have no weight, and nobody teaches them. Weighted sums are divided by the number of positions, as
D-PACE's authors do it, and not by the sum of weights, which would depend on what else is in a batch. Their size compares with
decay's: with α = 0.5 the weights of three heads at a position add up to 1.4 where none is right and to 6 where all are certain,
and 0.8, 0.64, 0.51 to 1.95.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """The first predictions of a loss as the heads of a chain, in their order.

    Attributes:
        positions: Of each head, the positions of its rows, ascending, `[rows]`; rows of different heads at the same position
            are of one chain.
        num_positions: How many positions there are.
        smoothing: α, at least 0, at most 1.
    """

    positions: Sequence[Tensor]
    num_positions: int
    smoothing: float


def chain_weights(
    cross_entropies: Sequence[Tensor], positions: Sequence[Tensor], num_positions: int, smoothing: float
) -> list[Tensor]:
    """The weight of every row of every head: `w_j = Σ_{m ≥ j} Π_{i ≤ m} ((1 - α) q_i + α)`.

    Where a head has no target, the chain ends before it: that head and those behind it add nothing at that position, and
    their rows there, if any, have no weight.

    Args:
        cross_entropies: Of each head, `-log q[target]` of its rows, `[rows]`.
        positions: Of each head, the positions of its rows, `[rows]`, below `num_positions`.
        num_positions: How many positions there are.
        smoothing: α.

    Returns:
        Of each head, the weights of its rows, `[rows]`.
    """
    first = cross_entropies[0]
    accepted = torch.zeros(num_positions, len(cross_entropies), device=first.device)
    for head, (losses, own) in enumerate(zip(cross_entropies, positions, strict=True)):
        accepted[own, head] = (1.0 - smoothing) * torch.exp(-losses.detach().float()) + smoothing
    weights = accepted.cumprod(dim=1).flip(1).cumsum(dim=1).flip(1)
    return [weights[own, head] for head, own in enumerate(positions)]
