"""Runs axolotl's commands in two CPU processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from axolotl_process import TIMEOUT_S

_KILL_AFTER_S = 40
"""torchrun gives its processes 30 s to end before it kills them."""


@contextlib.contextmanager
def two_processes(config: Path, command: str = "train", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`axolotl COMMAND` in two processes, with all that they print in `stdout`; they are gone when the block ends."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = subprocess.Popen(
        [*launch, "-m", f"axolotl.cli.{command}", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env=env,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_KILL_AFTER_S)
            process.kill()


def torchrun(config: Path, command: str = "train", ok: bool = True, **environment: str) -> str:
    """Runs it to its end and returns what it printed."""
    with two_processes(config, command, **environment) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode == 0) is ok, output[-20000:]
    return output
