"""The fastest candidate tree of an ONNX directory on this machine, and how sure its drafts must be.

Contract: model and prompts in, tree and facts out; reads and writes no files and needs no torch. Heads are asked along the
model's own greedy text. What a tree of a size costs is measured, what a threshold would have verified and accepted is
counted, and the fastest pair is checked on prompts that had no part in choosing it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree, default_tree, likely_part
from axolotl_medusa.measuring.tree_search import MIN_GAIN, JointRanks, held_out, interpolated, search_tree
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa

PLAIN = Tree()
SIZES = (2, 4, 8, 16, 32, 64)
"""Nodes whose steps are timed."""

THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Least probabilities of a draft's path that are tried."""

ROUNDS = 15
_WARM_UP_ROUNDS = 2
_CHECKED_NEW_TOKENS = 64


@dataclass(frozen=True)
class OnnxStepTimes:
    """Measured times.

    Attributes:
        plain_s: Median seconds of a plain step.
        ratios: By nodes, the median of forward with that many nodes / plain step of the same round, heads left out.
        head_ratio: Seconds of one head / seconds of a plain step.
    """

    plain_s: float
    ratios: dict[int, float]
    head_ratio: float


@dataclass(frozen=True)
class OnnxTunedTree:
    """What tuning found.

    Attributes:
        tree: The tree to decode with; the empty one means plain decoding.
        least_probability: Drafts of less likely paths are not verified.
        expected_length: Expected acceptance length.
        expected_speed_up: Against plain decoding, from counts and step times.
        measured_speed_up: On the held-out prompts; None where no tree was advised.
        times: The measured times.
        reason: A line for the user.
    """

    tree: Tree
    least_probability: float
    expected_length: float
    expected_speed_up: float
    measured_speed_up: float | None
    times: OnnxStepTimes
    reason: str

    def facts(self) -> dict[str, Any]:
        """What is written beside the tree."""
        return {
            "expected_acceptance_length": self.expected_length,
            "least_probability": self.least_probability,
            "plain_step_s": self.times.plain_s,
            "step_ratios": {str(nodes): ratio for nodes, ratio in self.times.ratios.items()},
            "head_ratio": self.times.head_ratio,
            "expected_speed_up": self.expected_speed_up,
            "measured_speed_up": self.measured_speed_up,
            "reasons": [self.reason],
        }


def measure_onnx_steps(model: OnnxMedusa, prompt: Sequence[int], rounds: int = ROUNDS) -> OnnxStepTimes:
    """Times whole steps of trees of `SIZES` nodes, plain ones and a head, in turn."""
    top_k = min(DEFAULT_TOP_K, model.heads.vocab_size)
    trees = {1: PLAIN} | {nodes: default_tree(model.heads.num_heads, nodes, top_k) for nodes in SIZES}
    trees = {tree.num_nodes: tree for tree in trees.values()}
    deepest = max(tree.depth for tree in trees.values())
    new_tokens = (rounds + _WARM_UP_ROUNDS + 1) * (deepest + 1)
    if model.context is not None:
        if model.context <= new_tokens:
            raise ValueError(f"timing steps takes {new_tokens} tokens, but the model's context has {model.context}")
        prompt = prompt[: model.context - new_tokens]
    decodings = {nodes: model.decoding([prompt], tree, new_tokens) for nodes, tree in trees.items()}
    times: dict[int, list[float]] = {nodes: [] for nodes in trees}
    heads: list[float] = []
    for round_ in range(-1 - _WARM_UP_ROUNDS, rounds):  # the first one is the prompts'
        seconds = {nodes: _seconds(decoding.step) for nodes, decoding in decodings.items()}
        own = [_head_seconds(model, head, decodings[1].hidden) for head in range(model.heads.num_heads)]
        if round_ >= 0:
            heads.append(statistics.mean(own) / seconds[1])
            for nodes, tree in trees.items():
                times[nodes].append(seconds[nodes] - statistics.mean(own) * tree.depth)
    ratios = {
        nodes: statistics.median(one / plain for one, plain in zip(own, times[1], strict=True))
        for nodes, own in times.items()
    }
    return OnnxStepTimes(statistics.median(times[1]), ratios, statistics.median(heads))


def tune_onnx_tree(
    model: OnnxMedusa, prompts: Sequence[Sequence[int]], nodes: int, max_new_tokens: int = 128
) -> OnnxTunedTree:
    """Finds the fastest tree of at most `nodes` nodes and its threshold.

    Args:
        model: The model with its heads.
        prompts: Token ids of at least two prompts.
        nodes: Nodes with the root at most.
        max_new_tokens: Tokens per prompt at most.

    Raises:
        ValueError: There are too few prompts, their answers are too short, or `nodes` is below 1.
    """
    if nodes < 1:
        raise ValueError(f"a tree of {nodes} nodes was asked for, expected at least 1 (the root alone)")
    calibrating, checking = held_out(prompts)
    places = [place for prompt in calibrating for place in _asked(model, prompt, max_new_tokens)]
    joint = JointRanks(min(DEFAULT_TOP_K, model.heads.vocab_size))
    joint.add(place.ranks for place in places)
    search = search_tree(joint, nodes)
    times = measure_onnx_steps(model, sorted(calibrating, key=len)[len(calibrating) // 2])
    sizes = sorted({size for size in (2, 3, 4, 6, *SIZES) if size <= len(search.expected_lengths)})
    best = (1.0, PLAIN, 0.0, 1.0)
    for tree in dict.fromkeys(search.tree(size) for size in sizes):
        for least in THRESHOLDS:
            length, cost = _expected(places, tree, least, times)
            best = max(best, (length / cost, tree, least, length), key=lambda found: found[0])
    speed_up, tree, least, length = best
    if speed_up < 1 + MIN_GAIN:
        reason = f"no tree: the best one is expected to gain {speed_up - 1:.1%}, less than {MIN_GAIN:.0%}"
        return OnnxTunedTree(PLAIN, 0.0, 1.0, speed_up, None, times, reason)
    measured = _measured(model, checking, tree, least, max_new_tokens)
    what = f"{tree.num_nodes} nodes, drafts of a probability from {least:g}: {length:.3f} tokens per step"
    if measured < 1 - MIN_GAIN:
        reason = f"no tree: {what}, but on held-out prompts it ran at {measured:.3f} times the speed of plain decoding"
        return OnnxTunedTree(PLAIN, 0.0, 1.0, speed_up, measured, times, reason)
    reason = f"{what}, {speed_up - 1:+.1%} against plain decoding expected"
    return OnnxTunedTree(tree, least, length, speed_up, measured, times, reason)


@dataclass(frozen=True)
class _Place:
    """A position of the model's own text: ranks of the true tokens, and what the heads say of their best ones."""

    ranks: list[int]
    log_probabilities: list[list[float]]


def _asked(model: OnnxMedusa, prompt: Sequence[int], max_new_tokens: int) -> list[_Place]:
    """Asks the heads at every position of a plain answer."""
    decoding = model.decoding([prompt], PLAIN, max_new_tokens, model.eos_token_ids)
    states = []
    while decoding.rows:
        decoding.step()
        states.append(decoding.hidden)
    text, heads = decoding.tokens[0], model.heads.num_heads
    top_k = min(DEFAULT_TOP_K, model.heads.vocab_size)
    places = []
    for number, hidden in enumerate(states[:-1]):
        wanted = text[number + 1 : number + 1 + heads]
        if len(wanted) < heads and len(text) == max_new_tokens:
            break  # the limit cut off what would have come
        found = [model.heads.best(head, hidden, top_k) for head in range(heads)]
        ranks = [_rank(tokens[0], token) for (tokens, _), token in zip(found, wanted, strict=False)]
        places.append(_Place(ranks + [-1] * (heads - len(wanted)), [log_p[0].tolist() for _, log_p in found]))
    return places


def _rank(best: Any, token: int) -> int:
    places = np.flatnonzero(best == token)
    return int(places[0]) if len(places) else len(best)


def _expected(places: Sequence[_Place], tree: Tree, least: float, times: OnnxStepTimes) -> tuple[float, float]:
    """Mean acceptance length and mean cost of a step, in plain steps."""
    length = cost = 0.0
    for place in places:
        part = likely_part(tree, place.log_probabilities[: tree.depth], least)
        choices = set(part.choices)
        length += 1 + sum(tuple(place.ranks[:depth]) in choices for depth in range(1, part.depth + 1))
        asked = min(tree.depth, part.depth + 1)  # the head whose draft was unsure has run too
        cost += (
            interpolated(times.ratios, part.num_nodes) or times.ratios[max(times.ratios)]
        ) + asked * times.head_ratio
    return length / len(places), cost / len(places)


def _measured(
    model: OnnxMedusa, prompts: Sequence[Sequence[int]], tree: Tree, least: float, max_new_tokens: int
) -> float:
    """Median over prompts of the speed with a tree / the speed of plain decoding, run in turn."""
    tokens = min(max_new_tokens, _CHECKED_NEW_TOKENS)
    before, ratios = model.heads.least_probability, []
    try:
        for prompt in prompts:
            model.heads.least_probability = 0.0
            plain = _answer_seconds(model, prompt, PLAIN, tokens)
            model.heads.least_probability = least
            ratios.append(plain / _answer_seconds(model, prompt, tree, tokens))
    finally:
        model.heads.least_probability = before
    return statistics.median(ratios)


def _answer_seconds(model: OnnxMedusa, prompt: Sequence[int], tree: Tree, new_tokens: int) -> float:
    return _seconds(lambda: model.generate([prompt], new_tokens, tree=tree))


def _head_seconds(model: OnnxMedusa, head: int, hidden: Any) -> float:
    return _seconds(lambda: model.heads.best(head, hidden, 1))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
