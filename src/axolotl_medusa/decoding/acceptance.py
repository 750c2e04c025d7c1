"""Which draft tokens of a verified candidate tree are accepted, and which token the target adds.

Contract: pure functions of logits, torch's or numpy's; knows no model and no cache. Every rule gets the target's logits at
all nodes and answers with the last accepted node and the target's own next token after it. The root is always accepted: it
was the target's own token of the step before.

Shapes: B rows, n nodes, V tokens in the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from axolotl_medusa.decoding.arrays import Arrays
from axolotl_medusa.decoding.tree import Tree

if TYPE_CHECKING:
    import torch

Acceptance = Literal["greedy", "typical", "rejection"]
Tensor = Any
"""An array of the library whose arrays the tree has."""


class Accepted(NamedTuple):
    """What a rule answers.

    Attributes:
        node: The last accepted node, `[B]`.
        token: The target's own token after it, `[B]`.
    """

    node: Tensor
    token: Tensor


@dataclass(frozen=True)
class TreeTensors:
    """A candidate tree as arrays of one library, on one device.

    Attributes:
        tree: The tree.
        arrays: The library.
        parents: Parent of every node, `[n]`.
        depths: Depth of every node, `[n]`.
        ancestors: Row i: node i and its ancestors, bool `[n, n]`.
        paths: Row i: the nodes from the root to node i, then zeros, `[n, depth + 1]`.
        children: Row i: the nodes whose parent is node i, then zeros, `[n, most children]`.
        heads: Head of every node but the root, `[n - 1]`.
        ranks: Rank of every node but the root among its head's best tokens, `[n - 1]`.
    """

    tree: Tree
    arrays: Arrays
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    paths: Tensor
    children: Tensor
    heads: Tensor
    ranks: Tensor


@functools.lru_cache(maxsize=64)
def tree_tensors(tree: Tree, device: torch.device) -> TreeTensors:
    """Moves a tree to a device of torch, once."""
    from axolotl_medusa.decoding.torch_arrays import TorchArrays

    return tree_arrays(tree, TorchArrays(device))


def tree_arrays(tree: Tree, arrays: Arrays) -> TreeTensors:
    """A tree as arrays of a library."""

    def padded(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return arrays.integers([row + [0] * (width - len(row)) for row in rows])

    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node, parent in enumerate(tree.parents[1:], 1):
        children[parent].append(node)
    return TreeTensors(
        tree,
        arrays,
        parents=arrays.integers(tree.parents),
        depths=arrays.integers(tree.depths),
        ancestors=arrays.booleans(tree.attention_mask),
        paths=padded([list(path) for path in tree.paths]),
        children=padded(children) if tree.choices else arrays.zeros(1, 0),
        heads=arrays.integers([head for head, _ in tree.picks]),
        ranks=arrays.integers([rank for _, rank in tree.picks]),
    )


def accept_greedy(logits: Tensor, tokens: Tensor, tree: TreeTensors) -> Accepted:
    """Accepts what greedy decoding would have written: a draft token is right if it is its parent's argmax.

    Args:
        logits: The target's logits at every node, `[B, n, V]`.
        tokens: The nodes' tokens, `[B, n]`.
        tree: The tree.
    """
    return accept_best(logits.argmax(-1), tokens, tree)


def accept_best(best: Tensor, tokens: Tensor, tree: TreeTensors) -> Accepted:
    """`accept_greedy` where the argmax was taken already: the target's likeliest next token at every node, `[B, n]`."""
    if not tree.tree.choices:
        return Accepted(tree.arrays.zeros(len(best)), best[:, 0])
    node = _deepest(tokens[:, 1:] == best[:, tree.parents[1:]], tree).argmax(-1)
    return Accepted(node, _at(best, node, tree))


def accept_typical(
    logits: Tensor, tokens: Tensor, tree: TreeTensors, *, temperature: float, epsilon: float, delta: float, sample: bool
) -> Accepted:
    """Typical acceptance (Medusa, section 2.3.1): x is accepted where `p(x) > min(ε, δ · exp(-H(p)))`.

    p is the target's distribution after x's parent at `temperature`, H its entropy. Of the longest accepted paths the
    likeliest is taken. The target's own token is its likeliest one, as in the paper; with `sample` it is drawn from p
    among the tokens that would be accepted.

    Args:
        logits: The target's logits at every node, `[B, n, V]`.
        tokens: The nodes' tokens, `[B, n]`.
        tree: The tree.
        temperature: T, above 0.
        epsilon: ε, the threshold's upper bound.
        delta: δ, the threshold's scale.
        sample: Whether the target's own token is drawn.
    """
    arrays = tree.arrays
    log_p = arrays.log_softmax(logits, temperature)
    threshold = arrays.at_most(delta * arrays.exp(-arrays.entropy(log_p)), epsilon)
    parents = tree.parents[1:]
    draft_log_p = arrays.take(log_p[:, parents], tokens[:, 1:])
    depth = _deepest(arrays.exp(draft_log_p) > threshold[:, parents], tree)
    own_log_p = arrays.pad(draft_log_p)
    path_log_p = arrays.where(tree.ancestors, own_log_p[:, None, :], 0.0).sum(-1)
    node = arrays.where(depth < arrays.largest(depth)[:, None], -float("inf"), path_log_p).argmax(-1)
    last = _at(log_p, node, tree)
    if not sample:
        return Accepted(node, last.argmax(-1))
    probabilities = arrays.exp(last)
    least = arrays.at_most(_at(threshold, node, tree), arrays.largest(probabilities) * (1 - 1e-6))
    return Accepted(node, arrays.draw(probabilities * (probabilities > least[:, None])))


def accept_rejection(logits: Tensor, tokens: Tensor, tree: TreeTensors, *, temperature: float) -> Accepted:
    """Rejection sampling that leaves the target's distribution at `temperature` exactly as it is.

    A node's draft tokens are certain given the text, so the drafter's distribution is a point at each of them. Accepting
    the first with probability p(x1), the second with p(x2) / (1 - p(x1)), and so on, and drawing from what is left of p
    if all are rejected, is the same as drawing one token from p and going down to the child that has it, if any does.

    Args:
        logits: The target's logits at every node, `[B, n, V]`.
        tokens: The nodes' tokens, `[B, n]`.
        tree: The tree.
        temperature: T, above 0.
    """
    arrays = tree.arrays
    node = arrays.zeros(len(logits))
    drawn = _draw(_at(logits, node, tree), temperature, arrays)
    for _ in range(tree.tree.depth):
        children = tree.children[node]
        matches = (tokens[arrays.range(len(node))[:, None], children] == drawn[:, None]) & (children > 0)
        goes_on = matches.any(-1)
        if not bool(goes_on.any()):
            break
        child = children[arrays.range(len(node)), (matches * 1).argmax(-1)]
        node = arrays.where(goes_on, child, node)
        drawn = arrays.where(goes_on, _draw(_at(logits, node, tree), temperature, arrays), drawn)
    return Accepted(node, drawn)


AcceptanceRule = Callable[[Tensor, Tensor, TreeTensors], Accepted]
"""Any of the rules above with its settings filled in."""


def acceptance_rule(
    acceptance: Acceptance | None, do_sample: bool, temperature: float, epsilon: float, delta: float
) -> AcceptanceRule:
    """Fills in a rule's settings.

    Args:
        acceptance: The rule; None means `rejection` when sampling, else `greedy`.
        do_sample: Whether tokens are drawn.
        temperature: T of `typical` and `rejection`.
        epsilon: ε of `typical`.
        delta: δ of `typical`.

    Raises:
        ValueError: Settings are out of bounds or contradict each other.
    """
    acceptance = acceptance or ("rejection" if do_sample else "greedy")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected above 0: for greedy decoding leave do_sample=False")
    if acceptance == "greedy":
        if do_sample:
            raise ValueError(
                "acceptance='greedy' with do_sample=True: sampling takes acceptance='rejection' or 'typical'"
            )
        return accept_greedy
    if acceptance == "rejection":
        if not do_sample:
            raise ValueError("acceptance='rejection' with do_sample=False: it samples, set do_sample=True")
        return functools.partial(accept_rejection, temperature=temperature)
    if acceptance != "typical":
        raise ValueError(f"acceptance is {acceptance!r}, expected 'greedy', 'typical' or 'rejection'")
    if not (0 < epsilon < 1 and 0 < delta <= 1):
        raise ValueError(f"epsilon is {epsilon} and delta is {delta}, expected epsilon in (0, 1) and delta in (0, 1]")
    return functools.partial(accept_typical, temperature=temperature, epsilon=epsilon, delta=delta, sample=do_sample)


def _deepest(fits: Tensor, tree: TreeTensors) -> Tensor:
    """Depth of every node that is accepted with all its ancestors, -1 elsewhere, `[B, n]`; `fits` is `[B, n - 1]`."""
    wrong = tree.arrays.pad(~fits)
    return tree.arrays.where((tree.ancestors & wrong[:, None, :]).any(-1), -1, tree.depths)


def _at(values: Tensor, node: Tensor, tree: TreeTensors) -> Tensor:
    """`values[b, node[b]]` for every row b."""
    return values[tree.arrays.range(len(node)), node]


def _draw(logits: Tensor, temperature: float, arrays: Arrays) -> Tensor:
    return arrays.draw(arrays.softmax(logits, temperature))
