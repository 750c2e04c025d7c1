"""What axolotl loads wherever this package is installed: brings the plugin to YAMLs that have a `medusa_*` key.

Contract: does nothing for any other YAML, and imports nothing of ours before a key is there. Axolotl finds it by the entry
point `axolotl.plugins`; versions that do not look there need the line `plugins: [axolotl_medusa.MedusaPlugin]`.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault

PLUGIN = "axolotl_medusa.MedusaPlugin"


class InstalledPlugin(BasePlugin):  # type: ignore[misc]
    """Registers `MedusaPlugin` as if the YAML had named it, where the YAML has one of its keys and does not."""

    def register(self, cfg: DictDefault) -> None:
        """Brings the plugin in, or takes out the one that an earlier YAML of this process brought."""
        plugins = list(cfg.get("plugins") or [])
        if PLUGIN in (str(name).replace(":", ".") for name in plugins):
            return
        manager = PluginManager.get_instance()
        if not any(str(key).startswith("medusa_") for key in cfg):
            manager.plugins.pop(PLUGIN, None)
            return
        cfg["plugins"] = [*plugins, PLUGIN]
        if PLUGIN not in manager.plugins:
            manager.register(PLUGIN, required=True)
        manager.plugins[PLUGIN].register(cfg)
