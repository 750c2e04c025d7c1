"""The cloud files: axolotl's own class reads Modal's, and the commands of the SkyPilot task exist and hang together."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from example_files import FOLDER, ROOT

import generate
from axolotl_medusa.cli import main
from parts.command_line import parse_flags

MODAL = FOLDER / "cloud" / "modal.yml"
TASK = yaml.safe_load((FOLDER / "cloud" / "skypilot.yml").read_text(encoding="utf-8"))
COMMANDS = [shlex.split(line, comments=True) for line in TASK["run"].replace("\\\n", " ").splitlines()]

FIELDS_OF_A_TASK = {"name", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
"""Of those that SkyPilot knows: the ones that are used."""


@pytest.fixture
def no_modal(monkeypatch):
    """Stands for Modal's service and for `docker`: what axolotl asks for is kept, nothing is sent."""
    import modal

    asked = {}
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: b'{"manifests": [{"digest": "sha256:0"}]}')
    monkeypatch.setattr(modal.App, "function", lambda _app, **options: asked.update(options))
    return asked


def test_axolotl_reads_the_cloud_file_for_modal(no_modal, monkeypatch, tmp_path):
    from axolotl.cli.cloud import load_cloud_cfg
    from axolotl.cli.cloud.modal_ import ModalCloud

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = load_cloud_cfg(MODAL)
    assert cfg.provider == "modal"
    cloud = ModalCloud(cfg)
    cloud.get_train_env({"/workspace/mounts": str(tmp_path)})
    assert no_modal["gpu"] == "H100:8"
    assert no_modal["timeout"] == 86400 and no_modal["memory"] == 256 * 1024
    assert set(no_modal["volumes"]) == {"/workspace/data", "/workspace/artifacts"}
    assert len(no_modal["secrets"]) == 1
    assert cloud.get_env()["PYTHONPATH"] == "/workspace/mounts/src"
    assert (ROOT / "src" / "axolotl_medusa" / "__init__.py").is_file() and not (ROOT / "src" / "axolotl").exists()


def test_every_key_of_the_cloud_file_is_one_that_axolotl_reads():
    import axolotl.cli.cloud as clouds
    from axolotl.cli.cloud import modal_

    source = Path(modal_.__file__).read_text(encoding="utf-8") + Path(clouds.__file__).read_text(encoding="utf-8")
    for key in yaml.safe_load(MODAL.read_text(encoding="utf-8")):
        assert re.search(rf"(config|cloud_cfg)\.{key}\b|config\.get\(\"{key}\"", source), key


def test_skypilot_task_has_fields_that_are_known_and_shell_that_is_sound():
    assert set(TASK) == FIELDS_OF_A_TASK
    for script in (TASK["setup"], TASK["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def arguments_of(*command: str) -> list[str]:
    """What follows a command in the task."""
    (found,) = [line[len(command) :] for line in COMMANDS if line[: len(command)] == list(command)]
    return found


def test_skypilot_task_asks_generate_for_what_it_knows():
    settings = parse_flags(generate.Settings, None, arguments_of("python", "data_generation/generate.py"))
    settings.check()
    assert settings.chat and (ROOT / settings.data_path).is_file()
    assert settings.output_path == Path("/medusa/answers.jsonl")


def test_skypilot_task_trains_the_example_on_the_answers_and_keeps_what_it_writes(tmp_path):
    """The task's own `sed` on the example: each of its changes finds what it changes."""
    lines = TASK["run"].replace("\\\n", " ").splitlines()
    edit = "\n".join(line for line in lines if line.strip().startswith(("sed ", "echo ")))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    subprocess.run(["bash", "-e", "-c", edit], cwd=tmp_path, check=True)
    cfg = yaml.safe_load((tmp_path / "train.yml").read_text(encoding="utf-8"))
    assert cfg["datasets"][0]["path"] == "/medusa/answers.jsonl"
    assert cfg["output_dir"] == "/medusa/out" and cfg["auto_resume_from_checkpoints"] is True
    assert cfg["base_model"] == TASK["envs"]["MODEL"]
    assert arguments_of("axolotl", "train")[:4] == ["train.yml", "--launcher", "torchrun", "--"]


def test_skypilot_task_exports_with_options_that_exist(capsys):
    arguments = arguments_of("axolotl-medusa", "export")
    assert arguments[0] == "/medusa/out"
    with pytest.raises(SystemExit) as stop:  # read as they stand; the directory is not here
        raise SystemExit(main(["export", *arguments]))
    assert stop.value.code == 1 and "/medusa/out" in capsys.readouterr().err
