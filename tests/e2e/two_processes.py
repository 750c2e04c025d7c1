"""Runs axolotl's commands in two CPU processes.

torchrun's agent starts them, in a process of its own. All three are forked from the server that has imported axolotl already
(`axolotl_process`): three imports take longer than the short runs of these tests.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from axolotl_process import TIMEOUT_S, run_as_main, start, status_of
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_KILL_AFTER_S = 40
"""The agent gives its processes 30 s to end before it kills them."""


@dataclass(frozen=True)
class Nodes:
    """How torchrun's agent meets the agents of other nodes.

    Attributes:
        number: Nodes, each with an agent.
        processes: Processes of each node.
        endpoint: Where the agents meet; whoever comes first waits there for the others.
        run_id: What the agents of one run have in common.
    """

    number: int = 1
    processes: int = 2
    endpoint: str = "localhost:0"
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Run:
    """A command that runs in two processes.

    Attributes:
        process: torchrun's agent.
    """

    def __init__(
        self, module: str, argument: Path, environment: dict[str, str], pipe: Path, nodes: Nodes | None = None
    ) -> None:
        os.mkfifo(pipe)
        arguments = (module, [str(argument)], nodes or Nodes())
        self.process = start(_agent, arguments, pipe, environment)
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
def two_processes(
    config: Path, command: str = "train", package: str = "axolotl.cli", **environment: str
) -> Iterator[Run]:
    """`axolotl COMMAND`, or a module of another package, in two processes; they are gone when the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        module = f"{package}.{command}".lstrip(".")
        run = Run(module, config, {"DS_ACCELERATOR": "cpu", **environment}, Path(directory) / "output")
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


@contextlib.contextmanager
def two_nodes(configs: tuple[Path, Path], command: str = "train", **environment: str) -> Iterator[tuple[Run, Run]]:
    """`axolotl COMMAND` on two nodes of one process each, with a YAML of its own; both are gone when the block ends.

    Both are this machine, where the agents meet on the loopback. `NODE` in a node's environment is its number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = Nodes(2, 1, endpoint)
    with tempfile.TemporaryDirectory() as directory:
        runs = tuple(
            Run(
                f"axolotl.cli.{command}",
                config,
                {**environment, "NODE": str(number)},
                Path(directory) / str(number),
                nodes,
            )
            for number, config in enumerate(configs)
        )
        try:
            yield runs
        finally:
            for run in runs:
                run.process.terminate()
            for run in runs:
                run.process.join(_KILL_AFTER_S)
                run.process.kill()
                run.process.join()


def _agent(module: str, arguments: list[str], nodes: Nodes) -> None:
    """What `torchrun --nnodes N --nproc_per_node P --rdzv_backend c10d --rdzv_endpoint E -m MODULE ARGUMENTS` does."""
    config = LaunchConfig(
        min_nodes=nodes.number,
        max_nodes=nodes.number,
        nproc_per_node=nodes.processes,
        run_id=nodes.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint,
        local_addr="127.0.0.1" if nodes.number > 1 else None,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank)(module, arguments)


def _rank(module: str, arguments: list[str]) -> None:
    if status := status_of(run_as_main, module, arguments):
        os._exit(status)  # the agent waits for an answer from whoever returns
