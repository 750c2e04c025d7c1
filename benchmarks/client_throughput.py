"""How near generate.py comes to the most that a server's latency allows: requests/s of one core, against a fake server.

    python -m benchmarks.client_throughput [--rows 30208] [--repeats 5] [--out FILE]

The server answers after 100 ms whatever comes, 256 requests are in flight, so 2,560 requests/s are ideal. The client is
pinned to one core and the server to another; whatever else runs there counts against the client, and shows in its
preemptions. The rate is that from the first request to the last answer; the rate with the client's start and end is
given beside it. Rows are whole rounds of 256: a fraction of a last round would take as long as a whole one.
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
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "tests" / "data_generation" / "fake_server.py"
COMMAND = ROOT / "data_generation" / "generate.py"
RESULTS = ROOT / "benchmarks" / "results" / "client_throughput.json"
CONCURRENCY = 256
LATENCY_S = 0.1
IDEAL_PER_S = CONCURRENCY / LATENCY_S
ROWS = 118 * CONCURRENCY
ANSWER_CHARS = 1000
TARGET = 0.95


def write_prompts(path: Path, rows: int) -> None:
    """Writes as many different prompts of an ordinary length."""
    with path.open("w", encoding="utf-8") as lines:
        for number in range(rows):
            prompt = f"Question {number}: what would you tell a friend who asks how the tides come about, and why?"
            lines.write(json.dumps({"id": f"p{number}", "prompt": prompt}) + "\n")


def run_client(url: str, prompts: Path, output: Path, core: int) -> dict[str, float]:
    """Runs generate.py on one core and returns when it began and how much time it took."""
    output.unlink(missing_ok=True)
    command = [sys.executable, str(COMMAND), "--chat", "--server", url, "--num_threads", str(CONCURRENCY)]
    began_s = time.monotonic()
    process = subprocess.Popen([*command, "--data_path", str(prompts), "--output_path", str(output)])
    os.sched_setaffinity(process.pid, {core})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"generate.py ended with status {process.returncode}, expected 0")
    return {
        "began_s": began_s,
        "wall_s": time.monotonic() - began_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "preemptions": used.ru_nivcsw,
    }


def measure(prompts: Path, output: Path, rows: int, cores: list[int]) -> dict[str, float]:
    """Measures one run against a server of its own.

    Raises:
        RuntimeError: The run did not do what it should.
    """
    flags = ["--latency_s", str(LATENCY_S), "--padding_chars", str(ANSWER_CHARS)]
    with subprocess.Popen([sys.executable, str(SERVER), *flags], stdout=subprocess.PIPE, text=True) as server:
        try:
            os.sched_setaffinity(server.pid, {cores[1]})
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            client = run_client(url, prompts, output, cores[0])
            with urllib.request.urlopen(url.removesuffix("/v1") + "/stats", timeout=10) as answer:
                stats: dict[str, Any] = json.load(answer)
        finally:
            server.kill()
    written = sum(1 for _ in output.open("rb"))
    if not rows == stats["answered"] == stats["requests"] == written:
        raise RuntimeError(f"found {stats['requests']} requests and {written} rows written, expected {rows} of both")
    per_s = rows / (stats["last_answer_s"] - stats["first_request_s"])
    return {
        "requests_per_s": round(per_s, 1),
        "share_of_ideal": round(per_s / IDEAL_PER_S, 4),
        "requests_per_s_with_start_and_end": round(rows / client["wall_s"], 1),
        "start_s": round(stats["first_request_s"] - client["began_s"], 3),
        "client_cpu_us_per_request": round(client["cpu_s"] / rows * 1e6, 1),
        "client_preemptions": client["preemptions"],
        "most_in_flight": stats["most_in_flight"],
        "mean_latency_of_server_s": round(stats["mean_latency_s"], 5),
    }


def main() -> int:
    """Runs the measurement; returns 1 if the median is under the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("found one core, expected two: one for the client and one for the server", file=sys.stderr)
        return 2
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        prompts, output = Path(directory, "prompts.jsonl"), Path(directory, "answers.jsonl")
        write_prompts(prompts, args.rows)
        for _ in range(args.repeats):
            runs.append(measure(prompts, output, args.rows, cores))
            print(json.dumps(runs[-1]), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result = {
        "rows": args.rows,
        "concurrency": CONCURRENCY,
        "latency_s": LATENCY_S,
        "ideal_requests_per_s": IDEAL_PER_S,
        "median": medians,
        "runs": runs,
    }
    write_result(args.out, result)
    print(f"median: {medians['share_of_ideal']:.1%} of {IDEAL_PER_S:.0f} requests/s (target: {TARGET:.0%})")
    return int(medians["share_of_ideal"] < TARGET)


if __name__ == "__main__":
    sys.exit(main())
