"""What a server accepted of its drafts, beside what a chain of our heads accepts on the same text, and what explains the rest.

Contract: numbers and tokens in, lines out; no model and no server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from axolotl_medusa.live.chain import Shares, Text, chain_shares, other_orders
from axolotl_medusa.live.counters import Counters
from axolotl_medusa.live.guesses import TRAINED, WITHOUT_BIASES, WITHOUT_BLOCKS, WITHOUT_OUTPUT_LAYERS, Along

_FULL_LENGTH = 0.98
"""Share of the possible draft tokens above which a server drafts all of them always."""

_MISSING = {
    WITHOUT_BIASES: "the server has the heads without their biases: with vLLM's own method config.json needs medusa_fc_bias: true",
    WITHOUT_BLOCKS: "the server has not loaded the heads' residual blocks: export them again, and check their names",
    WITHOUT_OUTPUT_LAYERS: "the server has not loaded the heads' own output layers: export them again, and check their names",
}

Kind = Literal["same", "changed", "other"]
"""The server's model beside ours: the same, with changed weights, or another."""


@dataclass
class HeadsReport:
    """What was found of drafts.

    Attributes:
        predicted: What a chain of our heads accepts.
        served: What the server accepted, None where it drafted nothing.
        adaptive: Whether it drafts fewer tokens than it could.
        precision: Share of its draft tokens that it accepted, None without drafts.
        causes: What is wrong, a line each; none where nothing is.
    """

    predicted: Shares
    served: Shares | None = None
    adaptive: bool = False
    precision: float | None = None
    causes: list[str] = field(default_factory=list)


def compare_heads(
    said: Sequence[Along], answers: Sequence[Sequence[int]], counted: Counters, kind: Kind
) -> HeadsReport:
    """Compares what a server accepted with what our heads say along its answers.

    Args:
        said: What model and heads say along each answer.
        answers: The answers' tokens.
        counted: What the server counted while it wrote them.
        kind: What its model is.
    """
    texts = {
        form: [Text(tokens, each.drafts[form]) for tokens, each in zip(answers, said, strict=True)]
        for form in said[0].drafts
    }
    num_heads = len(said[0].drafts[TRAINED][0]) if said[0].drafts[TRAINED] else 0
    places = min(len(counted.accepted), num_heads) or num_heads
    right = tuple(range(places))
    report = HeadsReport(chain_shares(texts[TRAINED], right))
    if not counted.speculates:
        report.causes.append("the server has no heads: it does not speculate; start it with `axolotl-medusa serve`")
    elif not counted.drafts:
        report.causes.append(
            "the server drafts nothing: its adaptive drafter found that drafts do not pay at this load, or it has no heads; start "
            "it with `axolotl-medusa serve --fixed` to see what they would be"
        )
    if not counted.speculates or not counted.drafts:
        return report
    report.served = Shares(tuple(count / counted.drafts for count in counted.accepted[:places]), counted.drafts)
    report.precision = sum(counted.accepted) / counted.draft_tokens
    report.adaptive = counted.draft_tokens < _FULL_LENGTH * counted.drafts * len(counted.accepted)
    if kind == "other":
        return report  # our predictions are of another model's hidden states
    if report.adaptive:
        length = min(places, counted.draft_tokens / counted.drafts)
        report.causes += _adaptive_causes(report, report.served, length, report.precision)
    elif report.served.falls_short_of(report.predicted):
        candidates = {form: chain_shares(texts[form], right) for form in texts if form != TRAINED}
        for order in other_orders(num_heads, places):
            candidates[_order_name(order)] = chain_shares(texts[TRAINED], order)
        report.causes.append(_cause(report.served, report.predicted, candidates, kind))
    return report


def _adaptive_causes(report: HeadsReport, served: Shares, length: float, precision: float) -> Iterator[str]:
    """An adaptive drafter picks drafts that are likely right: it must be right as often as drafts of its length always are."""
    whole = int(length)
    predicted = (*report.predicted.accepted, 0.0)
    expected = (sum(predicted[:whole]) + (length - whole) * predicted[whole]) / length
    if Shares((precision,), served.steps).falls_short_of(Shares((expected,), report.predicted.steps)):
        yield (
            f"the server accepts {precision:.1%} of its drafts, where drafts of {length:.1f} tokens in every step would be right in "
            f"{expected:.1%}: start it with `axolotl-medusa serve --fixed` and check it again to find the cause"
        )


def _order_name(order: Sequence[int]) -> str:
    return (
        f"the server has the heads in another order: heads {', '.join(map(str, order))} at places 0 to {len(order) - 1}"
    )


def _cause(served: Shares, predicted: Shares, candidates: dict[str, Shares], kind: Kind) -> str:
    """The explanation whose shares are nearest to the server's, if it is much nearer than the heads as they were trained."""
    shown = " ".join(f"{own:.3f}/{ours:.3f}" for own, ours in zip(served.accepted, predicted.accepted, strict=True))
    figures = f"accepted/predicted by place: {shown}"
    fitting = [name for name, shares in candidates.items() if served.fits(shares)]
    nearest = sorted(fitting, key=lambda name: served.distance(candidates[name]))
    if nearest and served.distance(candidates[nearest[0]]) < served.distance(predicted) / 2:
        alike = [name for name in nearest[1:] if candidates[name].fits(candidates[nearest[0]])]
        others = "".join(f"; or {_MISSING.get(name, name)}" for name in alike[:2])
        return f"{_MISSING.get(nearest[0], nearest[0])}{others} ({figures})"
    if kind == "changed":
        return f"the heads guess worse on the changed weights ({figures})"
    return (
        f"the server accepts less than these heads would get, and no known mistake explains it ({figures}): it has other heads, or "
        "does not feed them the hidden states after the final norm"
    )
