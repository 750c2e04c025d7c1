"""Medusa decoding heads for any Hugging Face causal LM, trained as an axolotl plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_medusa.plugin import MedusaPlugin as MedusaPlugin

__version__ = "0.1.0"
__all__ = ["MedusaPlugin", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the plugin only where axolotl asks for it, so that decoding and exporting never need axolotl."""
    if name == "MedusaPlugin":
        try:
            from axolotl_medusa.plugin import MedusaPlugin
        except ImportError as error:  # axolotl swallows an ImportError and would train on without heads
            raise RuntimeError(
                f"axolotl_medusa.MedusaPlugin cannot be imported, check the environment: {error}"
            ) from error
        return MedusaPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
