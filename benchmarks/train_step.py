"""Training speed and memory against a plain reference and against this machine's matmuls: `make bench`.

    python benchmarks/train_step.py [--model DIR] [--cases TEXT ...] [--rounds 3] [--heads-dtype float32]
        [--optimizer adamw8bit] [--json FILE]

Each training step is timed in alternation with the reference's and with the backbone's forward, in one process; peak
memory is taken in a process for each side. Then the loss of the heads alone beside the matmuls that it is made of, and
the peak memory with a vocabulary twice as large. `--cases` selects measurements whose name holds one of the texts, e.g.
`--cases "medusa-1 separate" "heads-loss smollm2"`. Prints tables and whether the issue's bounds hold; writes JSON. The
memory that a measurement needs must be free: a side that does not fit is left out. Takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import available_bytes, description
from smollm2 import unpacked
from train_step_bounds import bounds_of_heads_loss, bounds_of_step, bounds_of_vocabulary
from train_step_cases import FORMS, Case, Side, heads_loss_cases, step_cases, vocabulary_case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "train_step.json"
MEASURE = ROOT / "benchmarks" / "train_step_measure.py"
MODEL = ROOT / ".demo" / "smollm2"
SIDES: tuple[Side, ...] = ("ours", "reference")
SPARE_MIB = 1024.0
"""Left free when both sides are in memory."""

Result = dict[str, Any]
DOES_NOT_FIT = "does_not_fit"


def measure(what: str, case: Case, sides: tuple[Side, ...] = ("ours",), rounds: int = 1) -> Result:
    """Takes one measurement in a process of its own.

    Raises:
        RuntimeError: It failed; its error output was shown.
    """
    flags = [flag for side in sides for flag in ("--side", side)]
    command = [sys.executable, str(MEASURE), what, case.to_json(), "--rounds", str(rounds), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{what} of {case.name!r} ended with status {done.returncode}, expected 0: see above")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_step(case: Case, rounds: int) -> Result:
    """Peak memory of both sides, then their times; the reference's only where it fits beside our side."""
    peaks = {side: measure("memory", case, (side,)) for side in SIDES}
    result: Result = {"batch": case.batch, "seq": case.seq, "heads": case.heads, "memory_mib": peaks}
    if DOES_NOT_FIT in peaks["ours"]:
        return result | {DOES_NOT_FIT: ["ours"]}
    sides = SIDES
    if DOES_NOT_FIT in peaks["reference"]:
        sides = ("ours",)
    else:
        result["memory_ratio"] = round(peaks["ours"]["peak"] / peaks["reference"]["peak"], 3)
        if peaks["ours"]["after_steps"] + peaks["reference"]["peak"] + SPARE_MIB > available_bytes() / 2**20:
            sides = ("ours",)
    if sides != SIDES:
        result[DOES_NOT_FIT] = ["reference"]
    return result | measure("time", case, sides, rounds)


def measure_vocabulary(form: Any) -> Result:
    """Peak memory with a vocabulary and with its double, and by how much it may differ."""
    small, large = (vocabulary_case(form, factor) for factor in (1, 2))
    peaks = [measure("memory", case) for case in (small, large)]
    return {"vocab": [small.vocab, large.vocab], "memory_mib": peaks}


def show_step(name: str, found: Result) -> None:
    """Prints a line of the table of steps."""
    memory = found["memory_mib"]
    peaks = " ".join(f"{memory[side].get('peak', float('nan')):7.0f}" for side in SIDES)
    if "seconds" not in found:
        print(f"{name:36} does not fit in memory", flush=True)
        return
    seconds = found["seconds"]
    reference = f"{seconds['reference']:7.2f}" if "reference" in seconds else " no fit"
    print(
        f"{name:36} {seconds['ours']:7.2f} {reference} {seconds['backbone']:8.2f} {found.get('speed', float('nan')):6.2f} "
        f"{found['tokens_per_s']:8.0f} {found['gflops']:7.0f} {found['machine_gflops']:7.0f} "
        f"{found['machine_gflops_at_heads']:8.0f} {found['share_of_roofline']:8.1%} {peaks} "
        f"{found.get('memory_ratio', float('nan')):6.2f}   {found['batch']} x {found['seq']}, {found['heads']} heads",
        flush=True,
    )


STEP_COLUMNS = (
    f"{'training step':36} {'ours s':>7} {'ref. s':>7} {'backb. s':>8} {'speed':>6} {'tokens/s':>8} {'GFLOP/s':>7} {'2048^3':>7} "
    f"{'at heads':>8} {'of roof':>8} {'MiB':>7} {'ref.MiB':>7} {'ratio':>6}"
)


def run(args: argparse.Namespace) -> Result:
    """Takes the chosen measurements and shows each as it is done."""
    adapt = {"heads_dtype": args.heads_dtype, "optimizer": args.optimizer}
    adapt |= {key: getattr(args, key) for key in ("batch", "seq", "heads") if getattr(args, key)}
    directory = str(args.model or MODEL)
    steps = {case.name: replace(case, **adapt) for case in step_cases(directory)}
    losses = {f"heads-loss {case.model} {case.form} {case.precision}": case for case in heads_loss_cases(directory)}
    losses = {name: replace(case, **adapt) for name, case in losses.items()}
    vocabulary = {f"vocabulary {form}": form for form in FORMS}

    def chosen(names: Any) -> list[str]:
        return [name for name in names if not args.cases or any(text in name for text in args.cases)]

    selected = [*chosen(steps), *chosen(losses), *chosen(vocabulary)]
    if not selected:
        raise ValueError(f"--cases {args.cases} selects nothing of: {', '.join([*steps, *losses, *vocabulary])}")
    if args.model is None and any("smollm2" in name for name in selected):
        unpacked(MODEL)
    result: Result = {
        "heads_dtype": args.heads_dtype,
        "optimizer": args.optimizer,
        "rounds": args.rounds,
        **description("torch", "transformers", "peft"),
        "steps": {},
        "heads_loss": {},
        "vocabulary": {},
        "bounds": [],
    }
    for name in chosen(steps):
        if not result["steps"]:
            print(STEP_COLUMNS, flush=True)
        found = result["steps"][name] = measure_step(steps[name], args.rounds)
        result["bounds"] += bounds_of_step(steps[name], found)
        show_step(name, found)
    for name in chosen(losses):
        found = result["heads_loss"][name] = measure("heads-loss", losses[name], rounds=args.rounds)
        result["bounds"] += bounds_of_heads_loss(losses[name], found)
        if DOES_NOT_FIT in found:
            print(f"{name:36} does not fit in memory", flush=True)
            continue
        print(
            f"{name:36} {found['gflops']:7.0f} GFLOP/s, its matmuls alone {found['matmuls_gflops']:7.0f} "
            f"({found['matmuls_chunk_rows']} rows at once): {found['share']:.1%}",
            flush=True,
        )
    for name in chosen(vocabulary):
        found = result["vocabulary"][name] = measure_vocabulary(vocabulary[name])
        result["bounds"] += bounds_of_vocabulary(vocabulary_case(vocabulary[name], 1), found)
        print(f"{name:36} peak {found['memory_mib'][0]['peak']} MiB, doubled {found['memory_mib'][1]['peak']} MiB")
    return result


def main() -> int:
    """Runs the measurements; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="SmolLM2's directory, or another Llama's; unpacked if it is not given"
    )
    parser.add_argument("--cases", nargs="*", help="texts; measurements whose name holds one are taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads-dtype", choices=("backbone", "float32"), default="backbone")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    for name in ("batch", "seq", "heads"):
        parser.add_argument(f"--{name}", type=int, help="instead of the cases' own")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        result = run(args)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print()
    for bound in result["bounds"]:
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[bound["holds"]]
        print(f"{verdict:12} {bound['what']}: {bound['found']} (bound: {bound['sign']} {bound['bound']})")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(bound["holds"] is False for bound in result["bounds"]))


if __name__ == "__main__":
    sys.exit(main())
