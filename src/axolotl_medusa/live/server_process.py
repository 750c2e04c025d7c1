"""A vLLM server that this process starts, waits for, and ends.

Contract: knows a command and an address; nothing about heads. Whatever happens, the server is gone afterwards.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from axolotl_medusa.errors import first_line
from axolotl_medusa.live.server import ServerError
from axolotl_medusa.serving.serve import VllmCommand

START_TIMEOUT_S = 1800
"""Large models are read from slow disks, and compiled."""
_END_TIMEOUT_S = 60
_LOOK_EVERY_S = 0.2


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: VllmCommand, log: Path) -> Iterator[str]:
    """Starts a server and ends it afterwards.

    Args:
        command: From `vllm_command`; host and port are added.
        log: File for what it prints.

    Yields:
        Its address, without `/v1`.

    Raises:
        ServerError: It ended before it answered, or does not answer.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [*command.arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        # A session of its own, so that vLLM's processes can be ended together if it does not end them itself.
        process = subprocess.Popen(
            words,
            env={**os.environ, **command.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, url, log)
            yield url
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    begun = time.monotonic()
    while not _answers(url):
        if process.poll() is not None:
            raise ServerError(
                f"vLLM ended with status {process.returncode} before it answered ({_last_line(log)}): its output is in {log}"
            )
        if time.monotonic() - begun > START_TIMEOUT_S:
            raise ServerError(f"vLLM did not answer within {START_TIMEOUT_S} s: its output is in {log}")
        time.sleep(_LOOK_EVERY_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: Path) -> str:
    """The last line that names an error, else the last one."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return first_line((named or lines or ["it said nothing"])[-1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # engine processes that outlived their server
