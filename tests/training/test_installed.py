"""What an installed package changes in axolotl: nothing for a YAML without a `medusa_*` key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from axolotl.integrations import base
from conftest import AXOLOTL_YAML, PLUGIN
from training_outputs import save_base, write_run

from axolotl_medusa.training.installed import InstalledPlugin

ROOT = Path(__file__).parents[2]
finds_plugins = pytest.mark.skipif(
    not hasattr(base, "PLUGIN_ENTRY_POINT_GROUP"), reason="this axolotl does not look for installed plugins"
)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Path:
    """A folder with the metadata that an installation of this tree would have."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def installed(metadata, monkeypatch, validated):
    """Axolotl's way from a YAML to a config where this package is installed."""
    monkeypatch.syspath_prepend(str(metadata))
    base.reset_plugin_entry_points_cache()
    yield validated
    base.reset_plugin_entry_points_cache()


def yaml(**keys):
    return {**{key: value for key, value in AXOLOTL_YAML.items() if key != "plugins"}, **keys}


def registered() -> list[type]:
    return [type(plugin) for name, plugin in base.PluginManager.get_instance().plugins.items() if "medusa" in name]


@finds_plugins
def test_yaml_without_our_keys_is_validated_as_if_we_were_not_installed(installed, validated):
    with_us = dict(installed(yaml()))
    assert registered() == [InstalledPlugin]
    assert not [key for key in with_us if "medusa" in key] and not with_us.get("plugins")


@finds_plugins
def test_key_alone_brings_the_plugin_and_another_yaml_of_the_process_does_not_have_it(installed):
    from axolotl_medusa.training.plugin import MedusaPlugin

    cfg = installed(yaml(medusa_num_heads=3))
    assert cfg.plugins == [PLUGIN] and cfg.medusa_lm_head == "separate"
    assert registered() == [InstalledPlugin, MedusaPlugin]
    assert installed(yaml()).medusa_lm_head is None
    assert registered() == [InstalledPlugin]
    with pytest.raises(SystemExit, match="did you mean medusa_num_heads"):
        installed(yaml(medusa_num_haeds=3))


@finds_plugins
@pytest.mark.parametrize("name", [PLUGIN, PLUGIN.replace(".Medusa", ":Medusa")])
def test_plugin_that_the_yaml_names_is_registered_once(name, installed):
    from axolotl_medusa.training.plugin import MedusaPlugin

    assert installed(yaml(plugins=[name], medusa_num_heads=3)).medusa_num_heads == 3
    assert registered() == [InstalledPlugin, MedusaPlugin]


@finds_plugins
def test_plugin_that_cannot_be_imported_stops_a_yaml_with_our_keys_and_no_other(installed, monkeypatch):
    import axolotl_medusa

    monkeypatch.setitem(sys.modules, "axolotl_medusa.training.plugin", None)
    monkeypatch.delattr(axolotl_medusa.training, "plugin", raising=False)
    assert installed(yaml()).base_model == "org/model"
    with pytest.raises(RuntimeError, match="MedusaPlugin cannot be imported"):
        installed(yaml(medusa_num_heads=3))


def test_axolotl_medusa_is_the_same_command(metadata, tmp_path, model_factory):
    """`axolotl medusa export`, as axolotl's own command line runs it."""
    base_model = save_base(tmp_path / "base", model_factory())
    write_run(tmp_path / "run", model_factory(), "medusa-1", base_model)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(metadata), os.environ.get("PYTHONPATH", "")])}

    def axolotl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "axolotl.cli.main", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = axolotl("medusa", "export", "run", "--to", "vllm", "--out", "served")
    assert done.returncode == 0, done.stderr
    assert "written to served" in done.stdout and (tmp_path / "served" / "config.json").is_file()
    refused = axolotl("medusa", "export", "base", "--to", "vllm", "--out", "other")
    assert refused.returncode == 1 and "axolotl medusa export: error: base has neither" in refused.stderr
