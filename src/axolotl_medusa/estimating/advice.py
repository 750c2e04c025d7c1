"""What to change in a YAML whose training does not fit, cheapest first.

Contract: every change is keys of the YAML, or an engine, and what it saves is what `plan` and `memory` say of the changed
YAML. Changes add up: each one is tried on top of those before it, and left out where it saves less than a hundredth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from axolotl_medusa.estimating.memory import GIB, memory_of
from axolotl_medusa.estimating.plan import Engine, Plan, plan_of

_WORTH_IT = 0.99
_SHORTEST = 512
_MOST_GPUS = 512

_LORA = {"adapter": "lora", "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True}

ZERO_FILES: dict[Engine, str] = {
    "zero-1": "deepspeed_configs/zero1.json",
    "zero-2": "deepspeed_configs/zero2.json",
    "zero-3": "deepspeed_configs/zero3_bf16.json",
}
"""What `deepspeed:` names for an engine."""


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        lines: What to write into the YAML, `key: value`.
        price: What it costs.
        plan: What is trained then.
        gib: GiB of one GPU then.
        keys: Keys of the YAML that change, as `lines` has them but for the engine's.
    """

    lines: tuple[str, ...]
    price: str
    plan: Plan
    gib: float
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class _Candidate:
    price: str
    keys: Mapping[str, Any]
    engine: Engine | None = None
    gpus: int | None = None


def changes_until_it_fits(cfg: Mapping[str, Any], plan: Plan, gib: float) -> list[Change]:
    """Changes that together bring the peak under a GPU's memory, as far as there are any.

    Args:
        cfg: The YAML.
        plan: What it means.
        gib: Memory of a GPU.

    Returns:
        The changes in the order in which to make them; the last one's `gib` says whether it fits then.
    """
    made: list[Change] = []
    keys, peak = dict(cfg), memory_of(plan).peak / GIB
    tried: set[str] = set()
    while peak > gib:
        candidate = next((each for each in _candidates(keys, plan, gib) if _name(each) not in tried), None)
        if candidate is None:
            break
        tried.add(_name(candidate))
        changed = {**keys, **candidate.keys}
        after = plan_of(
            changed,
            gpus=candidate.gpus or plan.gpus,
            engine=candidate.engine or plan.engine,
            device=plan.device,
            sizes=plan.sizes,
        )
        found = memory_of(after).peak / GIB
        if found < _WORTH_IT * peak:
            keys, plan, peak = changed, after, found
            made.append(Change(_lines(candidate), candidate.price, plan, peak, candidate.keys))
    return made


def _name(candidate: _Candidate) -> str:
    return repr((candidate.price, sorted(candidate.keys.items()), candidate.engine, candidate.gpus))


def _lines(candidate: _Candidate) -> tuple[str, ...]:
    lines = [
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in candidate.keys.items()
    ]
    if candidate.engine in ZERO_FILES:
        lines.append(f"deepspeed: {ZERO_FILES[candidate.engine]}")
    if candidate.gpus:
        lines.append(f"{candidate.gpus} GPUs")
    return tuple(lines)


def _candidates(cfg: Mapping[str, Any], plan: Plan, gib: float) -> Iterator[_Candidate]:
    """What could be changed, from what costs nothing to what changes the result most."""
    several = plan.gpus > 1
    if plan.micro_batch > 1:
        keys = {"micro_batch_size": 1, "gradient_accumulation_steps": plan.accumulation * plan.micro_batch}
        yield _Candidate("the same step, a little slower", keys)
    if several and plan.engine == "ddp":
        yield _Candidate("the same step; new values go over the network", {}, "zero-1")
    if plan.optimizer in ("adamw_torch", "adamw_torch_fused"):
        yield _Candidate("the optimizer's state is rounded to 8 bits", {"optimizer": "adamw_bnb_8bit"})
    if not plan.only_heads and plan.recomputed < plan.sizes.layers:
        yield _Candidate("the same step; a third more computing", {"gradient_checkpointing": True, **_no_layers(cfg)})
    if several and plan.engine in ("ddp", "zero-1"):
        yield _Candidate("the same step; gradients go over the network in every micro-batch", {}, "zero-2")
    if several and plan.engine in ("ddp", "zero-1", "zero-2") and plan.weight_bits >= 16:
        yield _Candidate("the same step; all weights go over the network in every micro-batch", {}, "zero-3")
    if not plan.shared:
        yield _Candidate("heads without output layers of their own", {"medusa_lm_head": "shared"})
    if plan.trained_base:
        yield _Candidate("an adapter trains instead of all weights", {**_LORA, "medusa_num_unfreeze_layers": 0})
    if plan.weight_bits >= 16 and plan.engine in ("ddp", "zero-1", "zero-2") and plan.device == "gpu":
        in_4_bits = {"adapter": "qlora", "load_in_4bit": True}
        yield _Candidate("the base model is rounded to 4 bits", in_4_bits if plan.rank else {**_LORA, **in_4_bits})
    if plan.sequence >= 2 * _SHORTEST:
        yield _Candidate("longer conversations are cut", {"sequence_len": plan.sequence // 2})
    if plan.device == "gpu" and plan.weight_bits >= 16:
        gpus = max(2, 2 * plan.gpus)
        while gpus <= _MOST_GPUS:
            more = replace(plan, gpus=gpus, engine="zero-3")
            if memory_of(more).peak / GIB <= gib:
                yield _Candidate("more GPUs", {}, "zero-3", gpus)
                return
            gpus *= 2


def _no_layers(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {"medusa_checkpoint_layers": 0} if cfg.get("medusa_checkpoint_layers") else {}
