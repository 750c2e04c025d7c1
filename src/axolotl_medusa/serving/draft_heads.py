"""Heads as a server runs them: all of them at once, for all requests at once, each guess with its probability.

Contract: tensors alone, no server and no files. Weights of all heads are stacked, so that a pass is one matrix product
per layer of residual blocks and one of the output layer, whatever the numbers of heads and requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LOGITS_AT_ONCE = 1 << 27
"""Elements of logits that are held at a time; beyond, requests take turns."""


class Guesses(NamedTuple):
    """Best tokens.

    Attributes:
        tokens: `[requests, heads]`.
        probabilities: Of these tokens, `[requests, heads]`, fp32; None where nobody asked.
    """

    tokens: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class DraftHeads:
    """Stacked weights of N heads.

    Attributes:
        weights: Layer by layer of the residual blocks, `[N, H, H]`.
        biases: Layer by layer, `[N, H]`.
        outputs: Output layers of their own, `[N, rows, H]`, or one for all, `[1, rows, H]`; None where they use the model's. With
            tensor parallelism this rank's rows.
        first_row: Token of the first of these rows.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    outputs: Tensor | None = None
    first_row: int = 0

    @property
    def num_heads(self) -> int:
        """Number of heads N."""
        return len(self.weights[0])

    def hidden(self, states: Tensor, num_heads: int) -> Tensor:
        """Runs the residual blocks of the first heads: `x + SiLU(W x + b)`, layer after layer.

        Args:
            states: The model's hidden states after the final norm, `[requests, H]`.
            num_heads: Heads to run.

        Returns:
            What goes into the output layers, `[requests, heads, H]`.
        """
        size = states.shape[1]
        first = F.linear(states, self.weights[0][:num_heads].reshape(-1, size), self.biases[0][:num_heads].reshape(-1))
        hidden = states[:, None] + F.silu(first.view(-1, num_heads, size))
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            inputs = hidden.transpose(0, 1)
            inner = torch.baddbmm(bias[:num_heads, None], inputs, weight[:num_heads].transpose(1, 2))
            hidden = (inputs + F.silu(inner)).transpose(0, 1)
        return hidden

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Logits of heads with output layers that are not the model's, `[requests, heads, rows]`, from `[requests, heads, H]`."""
        if self.outputs is None:
            raise RuntimeError("found heads that share the model's output layer, expected some with their own")
        if len(self.outputs) == 1:
            return F.linear(hidden, self.outputs[0])
        return torch.bmm(hidden.transpose(0, 1), self.outputs[: hidden.shape[1]].transpose(1, 2)).transpose(0, 1)


def best_guesses(logits: Tensor, *, with_probabilities: bool) -> Guesses:
    """The best token of each row of logits, and its probability `softmax(logits).max()` in fp32."""
    if not with_probabilities:
        return Guesses(logits.argmax(-1), None)
    values, tokens = logits.max(-1)
    return Guesses(tokens, (values.float() - logits.float().logsumexp(-1)).exp())


def joined_guesses(parts: Tensor, first_rows: Tensor) -> Guesses:
    """Joins what ranks found in their parts of a vocabulary.

    Args:
        parts: Largest logit, logarithm of the summed exponentials, and place in the part, `[ranks, ..., 3]`, fp32.
        first_rows: Token of each part's first row, `[ranks]`.
    """
    values, sums, places = parts.unbind(-1)
    best = values.argmax(0, keepdim=True)
    tokens = places.gather(0, best)[0].long() + first_rows.to(parts.device)[best[0]]
    return Guesses(tokens, (values.gather(0, best)[0] - sums.logsumexp(0)).exp())


def part_of_guesses(logits: Tensor) -> Tensor:
    """What a rank tells the others of its part of the vocabulary, `[..., 3]`; see `joined_guesses`."""
    values, places = logits.max(-1)
    return torch.stack((values.float(), logits.float().logsumexp(-1), places.float()), -1)


def in_turns(states: Tensor, elements_per_row: int, guess: Callable[[Tensor], Guesses | None]) -> Guesses | None:
    """Guesses for all rows at once, or for as many at a time as their logits may be held of; None where a guess is."""
    at_once = max(1, _LOGITS_AT_ONCE // elements_per_row)
    if len(states) <= at_once:
        return guess(states)
    found = [guess(part) for part in torch.split(states, at_once)]
    there = [part for part in found if part is not None]
    if not there:
        return None
    probabilities = [part.probabilities for part in there if part.probabilities is not None]
    return Guesses(torch.cat([part.tokens for part in there]), torch.cat(probabilities) if probabilities else None)
