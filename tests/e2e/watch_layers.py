"""A plugin for tests only: prints the class of a decoder layer's matrix, and the type of the heads' parameters."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_medusa.model.anatomy import decoder_layers
from axolotl_medusa.model.heads import attached_heads


class WatchLayersPlugin(BasePlugin):
    """Prints `layers are CLASS, heads are DTYPE` before training."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        matrix = decoder_layers(trainer.model)[0][0].mlp.up_proj
        print(
            f"layers are {type(getattr(matrix, 'base_layer', matrix)).__name__}, heads are {attached_heads(trainer.model).dtype}"
        )
