"""A plugin for tests only: a new adapter starts from the same random numbers in every run."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class SeedAdapterPlugin(BasePlugin):
    """Seeds torch before adapters are made, which axolotl does not."""

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        torch.manual_seed(0)
