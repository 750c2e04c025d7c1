"""Which files of a directory hold Medusa heads, whatever their trainer called them.

Contract: looks at the names of files and tensors; loads none.
"""

from __future__ import annotations

import re
from pathlib import Path

from axolotl_medusa.model.file_names import HEADS_FILE
from axolotl_medusa.model.tensor_files import INDEX_SUFFIX, TensorFiles
from axolotl_medusa.serving.format_rules import TORCH_HEADS_FILE
from axolotl_medusa.serving.head_names import is_of_heads, parse

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Files of tensors, the first of these where the same heads are there in several forms."""

_FSDP_FILE = "pytorch_model_fsdp.bin"
"""Where accelerate saves a full state dict of FSDP."""

_SHARD = re.compile(r"-\d{1,6}-of-(?P<of>\d{1,6})\.[a-z]+$")


def open_heads_files(path: Path) -> TensorFiles:
    """Opens a file, or of a directory the files named after heads, else its weights; reads no tensor.

    Raises:
        ValueError: There are none, several that exclude each other, or damaged ones.
    """
    if not path.is_dir():
        return TensorFiles.open(path)
    for name in (HEADS_FILE, TORCH_HEADS_FILE):
        if (path / name).is_file():
            return TensorFiles.open(path / name)
    if (path / "rank1.safetensors").is_file():
        raise ValueError(
            f"{path} has rank0.safetensors and rank1.safetensors, a TensorRT-LLM checkpoint divided among ranks, expected whole "
            "tensors; give the heads that it was converted from"
        )
    if named := _named_files(path):
        is_index = named[0].name.endswith(INDEX_SUFFIX)
        files = TensorFiles.open(named[0]) if is_index else TensorFiles.open_all(path, named)
        if any(parse(name) or is_of_heads(name) for name in files):
            return files
    try:
        return TensorFiles.open(path)
    except ValueError as error:
        if elsewhere := heads_elsewhere(path):
            raise ValueError(f"found no weights in {path}, {elsewhere}") from error
        raise


def _named_files(path: Path) -> list[Path]:
    """The files of a directory named after heads, in the first of the forms that are there."""
    named = [file for file in sorted(path.iterdir()) if _is_named(file) and file.is_file()]
    for suffix in _SUFFIXES:
        if index := next((file for file in named if file.name.endswith(suffix + INDEX_SUFFIX)), None):
            return [index]
        found = [file for file in named if file.suffix == suffix]
        shards = [match for file in found if (match := _SHARD.search(file.name))]
        names = ", ".join(file.name for file in found[:3])
        if shards and len(found) == len(shards) != int(shards[0]["of"]):
            raise ValueError(
                f"{path} holds {len(found)} of {int(shards[0]['of'])} shards ({names}): complete the download"
            )
        if len(found) > 1 and not shards:
            raise ValueError(f"{path} holds heads in several files ({names}), expected one: name the file")
        if found:
            return found
    return []


def _is_named(file: Path) -> bool:
    return "medusa" in file.name.lower() or file.name == _FSDP_FILE


def heads_elsewhere(path: Path) -> str | None:
    """Where else heads may be, as the end of a line."""
    if next(path.glob("*.distcp"), None) or next(path.glob("*/*.distcp"), None):
        return "but FSDP's own parts: join them with `axolotl merge-sharded-fsdp-weights`"
    for folder in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        for file in sorted(folder.iterdir()):
            if _is_named(file) and file.suffix in _SUFFIXES:
                return f"but its folder {folder.name} holds {file.name}: give that folder"
    return None
