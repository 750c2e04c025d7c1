"""Runs axolotl's commands in processes of their own, forked from one that has imported axolotl already.

An import of axolotl takes longer than the short runs of these tests; the fork server of the standard library pays for
it once. Each command still gets a fresh process, its own `sys.argv` and its exit status.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOAD = [
    "axolotl.cli.train",
    "axolotl.cli.config",
    "axolotl.train",
    "axolotl.core.builders",
    "axolotl_medusa.training.plugin",
    "bitsandbytes",
    "torchao.optim",
]
TIMEOUT_S = 150

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Result:
    """Exit status and what the command printed."""

    returncode: int
    output: str


def _child(module: str, arguments: list[str], env: dict[str, str], directory: str, log: str) -> None:
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(directory)
    os.environ.update(env)
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_module(
    module: str, arguments: list[str], directory: Path, log: Path, env: dict[str, str] | None = None
) -> Result:
    """Runs `python -m module arguments...` in `directory`.

    Raises:
        TimeoutError: It ran longer than `TIMEOUT_S`.
    """
    process = _context.Process(target=_child, args=(module, arguments, env or {}, str(directory), str(log)))
    process.start()
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
