"""What `axolotl-medusa estimate` says: as a record, and as text.

Contract: puts together what the other modules compute; prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from axolotl_medusa.estimating.advice import Change, changes_until_it_fits
from axolotl_medusa.estimating.memory import GIB, Memory, memory_of
from axolotl_medusa.estimating.network import sent_per_step
from axolotl_medusa.estimating.plan import ENGINES, Device, Engine, Plan, plan_of
from axolotl_medusa.estimating.sizes import ModelSizes

GPU_COUNTS = (1, 2, 4, 8)
"""Numbers of GPUs in the table, beside the one that is asked for."""

PARTS = {
    "weights": "base model",
    "heads": "heads and adapter",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "activations": "activations",
    "losses": "losses' buffers",
    "runtime": "CUDA, libraries",
}
"""What each part of `Memory` is called; on a CPU the last one is Python."""

MILLION = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        plan: What the YAML means.
        memory: Of one GPU.
        grid: By engine and number of GPUs, `(bytes of a GPU at the peak, bytes that it sends in a step)`.
        seconds_per_million_tokens: From the rate that was given; None without one.
        gpu_gib: Memory of a GPU that was given.
        changes: What to change where it does not fit.
    """

    plan: Plan
    memory: Memory
    grid: Mapping[tuple[Engine, int], tuple[float, float]]
    seconds_per_million_tokens: float | None
    gpu_gib: float | None
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool | None:
        """Whether it fits as it is; None where no memory was given."""
        return None if self.gpu_gib is None else self.memory.peak / GIB <= self.gpu_gib

    def to_json(self) -> dict[str, Any]:
        """All of it, in bytes and seconds."""
        plan = self.plan
        return {
            "base_model": plan.sizes.name,
            "recipe": recipe(plan),
            "device": plan.device,
            "engine": plan.engine,
            "gpus": plan.gpus,
            "parameters": parameters(plan),
            "bytes_of_a_gpu": {**asdict(self.memory), "peak": self.memory.peak},
            "peak_bytes_by_engine_and_gpus": self._by_engine(0),
            "bytes_sent_by_a_gpu_per_step": self._by_engine(1),
            "seconds_per_million_tokens": self.seconds_per_million_tokens,
            "gpu_gib": self.gpu_gib,
            "fits": self.fits,
            "changes": [
                {"yaml": change.lines, "price": change.price, "peak_bytes": change.gib * GIB} for change in self.changes
            ],
        }

    def _by_engine(self, value: int) -> dict[str, dict[str, float]]:
        counts = sorted({gpus for _, gpus in self.grid})
        return {engine: {str(gpus): self.grid[engine, gpus][value] for gpus in counts} for engine in ENGINES}


def estimate(
    cfg: Mapping[str, Any],
    *,
    gpus: int = 1,
    engine: str | None = None,
    device: Device = "gpu",
    gpu_gib: float | None = None,
    tokens_per_s: float | None = None,
    sizes: ModelSizes | None = None,
) -> Estimate:
    """What a run will need.

    Args:
        cfg: The YAML's keys.
        gpus: Number of GPUs.
        engine: Instead of the YAML's.
        device: Where it will train.
        gpu_gib: Memory of a GPU, for whether it fits.
        tokens_per_s: Tokens that one GPU trains on in a second.
        sizes: The base model's; read from its config where they are not given.

    Raises:
        ValueError: Something is missing, or not known here.
    """
    for name, value in (("--gpu-gib", gpu_gib), ("--tokens-per-s", tokens_per_s)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value:g}: expected a number above 0")
    plan = plan_of(cfg, gpus=gpus, engine=engine, device=device, sizes=sizes)
    memory = memory_of(plan)
    grid = {}
    for each in ENGINES:
        for count in sorted({*GPU_COUNTS, gpus}):
            found = plan_of(cfg, gpus=count, engine=each, device=device, sizes=plan.sizes)
            grid[each, count] = (memory_of(found).peak, sent_per_step(found))
    changes = [] if gpu_gib is None else changes_until_it_fits(cfg, plan, gpu_gib)
    seconds = None if tokens_per_s is None else MILLION / (tokens_per_s * gpus)
    return Estimate(plan, memory, grid, seconds, gpu_gib, tuple(changes))


def recipe(plan: Plan) -> str:
    """What is trained, in words."""
    how = []
    if plan.self_distillation:
        how.append("self-distillation")
    if plan.adapter:
        how.append(("QLoRA" if plan.weight_bits == 4 else "LoRA") + (", frozen" if plan.only_heads else ""))
    elif plan.weight_bits < 16:
        how.append(f"the model in {plan.weight_bits} bits")
    stage = "Medusa-1" if plan.only_heads else "Medusa-2"
    heads = f"{plan.heads} {'shared' if plan.shared else 'separate'} heads"
    if plan.one_output:
        heads = f"{plan.heads} heads of one output layer"
    return f"{stage}{' with ' if how else ''}{' and '.join(how)}, {heads}"


def parameters(plan: Plan) -> dict[str, int]:
    """Parameters of each part, and how many of all train."""
    return {
        "base": plan.sizes.parameters,
        "heads": plan.head_parameters,
        "adapter": plan.adapter,
        "trained": plan.trained,
    }


def text_of(found: Estimate) -> str:
    """The estimate as lines to read."""
    plan, memory = found.plan, found.memory
    unit, units = ("GPU", "GPUs") if plan.device == "gpu" else ("process", "processes")
    several = f"{plan.gpus} {units if plan.gpus > 1 else unit}"
    lines = [
        f"{plan.sizes.name}: {recipe(plan)}",
        f"{plan.micro_batch} x {plan.sequence} tokens a micro-batch, {plan.accumulation} a step; {plan.optimizer}; "
        f"{plan.engine}, {several}",
        "",
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in parameters(plan).items() if count),
        "",
        f"GiB of a {unit}",
    ]
    names = {**PARTS, "runtime": PARTS["runtime"] if plan.device == "gpu" else "Python"}
    lines += [f"  {names[name]:20}{value / GIB:8.1f}" for name, value in asdict(memory).items() if value]
    lines += [f"  {'peak':20}{memory.peak / GIB:8.1f}", ""]
    counts = sorted({count for _, count in found.grid})
    lines += _grid(f"GiB at the peak, by number of {units}", counts, found.grid, 0, GIB)
    lines += _grid(f"GB that a {unit} sends in a step", [count for count in counts if count > 1], found.grid, 1, 1e9)
    if found.seconds_per_million_tokens is not None:
        lines += [f"time: {found.seconds_per_million_tokens:,.0f} s for a million tokens", ""]
    return "\n".join([*lines, *_verdict(found)]).rstrip()


def _grid(
    title: str, counts: Iterable[int], grid: Mapping[tuple[Engine, int], tuple[float, float]], value: int, unit: float
) -> list[str]:
    counts = list(counts)
    lines = [f"{title:36}" + "".join(f"{count:>9}" for count in counts)]
    for engine in ENGINES:
        lines.append(f"  {engine:34}" + "".join(f"{grid[engine, count][value] / unit:9.1f}" for count in counts))
    return [*lines, ""]


def _verdict(found: Estimate) -> list[str]:
    if found.gpu_gib is None:
        return []
    if found.fits:
        return [f"It fits in {found.gpu_gib:g} GiB."]
    lines = [f"It does not fit in {found.gpu_gib:g} GiB. Change, in this order:"]
    for change in found.changes:
        lines.append(f"  {change.gib:6.1f} GiB with {', '.join(change.lines)}  ({change.price})")
    if not found.changes or found.changes[-1].gib > found.gpu_gib:
        lines.append("  Even then it does not fit: take larger GPUs or a smaller model.")
    return lines
