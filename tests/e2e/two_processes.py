"""Runs axolotl's commands in two CPU processes.

torchrun's agent starts them, in a process of its own. All three are forked from the server that has imported axolotl already
(`axolotl_process`): three imports take longer than the short runs of these tests.
"""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from axolotl_process import TIMEOUT_S, run_as_main, start, status_of
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_KILL_AFTER_S = 40
"""The agent gives its processes 30 s to end before it kills them."""


class Run:
    """A command that runs in two processes.

    Attributes:
        process: torchrun's agent.
    """

    def __init__(self, config: Path, command: str, environment: dict[str, str], pipe: Path) -> None:
        os.mkfifo(pipe)
        self.process = start(_agent, (f"axolotl.cli.{command}", [str(config)]), pipe, environment)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe: Path) -> None:
        with pipe.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def lines(self, within_s: float = TIMEOUT_S) -> Iterator[str]:
        """What the processes print, until all have ended; `queue.Empty` if nothing comes for too long."""
        while (line := self._lines.get(timeout=within_s)) is not None:
            yield line

    def end(self, within_s: float = TIMEOUT_S) -> str:
        """Waits for the end and returns what was printed until then, less the lines that were read before."""
        output = "".join(self.lines(within_s))
        self.process.join(within_s)
        return output


@contextlib.contextmanager
def two_processes(config: Path, command: str = "train", **environment: str) -> Iterator[Run]:
    """`axolotl COMMAND` in two processes; they are gone when the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        run = Run(config, command, {"DS_ACCELERATOR": "cpu", **environment}, Path(directory) / "output")
        try:
            yield run
        finally:
            run.process.terminate()
            run.process.join(_KILL_AFTER_S)
            run.process.kill()
            run.process.join()


def torchrun(config: Path, command: str = "train", ok: bool = True, **environment: str) -> str:
    """Runs it to its end and returns what it printed."""
    with two_processes(config, command, **environment) as run:
        output = run.end()
    assert (run.process.exitcode == 0) is ok, output[-20000:]
    return output


def _agent(module: str, arguments: list[str]) -> None:
    """What `torchrun --nproc_per_node 2 --standalone -m MODULE ARGUMENTS` does."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank)(module, arguments)


def _rank(module: str, arguments: list[str]) -> None:
    if status := status_of(run_as_main, module, arguments):
        os._exit(status)  # the agent waits for an answer from whoever returns
