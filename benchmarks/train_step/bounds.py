"""What must hold for the training step's speed and memory, and whether it does.

Contract: numbers in, verdicts out; without torch.
"""

from __future__ import annotations

from typing import Any

from benchmarks.train_step.cases import WIDE_HIDDEN, Case, Form, Precision, Stage

SPEED: dict[tuple[Stage, Form, Precision], float] = {
    ("medusa-1", "separate", "fp32"): 2.9,
    ("medusa-1", "separate", "bf16"): 3.5,
    ("medusa-1", "shared", "fp32"): 3.7,
    ("medusa-1", "shared", "bf16"): 4.2,
    ("medusa-2", "separate", "fp32"): 2.0,
    ("medusa-2", "separate", "bf16"): 1.8,
}
"""How many times faster than the reference SmolLM2's step must be, at least."""

MEMORY: dict[tuple[Stage, Form], float] = {
    ("medusa-1", "separate"): 0.40,
    ("medusa-1", "shared"): 0.25,
    ("medusa-2", "separate"): 0.45,
}
"""Which share of the reference's peak memory SmolLM2's step may need, at most.

Both without what Python and the libraries take (0.6 GiB where axolotl's packages are installed): so counted, the
reference needs 8.8 GiB in fp32 and 4.4 in bf16 for separate heads, as the first public trainer was measured (8.7, 4.5).
"""

HEADS_LOSS = 0.85
"""Share of the rate of its three matmuls that the loss of SmolLM2's separate heads must reach, at least."""

CHUNK_MIB = 128.0
"""One chunk of logits in fp32."""

FP32_BYTES = 4


def _bound(what: str, found: float | None, sign: str, bound: float) -> dict[str, Any]:
    holds = None if found is None else found >= bound if sign == ">=" else found <= bound
    return {"what": what, "found": found, "sign": sign, "bound": bound, "holds": holds}


def bounds_of_step(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed and memory against the reference, for SmolLM2; what was not measured neither holds nor fails."""
    speed = SPEED.get((case.stage, case.form, case.precision))
    memory = MEMORY.get((case.stage, case.form))
    if case.model != "smollm2" or speed is None or memory is None:
        return []
    return [
        _bound(f"{case.name}: speed against the reference", found.get("speed"), ">=", speed),
        _bound(
            f"{case.name}: peak memory above the runtime against the reference", found.get("memory_ratio"), "<=", memory
        ),
    ]


def bounds_of_heads_loss(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rate of the loss of SmolLM2's separate heads against its matmuls alone."""
    if case.model != "smollm2" or case.form != "separate":
        return []
    return [_bound(f"{case.name}: heads' loss against its matmuls", found.get("share"), ">=", HEADS_LOSS)]


def allowed_growth_mib(case: Case, tokens: int) -> float:
    """By how much `tokens` more in the vocabulary may raise the peak of a Medusa-1 step in fp32.

    Input and output embedding of the frozen model; weight, gradient and AdamW's two moments of each head's own output
    layer; one chunk of logits.

    Args:
        case: The step.
        tokens: Additional tokens.
    """
    matrices = 2 + (4 * case.heads if case.form == "separate" else 0)
    return matrices * tokens * WIDE_HIDDEN * FP32_BYTES / 2**20 + CHUNK_MIB


def bounds_of_vocabulary(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory that a larger vocabulary costs, against what its matrices need."""
    if any("peak" not in memory for memory in found["memory_mib"]):
        growth = None
    else:
        growth = round(found["memory_mib"][1]["peak"] - found["memory_mib"][0]["peak"], 1)
    allowed = allowed_growth_mib(case, found["vocab"][1] - found["vocab"][0])
    return [_bound(f"{case.form} heads: MiB more with twice the vocabulary", growth, "<=", round(allowed, 1))]
