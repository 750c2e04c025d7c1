"""What to use, given what was measured; and the picture of it.

Contract: figures in, lines and a picture out. A difference counts from `LEAST_GAIN` on: tokens per second are not measured
more exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_medusa.live.plan import ADAPTIVE, PLAIN, Measured

LEAST_GAIN = 0.02
PICTURE = "plan.png"


def speed_ups(measured: Measured) -> dict[str, dict[int, float]]:
    """Median tokens/s of every other setting, in those of plain serving, by requests at a time; empty without that."""
    if PLAIN not in measured:
        return {}
    plain = measured[PLAIN]
    return {
        name: {
            requests: found.median_tokens_per_s / plain[requests].median_tokens_per_s
            for requests, found in figures.items()
        }
        for name, figures in measured.items()
        if name != PLAIN
    }


def advice(measured: Measured) -> list[str]:
    """What to use, a line each."""
    ratios = speed_ups(measured)
    if not ratios:
        return [f"nothing was compared: measure {PLAIN} serving in the same run"]
    lines = [f"{requests} at a time: {_best_at(ratios, requests)}" for requests in measured[PLAIN]]
    lines += _adaptive(ratios[ADAPTIVE]) if ADAPTIVE in ratios else []
    best = max(value for by_requests in ratios.values() for value in by_requests.values())
    if best < 1 + LEAST_GAIN:
        lines.append("these heads make nothing faster here: serve without them (axolotl-medusa serve --method none)")
    lines += [
        f"{name} wrote another text than {PLAIN} in {1 - found.same_texts:.0%} of the answers at {requests} at a time: expected in "
        "half precision alone"
        for name, figures in measured.items()
        for requests, found in figures.items()
        if found.same_texts < 1
    ]
    return lines


def _best_at(ratios: Mapping[str, Mapping[int, float]], requests: int) -> str:
    name = max(ratios, key=lambda name: ratios[name][requests])
    ratio = ratios[name][requests]
    if ratio < 1 + LEAST_GAIN:
        return f"{PLAIN} is as fast as anything ({name} {ratio:.2f} x)"
    return f"{name} is fastest, {ratio:.2f} x {PLAIN}"


def _adaptive(ratios: Mapping[int, float]) -> list[str]:
    slower = {requests: ratio for requests, ratio in ratios.items() if ratio < 1 - LEAST_GAIN}
    faster = [requests for requests, ratio in ratios.items() if ratio >= 1 + LEAST_GAIN]
    if slower:
        named = ", ".join(f"{ratio:.2f} x at {requests}" for requests, ratio in slower.items())
        return [
            f"adaptive drafts cost speed under some loads ({named}): serve without heads where those loads are usual"
        ]
    if faster:
        return [
            "adaptive drafts are never slower than plain serving, and faster under some loads: axolotl-medusa serve OUTPUT_DIR"
        ]
    return []


def draw_speed_ups(axes: Any, measured: Measured) -> None:
    """Draws speed-ups over the number of requests at a time; tokens/s where there is no plain serving to compare with."""
    ratios = speed_ups(measured)
    lines = ratios or {
        name: {requests: found.median_tokens_per_s for requests, found in figures.items()}
        for name, figures in measured.items()
    }
    for name, by_requests in lines.items():
        axes.plot(list(by_requests), list(by_requests.values()), "o-", label=name)
    if ratios:
        axes.axhline(1, color="black", linewidth=1, label=PLAIN)
    levels = list(next(iter(measured.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set(xlabel="requests at a time", ylabel="tokens/s against plain serving" if ratios else "tokens/s")
    axes.set_ylim(bottom=0)
