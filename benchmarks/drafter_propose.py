"""What drafting costs beside its matrix products: the drafter's step alone, on the shapes of a served model.

    python -m benchmarks.drafter_propose --device cuda --json FILE            # Qwen3-8B, bf16, 5 heads
    python -m benchmarks.drafter_propose --hidden 64 --vocab 1000 --heads 2 --dtype float32 --batches 1 4

For every number of requests: median seconds of a whole call (rows found, heads run, tokens read back to the CPU, lists made),
once with all drafts always and once with as many as pay, and of the matrix products alone. `own_ms` is the difference of
the two; at one request at most 0.3 ms of it are allowed. No server is needed, and none is measured.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import description, gpu_description, write_result
from torch import Tensor
from torch.nn import functional as F

from axolotl_medusa.serving.draft_heads import DraftHeads
from axolotl_medusa.serving.draft_plan import DraftPlan, StepTimes
from axolotl_medusa.serving.heads_drafter import HeadsDrafter, Options, Step

BATCHES = (1, 4, 16, 64, 256)
ALLOWED_MS = 0.3
WARM_UP_ROUNDS = 10
FREE = DraftPlan(step_times=StepTimes({1: 1.0, 100_000: 1.0001}), heads_times=StepTimes({1: 1e-6, 100_000: 1e-6}))
"""A plan by which every draft pays, so that all heads run."""


def random_heads(args: argparse.Namespace, form: str) -> DraftHeads:
    """Heads with random weights."""
    options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    scale = args.hidden**-0.5
    weights = (torch.randn(args.heads, args.hidden, args.hidden, **options) * scale,)
    biases = (torch.zeros(args.heads, args.hidden, **options),)
    outputs = torch.randn(args.heads, args.vocab, args.hidden, **options) * scale if form == "separate" else None
    return DraftHeads(weights, biases, outputs)


def drafter(args: argparse.Namespace, heads: DraftHeads, lm_head: Tensor, *, adaptive: bool) -> HeadsDrafter:
    """A drafter of these heads whose server's output layer is `lm_head`."""
    sizes = {"hidden_size": args.hidden, "vocab_size": args.vocab}
    options = Options(Path(), adaptive, None, args.heads, sizes, lm_head.dtype, 1 << 20)
    return HeadsDrafter(options, heads, lambda hidden: F.linear(hidden, lm_head), FREE)


def batch_of(args: argparse.Namespace, requests: int) -> tuple[Step, list[list[int]], list[int]]:
    """A step in which every request's first draft was accepted."""
    drafts = [min(2, args.heads)] * requests
    states = torch.randn(sum(drafts) + requests, args.hidden, device=args.device, dtype=getattr(torch, args.dtype))
    names = [f"request-{number}" for number in range(requests)]
    return Step(states, drafts, names, len(states)), [[1, 2]] * requests, [100] * requests


def median_s(run: Callable[[], object], rounds: int, device: str) -> float:
    """Median seconds of a call, the work that it leaves to the device included."""
    seconds = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        if device != "cpu":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM_UP_ROUNDS:])


def products_s(heads: DraftHeads, lm_head: Tensor, states: Tensor, rounds: int, device: str) -> float:
    """Median seconds of the matrix products alone; on a GPU of a recorded graph of them, so that no launch counts."""
    weight = heads.weights[0].reshape(-1, states.shape[1])
    hidden = states.repeat_interleave(heads.num_heads, 0)
    by_head = hidden.view(len(states), heads.num_heads, -1).transpose(0, 1)

    def products() -> None:
        F.linear(states, weight)
        if heads.outputs is None:
            F.linear(hidden, lm_head)
        else:
            torch.bmm(by_head, heads.outputs.transpose(1, 2))

    if device == "cpu":
        return median_s(products, rounds, device)
    products()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    seconds = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(float(start.elapsed_time(end)) / 1000)
    return statistics.median(seconds[WARM_UP_ROUNDS:])


@torch.inference_mode()
def measure(args: argparse.Namespace, form: str) -> list[dict[str, float]]:
    """Times one form of heads at all numbers of requests."""
    heads = random_heads(args, form)
    lm_head = torch.randn(args.vocab, args.hidden, device=args.device, dtype=getattr(torch, args.dtype))
    rows = []
    for requests in args.batches:
        batch = batch_of(args, requests)
        row: dict[str, float] = {"requests": requests}
        matmuls = products_s(heads, lm_head, batch[0].states[:requests], args.rounds, args.device)
        row["products_ms"] = round(matmuls * 1000, 4)
        for name, adaptive in (("always", False), ("adaptive", True)):
            own = drafter(args, heads, lm_head, adaptive=adaptive)
            whole = median_s(functools.partial(own.drafts, *batch), args.rounds, args.device)
            row[f"{name}_ms"] = round(whole * 1000, 4)
            row[f"{name}_own_ms"] = round((whole - matmuls) * 1000, 4)
        rows.append(row)
        print(form, row, flush=True)
    return rows


def main() -> None:
    """Measures both forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--forms", nargs="+", choices=("shared", "separate"), default=["shared", "separate"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = {key: getattr(args, key) for key in ("dtype", "hidden", "vocab", "heads", "rounds")}
    result: dict[str, Any] = (
        description("torch") | gpu_description(args.device) | {"shape": shape, "allowed_ms": ALLOWED_MS}
    )
    result |= {form: measure(args, form) for form in args.forms}
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
