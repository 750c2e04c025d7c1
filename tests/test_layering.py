"""Which room may import which: dependencies point one way, and only the training room needs axolotl."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import axolotl_medusa
import axolotl_medusa.training

PACKAGE = Path(axolotl_medusa.__file__).parent
MAY_IMPORT = {
    "model": set(),
    "losses": set(),
    "serving": {"model"},
    "decoding": {"model"},
    "onnx_decoding": {"decoding", "model"},
    "onnx_export": {"decoding", "model", "onnx_decoding", "serving"},
    "training": {"losses", "measuring", "model"},  # measuring draws the log of a run, when it ends
    "estimating": {"losses", "model", "training"},
    "recipes": {"estimating", "model", "serving"},
    "doctor": {"model", "serving"},
    "measuring": {"decoding", "model", "onnx_decoding"},
    "live": {"decoding", "measuring", "model", "serving"},
    "terminal": {"decoding", "live", "measuring", "model", "onnx_decoding", "serving"},
    "reporting": {"decoding", "measuring", "model", "terminal"},
}
"""What the modules of a room may import of ours, inside functions too: their own room and these."""

FOR_ALL = {"errors", "cpu_instructions"}
"""Modules beside the rooms that know nothing of ours; every room may import them."""

USES_AXOLOTL = {
    "training.installed",
    "training.interruptions",
    "training.axolotl_versions",
    "training.loading",
    "training.lora_kernels",
    "training.plots_at_the_end",
    "training.plugin",
    "training.renderable_chats",
    "training.rendering",
    "training.resuming",
    "training.saving",
    "training.trainable",
    "training.trainer",
    "training.vocabulary",
}
LAZY = {"__init__", "cli"}
"""Modules that import ours only inside functions."""

INSTALLED = {"numpy", "pydantic", "safetensors", "torch", "transformers"}
"""What `install_requires` brings, numpy with transformers; anything else must be imported where it is used."""

STAYS_LIGHT = {
    "decoding.acceptance",
    "decoding.arrays",
    "decoding.auto_steps",
    "decoding.library_errors",
    "decoding.running_rows",
    "decoding.tree",
    "decoding.tree_chooser",
    "doctor.command",
    "doctor.machine",
    "doctor.versions",
    "errors",
    "estimating.plan",
    "estimating.sizes",
    "live.advice",
    "live.chain",
    "live.counters",
    "live.load",
    "live.plan",
    "live.server",
    "measuring.onnx_runs",
    "measuring.onnx_tuning",
    "measuring.plots",
    "measuring.training_plots",
    "measuring.tree_search",
    "model.checkpoints",
    "model.file_names",
    "model.safe_paths",
    "model.json_files",
    "model.secrets",
    "model.wrapped_names",
    "cpu_instructions",
    "recipes.choices",
    "recipes.command",
    "recipes.commands_around",
    "recipes.model_facts",
    "recipes.yaml_text",
    "reporting.coloured_text",
    "reporting.command",
    "reporting.found_files",
    "reporting.page",
    "reporting.svg",
    "serving.chat_templates",
    "serving.draft_plan",
    "serving.export_files",
    "serving.format_rules",
    "serving.head_names",
    "serving.model_card",
    "serving.push",
    "onnx_decoding.decoding",
    "onnx_decoding.directory",
    "onnx_decoding.graph_names",
    "onnx_decoding.heads",
    "onnx_decoding.onnx_medusa",
    "onnx_decoding.sessions",
    "onnx_decoding.target",
    "onnx_decoding.tokenizer",
    "onnx_export.card",
    "serving.vllm_install",
    "terminal.chat",
    "terminal.completion",
    "terminal.default_prompts",
    "terminal.help_texts",
    "terminal.onnx_commands",
    "terminal.outputs",
    "terminal.prompts",
    "terminal.reports",
    "terminal.server_arguments",
    "training.args",
    "training.datasets",
    "training.learning_rates",
    "training.named_files",
    "training.yaml_problems",
    "training.refused_keys",
    "training.renamed_keys",
    "training.schedule",
}
"""Modules that import neither torch nor transformers when they are imported."""

MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for path in PACKAGE.rglob("*.py")
    if path.parent == PACKAGE or path.name != "__init__.py"
)


def imports(module: str, *, at_import: bool = False) -> Iterator[str]:
    """Full names that a module of ours imports; `at_import`: only those that run when it is imported."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
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


def ours(module: str, **options: bool) -> set[str]:
    """Modules of ours that a module imports, as `room.module`."""
    found = set()
    for name in imports(module, **options):
        parts = name.removeprefix("axolotl_medusa.").split(".")
        if name.startswith("axolotl_medusa."):
            found |= {".".join(parts[:length]) for length in (1, 2)} & set(MODULES)
    return found - {"__init__"}


def room(module: str) -> str:
    """The room of a module, empty for those beside the rooms."""
    return module.rpartition(".")[0]


def test_every_module_is_in_a_room_one_level_deep():
    assert {room(module) for module in MODULES} == {"", *MAY_IMPORT}
    assert {module for module in MODULES if not room(module)} == {
        "__init__",
        "__main__",
        "cli",
        "vllm_drafter",
    } | FOR_ALL


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_module_imports_of_ours_only_what_its_room_may(module):
    allowed = {room(module), *MAY_IMPORT[room(module)]}
    assert {room(name) or name for name in ours(module)} <= allowed | FOR_ALL


@pytest.mark.parametrize("module", sorted(FOR_ALL))
def test_module_that_every_room_may_import_knows_nothing_of_ours(module):
    assert not ours(module)


@pytest.mark.parametrize("module", sorted(LAZY))
def test_command_and_package_import_ours_inside_functions(module):
    assert not ours(module, at_import=True)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_axolotl_only_in_the_training_room(module):
    uses_axolotl = any(name.split(".")[0] == "axolotl" for name in imports(module))
    assert uses_axolotl == (module in USES_AXOLOTL)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_optional_when_it_is_imported(module):
    allowed = set(sys.stdlib_module_names) | {"axolotl_medusa"}
    allowed |= set() if module in LAZY else INSTALLED
    allowed |= {"axolotl", "jinja2"} if module in USES_AXOLOTL else set()  # axolotl brings it
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


def test_modules_outside_the_training_room_work_without_axolotl():
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
import axolotl_medusa.training
for name in {modules}:
    importlib.import_module("axolotl_medusa." + name)
from axolotl_medusa import MedusaHeads, MedusaModel
assert "axolotl" not in sys.modules
import torch
print(MedusaHeads(4, 8, 2).hidden(0, torch.ones(1, 4)).tolist(), MedusaModel.__name__)
try:
    axolotl_medusa.MedusaPlugin
except RuntimeError as error:
    print(error)
"""
    )
    hidden, error = output.splitlines()
    assert hidden == "[[1.0, 1.0, 1.0, 1.0]] MedusaModel"
    assert error.startswith(
        "axolotl_medusa.MedusaPlugin cannot be imported, check the environment: No module named axolotl"
    )


def test_drafter_works_without_transformers_and_axolotl():
    """vLLM imports it by its public name; vLLM itself is imported when it builds the drafter."""
    output = run(
        """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("axolotl", "peft", "pydantic", "transformers", "vllm"):
            raise ImportError("No module named " + name)

sys.meta_path.insert(0, Blocker())
from axolotl_medusa.vllm_drafter import MedusaDrafter
print(MedusaDrafter.__name__)
"""
    )
    assert output.strip() == "MedusaDrafter"


def test_importing_the_package_alone_loads_nothing_large():
    loaded = run("import sys, axolotl_medusa; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "axolotl_medusa" in loaded
    assert not {"axolotl", "peft", "pydantic", "safetensors", "torch", "transformers"} & set(loaded)


def test_public_names_are_those_that_the_package_lists():
    assert set(axolotl_medusa.__all__) <= set(dir(axolotl_medusa))
    for name in axolotl_medusa.__all__:
        assert getattr(axolotl_medusa, name) is not None


@pytest.fixture
def broken_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl_medusa.training.plugin", None)  # importing it raises ImportError
    monkeypatch.delattr(axolotl_medusa.training, "plugin", raising=False)


def test_plugin_that_cannot_be_imported_is_a_runtime_error(broken_plugin):
    with pytest.raises(
        RuntimeError, match=r"axolotl_medusa.MedusaPlugin cannot be imported, check the environment"
    ) as error:
        _ = axolotl_medusa.MedusaPlugin
    assert isinstance(error.value.__cause__, ImportError)
    with pytest.raises(RuntimeError):
        from axolotl_medusa import MedusaPlugin  # noqa: F401


def test_axolotl_stops_at_a_plugin_that_cannot_be_imported(broken_plugin, monkeypatch):
    """Axolotl swallows an ImportError inside a plugin and would train on without heads."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)())
    with pytest.raises(RuntimeError, match="MedusaPlugin cannot be imported"):
        prepare_plugins(DictDefault(plugins=["axolotl_medusa.MedusaPlugin"]))


def test_plugin_is_axolotls_and_other_names_are_attribute_errors():
    from axolotl.integrations.base import BasePlugin

    assert issubclass(axolotl_medusa.MedusaPlugin, BasePlugin)
    with pytest.raises(AttributeError, match="has no attribute 'MedusaPlugins'"):
        _ = axolotl_medusa.MedusaPlugins
