"""One line for whatever a library raises about the files of a model, an adapter or a tokenizer, or what it misses for them.

Contract: imports none of these libraries. Damaged files are a `ValueError`, a missing package or too little memory a
`RuntimeError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from axolotl_medusa.errors import LONGEST

_INSTALL = re.compile(r"pip install (?:-U |--upgrade )?['\"]?([A-Za-z][\w.-]*(?:\[[\w,-]+\])?)")
_TOKENIZER_PACKAGES = ("sentencepiece", "tiktoken", "protobuf")
"""What transformers asks for without the command that installs it."""
_IMPORTED_AS = {"protobuf": "google.protobuf"}
_AGAIN = "get its files again, or update transformers"
_OWN_TROUBLE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
"""Errors of a library that did not expect what it read: their text alone says little."""


class OwnCodeError(ValueError):
    """A model brings code, and nobody said that it may be run."""


@contextlib.contextmanager
def one_line_for(files: str | Path, problem: str, advice: str = _AGAIN) -> Iterator[None]:
    """Turns what transformers, peft, tokenizers and jinja2 raise while they read `files` into one line.

    Args:
        files: The directory or Hub name that is read.
        problem: What the line says about it, such as "cannot be loaded".
        advice: What to do about damaged files.

    Raises:
        OwnCodeError: transformers refused to run code that the model brings.
        ValueError: The files are damaged.
        RuntimeError: A package is missing, or the memory is too small.
    """
    try:
        yield
    except OwnCodeError:
        raise
    except Exception as error:  # tokenizers raises bare ones, safetensors and peft their own
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise OwnCodeError(
                f"{files} brings code of its own, which is run only if you say so: read it, then add --trust-remote-code (in "
                "Python trust_remote_code=True)"
            ) from error
        if package := _missing_package(error):
            raise RuntimeError(f"{files} {problem}: {_one_line(error)}; pip install {package}") from error
        if isinstance(error, MemoryError) or re.search("allocate memory|out of memory|bad_alloc", str(error)):
            raise RuntimeError(
                f"{files} does not fit into memory ({_one_line(error)}): close other programs, or load it with --dtype bf16 or "
                "--load-in-4bit"
            ) from error
        raise ValueError(f"{files} {problem}: {_one_line(error)}; {advice}") from error


def _missing_package(error: Exception) -> str | None:
    """The package that is to be installed, None where the error is about something else."""
    text = str(error)
    named = next((name for name in _TOKENIZER_PACKAGES if name in text.lower() and not _is_there(name)), None)
    if not isinstance(error, ImportError):
        return named if isinstance(error, ValueError) else None
    command = _INSTALL.search(text)
    return command[1].rstrip(".") if command else named or (error.name or "transformers").partition(".")[0]


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(_IMPORTED_AS.get(package, package)) is not None
    except (ImportError, ValueError):  # its parent is missing, or it is blocked
        return False


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if not text or isinstance(error, _OWN_TROUBLE):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return "".join(mark if mark.isprintable() else "?" for mark in text[:LONGEST])
