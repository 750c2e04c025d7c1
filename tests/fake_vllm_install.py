"""An interpreter with a package `vllm` that has the files and the entry point of one, and no engine.

Started as `python -m vllm.entrypoints.cli.main serve ...` it writes its arguments and what it imports to a file, says
`serving`, and waits for a signal.
"""

from __future__ import annotations

import sys
from pathlib import Path

MAIN = """
import json, os, pathlib, signal, sys

def end(number, frame):
    print("ended by", signal.Signals(number).name, flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, end)
import axolotl_medusa
said = {"arguments": sys.argv[1:], "package": axolotl_medusa.__file__, "path": sys.path, "pid": os.getpid()}
pathlib.Path(os.environ["FAKE_VLLM_OUT"]).write_text(json.dumps(said))
print("serving", flush=True)
while True:
    signal.pause()
"""


def fake_vllm(directory: Path, version: str = "0.32.0", *, classes: bool = True, medusa: bool = True) -> Path:
    """Writes the package and its interpreter; returns the interpreter."""
    site = directory / "site"
    package = site / "vllm"
    for name, wanted in (("custom_class_proposer", classes), ("medusa", medusa)):
        (package / "v1" / "spec_decode").mkdir(parents=True, exist_ok=True)
        if wanted:
            (package / "v1" / "spec_decode" / f"{name}.py").touch()
    (package / "entrypoints" / "cli").mkdir(parents=True, exist_ok=True)
    for folder in (package, package / "entrypoints", package / "entrypoints" / "cli"):
        (folder / "__init__.py").touch()
    (package / "entrypoints" / "cli" / "main.py").write_text(MAIN)
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    # Without the test's own environment: what it finds of this package, `serve` has put there.
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec {sys._base_executable} "$@"\n')
    python.chmod(0o755)
    return python
