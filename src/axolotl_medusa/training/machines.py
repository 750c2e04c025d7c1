"""What several machines must agree on: which disks they share, and the checkpoint that all of them go on from.

Contract: knows processes, files and the names of machines; nothing about models. Every process calls each function, and all
get the same answer.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.model.file_names import STATE_FILE


def of_all_processes(value: Any) -> list[Any]:
    """The value that each process has, in the order of their ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def folder_of_this_machine(directory: str | Path) -> Path:
    """A folder that no other machine writes to: `directory` itself where there is only one machine.

    Machines that map the same file keep copies of its pages, and write whole pages back: one would undo what another wrote.
    """
    name = socket.gethostname()
    return Path(directory) / name if len(set(of_all_processes(name))) > 1 else Path(directory)


def machines_without(directory: str | Path) -> list[str]:
    """Names of the machines that see another directory under this name than the first process does."""
    directory, name = Path(directory), of_all_processes(f".seen-by-all-{uuid.uuid4().hex}")[0]
    mark = directory / name
    if _rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    of_all_processes(None)  # after this the mark is there
    found = of_all_processes((socket.gethostname(), mark.exists()))
    if _rank() == 0:
        mark.unlink()
    return sorted({machine for machine, is_seen in found if not is_seen})


def own_disks_warning(output_dir: str, machines: list[str], is_divided: bool) -> str:
    """What follows where `output_dir` is not shared, in one line.

    Args:
        output_dir: Of the run.
        machines: Those that do not see the first one's.
        is_divided: Whether every process writes its own part of a checkpoint.
    """
    resume = (
        "no machine has a whole checkpoint to go on from, because each writes its own parts: use a shared disk"
        if is_divided
        else "to go on from a checkpoint, copy it to every machine"
    )
    return (
        f"output_dir {output_dir} is not on a disk that all machines share: heads are written on the first machine alone, not on "
        f"{', '.join(machines)}; {resume}"
    )


def checkpoint_problem(checkpoint: str | None) -> str | None:
    """Why the processes cannot go on from a checkpoint together, in one line; None where they can."""
    wanted = Path(checkpoint).resolve() if checkpoint else None
    is_whole = False
    with contextlib.suppress(OSError):
        is_whole = wanted is not None and (wanted / STATE_FILE).is_file()
    found = of_all_processes((socket.gethostname(), wanted.name if wanted else None, is_whole))
    (first, name, first_is_whole), *others = found
    for machine, other, other_is_whole in others:
        if (other, other_is_whole) != (name, first_is_whole):
            return (
                f"{first} goes on from {_named(name, first_is_whole)}, {machine} from {_named(other, other_is_whole)}: copy the "
                "checkpoint to every machine, or keep output_dir on a disk that they share"
            )
    return None


def _named(checkpoint: str | None, is_whole: bool) -> str:
    if checkpoint is None:
        return "no checkpoint"
    return checkpoint if is_whole else f"a part of {checkpoint}"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
