"""Which module imports which: dependencies point one way, and only the plugin and the trainer need axolotl."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import axolotl_medusa

PACKAGE = Path(axolotl_medusa.__file__).parent
EVERY = {
    "acceptance",
    "args",
    "backbone",
    "calibration",
    "chat",
    "chat_prompts",
    "checkpoint",
    "cli_decoding",
    "compiled",
    "data",
    "decoding",
    "errors",
    "evaluate",
    "export",
    "formats",
    "generate",
    "heads",
    "hidden_cache",
    "import_heads",
    "load_decoder",
    "load_target",
    "lora",
    "loss",
    "model_card",
    "objective",
    "plain_decoding",
    "plots",
    "plugin",
    "push",
    "quality",
    "race",
    "sources",
    "step_times",
    "tensor_files",
    "trainer",
    "training_plots",
    "tree",
    "tree_attention",
    "tree_search",
    "tree_tuning",
    "verify_export",
}
MAY_IMPORT = {
    "__init__": {"plugin"},
    "args": set(),
    "errors": set(),
    "processor": set(),
    "heads": set(),
    "loss": set(),
    "data": set(),
    "tree": set(),
    "closed_form": {"loss"},
    "host_memory": set(),
    "chunked_loss": {"closed_form", "host_memory", "loss", "processor"},
    "objective": {"chunked_loss", "closed_form", "heads", "loss"},
    "checkpoint": {"heads", "tensor_files"},
    "hidden_cache": {"checkpoint", "heads", "loss", "tensor_files"},
    "trainer": {"args", "checkpoint", "chunked_loss", "data", "heads", "hidden_cache", "loss", "objective"},
    "plugin": {"args", "checkpoint", "data", "heads", "objective", "trainer"},
    "tensor_files": set(),
    "formats": set(),
    "sources": {"checkpoint", "heads", "tensor_files"},
    "lora": {"sources", "tensor_files"},
    "backbone": {"lora", "sources", "tensor_files"},
    "import_heads": {"backbone", "checkpoint", "formats", "heads", "sources", "tensor_files"},
    "model_card": set(),
    "verify_export": {"heads"},
    "export": {"backbone", "checkpoint", "formats", "model_card", "sources", "tensor_files", "verify_export"},
    "push": set(),
    "tree_search": {"tree"},
    "acceptance": {"tree"},
    "compiled": {"errors", "heads"},
    "tree_attention": {"acceptance", "compiled", "errors", "heads", "tree"},
    "decoding": {"acceptance", "compiled", "tree", "tree_attention"},
    "load_target": {"backbone", "checkpoint", "errors", "heads", "sources"},
    "generate": {"acceptance", "compiled", "decoding", "heads", "load_target", "tree", "tree_attention"},
    "chat_prompts": set(),
    "plots": set(),
    "training_plots": {"plots"},
    "quality": {"heads"},
    "plain_decoding": {"heads"},
    "load_decoder": {"errors", "generate", "sources"},
    "chat": {"chat_prompts", "decoding", "generate", "tree"},
    "race": {"generate", "heads", "plain_decoding", "step_times", "tree"},
    "step_times": {"generate", "heads", "plain_decoding", "tree"},
    "calibration": {"generate", "heads", "tree", "tree_search"},
    "evaluate": {"calibration", "decoding", "generate", "heads", "plain_decoding", "processor", "step_times", "tree"},
    "tree_tuning": {"calibration", "evaluate", "generate", "step_times", "tree", "tree_search"},
    "cli_decoding": EVERY,
    "cli": EVERY,
    "__main__": {"cli"},
}
"""What each module may import of ours, inside functions too. Nothing but `__main__` may import `cli`."""

USES_AXOLOTL = {"plugin", "trainer"}
LAZY = {"__init__", "cli"}
"""Modules that import ours only inside functions."""

INSTALLED = {"pydantic", "safetensors", "torch", "transformers"}
"""What `install_requires` brings; anything else must be imported where it is used."""

STAYS_LIGHT = {
    "args",
    "chat_prompts",
    "data",
    "formats",
    "model_card",
    "plots",
    "processor",
    "push",
    "training_plots",
    "tree",
    "tree_search",
}
"""Modules that import neither torch nor transformers when they are imported."""


def imports(module: str, *, at_import: bool = False) -> Iterator[str]:
    """Full names that a module of ours imports; `at_import`: only those that run when it is imported."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if at_import:
        later = [
            node
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
        skipped = {id(inner) for node in later for inner in ast.walk(node)}
        nodes = [node for node in nodes if id(node) not in skipped]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, ["axolotl_medusa" if node.level else "", node.module]))
            yield from (f"{source}.{alias.name}" for alias in node.names)


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def ours(module: str, **options: bool) -> set[str]:
    names = {name.split(".")[1] for name in imports(module, **options) if name.startswith("axolotl_medusa.")}
    return names & ({*MODULES} - {"__init__"})


def test_every_module_has_its_place_in_the_layout():
    assert set(MODULES) <= set(MAY_IMPORT)
    assert {"args", "plugin", "heads", "loss", "objective", "trainer", "checkpoint", "data"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_of_ours_only_what_the_layout_says(module):
    assert ours(module) <= MAY_IMPORT[module]
    assert not (module in LAZY and ours(module, at_import=True))


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_axolotl_only_in_plugin_and_trainer(module):
    uses_axolotl = any(name.split(".")[0] == "axolotl" for name in imports(module))
    assert uses_axolotl == (module in USES_AXOLOTL)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_optional_when_it_is_imported(module):
    allowed = set(sys.stdlib_module_names) | {"axolotl_medusa"}
    allowed |= set() if module in LAZY else INSTALLED
    allowed |= {"axolotl"} if module in USES_AXOLOTL else set()
    allowed -= {"torch", "transformers", "safetensors"} if module in STAYS_LIGHT else set()
    assert {name.split(".")[0] for name in imports(module, at_import=True)} <= allowed


def test_imports_of_the_modules_have_no_circle():
    done: set[str] = set()
    while waiting := set(MODULES) - done - {"__init__"}:
        ready = {module for module in waiting if ours(module) <= done}
        assert ready, f"circle among {sorted(waiting)}"
        done |= ready


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_modules_other_than_plugin_and_trainer_work_without_axolotl():
    modules = [name for name in MODULES if name not in (*USES_AXOLOTL, "__init__", "__main__")]
    output = run(
        f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "axolotl":
            raise ImportError("No module named " + name)

sys.meta_path.insert(0, Blocker())
import axolotl_medusa
for name in {modules}:
    importlib.import_module("axolotl_medusa." + name)
assert "axolotl" not in sys.modules
from axolotl_medusa.heads import MedusaHeads
import torch
print(MedusaHeads(4, 8, 2).hidden(0, torch.ones(1, 4)).tolist())
try:
    axolotl_medusa.MedusaPlugin
except RuntimeError as error:
    print(error)
"""
    )
    hidden, error = output.splitlines()
    assert hidden == "[[1.0, 1.0, 1.0, 1.0]]"
    assert error.startswith(
        "axolotl_medusa.MedusaPlugin cannot be imported, check the environment: No module named axolotl"
    )


def test_importing_the_package_alone_loads_nothing_large():
    loaded = run("import sys, axolotl_medusa; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "axolotl_medusa" in loaded
    assert not {"axolotl", "peft", "pydantic", "safetensors", "torch", "transformers"} & set(loaded)


@pytest.fixture
def broken_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl_medusa.plugin", None)  # importing it raises ImportError
    monkeypatch.delattr(axolotl_medusa, "plugin", raising=False)


def test_plugin_that_cannot_be_imported_is_a_runtime_error(broken_plugin):
    with pytest.raises(
        RuntimeError, match=r"axolotl_medusa.MedusaPlugin cannot be imported, check the environment"
    ) as error:
        _ = axolotl_medusa.MedusaPlugin
    assert isinstance(error.value.__cause__, ImportError)
    with pytest.raises(RuntimeError):
        from axolotl_medusa import MedusaPlugin  # noqa: F401


def test_axolotl_stops_at_a_plugin_that_cannot_be_imported(broken_plugin):
    """Axolotl swallows an ImportError inside a plugin and would train on without heads."""
    from axolotl.integrations.base import PluginManager

    with pytest.raises(RuntimeError, match="MedusaPlugin cannot be imported"):
        PluginManager.get_instance().register("axolotl_medusa.MedusaPlugin")


def test_plugin_is_axolotls_and_other_names_are_attribute_errors():
    from axolotl.integrations.base import BasePlugin

    assert issubclass(axolotl_medusa.MedusaPlugin, BasePlugin)
    with pytest.raises(AttributeError, match="has no attribute 'MedusaPlugins'"):
        _ = axolotl_medusa.MedusaPlugins
