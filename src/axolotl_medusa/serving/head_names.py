"""What a tensor's name says about its place among Medusa heads, in the formats of all who publish them.

Contract: pure functions of names; opens no file.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from axolotl_medusa.model.wrapped_names import unwrapped

OUTPUT_LAYER = -1
"""`layer` of an output layer whose name does not say how many blocks precede it."""

_IN_MODEL = re.compile(r"^(?:.*\.)?medusa_heads?\.(?:module\.)?(?:modules_to_save\.(?:[A-Za-z_]\w*\.)?)?(?P<rest>.+)$")
_SEQUENTIAL = re.compile(r"^(?P<head>\d+)\.(?P<layer>\d+)\.(?P<kind>linear\.weight|linear\.bias|weight)$")
_BLOCKS = (
    re.compile(r"^blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)$"),  # vLLM
    re.compile(r"^(?P<head>\d+)\.medusa_layers\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)$"),  # TensorRT-LLM
)
_OUTPUTS = (re.compile(r"^lm_heads\.(?P<head>\d+)\.weight$"), re.compile(r"^(?P<head>\d+)\.lm_head\.weight$"))

_OF_A_HEAD = re.compile(r"(\d+|blocks|lm_heads)\.")

_NOT_TRAINED = "original_module."
"""Where peft keeps what a module was before training."""

_STRANGE = (
    (
        re.compile(r"(^|[._])(lora|dora)_|base_layer"),
        "expected whole weights: it is of a LoRA on the heads; merge it where it was trained and save the heads again",
    ),
    (
        re.compile(r"scale|absmax|quant|nested|qweight|qzeros|g_idx|SCB|packed|zero_point"),
        "expected plain weights: the heads are quantized; get them as they were before",
    ),
    (
        re.compile(r"flat_param"),
        "expected whole weights: FSDP saved its own parts; save the full state dict, or join the parts",
    ),
    (
        re.compile(r"^(\d+\.\d+|lm_heads\.\d+|\d+\.lm_head)\.bias$"),
        "expected output layers without a bias, as all servers of Medusa heads have; train heads without",
    ),
)


class HeadTensor(NamedTuple):
    """Place of a tensor among the heads.

    Attributes:
        head: Which head, from 0.
        layer: Which residual block, from 0; the number of blocks stands for the output layer after them.
        kind: `linear.weight` and `linear.bias` of a block, `weight` of an output layer.
    """

    head: int
    layer: int
    kind: Literal["linear.weight", "linear.bias", "weight"]

    @property
    def canonical(self) -> str:
        """Its name in a heads directory."""
        return f"{self.head}.{self.layer}.{self.kind}"


class Parsed(NamedTuple):
    """What a name in some format means.

    Attributes:
        tensor: The place among the heads; `layer` is `OUTPUT_LAYER` in names that do not give it.
        in_model: Whether the heads lie inside a model's or an adapter's files, among tensors that are not theirs.
    """

    tensor: HeadTensor
    in_model: bool


def parse(name: str) -> Parsed | None:
    """Reads a tensor's name in any of the formats, wrapped by a trainer or not; None if it is not of the heads."""
    rest, in_model = _inner(name)
    if found := _SEQUENTIAL.match(rest):
        kind: Any = found["kind"]
        return Parsed(HeadTensor(int(found["head"]), int(found["layer"]), kind), in_model)
    for pattern in _BLOCKS:
        if found := pattern.match(rest):
            kind = f"linear.{found['kind']}"
            return Parsed(HeadTensor(int(found["head"]), int(found["layer"]), kind), in_model)
    for pattern in _OUTPUTS:
        if found := pattern.match(rest):
            return Parsed(HeadTensor(int(found["head"]), OUTPUT_LAYER, "weight"), in_model)
    return None


def is_of_heads(name: str) -> bool:
    """Whether a name lies under that of the heads in a model or an adapter, whatever it is there."""
    return _inner(name)[1]


def strange_part(name: str, *, alone: bool) -> str | None:
    """Why heads with this tensor are none that can be read, as the end of a line; None if it says nothing about them.

    Args:
        name: A name that `parse` does not know.
        alone: Whether the file holds heads alone, so that each of its names is under theirs.
    """
    rest, in_model = _inner(name)
    if rest.startswith(_NOT_TRAINED) or not (in_model or (alone and _OF_A_HEAD.match(rest))):
        return None
    for pattern, reason in _STRANGE:
        if pattern.search(rest):
            return reason
    return "expected residual blocks and output layers alone: they are heads of another kind" if in_model else None


def _inner(name: str) -> tuple[str, bool]:
    """The part of a name below `medusa_head` or `medusa_heads`, and whether it has one; else the whole name."""
    bare = unwrapped(name)
    inner = _IN_MODEL.match(bare)
    return (inner["rest"], True) if inner else (bare, False)
