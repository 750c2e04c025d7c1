"""A plugin for tests only: stands for those that patch a fused loss into the model's class (cut cross-entropy, Liger)."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class LabelsStayPlugin(BasePlugin):
    """A Llama whose own forward must not be given labels."""

    def pre_model_load(self, cfg: Any) -> None:
        from transformers import LlamaForCausalLM

        own_forward = LlamaForCausalLM.forward

        def forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            if labels is not None:
                raise RuntimeError("the model's own loss was asked for")
            return own_forward(self, *args, **kwargs)

        LlamaForCausalLM.forward = forward
