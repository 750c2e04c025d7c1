"""Tensors in files, one at a time: read lazily from safetensors and torch files, write as a stream.

Contract: knows file formats and nothing about models or heads. Reading never maps a safetensors file and writing never
holds more than the tensor at hand, so a model of any size is converted in the memory of its largest tensor; only
`write_torch_file` holds a whole file. Every file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_medusa.model.file_names import TORCH_FILE, TORCH_INDEX
from axolotl_medusa.model.json_files import parse_json, read_json
from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.model.torch_files import DAMAGE, check_torch_file

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Size of a shard where nothing else is asked for, as in transformers."""

# In safetensors' own order: files hold the tensors of the last type first, so that every tensor is aligned.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses longer headers."""
_LARGEST_SIZE = 2**62
"""Of a dimension, and of all of a shape: torch counts in 64 bits."""
_MAX_RANK = 64
_LONGEST_NAME = 500
"""Characters of a tensor's name, and of what messages quote."""


class LazyTensor(NamedTuple):
    """A tensor that is read when `load` is called.

    Attributes:
        name: Its name in the file it goes to.
        dtype: Its type.
        shape: Its shape.
        load: Reads or computes it; every call returns a tensor of that type and shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(Mapping[str, LazyTensor]):
    """The tensors of one or several files by name, none of them in memory; `files[name].load()` reads one.

    Names are in the files' order, so that reading one after the other reads the disk forwards.
    """

    def __init__(self, where: Path, shards: Mapping[Path, list[LazyTensor]]) -> None:
        self.where = where
        self._tensors: dict[str, LazyTensor] = {}
        self._file_of: dict[str, Path] = {}
        for file, tensors in shards.items():
            for tensor in tensors:
                if tensor.name in self._tensors:
                    raise ValueError(
                        f"{tensor.name} is in both {self._file_of[tensor.name]} and {file}: expected each tensor in one "
                        "file; move one of the files away"
                    )
                self._tensors[tensor.name] = tensor
                self._file_of[tensor.name] = file

    @classmethod
    def open(cls, path: str | Path) -> TensorFiles:
        """Opens a file, or the weights of a directory.

        Args:
            path: A `.safetensors` file, any other file as `torch.save` writes it, or a directory. Of a directory: the
                shards of its index, `model.safetensors`, or every `*.safetensors` that it holds; without any of them
                `pytorch_model*.bin`, `adapter_model.bin` or every `*.pt`.

        Raises:
            ValueError: There is no such file, it is damaged, or it holds anything but tensors.
        """
        path = Path(path)
        return cls(path, {file: _tensors_of(file) for file in _weight_files(path)})

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ValueError(
                f"{self.where} has no tensor {name}, it has {len(self)} others: is it the right file?"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor."""
        return self[name].dtype

    def load(self, name: str) -> Tensor:
        """Reads one tensor."""
        return self[name].load()

    def sketch(self) -> dict[str, Tensor]:
        """All tensors by name with their shapes and types, on the meta device: none is read."""
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in self.items()}

    def file(self, name: str) -> Path:
        """The file that holds one tensor."""
        return self._file_of[self[name].name]


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: expected a file of tensors or a directory of such files")
    for index, single, pattern in (
        (SAFETENSORS_INDEX, SAFETENSORS_FILE, "*.safetensors"),
        (TORCH_INDEX, TORCH_FILE, "adapter_model.bin"),
    ):
        if (path / index).is_file():
            return _indexed_files(path / index)
        found = [path / single] if (path / single).is_file() else sorted(path.glob(pattern))
        if found:
            return found
    if found := sorted(path.glob("*.pt")):
        return found
    raise ValueError(f"{path} has no weights: expected *.safetensors, pytorch_model*.bin or *.pt files in it")


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error}): expected a weight_map of tensor names to files") from error
    if not names:
        raise ValueError(f"{index} is damaged: expected a weight_map of tensor names to files")
    for name in names:
        if not _is_name(name) or name != Path(name).name:
            shown = ascii(name)[:_LONGEST_NAME]
            raise ValueError(f"{index} names {shown}, expected the name of a file beside it: get the index again")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is not beside it: complete the download")
        if not stays_inside(index.parent / name, index.parent):
            raise ValueError(f"{index} names {name}, a link to a file elsewhere: put the file itself there")
    return [index.parent / name for name in names]


def _tensors_of(file: Path) -> list[LazyTensor]:
    return _safetensors(file) if file.suffix == ".safetensors" else _torch_tensors(file)


def _safetensors(file: Path) -> list[LazyTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} is not a safetensors file, or only a part of one: get it again")
        header_bytes = stream.read(length)
    try:
        return _described_tensors(file, parse_json(header_bytes, "its header", size), 8 + length, size)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = ascii(str(error) if isinstance(error, ValueError) else repr(error))[1:-1][:_LONGEST_NAME]
        raise ValueError(f"{file} is not a whole safetensors file ({reason}): get it again") from error


def _described_tensors(file: Path, header: dict[str, Any], start: int, size: int) -> list[LazyTensor]:
    """The tensors of a header, which lie one after the other and fill the file, as safetensors itself demands."""
    header.pop("__metadata__", None)
    end, tensors = 0, []
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, previous, (_, end) = entry["data_offsets"][0], end, entry["data_offsets"]
        if not _is_name(name) or not all(_is_size(value) for value in (begin, end, *entry["shape"])):
            raise ValueError(f"{name} is {entry}")
        if len(entry["shape"]) > _MAX_RANK or math.prod(max(1, dim) for dim in entry["shape"]) > _LARGEST_SIZE:
            raise ValueError(f"{name} has the shape {entry['shape']}")
        tensor = _safetensor(file, name, entry, start + begin)
        if begin != previous or tensor.num_bytes != end - begin or start + end > size:
            raise ValueError(f"{name} has {end - begin} bytes after {previous} up to {start + end} of {size}")
        tensors.append(tensor)
    if start + end != size:
        raise ValueError(f"{size - start - end} bytes belong to no tensor")
    return tensors


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def _is_name(name: Any) -> bool:
    """Whether a tensor's name can be one: it also stands in messages, of one line."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and name.isprintable()


def _safetensor(file: Path, name: str, entry: Mapping[str, Any], offset: int) -> LazyTensor:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])

    def load() -> Tensor:
        values = torch.empty(shape, dtype=dtype)
        with file.open("rb") as stream:
            stream.seek(offset)
            if stream.readinto(_bytes(values)) != values.nbytes:
                raise RuntimeError(f"{file} became shorter while {name} was read: is it still being written?")
        return values

    return LazyTensor(name, dtype, shape, load)


def _bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, in row-major order; a copy only where they lie in another."""
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def _torch_tensors(file: Path) -> list[LazyTensor]:
    def lazy(name: str, tensor: Tensor) -> LazyTensor:
        # Read anew each time: a mapping that stays open would keep every page that was touched.
        return LazyTensor(
            name, tensor.dtype, tuple(tensor.shape), lambda: _torch_file(file)[name].detach().contiguous()
        )

    check_torch_file(file)
    return [lazy(name, tensor) for name, tensor in _torch_file(file).items()]


def _torch_file(file: Path) -> dict[str, Tensor]:
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file), map_location="cpu")
    except DAMAGE as error:
        reason = str(error).split("\n")[0][:120]
        raise ValueError(
            f"{file} cannot be read as plain tensors ({reason}): pickled code is never run; "
            "save it again as a dictionary of tensors, or get the safetensors form"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors (a state dict)")
    for name, value in content.items():
        if not _is_name(name) or not isinstance(value, Tensor):
            shown = ascii(name)[:_LONGEST_NAME]
            raise ValueError(
                f"{file} holds a {type(value).__name__} under {shown}, expected tensors by name; save its state dict alone"
            )
    return dict(content)


def write_tensors(path: str | Path, tensors: Iterable[LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, loading one tensor after the other; the bytes are those of `safetensors.torch.save_file`.

    Args:
        path: The file; what it held before stays until the new one is complete.
        tensors: What goes into it, each name once.
        metadata: The file's metadata, `{"format": "pt"}` by default, which transformers asks for.

    Raises:
        ValueError: A name comes twice, or a tensor is not of the type and shape that were announced.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for tensor in ordered:
        if tensor.name in header:
            raise ValueError(f"{path}: two tensors are named {tensor.name}, expected each name once")
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole_or_nothing(Path(path)) as part, part.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for tensor in ordered:
            stream.write(_bytes(_loaded(tensor)))


def write_sharded(
    directory: str | Path, tensors: Iterable[LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Writes a model's safetensors files in `directory`, as transformers reads them.

    Args:
        directory: Where; it is made if needed.
        tensors: The model's tensors; neighbours share a shard.
        max_shard_bytes: A shard is closed before it would exceed this; a larger tensor has a shard of its own.

    Returns:
        The files: `model.safetensors`, or the shards and after them their index.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    if len(shards) == 1:
        write_tensors(directory / SAFETENSORS_FILE, shards[0])
        return [directory / SAFETENSORS_FILE]
    files = [directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(file, shard)
    weight_map = {tensor.name: file.name for file, shard in zip(files, shards, strict=True) for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = directory / SAFETENSORS_INDEX
    write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return [*files, index]


def write_torch_file(path: str | Path, tensors: Iterable[LazyTensor]) -> None:
    """Writes a state dict with `torch.save`, for consumers that read nothing else; holds all of it in memory."""
    with whole_or_nothing(Path(path)) as part:
        torch.save({tensor.name: _loaded(tensor).clone() for tensor in tensors}, part)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_or_nothing(Path(path)) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _loaded(tensor: LazyTensor) -> Tensor:
    values = tensor.load()
    if (values.dtype, tuple(values.shape)) != (tensor.dtype, tensor.shape):
        raise ValueError(
            f"{tensor.name} is {values.dtype} {tuple(values.shape)}, expected {tensor.dtype} {tensor.shape}: "
            "the file it came from has changed"
        )
    return values


@contextlib.contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` where the block ends without an error."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # another rank may write the same file
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
