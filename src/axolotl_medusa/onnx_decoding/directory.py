"""An ONNX directory: what its `medusa_onnx.json` says, and whether its files are those.

Contract: reads small JSON files and the sizes of large ones; opens no graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.onnx_decoding.graph_names import ABOUT_FILE, FORMAT, MODEL_FILE

_AGAIN = "export it again with `axolotl-medusa export --to onnx`"
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class About:
    """What an export wrote down about itself.

    Attributes:
        precision: `fp32`, `int8` or `int4`: type of the model's matrices.
        layers: Decoder layers.
        kv_heads: Heads of keys and values.
        head_size: Size of each.
        hidden_size: Size H of the hidden state.
        vocab_size: Tokens that the model chooses among.
        context: Positions that the model has, 0 for no limit.
        window: Tokens that a sliding layer sees, 0 where none slides.
        mixes: Whether some layers slide and others see everything.
        num_heads: Medusa heads.
        draft_top_k: Tokens that a head can name at most.
        eos_token_ids: Tokens that end a text.
    """

    precision: str
    layers: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    context: int
    window: int
    mixes: bool
    num_heads: int
    draft_top_k: int
    eos_token_ids: tuple[int, ...]


PRECISIONS = ("fp32", "int8", "int4")


def is_onnx_directory(path: str | Path) -> bool:
    """Whether `axolotl-medusa export --to onnx` wrote this directory, or a part of it."""
    directory = Path(path).expanduser()
    return any((directory / name).is_file() for name in (ABOUT_FILE, MODEL_FILE))


def read_about(directory: str | Path) -> About:
    """Reads and verifies an ONNX directory: every file that the export wrote is there in its size.

    Raises:
        ValueError: It is none, of another version, damaged, or files are missing; one line says what.
    """
    directory = Path(directory).expanduser()
    file = directory / ABOUT_FILE
    if not file.is_file():
        found = "has ONNX files, but" if any(directory.glob("*.onnx")) else "is a directory that"
        raise ValueError(
            f"{directory} {found} has no {ABOUT_FILE}: expected what `axolotl-medusa export --to onnx` writes"
        )
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(f"{file}: format is {shorten(content.get('format'))}, expected {FORMAT}: {_AGAIN}")
    about = _about(content.get("model"), file)
    for name, size in _files(content, file).items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} has no {name}, which its {ABOUT_FILE} lists: complete the directory")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}: copy it again, or {_AGAIN}")
    return about


def check_digests(directory: str | Path) -> None:
    """Compares every file of an ONNX directory with its SHA-256.

    Raises:
        ValueError: One differs.
    """
    directory = Path(directory).expanduser()
    read_about(directory)
    for name, listed in read_json(directory / ABOUT_FILE)["files"].items():
        if file_digest(directory / name) != listed.get("sha256"):
            raise ValueError(f"{directory / name} is damaged (its SHA-256 is another): copy it again, or {_AGAIN}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


class _Kind(NamedTuple):
    """What a value must be."""

    name: str
    fits: Callable[[Any], bool]


_NUMBER = _Kind("a whole number", lambda value: type(value) is int and 0 <= value < 2**31)
_KINDS = {
    "precision": _Kind(f"one of {', '.join(PRECISIONS)}", lambda value: value in PRECISIONS),
    "mixes": _Kind("true or false", lambda value: isinstance(value, bool)),
    "eos_token_ids": _Kind(
        "a list of token ids", lambda value: isinstance(value, list) and all(map(_NUMBER.fits, value))
    ),
}


def _about(model: Any, file: Path) -> About:
    if not isinstance(model, dict):
        raise ValueError(f"{file}: model is {shorten(model)}, expected an object: {_AGAIN}")
    values: dict[str, Any] = {}
    for field in fields(About):
        value, kind = model.get(field.name), _KINDS.get(field.name, _NUMBER)
        if not kind.fits(value):
            raise ValueError(f"{file}: {field.name} is {shorten(value)}, expected {kind.name}: {_AGAIN}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    about = About(**values)
    sizes = ("layers", "kv_heads", "head_size", "hidden_size", "vocab_size", "num_heads", "draft_top_k")
    if empty := next((name for name in sizes if getattr(about, name) < 1), None):
        raise ValueError(f"{file}: {empty} is 0, expected at least 1: {_AGAIN}")
    return about


def _files(content: dict[str, Any], file: Path) -> dict[str, int]:
    listed = content.get("files")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{file}: files is {shorten(listed)}, expected the files of the export: {_AGAIN}")
    sizes = {}
    for name, entry in listed.items():
        if Path(name).name != name or not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise ValueError(
                f"{file}: found {shorten(name)}: {shorten(entry)}, expected a file and its bytes: {_AGAIN}"
            )
        sizes[name] = entry["bytes"]
    return sizes
