"""The fastest candidate tree of given heads on this machine: calibration, step times, choice, and a check of the choice.

Contract: model and prompts in, tree and facts out; reads and writes no files. The prompts that check the choice have no part
in making it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree
from axolotl_medusa.measuring.calibration import HeadRanks, head_ranks
from axolotl_medusa.measuring.evaluate import PLAIN, PromptTokens, check_fits, decode_in_turn
from axolotl_medusa.measuring.step_times import SIZES, StepTimes, measure_steps
from axolotl_medusa.measuring.tree_search import CHECKED_PROMPTS as CHECKED_PROMPTS
from axolotl_medusa.measuring.tree_search import MIN_GAIN, ChosenSize, TreeSearch, fastest_size, search_tree
from axolotl_medusa.measuring.tree_search import held_out as held_out


@dataclass(frozen=True)
class TunedTree:
    """What tuning found.

    Attributes:
        tree: The tree to decode with; the empty one means plain decoding.
        search: Best trees and expected acceptance lengths of every size.
        times: Measured steps.
        chosen: What the expected lengths and the step times advise.
        calibrated_on: Prompts that tree and size were chosen with.
        checked_on: Ids of the held-out prompts that `speed_ups` were measured on.
        speed_ups: By nodes, the measured speed-up of every tree that was tried, the advised one first.
        reasons: Lines for the user: the advice, then why smaller trees were fallen back to, if they were.
    """

    tree: Tree
    search: TreeSearch
    times: StepTimes
    chosen: ChosenSize
    calibrated_on: int
    checked_on: tuple[str, ...]
    speed_ups: dict[int, float]
    reasons: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """What is written beside the tree."""
        return {
            "expected_acceptance_length": self.search.expected_lengths[self.tree.num_nodes - 1],
            "expected_acceptance_lengths": list(self.search.expected_lengths),
            "plain_step_s": self.times.plain_s,
            "step_ratios": {str(nodes): ratio for nodes, ratio in self.times.ratios.items()},
            "calibrated_on": self.calibrated_on,
            "checked_on": list(self.checked_on),
            "measured_speed_ups": {str(nodes): speed_up for nodes, speed_up in self.speed_ups.items()},
            "reasons": list(self.reasons),
        }


def tune_tree(model: MedusaModel, prompts: Sequence[PromptTokens], nodes: int, max_new_tokens: int = 128) -> TunedTree:
    """Finds the fastest tree of at most `nodes` nodes.

    Args:
        model: The model with its heads.
        prompts: At least two, answered by plain greedy decoding; `held_out` says which of them only check the choice.
        nodes: Nodes with the root at most.
        max_new_tokens: Tokens per prompt at most.

    Raises:
        ValueError: There are too few prompts or some do not fit the model, their answers are too short to count anything,
            or `nodes` is below 1.
    """
    if nodes < 1:
        raise ValueError(f"a tree of {nodes} nodes was asked for, expected at least 1 (the root alone)")
    check_fits(model, prompts, max_new_tokens)
    calibrating, checking = held_out(prompts)
    ranks = HeadRanks(model.heads.num_heads, min(DEFAULT_TOP_K, model.heads.vocab_size))
    for prompt in calibrating:
        tokens = decode_in_turn(model, prompt.input_ids, {}, max_new_tokens)[PLAIN].tokens
        ranks.add(head_ranks(model, prompt.input_ids, tokens, ranks.top_k), ended=len(tokens) < max_new_tokens)
    search = search_tree(ranks.joint, nodes)
    largest = len(search.expected_lengths)
    sizes = sorted({1, largest} | {size for size in SIZES if size < largest})
    middle = sorted(calibrating, key=lambda prompt: len(prompt.input_ids))[len(calibrating) // 2]
    times = measure_steps(model, middle.input_ids, [search.tree(size) for size in sizes])
    chosen = fastest_size(search, times.step_s, times.plain_s)

    def speed_up(tree: Tree) -> float:
        return measured_speed_up(model, checking, tree, max_new_tokens)

    kept, speed_ups, fallbacks = largest_that_pays(search, chosen.nodes, sizes, speed_up)
    checked_on = tuple(prompt.id for prompt in checking) if speed_ups else ()
    reasons = (chosen.reason, *fallbacks)
    return TunedTree(search.tree(kept), search, times, chosen, len(calibrating), checked_on, speed_ups, reasons)


def largest_that_pays(
    search: TreeSearch, nodes: int, sizes: Sequence[int], speed_up: Callable[[Tree], float]
) -> tuple[int, dict[int, float], list[str]]:
    """Falls back from an advised size to smaller ones until one is no slower than plain decoding by more than 2%.

    Args:
        search: Best trees by size.
        nodes: The advised size.
        sizes: Sizes to fall back to; 1 is always among them and is not run.
        speed_up: Measures a tree's speed against plain decoding.

    Returns:
        The size, measured speed-ups by size, and a line for every fallback.
    """
    measured: dict[int, float] = {}
    reasons: list[str] = []
    smaller = sorted((size for size in sizes if 1 < size < nodes), reverse=True)
    for size, following in zip([nodes, *smaller], [*smaller, 1], strict=True):
        if size == 1:
            break
        measured[size] = speed_up(search.tree(size))
        if measured[size] >= 1 - MIN_GAIN:
            return size, measured, reasons
        what = f"{following} nodes" if following > 1 else "no tree"
        reasons.append(
            f"{size} nodes ran at {measured[size]:.3f} times the speed of plain decoding, less than {1 - MIN_GAIN:.2f}: "
            f"falling back to {what}"
        )
    return 1, measured, reasons


def measured_speed_up(model: MedusaModel, prompts: Sequence[PromptTokens], tree: Tree, max_new_tokens: int) -> float:
    """Median over prompts of tokens/s with the tree / tokens/s of plain decoding, run in turn."""
    ratios = []
    for number, prompt in enumerate(prompts):
        runs = decode_in_turn(model, prompt.input_ids, {"tree": tree}, max_new_tokens, first=number)
        ratios.append(runs["tree"].tokens_per_s / runs[PLAIN].tokens_per_s)
    return statistics.median(ratios)
