"""What a fuzzed reader is, the limits that it has to keep, and the one line that it may end in."""

from __future__ import annotations

import re
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

RATIO = 10
"""Memory of Python's objects by the size of what is read."""
ADDRESS_SPACE_BYTES = 512 << 20
"""Beyond what the process has: an allocation of more fails, whether it is Python's, torch's or a library's."""
CPU_SECONDS = 20.0
"""Of one input; the slowest takes a tenth of a second on a quiet machine. Waiting does not count."""
LONGEST_MESSAGE = 2500


@dataclass(frozen=True)
class Reader:
    """One reader, a directory that it can read, and how its files are damaged.

    Attributes:
        name: For the test's name and for its seeds.
        make: Writes the valid directory.
        read: Reads it, and checks what it has read.
        damage: By file, what may stand in it instead.
        inputs: Its share of the 10,000.
        free_bytes: Memory that any input may take.
        free_address_space: Whether the library behind reserves address space that it does not use.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    damage: Mapping[str, SearchStrategy[bytes]]
    inputs: int
    free_bytes: int = 12_000_000
    free_address_space: bool = False
    refusals: tuple[type[Exception], ...] = field(default=(ValueError, RuntimeError, OSError))


class Hang(BaseException):
    """An input that takes too long; no reader catches it."""


def _hang(*_: object) -> None:
    raise Hang(f"more than {CPU_SECONDS} s of computing")


@contextmanager
def limits(reader: Reader, num_bytes: int) -> Iterator[None]:
    """Fails where the block takes too long or too much memory for an input of this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not reader.free_address_space:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE_BYTES, hard))
    handler = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    tracemalloc.start()
    try:
        yield
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert taken <= reader.free_bytes + RATIO * num_bytes, f"{taken:,} bytes of memory for {num_bytes:,}"


def outcome(reader: Reader, directory: Path, num_bytes: int) -> str:
    """Reads a directory; returns the one line that it ended in, empty after a right result.

    Raises:
        AssertionError: It ended in anything else.
    """
    try:
        with limits(reader, num_bytes):
            reader.read(directory)
    except reader.refusals as error:
        assert not isinstance(error, RecursionError | NotImplementedError | UnicodeError), repr(error)
        message = str(error)
        assert message and "\n" not in message and len(message) < LONGEST_MESSAGE, f"not one line: {message[:3000]!r}"
        assert not re.search("allocate memory|out of memory|bad_alloc", message), message
        return message
    return ""


def one_error_line(status: int, stderr: str) -> None:
    """Checks how a command ended."""
    assert status in (0, 1, 2), status
    lines = stderr.splitlines()
    if status == 2:
        assert len(lines) == 1 and "error: " in lines[0], stderr
