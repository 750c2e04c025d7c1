"""Medusa heads in the files of whoever published them, recognised by their tensors' names.

Contract: takes every size from the tensors' shapes; a config is asked only for what shapes cannot say, since published ones
are often wrong. Loads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, META_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.json_files import read_json_if_there
from axolotl_medusa.model.sources import text_value
from axolotl_medusa.model.stored_embeddings import stored_embeddings
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles
from axolotl_medusa.model.wrapped_names import unwrapped
from axolotl_medusa.serving.head_names import OUTPUT_LAYER, HeadTensor, parse, strange_part
from axolotl_medusa.serving.heads_files import heads_elsewhere, open_heads_files

_MOST_REPETITIONS = 16
_DECODER_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
_BASE_MODEL = "base_model_name_or_path"
_LM_HEAD = "lm_head.weight"
_SAVED_LM_HEAD = "lm_head.modules_to_save.weight"


@dataclass(frozen=True)
class PublishedHeads:
    """Heads as they lie in files.

    Attributes:
        where: The directory.
        tensors: Every tensor of theirs, by its place; output layers under the number of blocks.
        others: Tensors beside them, by their names without wrappers.
        num_heads: Number of heads N.
        num_layers: Blocks per head L.
        in_model: Whether they lie inside a model's or adapter's files.
        config: `config.json` beside them.
        adapter_config: `adapter_config.json` beside them.
        meta: `medusa_meta.json` beside them, where this package exported them.
    """

    where: Path
    tensors: dict[HeadTensor, LazyTensor]
    others: dict[str, LazyTensor]
    num_heads: int
    num_layers: int
    in_model: bool
    config: dict[str, Any]
    adapter_config: dict[str, Any]
    meta: dict[str, Any]

    @property
    def canonical_config(self) -> dict[str, Any]:
        """The config that the heads had before this package exported them, empty for other heads."""
        export = self.meta.get("export")
        config = export.get("config") if isinstance(export, dict) else None
        return config if isinstance(config, dict) else {}

    @property
    def has_lora(self) -> bool:
        """Whether LoRA's matrices for the model lie beside the heads."""
        return any(".lora_" in name for name in self.others)

    def outputs(self) -> list[LazyTensor]:
        """The output layers that are there, by head."""
        places = (HeadTensor(head, self.num_layers, "weight") for head in range(self.num_heads))
        return [self.tensors[place] for place in places if place in self.tensors]

    def dtypes(self) -> list[torch.dtype]:
        """The types of the tensors, each once, by name."""
        return sorted({tensor.dtype for tensor in self.tensors.values()}, key=str)

    def named_base_model(self) -> str | None:
        """The base model that the config or the adapter's config names."""
        for config, file in ((self.config, CONFIG_FILE), (self.adapter_config, ADAPTER_CONFIG_FILE)):
            if name := text_value(config, _BASE_MODEL, self.where / file):
                return name
        return None

    def base_model(self) -> str:
        """Name or path of the model that the heads were trained on.

        Raises:
            ValueError: Nothing names one.
        """
        before = text_value(self.canonical_config, _BASE_MODEL, self.where / META_FILE)
        if name := before or self.named_base_model():
            return name
        if self.in_model and self.config.get("model_type", "medusa") != "medusa":
            return str(self.where)
        raise ValueError(
            f"{self.where}/{CONFIG_FILE} names no base model ({_BASE_MODEL}), expected the model that the heads were "
            "trained on; pass it as --base-model"
        )

    def own_lm_head(self) -> LazyTensor | None:
        """The output embedding of the model that the heads lie in, or that the adapter saved; None where there is neither."""
        if saved := self.others.get(_SAVED_LM_HEAD) or (self.others.get(_LM_HEAD) if self.adapter_config else None):
            return saved
        if not any(_DECODER_LAYER.search(name) and ".lora_" not in name for name in self.others):
            return None
        others = {name: tensor._replace(name=name) for name, tensor in self.others.items()}
        try:
            embeddings = stored_embeddings(others, self.config, self.where)
        except ValueError:  # parts of a model
            return None
        return others[embeddings.tokens if embeddings.tied else embeddings.head]


def find_published_heads(path: Path) -> PublishedHeads:
    """Finds heads in a file, or in the files of a directory; reads no tensor.

    Raises:
        ValueError: There are none, or they are damaged, quantized or of another kind.
    """
    where = path.parent if path.is_file() else path
    files = open_heads_files(path)
    tensors: dict[HeadTensor, LazyTensor] = {}
    others: dict[str, LazyTensor] = {}
    in_model = False
    for name in files:
        parsed = parse(name)
        if parsed is None:
            others[unwrapped(name)] = files[name]
            continue
        if parsed.tensor in tensors:
            raise ValueError(
                f"{path}: {tensors[parsed.tensor].name} and {name} are the same tensor, expected one of them"
            )
        tensors[parsed.tensor] = files[name]
        in_model |= parsed.in_model
    _check_others(path, others, alone=not in_model)
    layers = [place.layer for place in tensors if place.kind != "weight"]
    if not layers:
        raise ValueError(_no_heads(path, files, has_output_layers=bool(tensors)))
    if _LM_HEAD in others and not in_model and len(layers) == len(tensors):
        tensors[HeadTensor(0, OUTPUT_LAYER, "weight")] = others.pop(_LM_HEAD)._replace(name=SHARED_OUTPUT_LAYER)
    surplus = next((tensor.name for name, tensor in others.items() if ".lora_" not in name), None)
    if surplus is not None and not in_model:
        raise ValueError(_surplus_message(path, surplus))
    _check_types(path, tensors.values())
    num_layers = _whole_heads(path, tensors)
    num_heads = max(place.head for place in tensors) + 1
    if num_heads * num_layers > len(tensors):
        raise ValueError(
            f"{path} has {len(tensors)} tensors of heads, expected {num_heads} heads of {num_layers} residual blocks as its names "
            "say: get it again"
        )
    return PublishedHeads(
        where,
        {_with_layer(place, num_layers): tensor for place, tensor in tensors.items()},
        others,
        num_heads,
        num_layers,
        in_model,
        *(read_json_if_there(where / file) for file in (CONFIG_FILE, ADAPTER_CONFIG_FILE, META_FILE)),
    )


def _whole_heads(path: Path, tensors: dict[HeadTensor, LazyTensor]) -> int:
    """The number of blocks per head, which an output layer's name says too.

    Trainers that repeat one block have it once in memory, and safetensors files of theirs hold it once: it is put in every
    place that it has.
    """
    blocks = {place.layer for place in tensors if place.kind != "weight"}
    outputs = {place.layer for place in tensors if place.kind == "weight"} - {OUTPUT_LAYER}
    num_layers = max(blocks) + 1
    after = max(outputs, default=num_layers)
    if not outputs or (len(outputs) == 1 and blocks == set(range(after))):
        return num_layers
    if len(outputs) > 1 or len(blocks) > 1 or not num_layers <= after <= _MOST_REPETITIONS:
        raise ValueError(
            f"{path} has residual blocks {sorted(blocks)[:9]} and output layers after {sorted(outputs)[:9]} blocks, expected "
            "heads that are alike; get it again"
        )
    for place in [place for place in tensors if place.kind != "weight"]:
        for layer in range(after):
            tensors[place._replace(layer=layer)] = tensors[place]
    return after


def _no_heads(path: Path, files: TensorFiles, *, has_output_layers: bool) -> str:
    if has_output_layers:
        return (
            f"found no Medusa heads in {path}: output layers and no residual block, expected both; get the heads again"
        )
    if path.is_dir() and (elsewhere := heads_elsewhere(path)):
        return f"found no Medusa heads in {path}, {elsewhere}"
    example = next(iter(files), "nothing")
    return (
        f"found no Medusa heads in {path} ({len(files)} tensors, the first is {example}), expected residual blocks such "
        "as 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight; is it the right directory?"
    )


def _check_others(path: Path, others: dict[str, LazyTensor], *, alone: bool) -> None:
    for tensor in others.values():
        if reason := strange_part(tensor.name, alone=alone):
            raise ValueError(f"{path} has the tensor {tensor.name}, {reason}")


def _surplus_message(path: Path, name: str) -> str:
    if name == "token_map":
        return (
            f"{path} has a token_map: its heads know a part of the vocabulary only, expected output layers of the whole "
            "vocabulary; take heads that were not truncated"
        )
    return (
        f"{path} has the tensor {name}, expected nothing but Medusa heads in this file; remove it if it is not theirs"
    )


def _check_types(path: Path, tensors: Iterable[LazyTensor]) -> None:
    for tensor in tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < torch.float16.itemsize:
            raise ValueError(
                f"{path}: {tensor.name} is {kind}, expected fp32, bf16 or fp16: the heads are quantized; get them as they were "
                "before"
            )
        if 0 in tensor.shape:
            raise ValueError(
                f"{path}: {tensor.name} is empty, expected a whole tensor: ZeRO-3 divides what it saves; join the parts with "
                "its zero_to_fp32.py"
            )


def _with_layer(place: HeadTensor, num_layers: int) -> HeadTensor:
    return place._replace(layer=num_layers) if place.layer == OUTPUT_LAYER else place
