"""What data_generation/ needs for a million rows: the reader's and the resume scan's time and memory.

    python -m benchmarks.data_files [--rows 1000000] [--directory DIR] [--out benchmarks/results/data_files.json]

Makes rows of about 1 kB (a prompt of 30 words, an answer of 150) as input and as an earlier run's output, 3.5 GB in
a temporary directory, and takes each measurement in a process of its own. Needs `ijson`. Takes five minutes.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_generation"))

import aiohttp  # noqa: E402, F401 - in memory as in generate.py
import tqdm  # noqa: E402, F401
from benchmarks.machine import description, write_result  # noqa: E402

from parts.conversation_files import OutputFiles  # noqa: E402
from parts.prompt_files import check_rows, id_key, read_rows  # noqa: E402

TEXTS = 5000


def make_texts(rng: random.Random, words: int) -> list[str]:
    """Returns texts with what texts have: sentences, paragraphs, quotes, some letters beyond ASCII."""
    letters = "aaabcdeeeefghiiijklmnnnooopqrrrsssttttuuvwxyzé"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(3000)]
    ends = [" "] * 14 + [". ", ", ", '" ', ".\n\n"]
    return ["".join(rng.choice(vocabulary) + rng.choice(ends) for _ in range(words)) for _ in range(TEXTS)]


def make_files(directory: Path, rows: int) -> None:
    """Writes the same rows as input.jsonl, as input.json and, answered, as output.jsonl."""
    rng = random.Random(0)
    prompts, answers = make_texts(rng, 30), make_texts(rng, 150)
    with (
        (directory / "input.jsonl").open("w", encoding="utf-8") as lines,
        (directory / "input.json").open("w", encoding="utf-8") as array,
        (directory / "output.jsonl").open("w", encoding="utf-8") as output,
    ):
        for count in range(rows):
            row_id = f"conversation-{count:07d}"
            prompt, answer = f"{count}: {rng.choice(prompts)}", rng.choice(answers)
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
            line = json.dumps({"id": row_id, "conversations": turns}, ensure_ascii=False)
            lines.write(f"{line}\n")
            array.write(f"{',' if count else '['}{line}\n")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            usage = {"prompt_tokens": 30, "completion_tokens": 150}
            done = {"id": row_id, "messages": messages, "finish_reasons": ["stop"], "usage": usage, "model": "a-model"}
            output.write(f"{json.dumps(done, ensure_ascii=False)}\n")
        array.write("]\n")


def seconds(work: Callable[[], object]) -> float:
    """Returns how long something takes."""
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 2)


def read_input(path: Path) -> dict[str, float]:
    """Measures the two passes over an input: the check before the first request, then the rows."""
    return {
        "check_s": seconds(lambda: check_rows(str(path))),
        "rows_s": seconds(lambda: deque(read_rows(str(path)), maxlen=0)),
    }


def scan_output(path: Path) -> dict[str, float]:
    """Measures what a rerun does before it goes on."""
    started = time.perf_counter()
    with OutputFiles(path) as files:
        return {"scan_s": round(time.perf_counter() - started, 2), "done": len(files.done)}


def resume(directory: Path) -> dict[str, float]:
    """Measures everything that generate.py holds when it goes on: the check, the scan, then row by row what is left."""
    path = str(directory / "input.jsonl")
    started = time.perf_counter()
    check_rows(path)
    with OutputFiles(directory / "output.jsonl") as files:
        seen: set[int] = set()
        left = 0
        for row in read_rows(path):
            key = id_key(row.id)
            left += key not in seen and key not in files.done
            seen.add(key)
    return {"resume_s": round(time.perf_counter() - started, 2), "left": left}


MEASUREMENTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "imports alone": lambda _: {},
    "reader, .jsonl": lambda directory: read_input(directory / "input.jsonl"),
    "reader, .json": lambda directory: read_input(directory / "input.json"),
    "resume scan": lambda directory: scan_output(directory / "output.jsonl"),
    "reader and resume scan": resume,
}


def measure(name: str, directory: Path) -> dict[str, float]:
    """Takes one measurement in this process, with its peak memory."""
    found = MEASUREMENTS[name](directory)
    return found | {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}


def run_self(*arguments: str) -> str:
    """Runs this file in a process of its own; returns what it prints."""
    command = [sys.executable, "-m", "benchmarks.data_files", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def measure_all(rows: int, parent: Path | None) -> dict[str, Any]:
    """Makes the files, takes all measurements and removes the files."""
    result: dict[str, Any] = {"rows": rows}
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        run_self("--make", "--rows", str(rows), "--directory", directory)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(directory).iterdir())}
        result["bytes_per_row"] = {name: round(size / rows) for name, size in sizes.items()}
        for name in MEASUREMENTS:
            result[name] = json.loads(run_self("--measure", name, "--directory", directory))
            print(f"{name:24}", *(f"{key} {value:g}" for key, value in result[name].items()), sep="  ", flush=True)
    return result | description("aiohttp", "ijson")


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data_files.json")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=list(MEASUREMENTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_files(args.directory, args.rows)
    elif args.measure:
        print(json.dumps(measure(args.measure, args.directory)))
    else:
        result = measure_all(args.rows, args.directory)
        write_result(args.out, result)


if __name__ == "__main__":
    main()
