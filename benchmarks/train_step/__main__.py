"""Training speed and memory against a plain reference and against this machine's matmuls: `make bench`.

    python -m benchmarks.train_step [--model DIR] [--cases TEXT ...] [--rounds 3] [--heads-dtype float32]
        [--optimizer adamw8bit] [--liger] [--device cuda] [--json FILE]

Each training step is timed in alternation with the reference's and with the backbone's forward, in one process; peak
memory is taken on a CPU in a process for each side, and its ratio leaves out what the libraries take before a model is there. Then
the loss of the heads alone beside the matmuls that it is made of, and the peak memory with a vocabulary twice as large.
`--cases` selects measurements whose name holds one of the texts, e.g. `--cases "medusa-1 separate" "heads-loss smollm2"`.
Prints tables and whether the bounds of `bounds.py` hold; writes JSON after every measurement. A side that does
not fit in free memory is left out. Takes most of an hour on two cores, which nothing else should use. With `--device cuda`
the steps are those of all of Qwen3-8B, and the time of each kind of kernel is shown too; that takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.machine import description, gpu_description, write_result
from benchmarks.train_step.bounds import bounds_of_heads_loss, bounds_of_step, bounds_of_vocabulary
from benchmarks.train_step.cases import FORMS, Case, Device, Form, Side, heads_loss_cases, step_cases, vocabulary_case
from benchmarks.train_step.measured_step import DOES_NOT_FIT, SIDES, Result, measured_step
from demo.smollm2 import unpacked

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES: dict[Device, str] = {"cpu": "train_step.json", "cuda": "train_step_gpu.json"}
MEASURE = "benchmarks.train_step.measure"
MODEL = ROOT / ".demo" / "smollm2"

STEP_COLUMNS = (
    f"{'training step':36} {'ours s':>7} {'ref. s':>7} {'backb. s':>8} {'speed':>6} {'tokens/s':>8} {'GFLOP/s':>7} {'square':>7} "
    f"{'at heads':>8} {'of roof':>8} {'MiB':>7} {'ref.MiB':>7} {'ratio':>6}"
)


def measure(what: str, case: Case, sides: tuple[Side, ...] = ("ours",), rounds: int = 1) -> Result:
    """Takes one measurement in a process of its own.

    Raises:
        RuntimeError: It failed; its error output was shown.
    """
    flags = [flag for side in sides for flag in ("--side", side)]
    command = [sys.executable, "-m", MEASURE, what, case.to_json(), "--rounds", str(rounds), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{what} of {case.name!r} ended with status {done.returncode}, expected 0: see above")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_step(case: Case, rounds: int) -> Result:
    """Memory and times of both sides, on a CPU each in a process of its own; a GPU's allocator tells them apart in one."""
    if case.device == "cuda":
        return measure("step", case, (), rounds)
    return measured_step(case, rounds, measure)


def measure_vocabulary(form: Form) -> Result:
    """Peak memory with a vocabulary and with its double, and by how much it may differ."""
    small, large = (vocabulary_case(form, factor) for factor in (1, 2))
    result: Result = {"vocab": [small.vocab, large.vocab]}
    result["memory_mib"] = [measure("memory", case) for case in (small, large)]
    return result | ({DOES_NOT_FIT: True} if any(DOES_NOT_FIT in memory for memory in result["memory_mib"]) else {})


def show_step(name: str, found: Result) -> None:
    """Prints a line of the table of steps."""
    nan = float("nan")
    seconds, memory = found["seconds"], found["memory_mib"]
    reference = f"{seconds['reference']:7.2f}" if "reference" in seconds else f"{'no fit':>7}"
    peaks = " ".join(f"{memory[side].get('peak', nan):7.0f}" for side in SIDES)
    print(
        f"{name:36} {seconds['ours']:7.2f} {reference} {seconds['backbone']:8.2f} {found.get('speed', nan):6.2f} "
        f"{found['tokens_per_s']:8.0f} {found['gflops']:7.0f} {found['machine_gflops']:7.0f} "
        f"{found['machine_gflops_at_heads']:8.0f} {found['share_of_roofline']:8.1%} {peaks} "
        f"{found.get('memory_ratio', nan):6.2f}   {found['batch']} x {found['seq']}, {found['heads']} heads"
    )
    if "kernels" in found:
        kinds = ", ".join(f"{kind} {value:.1f}" for kind, value in found["kernels"]["kinds_ms"].items())
        print(f"{'':36} ms by kernel: {kinds}; MFU {found.get('mfu', nan):.1%}")


def show_heads_loss(name: str, found: Result) -> None:
    """Prints the rate of the heads' loss beside that of its matmuls."""
    print(
        f"{name:36} {found['gflops']:7.0f} GFLOP/s, its matmuls alone {found['matmuls_gflops']:7.0f} "
        f"({found['matmuls_chunk_rows']} rows at once): {found['share']:.1%}"
    )


def show_vocabulary(name: str, found: Result) -> None:
    """Prints the peaks with a vocabulary and with its double."""
    peaks = " and ".join(f"{memory['peak']:.0f} MiB" for memory in found["memory_mib"])
    print(f"{name:36} peaks of {peaks} with {found['vocab'][0]} and {found['vocab'][1]} tokens")


@dataclass(frozen=True)
class Measurement:
    """Something to measure.

    Attributes:
        section: Where it goes in the JSON.
        name: What `--cases` selects by.
        take: Measures it.
        show: Prints what was found.
        bounds: What must hold for it.
    """

    section: str
    name: str
    take: Callable[[], Result]
    show: Callable[[str, Result], None]
    bounds: Callable[[Result], list[Result]]


def plan(args: argparse.Namespace) -> list[Measurement]:
    """The chosen measurements.

    Raises:
        ValueError: There are none.
    """
    changes = {"heads_dtype": args.heads_dtype, "optimizer": args.optimizer}
    changes |= {key: getattr(args, key) for key in ("batch", "seq", "heads", "liger") if getattr(args, key)}
    if args.liger and args.device == "cpu":
        raise ValueError("--liger needs --device cuda: Liger's kernels are a GPU's")
    directory, rounds = str(args.model or MODEL), args.rounds
    found = []
    for case in step_cases(directory, args.device):
        case = replace(case, **changes)
        take = partial(measure_step, case, rounds)
        found.append(Measurement("steps", case.name, take, show_step, partial(bounds_of_step, case)))
    for case in heads_loss_cases(directory, args.device):
        case = replace(case, **changes)
        name = f"heads-loss {case.model} {case.form} {case.precision}"
        take = partial(measure, "heads-loss", case, rounds=rounds)
        found.append(Measurement("heads_loss", name, take, show_heads_loss, partial(bounds_of_heads_loss, case)))
    for form in FORMS if args.device == "cpu" else ():
        bounds = partial(bounds_of_vocabulary, vocabulary_case(form, 1))
        take = partial(measure_vocabulary, form)
        found.append(Measurement("vocabulary", f"vocabulary {form}", take, show_vocabulary, bounds))
    chosen = [one for one in found if not args.cases or any(text in one.name for text in args.cases)]
    if not chosen:
        names = ", ".join(one.name for one in found)
        raise ValueError(f"--cases {' '.join(args.cases)} selects nothing, expected part of a name: {names}")
    return chosen


def run(args: argparse.Namespace) -> Result:
    """Takes the chosen measurements; shows and stores each as it is done."""
    chosen = plan(args)
    if args.model is None and any("smollm2" in one.name for one in chosen):
        unpacked(MODEL)
    result: Result = {"rounds": args.rounds} | {
        key: getattr(args, key) for key in ("heads_dtype", "optimizer", "liger")
    }
    result |= description("torch", "transformers", "peft") | gpu_description(args.device)
    result |= {"steps": {}, "heads_loss": {}, "vocabulary": {}}
    result["bounds"] = []
    file: Path = args.json or RESULTS / FILES[args.device]
    file.parent.mkdir(parents=True, exist_ok=True)
    for one in chosen:
        if one.section == "steps" and not result["steps"]:
            print(STEP_COLUMNS)
        found = result[one.section][one.name] = one.take()
        result["bounds"] += one.bounds(found)
        if DOES_NOT_FIT in found:
            print(f"{one.name:36} does not fit in memory")
        else:
            one.show(one.name, found)
        sys.stdout.flush()
        write_result(file, result)
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
    parser.add_argument("--liger", action="store_true", help="Liger's norms, rotary positions and MLPs in the backbone")
    for name in ("batch", "seq", "heads"):
        parser.add_argument(f"--{name}", type=int, help="instead of the cases' own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help=f"instead of {FILES['cpu']} or {FILES['cuda']} in {RESULTS}")
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
    return int(any(bound["holds"] is False for bound in result["bounds"]))


if __name__ == "__main__":
    sys.exit(main())
