"""Whether a model is the one that heads were trained with: by the shape of its output embedding, and by its hash.

Contract: reads that one tensor and nothing else of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from axolotl_medusa.model.heads_directory import weight_hash
from axolotl_medusa.model.sources import Source

LOG = logging.getLogger(__name__)

_HASHED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that a model may have had in training: the hash is of the output embedding's bytes in that type. Axolotl loads a
model in half precision and may turn its embeddings back into fp32, so rounded values in fp32 count too."""


def check_shape(found: tuple[int, ...], expected: tuple[int, int], model: str) -> None:
    """Compares the shape of a model's output embedding with that of the one the heads were trained with.

    Raises:
        ValueError: They differ.
    """
    if tuple(found) != expected:
        raise ValueError(
            f"the output embedding of {model} is {list(found)}, but the heads were trained with one of {list(expected)} "
            "(vocabulary, hidden size): give the base model that they were trained with"
        )


def check_output_layer(source: Source, load: Callable[[], Tensor], model: str) -> None:
    """Compares an output embedding with the hash that training wrote down, if it did, in one type after the other.

    Args:
        source: The heads.
        load: Reads the output embedding of the model that they are to run with.
        model: What errors call that model.

    Raises:
        ValueError: It is another one.
    """
    expected = source.meta.get("lm_head_sha256")
    if expected is None:
        return
    weight, own = load(), None
    for dtypes in _trained_types(weight.dtype, source.meta.get("dtype")):
        found = weight_hash(weight, *dtypes)
        if found == expected:
            return
        own = own or found
    if source.meta.get("recipe") == "medusa-2" and source.model_kind == "base":
        # A merged adapter may have changed the output embedding, rightly so; its hash was taken without the adapter.
        LOG.warning("cannot tell whether %s is the model that %s was trained with", model, source.heads_dir)
        return
    raise ValueError(
        f"the output embedding of {model} is another than the one that {source.heads_dir} was trained with "
        f"(SHA-256 {str(own)[:12]}, expected {expected[:12]}): give the base model that they were trained with"
    )


def _trained_types(stored: torch.dtype, heads_dtype: str | None) -> list[tuple[torch.dtype, ...]]:
    """Types that an output embedding may have had in training, each as the conversions that lead to it, the likeliest first.

    Args:
        stored: The type that it is stored in; no conversion comes first.
        heads_dtype: Type that the heads had, as `medusa_meta.json` names it; that comes next.
    """
    if not stored.is_floating_point:
        return [()]
    ways: list[tuple[torch.dtype, ...]] = [(dtype,) for dtype in _HASHED_DTYPES if dtype != stored]
    ways += [(half, torch.float32) for half in _HASHED_DTYPES if half not in (stored, torch.float32)]
    named = getattr(torch, str(heads_dtype), None)
    return [(), *sorted(ways, key=lambda way: way[-1] != named)]
