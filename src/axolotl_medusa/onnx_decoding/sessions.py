"""Graphs opened in ONNX Runtime, and its errors as one line.

Contract: the one module that imports onnxruntime.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from axolotl_medusa.errors import first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
"""What `--provider` takes, and ONNX Runtime's names."""

_PACKAGES = {"cuda": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
_ERRORS_ONLY = 3
_NO_OPERATOR = ("NOT_IMPLEMENTED", "is not a registered function/op", "Could not find an implementation")


def runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        RuntimeError: It is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RuntimeError(
            f"ONNX directories need onnxruntime ({first_line(error)}): pip install 'axolotl-medusa[onnx]'"
        ) from error


def check_provider(provider: str, precision: str) -> None:
    """Checks that a provider is here and computes in a precision.

    Raises:
        ValueError: There is no provider of that name, or it has no weights in 4-bit or 8-bit.
        RuntimeError: The installed onnxruntime does not have it.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}")
    if provider == "openvino" and precision != "fp32":
        raise ValueError(
            f"the OpenVINO provider has no operator for {precision} weights (MatMulNBits): export with --precision fp32, or use "
            "--provider cpu"
        )
    here = runtime().get_available_providers()
    if PROVIDERS[provider] not in here:
        names = ", ".join(name for name, full in PROVIDERS.items() if full in here)
        raise RuntimeError(
            f"this onnxruntime has no {provider} provider (it has {names}): pip install {_PACKAGES[provider]} in its place"
        )


def open_session(file: Path, provider: str = "cpu", threads: int | None = None) -> Any:
    """Opens a graph.

    Args:
        file: The `.onnx` file; its external data lie beside it.
        provider: A name in `PROVIDERS`; nothing falls back to another one.
        threads: Threads, by default one per core that this process may use.

    Raises:
        ValueError: The file is damaged.
        RuntimeError: The runtime lacks an operator or memory.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # The threads of the last graph would else spin on while the next one runs on the same cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = ort.InferenceSession(str(file), options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime raises a class of its own for every status
        reason = first_line(error)
        if any(sign in str(error) for sign in _NO_OPERATOR):
            raise RuntimeError(
                f"onnxruntime {ort.__version__} ({provider}) lacks an operator of {file}: {reason}; update it, or export "
                "with another --precision"
            ) from error
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            raise RuntimeError(f"{file} does not fit into memory: export with --precision int4") from error
        raise ValueError(f"{file} cannot be opened by onnxruntime {ort.__version__}: {reason}") from error
    if session.get_providers()[0] != PROVIDERS[provider]:  # onnxruntime only logs what it could not load
        raise RuntimeError(
            f"onnxruntime {ort.__version__} cannot use its {provider} provider here and would fall back to the CPU: see what it "
            "logged, or leave --provider out"
        )
    return session
