"""What of vLLM's own speed arrives through generate.py: tokens/s through a server against vLLM's offline batch.

    python -m benchmarks.vllm_throughput [--prompts 200] [--max_tokens 128] [--repeats 3] [--out FILE]

Both sides answer the same prompts greedily with the same engine settings, in turns and never at a time, each repeat in
a fresh process that first answers a few other prompts. Needs `make venv-vllm` and the model of `make demo`. The offline
clock runs during `LLM.chat`; that of generate.py from its first look at the server to its last row, and the time of the
whole command is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from demo.__main__ import MODEL, WORK
from demo.model_server import ENVIRONMENT, ROOT, VLLM_PYTHON, half_precision, server

COMMAND = ROOT / "data_generation" / "generate.py"
PROMPTS = ROOT / "data_generation" / "prompts_by_hand.jsonl"
WARM_UP_PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "vllm_throughput.json"
WARM_UP = 8
TARGET = 0.95
ENGINE = {"max_model_len": 2048, "max_num_seqs": 128, "max_num_batched_tokens": 2048}
"""What the server takes by itself on a CPU; the offline engine would otherwise take more."""


def conversations(path: Path, limit: int) -> list[list[dict[str, str]]]:
    """Returns the first prompts of a file as conversations."""
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    return [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]


def offline(prompts: int, max_tokens: int, out: Path) -> None:
    """Runs in vLLM's environment: answers the prompts in one batch and writes down tokens and seconds."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    llm = LLM(model=str(MODEL), dtype="bfloat16" if half_precision() else "float32", **ENGINE)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm.chat(conversations(WARM_UP_PROMPTS, WARM_UP), sampling, use_tqdm=False)
    batch = conversations(PROMPTS, prompts)
    started = time.monotonic()
    answers = llm.chat(batch, sampling, use_tqdm=False)
    wall_s = time.monotonic() - started
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    out.write_text(json.dumps({"tokens": tokens, "wall_s": wall_s}), encoding="utf-8")


def measure_offline(args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Runs `offline` in vLLM's environment."""
    out = directory / "offline.json"
    command = [str(VLLM_PYTHON), "-m", "benchmarks.vllm_throughput", "--offline", str(out)]
    command += ["--prompts", str(args.prompts), "--max_tokens", str(args.max_tokens)]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT}, stdout=sys.stderr)
    measured: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return {
        "tokens": measured["tokens"],
        "wall_s": round(measured["wall_s"], 3),
        "tokens_per_s": round(measured["tokens"] / measured["wall_s"], 1),
    }


def generate(address: str, prompts: Path, limit: int, max_tokens: int, output: Path) -> dict[str, Any]:
    """Runs generate.py and returns its report with the seconds of the whole command.

    Raises:
        RuntimeError: Not all prompts were answered.
    """
    command = [sys.executable, str(COMMAND), "--chat", "--server", f"{address}/v1", "--model", str(MODEL)]
    command += ["--data_path", str(prompts), "--limit", str(limit), "--output_path", str(output)]
    command += ["--max_tokens", str(max_tokens), "--temperature", "0"]
    started = time.monotonic()
    subprocess.run(command, check=True)
    command_s = time.monotonic() - started
    report: dict[str, Any] = json.loads(Path(f"{output}.report.json").read_text(encoding="utf-8"))
    if report["succeeded"] != limit:
        raise RuntimeError(f"found {report['succeeded']} answers, expected {limit}")
    return {**report, "command_s": command_s}


def measure_server(args: argparse.Namespace, directory: Path, repeat: int) -> dict[str, float]:
    """Starts a server and lets generate.py answer the prompts."""
    with server("vllm", MODEL, WORK / "logs" / "server-throughput.log") as address:
        generate(address, WARM_UP_PROMPTS, WARM_UP, args.max_tokens, directory / f"warm-up{repeat}.jsonl")
        report = generate(address, PROMPTS, args.prompts, args.max_tokens, directory / f"answers{repeat}.jsonl")
    tokens = report["completion_tokens"]
    return {
        "tokens": tokens,
        "wall_s": report["wall_s"],
        "tokens_per_s": round(tokens / report["wall_s"], 1),
        "command_s": round(report["command_s"], 3),
        "tokens_per_s_of_command": round(tokens / report["command_s"], 1),
    }


def main() -> int:
    """Runs the measurement; returns 1 if the ratio of the medians is under the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--offline", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        offline(args.prompts, args.max_tokens, args.offline)
        return 0
    runs: dict[str, list[dict[str, float]]] = {"offline": [], "generate": []}
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(args.repeats):
            runs["offline"].append(measure_offline(args, Path(name)))
            runs["generate"].append(measure_server(args, Path(name), repeat))
            print(json.dumps({side: measured[-1] for side, measured in runs.items()}), flush=True)
    medians = {side: statistics.median(run["tokens_per_s"] for run in measured) for side, measured in runs.items()}
    ratio = round(medians["generate"] / medians["offline"], 4)
    result = {
        "model": "SmolLM2-135M-Instruct",
        "precision": "bf16" if half_precision() else "fp32",
        "engine": ENGINE,
        "prompts": args.prompts,
        "max_tokens": args.max_tokens,
        "median_tokens_per_s": medians,
        "ratio": ratio,
        "runs": runs,
    }
    write_result(args.out, result)
    print(f"generate.py gets {ratio:.1%} of vLLM's offline tokens/s (target: {TARGET:.0%})")
    return int(ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
