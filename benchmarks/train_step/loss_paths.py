"""The loss of one separate head, forward and backward, by every path that there is: what `losses/chunked.py` was chosen among.

    python -m benchmarks.train_step.loss_paths [--rows 1203] [--vocab 49152] [--hidden 576] [--rounds 5] [--device cuda] [--json FILE]

In alternation: ours; ours with every chunk recomputed by autograd, as with sharded parameters; plain cross-entropy of all
rows; and torch's `linear_cross_entropy` (2.13 and later) with its own choice of chunks and with given ones. In bf16 the
latter runs with `acc_policy="accurate"` only: on CPUs the other policies multiply in an emulated type, which by its
documentation is 20 to 50 times as slow. On a GPU also Liger's `fused_linear_cross_entropy`, and its `fused_linear_jsd` beside
our divergence from a teacher.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import description, gpu_description, write_result
from benchmarks.train_step.cases import PRECISIONS, WIDE_HIDDEN, WIDE_VOCAB, Device, Precision
from benchmarks.train_step.measure import alternated, head_prediction
from benchmarks.train_step.models import DTYPES
from benchmarks.train_step.step_memory import memory_of
from torch import Tensor
from torch.nn import functional as F

from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.closed_form import fused_kernels_for
from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights
from axolotl_medusa.losses.prediction import Teacher, matmul_dtype

CHUNK_ROWS = (128, 256, 512, 1024)
"""Chunks that `linear_cross_entropy` is tried with."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean loss of hidden rows `[rows, hidden]`, a weight `[vocab, hidden]` and targets `[rows]`."""

SAME = 0.01
"""Paths' losses may differ by this share: bf16 rounds each logit to 8 bits."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, recompute: bool | None = None) -> Tensor:
    """The package's loss."""
    dtype = matmul_dtype(hidden.dtype, hidden.device)
    loss, _ = chunked_loss([head_prediction(hidden, weight, targets, dtype)], recompute=recompute)
    return loss


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of all rows, in fp32 as trainers have it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]
    return loss


def teacher_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden rows and output layer of a teacher that differs from the student."""
    return hidden.detach().roll(1, dims=0), weight.detach()


def divergence(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The package's mean KL(teacher ‖ student)."""
    every_row = torch.arange(len(targets), device=hidden.device)
    prediction = head_prediction(hidden, weight, targets, hidden.dtype)
    prediction = replace(prediction, weights=LossWeights(cross_entropy=0.0, kl=1.0), teacher_rows=every_row)
    teacher_hidden, teacher_weight = teacher_of(hidden, weight)
    layer = replace(prediction.layer, weight=teacher_weight, parameters=[teacher_weight])
    loss, _ = chunked_loss([prediction], Teacher(teacher_hidden, layer))
    return loss


def liger_divergence(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same by Liger's fused linear Jensen-Shannon divergence, whose β = 0 is KL(teacher ‖ student)."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    teacher = teacher_of(hidden, weight)
    loss: Tensor = LigerFusedLinearJSDFunction.apply(hidden, weight, *teacher, None, 0.0)
    return loss


def losses(precision: Precision, device: Device) -> dict[str, Loss]:
    """The paths by their names; those of a divergence begin with `kl`."""
    found: dict[str, Loss] = {"ours": ours, "ours, recomputed": partial(ours, recompute=True), "plain": plain}
    if fused_kernels_for(torch.device(device)):
        found["liger fused_linear_cross_entropy"] = liger
        found |= {"kl, ours": divergence, "kl, liger fused_linear_jsd": liger_divergence}
    fused, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if fused is None or options is None:
        return found
    if precision == "fp32":
        found["linear_cross_entropy"] = partial(fused, options=options())
    for rows in CHUNK_ROWS:
        chosen = options(batch_chunk_size=rows, chunking_method=None, acc_policy="accurate")
        found[f"linear_cross_entropy, accurate, {rows} rows"] = partial(fused, options=chosen)
    return found


def measure(
    precision: Precision, rows: int, vocab: int, hidden_size: int, rounds: int, device: Device = "cpu"
) -> dict[str, Any]:
    """Times every path; returns medians of seconds and rates, and on a GPU the memory beyond the operands.

    Raises:
        RuntimeError: Two paths of the same loss have different values.
    """
    torch.manual_seed(0)
    dtype, memory = DTYPES[precision], memory_of(device)
    with torch.device(device):
        hidden = torch.randn(rows, hidden_size, dtype=dtype).requires_grad_()
        weight = torch.randn(vocab, hidden_size, dtype=dtype).mul_(0.05).requires_grad_()
        targets = torch.randint(vocab, (rows,))
    values: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def step(name: str, loss: Loss) -> None:
        memory.forget_peak()
        found = loss(hidden, weight, targets)
        found.backward()  # type: ignore[no-untyped-call]
        values[name], peaks[name] = found.item(), memory.peak()
        hidden.grad = weight.grad = None

    before = memory.used()
    paths = losses(precision, device)
    times = alternated({name: partial(step, name, loss) for name, loss in paths.items()}, rounds)
    for kind in (True, False):
        found = {name: value for name, value in values.items() if name.startswith("kl") is kind}
        if found and max(found.values()) - min(found.values()) > SAME * max(found.values()):
            raise RuntimeError(f"the losses are {found}, expected equal ones: they do not compute the same")
    result = {}
    for name, taken in times.items():
        seconds = statistics.median(taken)
        gflop = (4 if name.startswith("kl") else 3) * 2 * rows * vocab * hidden_size / 1e9
        result[name] = {"seconds": round(seconds, 4), "gflops": round(gflop / seconds, 1)}
        if device == "cuda":
            result[name]["mib"] = round(peaks[name] - before, 1)
    return result


def main() -> None:
    """Measures both precisions; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1203)
    parser.add_argument("--vocab", type=int, default=WIDE_VOCAB)
    parser.add_argument("--hidden", type=int, default=WIDE_HIDDEN)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"rows": args.rows, "vocab": args.vocab, "hidden": args.hidden}
    result |= description("torch") | gpu_description(args.device)
    for precision in PRECISIONS:
        result[precision] = measure(precision, args.rows, args.vocab, args.hidden, args.rounds, args.device)
        for name, found in result[precision].items():
            print(f"{precision}  {name:42} {found['seconds']:8.3f} s {found['gflops']:7.0f} GFLOP/s", flush=True)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
