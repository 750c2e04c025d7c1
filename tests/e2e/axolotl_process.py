"""Runs axolotl's commands in processes of their own, forked from one that has imported axolotl already.

An import of axolotl takes longer than the short runs of these tests; the fork server of the standard library pays for
it once. Each command still gets a fresh process, its own `sys.argv` and its exit status.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
PRELOAD = [
    "axolotl.cli.train",
    "axolotl.cli.config",
    "axolotl.train",
    "axolotl.core.builders",
    "axolotl_medusa.training.plugin",
    "bitsandbytes",
    "torchao.optim",
    "warm_start",
]
TIMEOUT_S = 150

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@functools.cache
def _start_server() -> None:
    """Starts the fork server, which looks for modules in the environment's path alone and passes over those that it misses."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


@dataclass(frozen=True)
class Result:
    """Exit status and what the command printed."""

    returncode: int
    output: str


def _child(
    function: Callable[..., None], arguments: tuple[Any, ...], output: str, env: dict[str, str], directory: str
) -> None:
    with Path(output).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    # A child of a fork server would start its own workers from another server, which would import all of this again.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(directory)
    os.environ.update(env)
    os._exit(status_of(function, *arguments))


def status_of(function: Callable[..., None], *arguments: Any) -> int:
    """Calls a function as Python runs a program, and returns the exit status."""
    status = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run_as_main(module: str, arguments: list[str]) -> None:
    """`python -m module arguments...` in this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def start(
    function: Callable[..., None], arguments: tuple[Any, ...], output: Path, env: dict[str, str] | None = None
) -> BaseProcess:
    """Calls a function in a new process, in the repository's root, with what it prints in `output`."""
    _start_server()
    process = _context.Process(target=_child, args=(function, arguments, str(output), env or {}, str(ROOT)))
    process.start()
    return process


def run_module(module: str, arguments: list[str], log: Path, env: dict[str, str] | None = None) -> Result:
    """Runs `python -m module arguments...`.

    Raises:
        TimeoutError: It ran longer than `TIMEOUT_S`.
    """
    process = start(run_as_main, (module, arguments), log, env)
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(
            f"{module} {arguments} ran longer than {TIMEOUT_S} s: {log.read_text(encoding='utf-8')[-3000:]}"
        )
    return Result(process.exitcode or 0, log.read_text(encoding="utf-8", errors="replace"))


def log_history(output_dir: Path) -> list[dict[str, Any]]:
    """What `Trainer.log` was given, from the latest checkpoint."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
