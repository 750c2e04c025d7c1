"""Starts a real server for a model on this machine, waits for it, and ends it: vLLM or `transformers serve`.

Knows nothing about what is asked of it; used by the demo, by benchmarks and by tests.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_TIMEOUT_S = 600
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ServerStartError(Exception):
    """A server did not come up; the message says what was seen."""


def half_precision() -> bool:
    """Whether vLLM is started in bf16: where the CPU computes in it (AVX512-BF16 or AMX)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str) -> str | None:
    """The body of a page on this machine, None while nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            body: bytes = answer.read()
            return body.decode()
    except (urllib.error.URLError, OSError):
        return None


def server_command(
    kind: str, model: Path, port: int, heads: Path | None = None, dtype: str | None = None
) -> list[str | Path]:
    """The command that serves a model.

    Args:
        kind: `vllm` or `transformers`.
        model: Its directory, by whose path the server calls it.
        port: Where it listens on 127.0.0.1.
        heads: Directory of heads that vLLM speculates with, all of them in a chain.
        dtype: What vLLM computes in; None for bf16 where the CPU has it, else fp32.
    """
    address: list[str | Path] = ["--host", "127.0.0.1", "--port", str(port)]
    if kind == "transformers":
        return [Path(sys.executable).with_name("transformers"), "serve", model, *address]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *address]
    command += ["--served-model-name", str(model), "--max-model-len", "2048"]
    command += ["--dtype", dtype or ("bfloat16" if half_precision() else "float32")]
    if heads is not None:
        tokens = heads_in(heads)
        speculative = {"method": "medusa", "model": str(heads), "num_speculative_tokens": tokens}
        command += ["--speculative-config", json.dumps(speculative)]
    return command


def heads_in(directory: Path) -> int:
    """Number of heads that a directory's config names, in the words of ours or of vLLM's."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("medusa_num_heads") or config["num_heads"])


@contextmanager
def server(kind: str, model: Path, log: Path, heads: Path | None = None, dtype: str | None = None) -> Iterator[str]:
    """Starts a server and stops it afterwards.

    Args:
        kind: See `server_command`, as are `model`, `heads` and `dtype`.
        model: The model's directory.
        log: File for its output.
        heads: Directory of heads.
        dtype: What vLLM computes in.

    Yields:
        The address, without `/v1`.

    Raises:
        ServerStartError: It ended, or did not answer in time.
    """
    port = free_port()
    command = [str(part) for part in server_command(kind, model, port, heads, dtype)]
    log.parent.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}"
    print(f"starting {kind} at {address} (log: {log})", flush=True)
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for_server(process, address, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_server(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Waits until the server answers; raises ServerStartError if it ended, or did not answer in time."""
    started = time.monotonic()
    while fetch(f"{address}/health") is None:
        seconds = time.monotonic() - started
        if process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise ServerStartError(f"the server ended with status {process.returncode}: {' | '.join(tail)}")
        if seconds > START_TIMEOUT_S:
            raise ServerStartError(f"the server did not answer within {START_TIMEOUT_S} s; see {log}")
        print(f"\r  waiting for the server ... {seconds:.0f} s", end="", flush=True)
        time.sleep(1)
    print(f"\r  the server answered after {time.monotonic() - started:.0f} s")


def spec_decode_counters(address: str) -> dict[str, float]:
    """VLLM's own counters of drafts and accepted tokens, also by position: `accepted_tokens_per_pos_0` and so on."""
    counters: dict[str, float] = {}
    for line in (fetch(f"{address}/metrics") or "").splitlines():
        found = re.match(r"vllm:spec_decode_num_(\w+?)_total\{([^}]*)\} (\S+)", line)
        if found:
            position = re.search(r'position="(\d+)"', found.group(2))
            counters[found.group(1) + (f"_{position.group(1)}" if position else "")] = float(found.group(3))
    return counters
