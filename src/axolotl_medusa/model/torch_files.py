"""Torch files as strangers send them: what one claims to hold is checked before any memory is given to it.

Contract: knows `torch.save`'s two formats, and that the file should hold tensors by name, at its top or under the keys that
trainers use. A zip archive may unpack to any size, a pickle may ask for a tensor of any shape, and `torch.load` would believe
both.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
)
"""What `torch.load`, `pickletools` and `zipfile` raise at a damaged file."""

_NUM_LEGACY_PICKLES = 5
"""Before torch 1.6: a magic number, a version, facts of the machine, the tensors, and the storages' keys."""

_MAX_PICKLE_BYTES = 16_000_000
"""Names and shapes of 60,000 tensors."""
_FREE_BYTES = 1_000_000
_MEMORY_OF = {"EMPTY_LIST": 72, "EMPTY_DICT": 80, "EMPTY_SET": 232, "MARK": 72, "EMPTY_TUPLE": 16, "REDUCE": 200}
"""Bytes that opcodes of one byte make torch's unpickler take."""

_PLAIN = {
    "collections OrderedDict",
    "torch Size",
    "torch.nn.parameter Parameter",
    "torch.storage TypedStorage",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
"""Names that pickled tensors need; torch itself allows more, `bytearray` of any length among them."""


_OF_HEADS = ("medusa_head", "medusa_heads")
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", *_OF_HEADS)
"""Keys that trainers save a state dict under, beside an optimizer and a step."""
_DEEPEST = 3
"""Keys within keys that are followed."""
LONGEST_NAME = 500
"""Characters of a tensor's name, and of what messages quote."""


def check_torch_file(file: Path) -> None:
    """Checks that a file of `torch.save` holds no more than its own size.

    Raises:
        ValueError: It is damaged, packed, would run code, or has a tensor larger than the file.
    """
    size = file.stat().st_size
    try:
        _check_pickles(file, size)
        with FakeTensorMode():  # tensors with shapes and without memory
            content = torch.load(file, weights_only=True)
        for tensor in _tensors_in(content):
            if tensor.numel() * tensor.element_size() > size:
                raise ValueError(f"a tensor of {tuple(tensor.shape)} is larger than the file, of {size:,} bytes")
    except DAMAGE as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as plain tensors ({reason}): pickled code is never run; "
            "save it again as a dictionary of tensors, or get the safetensors form"
        ) from error


def state_dict(content: Any, file: Path) -> dict[str, torch.Tensor]:
    """The tensors by name that a file of `torch.save` holds: all of it, or what trainers put under a key of their own.

    An optimizer and numbers beside that key are passed over. Heads under a key keep its name before theirs.

    Raises:
        ValueError: It holds anything else, or one name under two keys.
    """
    found: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for key, name, value in _named(content, file):
        if not is_name(name) or not isinstance(value, torch.Tensor):
            shown = ascii(name)[:LONGEST_NAME]
            raise ValueError(
                f"{file} holds a {type(value).__name__} under {shown}, expected tensors by name, or under "
                f"{', '.join(_STATE_DICTS)}; save its state dict alone"
            )
        if name in found:
            raise ValueError(
                f"{file} holds {name} under both {keys[name]} and {key}, expected one; save one state dict alone"
            )
        found[name], keys[name] = value, key
    return found


def is_name(name: Any) -> bool:
    """Whether a tensor's name can be one: it also stands in messages, of one line."""
    return isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()


def _named(content: Any, file: Path, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any, Any]]:
    """Keys, names and values of the state dicts in a file; `key` is what led to them."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors (a state dict)")
    nested = [name for name in _STATE_DICTS if isinstance(content.get(name), Mapping)]
    if not nested or depth == _DEEPEST:
        yield from ((key, name, value) for name, value in content.items())
    for name in nested if depth < _DEEPEST else ():
        prefix = f"{name}." if name in _OF_HEADS else ""
        for inner, inner_name, value in _named(content[name], file, name, depth + 1):
            yield inner, f"{prefix}{inner_name}" if isinstance(inner_name, str) else inner_name, value


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries and lists, which may also hold themselves."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, Mapping) else value)


def _check_pickles(file: Path, size: int) -> None:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            pickles = io.BytesIO(stream.read(min(size, _MAX_PICKLE_BYTES)))
        for _ in range(_NUM_LEGACY_PICKLES):
            _check_pickle(pickles)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or sum(entry.file_size for entry in entries) > size:
            raise ValueError("it is packed, as torch packs no file")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(entry)))


def _check_pickle(stream: io.BytesIO) -> None:
    """Reads a pickle's operations without doing any of them; in memory, as a file's `read` takes whatever length it is told."""
    begin, memory = stream.tell(), 0
    for operation, argument, place in pickletools.genops(stream):
        memory += _MEMORY_OF.get(operation.name, 0)
        length = (place or 0) - begin
        if length > _MAX_PICKLE_BYTES or memory > _FREE_BYTES + 5 * length:
            raise ValueError("its pickle is larger than names and shapes of tensors are")
        if operation.name == "GLOBAL" and not _is_plain(str(argument)):
            raise ValueError(f"it asks for {ascii(argument)[:60]}")


def _is_plain(name: str) -> bool:
    module, _, kind = name.partition(" ")
    is_type = module == "torch" and (kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype))
    return name in _PLAIN or is_type
