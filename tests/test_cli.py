"""The command: what reaches the package, what a user reads, and with which status it ends."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model
from training_outputs import save_base, write_run

import axolotl_medusa
from axolotl_medusa import cli
from axolotl_medusa.cli import COMMANDS, Command, main

USAGE = {
    "recipe": ["org/model"],
    "estimate": ["x.yml"],
    "export": ["out", "--to", "vllm", "--out", "dir"],
    "import": ["dir", "--to", "canonical", "--out", "other"],
    "push": ["dir", "--repo", "me/heads"],
    "evaluate": ["heads", "--prompts", "prompts.jsonl"],
    "tree": ["heads", "--calibration", "prompts.jsonl", "--out", "tree.json"],
    "calibrate": ["heads", "--prompts", "prompts.jsonl"],
    "generate": ["heads", "--prompt", "Hello"],
    "chat": ["heads"],
    "demo": ["heads"],
    "serve": ["out"],
    "plan": ["out"],
    "check-server": ["http://127.0.0.1:8000", "heads"],
    "doctor": [],
    "plot": ["out"],
    "report": ["out"],
    "completion": ["bash"],
}


@pytest.fixture
def calls(monkeypatch):
    """Replaces what the commands call; the calls are listed."""
    made: list[tuple] = []

    def recorded(name, result=None):
        def call(*args, **options):
            made.append((name, args, options))
            return result

        return call

    monkeypatch.setattr("axolotl_medusa.model.sources.find_source", recorded("find_source", "the source"))
    monkeypatch.setattr("axolotl_medusa.serving.export.export", recorded("export"))
    monkeypatch.setattr("axolotl_medusa.serving.import_heads.import_heads", recorded("import", ["one block, repeated"]))
    monkeypatch.setattr("axolotl_medusa.serving.push.push", recorded("push", "https://hub.invalid/me/heads"))
    return made


def test_export_passes_its_defaults(calls, capsys):
    assert main(["export", *USAGE["export"]]) == 0
    assert calls == [
        ("find_source", ("out", None), {}),
        ("export", ("the source", "vllm", "dir"), {"model": "none", "verify": True}),
    ]
    assert capsys.readouterr().out == "written to dir; its README.md has the command that serves it\n"


def test_export_passes_every_option(calls):
    options = ["--base-model", "org/model", "--model", "merged", "--no-verify"]
    assert main(["export", "out", "--to", "tgi", "--out", "dir", *options]) == 0
    assert calls == [
        ("find_source", ("out", "org/model"), {}),
        ("export", ("the source", "tgi", "dir"), {"model": "merged", "verify": False}),
    ]


def test_export_still_takes_the_name_that_model_had(calls, capsys, monkeypatch):
    arguments = ["export", "out", "--to", "tgi", "--out", "dir"]
    assert main([*arguments, "--backbone", "merged"]) == 0
    assert calls[-1][2]["model"] == "merged"
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "backbone" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--model", "all"])
    assert "argument --model: invalid choice: 'all'" in capsys.readouterr().err


@pytest.mark.parametrize("base_model", [None, "org/model"])
def test_import_prints_its_notes(base_model, calls, capsys):
    options = ["--base-model", base_model] if base_model else []
    assert main(["import", *USAGE["import"], *options]) == 0
    assert calls == [("import", ("dir", "other", base_model), {})]
    assert capsys.readouterr().out == "one block, repeated\nwritten to other\n"


@pytest.mark.parametrize("private", [False, True])
def test_push_prints_the_address(private, calls, capsys):
    assert main(["push", *USAGE["push"], *["--private"] * private]) == 0
    assert calls == [("push", ("dir", "me/heads"), {"private": private})]
    assert capsys.readouterr().out == "https://hub.invalid/me/heads\n"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
@pytest.mark.parametrize("command", COMMANDS)
def test_error_is_one_line_and_status_1(command, error, monkeypatch, capsys):
    def fail(_):
        raise error("found two,\n  expected one;\n do this")

    monkeypatch.setitem(COMMANDS, command, COMMANDS[command]._replace(run=fail))
    assert main([command, *USAGE[command]]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"axolotl-medusa {command}: error: found two, expected one; do this\n"
    assert captured.out == ""


def test_error_line_says_no_credentials(monkeypatch, capsys):
    def fail(_):
        raise OSError("cannot reach https://me:pass@host/x?token=abc")

    monkeypatch.setitem(COMMANDS, "push", COMMANDS["push"]._replace(run=fail))
    assert main(["push", *USAGE["push"]]) == 1
    assert capsys.readouterr().err == "axolotl-medusa push: error: cannot reach https://***@host/x?token=***\n"


def test_error_without_words_is_named(monkeypatch, capsys):
    def fail(_):
        raise PermissionError

    monkeypatch.setitem(COMMANDS, "push", COMMANDS["push"]._replace(run=fail))
    assert main(["push", *USAGE["push"]]) == 1
    assert capsys.readouterr().err == "axolotl-medusa push: error: PermissionError\n"


def test_defect_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise KeyError("a defect")

    monkeypatch.setitem(COMMANDS, "push", COMMANDS["push"]._replace(run=fail))
    with pytest.raises(KeyError):
        main(["push", *USAGE["push"]])


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "push", COMMANDS["push"]._replace(run=interrupt))
    assert main(["push", *USAGE["push"]]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["exprot"], "invalid choice: 'exprot'"),
        (["export", "out", "--out", "dir"], "the following arguments are required: --to"),
        (["export", "out", "--to", "sglang", "--out", "dir"], "invalid choice: 'sglang'"),
        (["export", "out", "--to", "vllm", "--out", "dir", "--model", "all"], "invalid choice: 'all'"),
        (["import", "dir", "--to", "vllm", "--out", "other"], "invalid choice: 'vllm'"),
        (["push", "dir"], "the following arguments are required: --repo"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # argparse breaks lines at hyphens
    for arguments, words in (
        (["--help"], COMMANDS),
        (["export", "--help"], ["fasterdecoding-legacy", "rtp-llm", "--no-verify", "--model"]),
        (["--version"], [axolotl_medusa.__version__]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_added_command_is_reached(monkeypatch, capsys):
    def add(parser):
        parser.add_argument("name")

    monkeypatch.setitem(COMMANDS, "greet", Command("greets", add, lambda options: print(f"hello {options.name}")))
    assert main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"


def run_module(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "axolotl_medusa", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def test_module_exports_a_run_from_disk_and_refuses_what_is_none(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    write_run(tmp_path / "run", make_model(), "medusa-1", base)
    done = run_module("export", "run", "--to", "vllm", "--out", "served", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written to served; its README.md has the command that serves it\n"
    card = (tmp_path / "served" / "README.md").read_text()
    assert f"vllm serve {base} --speculative-config" in card and "| 2 ahead (head 0) | 62.0% |" in card
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["num_heads"] == 3
    refused = run_module("export", "base", "--to", "vllm", "--out", "other", cwd=tmp_path)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("axolotl-medusa export: error: base has neither medusa_heads nor")
    assert "Traceback" not in refused.stderr and not (tmp_path / "other").exists()


def test_installed_command_is_the_same_function():
    text = (Path(axolotl_medusa.__file__).parents[2] / "setup.py").read_text()
    assert '"axolotl-medusa = axolotl_medusa.cli:main"' in text
    assert cli.main is main


def test_parsing_needs_nothing_large():
    code = "import sys; from axolotl_medusa.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "axolotl_medusa.serving.format_rules" in loaded
    assert not {"torch", "transformers", "safetensors", "axolotl", "peft", "huggingface_hub"} & set(loaded)


@pytest.mark.parametrize(
    ("logger", "message", "shown"),
    [
        ("torchao", "Failed to load /site/torchao/_C_mxfp8.so: Could not load this library", False),
        ("torchao", "torchao is too old", True),
        ("torch.utils._pytree", "<enum 'Kernel'> is an Enum subclass and is now natively supported", False),
        ("torch.utils._pytree", "registered twice", True),
        ("transformers", "Failed to load the model", True),
    ],
)
def test_what_importing_torchao_says_does_not_bother_users(logger, message, shown, monkeypatch, caplog):
    def run(options: argparse.Namespace) -> None:
        logging.getLogger(logger).warning("%s", message)

    monkeypatch.setitem(COMMANDS, "push", COMMANDS["push"]._replace(run=run))
    for _ in range(2):
        assert main(["push", "DIR", "--repo", "NAME"]) == 0
    assert (message in caplog.text) is shown
    assert len(logging.getLogger(logger).filters) <= 1
