"""The target's backbone under `torch.compile`, over a cache whose shapes never change.

Contract: compiles and hands out caches; what is forwarded and where it goes is `target_cache`'s. A compiled forward is
made for every shape, so all steps of a batch must have one: keys and values have columns for the whole text from the start,
in steps of `COLUMNS`, and rows that stopped stay. Growing caches are faster where nothing is compiled, so they are the default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.anatomy import backbone, causal_lm

COLUMNS = 256
"""A cache's columns are a multiple of this, so that prompts of about the same length share one compiled forward."""

_SHAPES = 64
"""Shapes that one model is compiled for, after which `torch.compile` runs new ones uncompiled. Measuring takes a dozen."""


class CompiledBackbone:
    """A backbone that is compiled when it is first called; on a GPU its kernels are replayed as one CUDA graph.

    The CUDA part follows what transformers' own `generate` does with a static cache; it was not measured on a GPU.

    Args:
        model: The target, possibly wrapped by peft.
        backend: Of `torch.compile`.

    Raises:
        ValueError: The model is quantized.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        lm = causal_lm(model)
        if getattr(lm, "is_quantized", False):
            raise ValueError(
                f"compile=True with a quantized {type(lm).__name__}: the kernels of 8-bit and 4-bit weights are not compiled; "
                "leave it out"
            )
        self._num_layers = int(lm.config.get_text_config().num_hidden_layers)
        self._on_cuda = lm.get_input_embeddings().weight.is_cuda
        graphs: dict[str, Any] = {"mode": "reduce-overhead"} if self._on_cuda and backend == "inductor" else {}
        self._forward: Any = torch.compile(backbone(model), backend=backend, dynamic=False, **graphs)
        self._free: dict[tuple[int, int], Cache] = {}

    def cache(self, rows: int, columns: int) -> tuple[Cache, int]:
        """An empty cache for `rows` rows of at least `columns` columns, and its columns."""
        columns = -(-columns // COLUMNS) * COLUMNS
        cache = self._free.pop((rows, columns), None)
        if cache is None:
            cache = Cache(layers=[StaticLayer(columns) for _ in range(self._num_layers)])
        cache.reset()
        return cache, columns

    def give_back(self, cache: Cache, rows: int, columns: int) -> None:
        """Keeps a cache that is no longer needed for the next text: a CUDA graph belongs to the memory it was recorded with."""
        self._free = {(rows, columns): cache}

    def __call__(self, **arguments: Any) -> Tensor:
        """What the backbone does with these arguments: the hidden states after the final norm, valid until the next call.

        Raises:
            RuntimeError: Nothing can be compiled here, because there is no C++ compiler, say.
        """
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            with torch._dynamo.config.patch(recompile_limit=_SHAPES):
                hidden: Tensor = self._forward(**arguments)[0]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = first_line(error.inner_exception)
            raise RuntimeError(
                f"torch.compile failed ({type(error.inner_exception).__name__}: {reason}): "
                "it needs a C++ compiler (g++ or clang++); install one, or leave compile=True (--compile) out"
            ) from error
        return hidden
