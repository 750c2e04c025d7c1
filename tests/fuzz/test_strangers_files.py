"""Damaged files for every reader: each input ends in one line or in a right result, within limits of time and memory.

A reader is given a directory that it reads as it should, with one file damaged: a header, an index, a config, a tree, rows
or an archive whose structure was changed, or its bytes. What it may end in is `reader.outcome`'s to say: no other exception,
no more than 20 s of computing, and no more memory than ten times what is read, beyond a constant of 12 MB (120 MB where
archives are unpacked); an allocation of half a gigabyte fails, whoever asks for it.

By default each reader gets its share of about 12,000 inputs, the same ones in every run: less than 90 s of one core. More of
them, and others in every run:

    pytest tests/fuzz --fuzz-inputs 200000        or        MEDUSA_FUZZ_INPUTS=200000 pytest tests/fuzz

Inputs that once were faults are kept, a few of each kind: `seeds/READER/LABEL--FILE` is read in place of FILE by that reader,
always and first; a `/` in FILE is written `+`. A new fault prints its input; store it there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_readers import DATA_READERS
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from loader_readers import LOADER_READERS
from package_readers import PACKAGE_READERS
from reader import Reader, outcome

READERS = [*PACKAGE_READERS, *DATA_READERS, *LOADER_READERS]
SEEDS = Path(__file__).with_name("seeds")
LEAST_INPUTS = 10_000
"""In CI, all readers together."""

EACH = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)


@pytest.fixture
def directory(reader: Reader) -> Iterator[Path]:
    """The reader's valid directory, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        valid = Path(place) / "directory"
        reader.make(valid)
        yield valid


@pytest.fixture
def scale(pytestconfig: pytest.Config) -> float:
    """How many times its share each reader gets."""
    asked = pytestconfig.getoption("--fuzz-inputs", None)
    return 1.0 if asked is None else asked / sum(reader.inputs for reader in READERS)


def read_with(reader: Reader, directory: Path, name: str, content: bytes) -> str:
    """The outcome with another content of a file; what the valid directory had is there again afterwards."""
    file = directory / name
    before = Path(f"{directory}.before")
    shutil.copytree(directory, before, symlinks=True)
    try:
        kept = file.read_bytes() if file.is_file() else None
        file.write_bytes(content)
        return outcome(reader, directory, len(content))
    finally:
        shutil.rmtree(directory)
        before.rename(directory)
        if ".." in name and kept is not None:
            file.write_bytes(kept)


@EACH
def test_directory_that_is_not_damaged_is_read_as_it_should(reader: Reader, directory: Path) -> None:
    assert outcome(reader, directory, 1 << 20) == ""


@pytest.mark.parametrize(
    ("reader", "seed"),
    [(reader, seed) for reader in READERS for seed in sorted((SEEDS / reader.name).glob("*--*"))],
    ids=lambda value: value.name,
)
def test_input_that_once_was_a_fault_ends_in_one_line_or_a_right_result(
    reader: Reader, seed: Path, directory: Path
) -> None:
    name = seed.name.partition("--")[2].replace("+", "/")
    read_with(reader, directory, name, seed.read_bytes())


def test_every_kept_input_belongs_to_a_reader() -> None:
    kept = {file.parent.name for file in SEEDS.glob("*/*--*")}
    assert kept and kept <= {reader.name for reader in READERS}
    assert {file.parent.name for file in SEEDS.glob("*/*")} == kept


@EACH
def test_damaged_input_ends_in_one_line_or_a_right_result(reader: Reader, directory: Path, scale: float) -> None:
    wanted = max(1, round(reader.inputs * scale))
    files = st.sampled_from(sorted(reader.damage)).flatmap(lambda name: st.tuples(st.just(name), reader.damage[name]))
    ended = {"line": 0, "result": 0}

    @settings(
        max_examples=wanted,
        derandomize=scale == 1.0,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(files)
    def read(damaged: tuple[str, bytes]) -> None:
        name, content = damaged
        note(f"store {content!r} in {SEEDS}/{reader.name}/LABEL--{name.replace('/', '+')}")
        ended["line" if read_with(reader, directory, name, content) else "result"] += 1

    read()
    assert sum(ended.values()) >= wanted
    if scale >= 1.0 and reader.refusals:
        assert ended["line"] > 0, "nothing was refused: is the file read at all?"


def test_shares_of_the_readers_are_as_many_inputs_as_promised() -> None:
    assert sum(reader.inputs for reader in READERS) >= LEAST_INPUTS
    assert len({reader.name for reader in READERS}) == len(READERS)
