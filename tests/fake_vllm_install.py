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


SERVER = """
import json, os, pathlib, sys
sys.path.append({tests!r})
from fake_streaming import Streaming

def option(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None

speculative, additional = (json.loads(option(name) or "{{}}") for name in ("--speculative-config", "--additional-config"))
if option("--fails"):
    print("Traceback ...")
    print("RuntimeError:", option("--fails"))
    sys.exit(3)
drafts = speculative.get("num_speculative_tokens")
with pathlib.Path(os.environ["FAKE_VLLM_OUT"]).open("a") as started:
    started.write(json.dumps([speculative, additional, os.getpid()]) + "\\n")
record = additional.get("medusa_record")
if record:
    head = {{"edges": [0.0, 0.5, 1.0], "acceptance": [0.2, 0.8], "drafts": [3, 4]}}
    calibration = {{"format": 1, "heads": [head] * drafts}}
    plan = {{"format": 1, "step_s": {{str(1 + drafts): 0.1 * drafts, "64": 1.0 + drafts}}, "heads_s": {{str(drafts): 0.01}}}}
    pathlib.Path(record, "draft_calibration.json").write_text(json.dumps(calibration))
    pathlib.Path(record, "plan.json").write_text(json.dumps(plan))
Streaming(int(option("--port")), tokens=4, token_s=0.004 / (1 + (drafts or 0)), drafts=drafts).serve_forever()
"""
"""Serves in `fake_streaming`, the faster the more it drafts, and records as our drafter does."""


def fake_vllm(
    directory: Path,
    version: str = "0.32.0",
    *,
    classes: bool = True,
    medusa: bool = True,
    main: str = MAIN,
    name: str = "vllm",
) -> Path:
    """Writes the package and its interpreter; returns the interpreter."""
    site = directory / "site"
    package = site / "vllm"
    for module, wanted in (("custom_class_proposer", classes), ("medusa", medusa)):
        (package / "v1" / "spec_decode").mkdir(parents=True, exist_ok=True)
        if wanted:
            (package / "v1" / "spec_decode" / f"{module}.py").touch()
    (package / "entrypoints" / "cli").mkdir(parents=True, exist_ok=True)
    for folder in (package, package / "entrypoints", package / "entrypoints" / "cli"):
        (folder / "__init__.py").touch()
    (package / "entrypoints" / "cli" / "main.py").write_text(
        main.format(tests=str(Path(__file__).parent)) if main is SERVER else main
    )
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    # Without the test's own environment: what it finds of this package, `serve` has put there.
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec {sys._base_executable} "$@"\n')
    python.chmod(0o755)
    return python
