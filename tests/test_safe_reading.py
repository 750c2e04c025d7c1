"""No call of ours runs what a file says: neither pickled code, nor YAML's tags, nor an archive's own paths."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "data_generation", "demo", "benchmarks", "docs")

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "shutil.unpack_archive"}
UNSAFE_METHODS = {"extractall", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "read_pickle"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}
ERRORS_ALONE = {"pickle.UnpicklingError", "pickle.PickleError"}
"""What may be had of pickle: the names of what others raise."""


def _names(tree: ast.AST) -> dict[str, str]:
    """What names of a module stand for: `{"load": "torch.load"}` after `from torch import load`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return names.get(first, first) + dot + rest


def _unsafe_call(call: ast.Call, names: dict[str, str]) -> bool:
    function = _full_name(call.func, names)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    method = function.rpartition(".")[2]
    if function == "torch.load":
        return given.get("weights_only") != "True"
    if function in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        return loader.rpartition(".")[2] not in SAFE_LOADERS
    if function in ("numpy.load", "np.load"):
        return given.get("allow_pickle", "False") != "False"
    return function in UNSAFE_CALLS or method in UNSAFE_METHODS or given.get("shell", "False") != "False"


def unsafe_reads(code: str) -> Iterator[int]:
    """The lines of a module that may run what a file says."""
    tree = ast.parse(code)
    names = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = _full_name(node, names)
            if name.partition(".")[0] in UNSAFE_MODULES and name not in ERRORS_ALONE:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE_MODULES:
            if not {f"{node.module}.{alias.name}" for alias in node.names} <= ERRORS_ALONE:
                yield node.lineno
        elif isinstance(node, ast.Call) and _unsafe_call(node, names):
            yield node.lineno


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import torch as t\nt.load(file)",
        "from torch import load as read\nread(file)",
        "import pickle\npickle.load(file)",
        "from pickle import Unpickler\nUnpickler(file)",
        "import pickle as p\np.loads(text)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "import tarfile\ntarfile.open(file).extractall()",
        "import shutil\nshutil.unpack_archive(file)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_call_that_may_run_what_a_file_says_is_found(code):
    assert list(unsafe_reads(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(file, weights_only=True, mmap=True)",
        "import yaml\nyaml.load(text, yaml.CSafeLoader)\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)",
        "import pickle\ntry:\n    read()\nexcept pickle.UnpicklingError:\n    raise",
        "model.eval()",
        "import re\nre.compile('x')",
    ],
)
def test_other_calls_are_not(code):
    assert list(unsafe_reads(code)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_of_ours_may_run_what_a_file_says(folder):
    files = list((ROOT / folder).rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in files for line in unsafe_reads(file.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert files
