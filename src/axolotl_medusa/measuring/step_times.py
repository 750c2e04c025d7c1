"""Seconds of a decoding step by the size of its tree, beside a plain step of the same model.

Contract: whole steps are timed (forward, heads, acceptance, cache), as generation runs them, in turn with plain ones, so
that a machine that gets slower or busier in between slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.model.anatomy import causal_lm

SIZES = (1, 4, 8, 16, 32, 64)
"""Nodes whose steps are timed."""

ROUNDS = 20
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class StepTimes:
    """Measured steps.

    Attributes:
        plain_s: Median seconds of a plain step.
        ratios: By nodes, the median over rounds of step / plain step of the same round.
        context_tokens: Tokens in the cache when measuring began.
        rounds: Rounds measured.
    """

    plain_s: float
    ratios: dict[int, float]
    context_tokens: int
    rounds: int

    @property
    def step_s(self) -> dict[int, float]:
        """Seconds of a step by nodes: `ratios` times `plain_s`."""
        return {nodes: ratio * self.plain_s for nodes, ratio in self.ratios.items()}


@torch.no_grad()
def measure_steps(
    model: MedusaModel, input_ids: Sequence[int], trees: Sequence[Tree], rounds: int = ROUNDS, compile: bool = False
) -> StepTimes:
    """Times one step of every tree and a plain one, in turn, `rounds` times.

    Args:
        model: The model with its heads.
        input_ids: A prompt that fills the cache; its end is cut off where the model's context has no room for the steps.
        trees: Trees of different sizes.
        rounds: Rounds to measure, at least 1.
        compile: Whether the trees' forwards are compiled.

    Raises:
        ValueError: The model's context is too short for the steps alone.
    """
    deepest = max((tree.depth for tree in trees), default=0)
    new_tokens = (rounds + _WARM_UP_ROUNDS + 1) * (deepest + 1)
    if model.context is not None:
        if model.context <= new_tokens:
            raise ValueError(f"timing steps takes {new_tokens} tokens, but the model's context has {model.context}")
        input_ids = input_ids[: model.context - new_tokens]
    prompt = torch.tensor([list(input_ids)], device=causal_lm(model.base_model).get_input_embeddings().weight.device)
    plain = PlainDecoding(model.base_model, prompt, new_tokens)
    decoders = {tree.num_nodes: model.greedy_decoding(prompt, tree, new_tokens, compile=compile) for tree in trees}
    steps: dict[int, Callable[[], object]] = {nodes: decoding.step for nodes, decoding in decoders.items()}
    plain_s: list[float] = []
    ratios: dict[int, list[float]] = {nodes: [] for nodes in steps}
    for round_ in range(-1 - _WARM_UP_ROUNDS, rounds):  # the first one is the prompts'
        before = timed(plain.step, prompt)
        times = {nodes: timed(step, prompt) for nodes, step in steps.items()}
        if round_ >= 0:
            plain_s.append(before)
            for nodes, seconds in times.items():
                ratios[nodes].append(seconds / before)
    medians = {nodes: statistics.median(values) for nodes, values in sorted(ratios.items())}
    return StepTimes(statistics.median(plain_s), medians, len(input_ids), rounds)


def timed(run: Callable[[], object], on: Tensor) -> float:
    """Seconds that `run` takes, the work that it leaves to the device of `on` included."""
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    begin = time.perf_counter()
    run()
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter() - begin
