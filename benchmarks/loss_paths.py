"""The loss of one separate head, forward and backward, by every path that there is: what `chunked_loss` was chosen among.

    python benchmarks/loss_paths.py [--rows 1203] [--vocab 49152] [--hidden 576] [--rounds 5] [--json FILE]

In alternation: ours; ours with every chunk recomputed by autograd, as with sharded parameters; plain cross-entropy of all
rows; and torch's `linear_cross_entropy` (2.13 and later) with its own choice of chunks and with given ones. In bf16 the
latter runs with `acc_policy="accurate"` only: on CPUs the other policies multiply in an emulated type, which by its
documentation is 20 to 50 times as slow.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import description, write_result
from torch import Tensor
from torch.nn import functional as F
from train_step_cases import PRECISIONS, WIDE_HIDDEN, WIDE_VOCAB, Precision
from train_step_measure import alternated, head_prediction
from train_step_models import DTYPES

from axolotl_medusa.chunked_loss import matmul_dtype, row_losses

CHUNK_ROWS = (128, 256, 512, 1024)
"""Chunks that `linear_cross_entropy` is tried with."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean loss of hidden rows `[rows, hidden]`, a weight `[vocab, hidden]` and targets `[rows]`."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, recompute: bool | None = None) -> Tensor:
    """The package's loss."""
    dtype = matmul_dtype(hidden.dtype, hidden.device)
    loss, _ = row_losses([head_prediction(hidden, weight, targets, dtype)], recompute=recompute)
    return loss


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of all rows, in fp32 as trainers have it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def losses(precision: Precision) -> dict[str, Loss]:
    """The paths by their names."""
    found: dict[str, Loss] = {"ours": ours, "ours, recomputed": partial(ours, recompute=True), "plain": plain}
    fused, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if fused is None or options is None:
        return found
    if precision == "fp32":
        found["linear_cross_entropy"] = partial(fused, options=options())
    for rows in CHUNK_ROWS:
        chosen = options(batch_chunk_size=rows, chunking_method=None, acc_policy="accurate")
        found[f"linear_cross_entropy, accurate, {rows} rows"] = partial(fused, options=chosen)
    return found


def measure(precision: Precision, rows: int, vocab: int, hidden_size: int, rounds: int) -> dict[str, Any]:
    """Times every path; returns medians of seconds and rates."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    hidden = torch.randn(rows, hidden_size, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden_size) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,))

    def step(loss: Loss) -> None:
        loss(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
        hidden.grad = weight.grad = None

    times = alternated({name: partial(step, loss) for name, loss in losses(precision).items()}, rounds)
    gflop = 3 * 2 * rows * vocab * hidden_size / 1e9
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {name: {"seconds": round(value, 4), "gflops": round(gflop / value, 1)} for name, value in seconds.items()}


def main() -> None:
    """Measures both precisions; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1203)
    parser.add_argument("--vocab", type=int, default=WIDE_VOCAB)
    parser.add_argument("--hidden", type=int, default=WIDE_HIDDEN)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"rows": args.rows, "vocab": args.vocab, "hidden": args.hidden, **description("torch")}
    for precision in PRECISIONS:
        result[precision] = measure(precision, args.rows, args.vocab, args.hidden, args.rounds)
        for name, found in result[precision].items():
            print(f"{precision}  {name:42} {found['seconds']:8.3f} s {found['gflops']:7.0f} GFLOP/s", flush=True)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
