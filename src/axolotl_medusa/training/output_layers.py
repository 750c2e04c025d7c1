"""Output layers as the losses take them: the base model's, each head's, and of a draft vocabulary's tokens alone.

Contract: knows modules and autocast, and of the losses only what an output layer is to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from axolotl_medusa.losses.prediction import OutputLayer, matmul_dtype
from axolotl_medusa.model.anatomy import (
    embedding_shape,
    frozen_output_embedding,
    identity,
    logit_transform,
    output_embedding,
)
from axolotl_medusa.model.heads import MedusaHeads


class OutputLayers:
    """The output layers of one micro-batch.

    Args:
        lm: The causal LM.
        heads: Its heads.
    """

    def __init__(self, lm: Any, heads: MedusaHeads) -> None:
        self._lm_head = output_embedding(lm)
        self._heads = heads
        self._transform = logit_transform(lm.config)
        self._shared: OutputLayer | None = None

    def of(self, layer: nn.Module, frozen: bool = False) -> OutputLayer:
        """An output layer of the model or of heads; frozen: without dropout."""
        weight, dtype = None, _compute_dtype(layer)
        is_matmul = type(layer) is nn.Linear and layer.bias is None and self._transform is identity
        if is_matmul and dtype in (torch.float32, torch.bfloat16):
            weight = cast(Tensor, layer.weight)

        def project(hidden: Tensor) -> Tensor:
            with evaluating(layer) if frozen else contextlib.nullcontext():
                return self._transform(layer(hidden.to(_weight_dtype(layer))))

        return OutputLayer(project, embedding_shape(layer)[0], list(layer.parameters()), weight, dtype)

    def of_head(self, head: int) -> OutputLayer:
        """The output layer of a head, for the tokens that it chooses among."""
        own = self._heads.output_layer(head)
        if own is not None:
            return self.of(own)
        if self._shared is None:  # one for all heads, so that its gradient is one too
            self._shared = self.of_draft_vocab(self.of(self._lm_head))
        return self._shared

    def of_draft_vocab(self, layer: OutputLayer) -> OutputLayer:
        """The model's output layer for the tokens of the draft vocabulary alone; all of it without one."""
        tokens = self._heads.token_map
        if tokens is None:
            return layer
        if layer.weight is None:
            return replace(layer, project=lambda hidden: layer.project(hidden)[..., tokens], vocab_size=len(tokens))
        rows = layer.weight[tokens]

        def project(hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden.to(rows.dtype), rows)

        return OutputLayer(project, len(tokens), [rows], rows, layer.dtype)


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """What the layer's matmul is computed in."""
    weight = frozen_output_embedding(layer).weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return matmul_dtype(dtype, weight.device)


def _weight_dtype(layer: nn.Module) -> torch.dtype:
    dtype: torch.dtype = frozen_output_embedding(layer).weight.dtype
    return dtype


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switches dropout off: what is frozen must answer in training as it does when it is served."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
