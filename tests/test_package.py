"""What is published: a wheel with the package and its licence alone, which works where nothing else is installed."""

from __future__ import annotations

import email.message
import email.parser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import axolotl_medusa

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "axolotl_medusa"
NOT_COPIED = (
    ".*",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "data",
    "outputs",
    "last_run_prepared",
    "wandb",
    "model-out",
)
"""What tools and runs leave behind; git ignores most of it."""

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command that neither sees the package in this checkout nor a package index, and returns what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **OFFLINE}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with the source archive of a copy of this tree, and the wheel that is built from that archive."""
    folder = tmp_path_factory.mktemp("published")
    copy = folder / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=copy)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(published) -> Path:
    (file,) = published.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment with this wheel and no other package, not even pip."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    return folder / "bin"


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert [archive.read(name) for name in licences] == [(ROOT / "LICENSE").read_bytes()]
    sources = [path for path in PACKAGE.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert names == {str(path.relative_to(PACKAGE.parent)) for path in sources}


def test_source_archive_holds_no_tests_benchmarks_or_data(published):
    (file,) = published.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        inside = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    tops = {path.parts[0] for path in inside if path.parts}
    written_by_setuptools = {"PKG-INFO", "setup.cfg"}
    named = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "src"}
    assert tops - written_by_setuptools == named


def test_metadata_names_licence_and_authors_and_no_address(wheel):
    found = metadata(wheel)
    assert found["License-Expression"] == "Apache-2.0" and found.get_all("License-File") == ["LICENSE"]
    assert found["Author"] == "axolotl-medusa contributors"
    assert found["Version"] == axolotl_medusa.__version__ and found["Requires-Python"] == ">=3.11"
    assert not {"Home-page", "Project-URL", "Download-URL", "Author-email"} & set(found.keys())
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_version_stands_in_one_place(wheel):
    assert axolotl_medusa.__version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert metadata(wheel)["Version"] == axolotl_medusa.__version__


def test_quantized_models_come_with_all_that_they_need(wheel):
    needed = [line for line in metadata(wheel).get_all("Requires-Dist") if 'extra == "quantized"' in line]
    assert sorted(line.partition(";")[0].strip() for line in needed) == ["accelerate", "bitsandbytes"]


def test_environment_holds_this_package_alone(empty_environment, tmp_path):
    code = "import importlib.metadata as m; print(*(each.name for each in m.distributions()))"
    assert run(empty_environment / "python", "-c", code, cwd=tmp_path).split() == ["axolotl-medusa"]


def test_package_is_imported_in_an_empty_environment(empty_environment, tmp_path):
    code = "import axolotl_medusa as a; print(a.__file__, a.__version__)"
    file, version = run(empty_environment / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(empty_environment.parent) and version == axolotl_medusa.__version__


def test_command_explains_itself_in_an_empty_environment(empty_environment, tmp_path):
    command = empty_environment / "axolotl-medusa"
    assert run(command, "--version", cwd=tmp_path) == f"axolotl-medusa {axolotl_medusa.__version__}\n"
    overview = run(command, "--help", cwd=tmp_path)
    for name in ("export", "generate"):
        assert f"    {name} " in overview
        assert f"usage: axolotl-medusa {name}" in run(command, name, "--help", cwd=tmp_path)
