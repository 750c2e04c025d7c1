"""A plugin for tests only: stands for an engine that saves the model in a way that no other plugin sees."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class SavesByItselfPlugin(BasePlugin):
    """Replaces what axolotl calls to save the model at the end."""

    def post_train(self, cfg: Any, model: Any) -> None:
        model.save_pretrained = lambda *_, **__: None
