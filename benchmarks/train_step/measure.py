"""One measurement of `benchmarks.train_step`, in this process alone.

    python -m benchmarks.train_step.measure {memory|time|step|heads-loss} CASE_AS_JSON [--side ours] [--rounds 3]

Prints JSON; `{"does_not_fit": true}` where the memory that is available now is too little.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.train_step import roofline
from benchmarks.train_step.cases import LORA_RANK, Case, Side
from benchmarks.train_step.gpu_kernels import gpu_kernels
from benchmarks.train_step.measured_step import DOES_NOT_FIT, measured_step
from benchmarks.train_step.models import (
    DTYPES,
    Step,
    counted_rows,
    load_model,
    make_batch,
    trained_dtype,
    with_shared_weights,
)
from benchmarks.train_step.roofline import SQUARE, Shape, VocabularyMatmuls, matmul_flops_per_s
from benchmarks.train_step.step_memory import limit_to_available, memory_of
from torch import Tensor
from torch.nn import functional as F

from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.prediction import OutputLayer, Prediction, matmul_dtype

STEPS_FOR_PEAK = 2
"""The optimizer's state comes with the first step; the second has everything."""

LOSS_RTOL = 0.02
"""Both sides' losses are equal but for rounding and, after the first step, dropout."""

CHUNKS = (1024, 512, 320, 256)
"""Rows of the chunks in which the matmuls are tried alone."""


def memory_of_steps(case: Case, side: Side) -> dict[str, Any]:
    """Memory of one side: with the libraries alone, with the model, before and after the steps, and the steps' peak.

    Reading the model file takes more for a moment than some steps do; that is not the trainer's and is left out.
    """
    memory = memory_of(case.device)
    found = {"available": memory.available(), "runtime": memory.used()}
    lm = load_model(case)
    found["model"] = memory.used()
    step = Step(case, side, lm, make_batch(case, lm.config.vocab_size))
    found["before_step"] = memory.used()
    memory.forget_peak()
    for _ in range(STEPS_FOR_PEAK):
        step()
    return found | {"peak": memory.peak(), "after_steps": memory.used()}


def alternated(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of several things, done in alternation; a first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = roofline.seconds(work)
            if number:
                times[name].append(taken)
    return times


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the rounds of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def step_times(case: Case, sides: list[Side], rounds: int) -> dict[str, Any]:
    """Times the sides' steps, the backbone's forward and a matmul in alternation; on a GPU also each kind of kernel.

    Raises:
        RuntimeError: The sides' first losses differ.
    """
    memory_of(case.device).used()  # what was measured here before is gone
    lm = load_model(case)
    batch = make_batch(case, lm.config.vocab_size)
    steps = {side: Step(case, side, with_shared_weights(lm), batch) for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    rates: list[float] = []
    square = SQUARE[case.device]

    def run(side: Side) -> None:
        losses[side].append(steps[side]())

    def run_matmul() -> None:
        rates.append(matmul_flops_per_s(square, square, square, multiplied_in(case), case.device))

    works: dict[str, Callable[[], object]] = {side: partial(run, side) for side in sides}
    works |= {"backbone": steps["ours"].backbone_forward, "matmul": run_matmul}
    times = alternated(works, rounds)
    del times["matmul"]  # it is repeated, and its rate is in `rates`
    first = {side: values[0] for side, values in losses.items()}
    if max(first.values()) - min(first.values()) > LOSS_RTOL * max(first.values()):
        raise RuntimeError(f"the sides' first losses are {first}, expected equal ones: they do not compute the same")
    result: dict[str, Any] = {
        "rounds_s": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "first_loss": first,
    }
    if "reference" in times:
        result["speed"] = round(paired_ratio(times["reference"], times["ours"]), 3)
    if case.device == "cuda":
        result["kernels"] = gpu_kernels(steps["ours"])
    rows = counted_rows(batch["labels"], case.heads)
    return result | against_roofline(case, Shape.of(lm.config), rows, statistics.median(times["ours"]), max(rates))


def against_roofline(case: Case, shape: Shape, rows: list[int], ours_s: float, machine: float) -> dict[str, Any]:
    """What our step reaches of what the machine can do.

    Args:
        case: The step.
        shape: Its model.
        rows: Counted rows of the base model and of each head, `[N + 1]`.
        ours_s: Seconds of our step.
        machine: Rate of the square matmul in FLOP/s.
    """
    rank = LORA_RANK if case.stage == "medusa-2" else 0
    flops = roofline.step(shape, case.batch, case.seq, rows, shared=case.form == "shared", rank=rank)
    rate = sum(flops.values()) / ours_s
    at_heads = matmul_flops_per_s(rows[1], shape.hidden, shape.vocab, multiplied_in(case), case.device)
    peak = roofline.PEAK_BF16.get(torch.cuda.get_device_name()) if case.device == "cuda" else None
    return {
        "rows": rows,
        "flops": flops,
        "matmul_dtype": str(multiplied_in(case)).removeprefix("torch."),
        "machine_gflops": round(machine / 1e9, 1),
        "machine_gflops_at_heads": round(at_heads / 1e9, 1),
        "gflops": round(rate / 1e9, 1),
        "share_of_roofline": round(rate / machine, 3),
        "tokens_per_s": round(case.batch * case.seq / ours_s, 1),
        **({"mfu": round(rate / peak, 3)} if peak and multiplied_in(case) == torch.bfloat16 else {}),
    }


def multiplied_in(case: Case) -> torch.dtype:
    """The type in which this machine multiplies the case's matrices fastest."""
    return matmul_dtype(DTYPES[case.precision], torch.device(case.device))


def head_prediction(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Prediction:
    """One head's rows `[rows, hidden]` and output layer `[vocab, hidden]` as the objective has them, with matmuls in `dtype`."""
    layer = OutputLayer(partial(F.linear, weight=weight), weight.shape[0], [weight], weight, dtype)
    return Prediction(hidden, targets, layer, scale=1 / len(targets))


def heads_loss(case: Case, rounds: int) -> dict[str, Any]:
    """Times the loss of all heads, forward and backward, beside the matmuls that it is made of."""
    lm = load_model(case)
    shape, batch = Shape.of(lm.config), make_batch(case, lm.config.vocab_size)
    rows, frozen = counted_rows(batch["labels"], case.heads)[1:], case.form == "shared"
    dtype = multiplied_in(case)
    torch.manual_seed(3)
    start = lm.get_output_embeddings().weight.detach().to(trained_dtype(case))
    del lm
    weights = [start] * case.heads if frozen else [start.clone().requires_grad_() for _ in rows]
    with torch.device(case.device):
        hidden = [torch.randn(count, shape.hidden, dtype=DTYPES[case.precision]).requires_grad_() for count in rows]
        targets = [torch.randint(shape.vocab, (count,)) for count in rows]

    def ours() -> None:
        loss, _ = chunked_loss([head_prediction(*each, dtype) for each in zip(hidden, weights, targets, strict=True)])
        loss.backward()  # type: ignore[no-untyped-call]
        for tensor in (*weights, *hidden):
            tensor.grad = None

    matmuls = VocabularyMatmuls(max(rows), shape, dtype, case.device, frozen=frozen)
    chunk = matmuls.choose_chunk(CHUNKS)

    def alone() -> None:
        for _ in rows:
            matmuls()

    times = alternated({"ours": ours, "matmuls": alone}, rounds)
    gflop = sum(roofline.vocabulary(shape, count, matmuls=2 if frozen else 3) for count in rows) / 1e9
    alone_gflop = len(rows) * matmuls.flops / 1e9
    ours_rates = [gflop / value for value in times["ours"]]
    matmul_rates = [alone_gflop / value for value in times["matmuls"]]
    return {
        "rows": rows,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "rounds_s": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "gflops": round(statistics.median(ours_rates), 1),
        "matmuls_gflops": round(statistics.median(matmul_rates), 1),
        "matmuls_chunk_rows": chunk,
        "share": round(paired_ratio(ours_rates, matmul_rates), 3),
    }


def measure(what: str, case: Case, sides: tuple[Side, ...] = ("ours",), rounds: int = 1) -> dict[str, Any]:
    """Takes one measurement here, see `measured_step.Measure`."""
    try:
        if what == "memory":
            return memory_of_steps(case, sides[0])
        if what == "time":
            return step_times(case, list(sides), rounds)
        return heads_loss(case, rounds)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return {DOES_NOT_FIT: True}


def main() -> None:
    """Takes one measurement, or as `step` all of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "time", "step", "heads-loss"))
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("--side", action="append", choices=("ours", "reference"), help="of `memory` and `time`")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.what in ("memory", "time") and not args.side:
        parser.error(f"{args.what} without --side, expected at least one")
    if args.case.device == "cpu":
        limit_to_available()
    if args.what == "step":
        result = measured_step(args.case, args.rounds, measure)
    else:
        result = measure(args.what, args.case, tuple(args.side or ()), args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
