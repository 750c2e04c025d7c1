"""Medusa decoding heads for any Hugging Face causal LM, trained as an axolotl plugin."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_medusa.decoding.medusa_model import MedusaModel as MedusaModel
    from axolotl_medusa.model.heads import MedusaHeads as MedusaHeads
    from axolotl_medusa.training.plugin import MedusaPlugin as MedusaPlugin

__version__ = "0.1.0"
__all__ = ["MedusaHeads", "MedusaModel", "MedusaPlugin", "__version__"]

_HOMES = {"MedusaHeads": "model.heads", "MedusaModel": "decoding.medusa_model"}
"""Modules of the public names that need no axolotl."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for, so that decoding and exporting never need axolotl."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"axolotl_medusa.{_HOMES[name]}"), name)
    if name == "MedusaPlugin":
        try:
            from axolotl_medusa.training.plugin import MedusaPlugin
        except ImportError as error:  # axolotl swallows an ImportError and would train on without heads
            raise RuntimeError(
                f"axolotl_medusa.MedusaPlugin cannot be imported, check the environment: {error}"
            ) from error
        return MedusaPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that the package has, and the public ones that are imported when they are asked for."""
    return sorted({*globals(), *__all__})
