"""The model of a Medusa-2 run with its adapter merged, written once and kept beside the run for the next start.

Contract: what lies there is an export for vLLM with its merged model, and a file that says what it was made of.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, HEADS_FILE, HEADS_FOLDER
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.sources import Source, adapter_file
from axolotl_medusa.model.tensor_files import write_json
from axolotl_medusa.serving.export import export
from axolotl_medusa.serving.export_files import MERGED_FOLDER

LOG = logging.getLogger(__name__)

_MADE_OF = "made_of.json"


def merged_dir(source: Source) -> Path:
    """Where the export of a run with an adapter lies: `OUTPUT_DIR-served`, beside the run."""
    run = source.output_dir or (source.heads_dir.parent if source.heads_dir.name == HEADS_FOLDER else source.heads_dir)
    run = run.resolve()
    return run.with_name(f"{run.name}-served")


def merged_model_dir(source: Source) -> Path:
    """The merged model in `merged_dir`."""
    return merged_dir(source) / MERGED_FOLDER


def is_merged(source: Source) -> bool:
    """Whether `merged_dir` is complete, and made of the very files that are there now."""
    file = merged_dir(source) / _MADE_OF
    return source.adapter_dir is not None and file.is_file() and read_json(file) == _made_of(source, source.adapter_dir)


def merge_once(source: Source, adapter_dir: Path) -> None:
    """Writes `merged_dir` unless it is there already.

    Args:
        source: The heads and their model.
        adapter_dir: Its adapter.

    Raises:
        ValueError: The adapter cannot be merged, or something else lies there.
    """
    with _alone(source.heads_dir):
        if is_merged(source):
            return
        directory = merged_dir(source)
        LOG.info("merging the adapter in %s into %s, once", adapter_dir, directory)
        (directory / _MADE_OF).unlink(missing_ok=True)
        made_of = _made_of(source, adapter_dir)
        export(source, "vllm", directory, model="merged")
        write_json(directory / _MADE_OF, made_of)


def _made_of(source: Source, adapter_dir: Path) -> dict[str, list[int]]:
    """Size and time of every file that goes into the merge: hashing large models would take longer than it is worth."""
    own = [source.heads_dir / HEADS_FILE, adapter_file(adapter_dir), adapter_dir / ADAPTER_CONFIG_FILE]
    base = source.model_dir()
    weights = [path for suffix in ("safetensors", "bin") for path in sorted(base.glob(f"*.{suffix}"))]
    stats = {str(path.resolve()): path.stat() for path in [*own, base / "config.json", *weights]}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits for others that merge the same run."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
