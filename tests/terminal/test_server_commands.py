"""`serve` as a process: what it prints, what it becomes, and how a signal reaches vLLM."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exports import trained
from fake_vllm import fake_vllm

import axolotl_medusa

PACKAGE = Path(axolotl_medusa.__file__).resolve().parent


def serve_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "axolotl_medusa", "serve", *map(str, arguments)]


def test_serve_becomes_vllm_and_a_signal_ends_it(tmp_path):
    trained(tmp_path)
    python, out = fake_vllm(tmp_path / "vllm"), tmp_path / "said.json"
    command = serve_command(tmp_path / "run", "--vllm-python", python, "--port", 8001, "--dtype", "float32")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["FAKE_VLLM_OUT"] = str(out)
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": PACKAGE.parent}
    with subprocess.Popen(command, **options) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.readline()
            assert process.stdout.readline() == "serving\n"
            said = json.loads(out.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 7
            assert process.stdout.read() == "ended by SIGTERM\n"
        finally:
            process.kill()
    assert said["pid"] == process.pid, "it is this very process, so that supervisors see vLLM"
    words = shlex.split(printed)
    assert words[0].startswith("PYTHONPATH=") and words[1] == str(python)
    assert words[words.index("serve") :] == said["arguments"]
    assert said["arguments"][:2] == ["serve", str(tmp_path / "base")]
    assert said["arguments"][-4:] == ["--port", "8001", "--dtype", "float32"]
    assert Path(said["package"]).resolve().parent == PACKAGE
    assert not any("site-packages" in part and str(Path(sys.prefix)) in part for part in said["path"])


def test_dry_run_prints_alone(tmp_path):
    trained(tmp_path, "medusa-2", adapter={"targets": ["q_proj"]})
    python = fake_vllm(tmp_path / "vllm", "0.33.0", medusa=False)
    command = serve_command(tmp_path / "run", "--dry-run", "--vllm-python", python, "--", "--port", 8001)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert '"method": "custom_class"' in line and line.endswith("--port 8001")
    assert f"will first be merged into {tmp_path / 'run-served'}" in done.stderr
    assert not (tmp_path / "run-served").exists()


def test_vllm_that_is_missing_is_one_line(tmp_path, capsys):
    from axolotl_medusa.cli import main

    trained(tmp_path)
    assert main(["serve", str(tmp_path / "run"), "--vllm-python", sys._base_executable]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("install vllm, or name another --vllm-python\n") and "Traceback" not in captured.err


def test_options_of_vllm_are_no_options_of_other_commands(capsys):
    from axolotl_medusa.cli import main

    with pytest.raises(SystemExit):
        main(["plot", "out", "--port", "8001"])
    assert "unrecognized arguments: --port 8001" in capsys.readouterr().err
