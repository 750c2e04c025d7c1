"""Published Medusa heads in any known format, rewritten as a canonical directory.

Contract: recognises a format by its tensors' names and takes every size from their shapes; a config is asked only for
what shapes cannot say, since published ones are often wrong. Tensors go through one at a time, bit by bit as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, HEADS_FILE, META_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.heads import HeadForm, MedusaHeads
from axolotl_medusa.model.heads_directory import HeadsFile, heads_config, verify_heads
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.secrets import without_secrets
from axolotl_medusa.model.sources import Source, text_value
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles, write_json, write_tensors
from axolotl_medusa.serving.format_rules import OUTPUT_LAYER, TORCH_HEADS_FILE, HeadTensor, parse
from axolotl_medusa.serving.served_model import lm_head


@dataclass(frozen=True)
class _Found:
    """Heads as they lie in files.

    Attributes:
        where: The directory.
        tensors: Every tensor of theirs, by its place; output layers under the number of blocks.
        num_heads: Number of heads N.
        num_layers: Blocks per head L.
        in_model: Whether they lie inside a model's or adapter's files.
        config: `config.json` beside them.
        meta: `medusa_meta.json` beside them, where this package exported them.
    """

    where: Path
    tensors: dict[HeadTensor, LazyTensor]
    num_heads: int
    num_layers: int
    in_model: bool
    config: dict[str, Any]
    meta: dict[str, Any]

    @property
    def canonical_config(self) -> dict[str, Any]:
        """The config that the heads had before this package exported them, empty for other heads."""
        export = self.meta.get("export")
        config = export.get("config") if isinstance(export, dict) else None
        return config if isinstance(config, dict) else {}

    def outputs(self) -> list[LazyTensor]:
        """The output layers that are there, by head."""
        places = (HeadTensor(head, self.num_layers, "weight") for head in range(self.num_heads))
        return [self.tensors[place] for place in places if place in self.tensors]


def import_heads(directory: str | Path, out: str | Path, base_model: str | None = None) -> list[str]:
    """Writes heads of any known format as a canonical directory.

    Known are the formats of FasterDecoding (current, legacy and merged), TGI, LoRAX, vLLM, TensorRT-LLM, rtp-llm and
    ModelOpt, heads that peft saved among its `modules_to_save`, and the canonical directory itself.

    Args:
        directory: The heads, or the model or adapter that holds them.
        out: The canonical directory to write: new, empty, or with earlier heads in the canonical form, which are replaced.
        base_model: Name or path of the model that the heads were trained on; by default what the config says.

    Returns:
        What was found, a line each for the user to read.

    Raises:
        ValueError: There are no heads, or they are damaged; no base model is known and one is needed; or `out` holds
            anything else.
    """
    out = Path(out)
    _check_out(out)
    found = _find(Path(directory))
    base = base_model or _base_model(found)
    named = text_value(found.config, "base_model_name_or_path", found.where / CONFIG_FILE)
    tensors, form = _canonical_tensors(found, base_model or named or base)
    notes = [f"{found.num_heads} heads of {found.num_layers} residual blocks, {form}"]
    if not any(place.kind == "linear.bias" for place in found.tensors):
        notes.append("the blocks have no biases: zeros were added, which compute the same")
    by_name = {tensor.name: tensor for tensor in tensors}
    config = _config(found, by_name, form, base)
    sketch = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in by_name.items()}
    verify_heads(HeadsFile(sketch, config), str(found.where))
    if found.num_layers > 1 and _blocks_repeat(found):
        notes.append(
            f"the {found.num_layers} blocks of every head are equal, as trainers write them that repeat one block: "
            "they are kept as independent blocks, which compute the same"
        )
    meta = {key: value for key, value in without_secrets(found.meta).items() if key != "export"}
    meta = meta or {"imported": {"from": found.where.resolve().name, "notes": notes}}
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        write_json(out / META_FILE, meta)  # so that an import that is interrupted can be run again
    write_tensors(out / HEADS_FILE, tensors)
    for file in Source(found.where, config={}, meta={}, base_model=None).tokenizer_files():
        if file.parent.resolve() != out.resolve():
            shutil.copyfile(file, out / file.name)
    write_json(out / META_FILE, meta)
    write_json(out / CONFIG_FILE, config)
    return notes


def _check_out(out: Path) -> None:
    """Refuses what is there already, unless it is empty or holds heads that training or an earlier import wrote.

    Their `medusa_meta.json` says which of both it was, their config is of heads, and no export is noted.

    Raises:
        ValueError: It is a file, or holds anything else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        found = "a file"
    elif not any(out.iterdir()) or _is_canonical(out):
        return
    else:
        found = "not empty"
    raise ValueError(
        f"{out} is {found}, expected a new or an empty directory, or heads that training or an import wrote: "
        "choose another --out"
    )


def _is_canonical(directory: Path) -> bool:
    try:
        meta, config = _json(directory / META_FILE), _json(directory / CONFIG_FILE)
    except ValueError:
        return False
    return (
        bool({"recipe", "imported"} & meta.keys())
        and "export" not in meta
        and config.get("model_type", "medusa") == "medusa"
    )


def _find(path: Path) -> _Found:
    where = path.parent if path.is_file() else path
    heads_files = (path / HEADS_FILE, path / TORCH_HEADS_FILE)
    files = TensorFiles.open(next((file for file in heads_files if file.is_file()), path))
    tensors: dict[HeadTensor, LazyTensor] = {}
    surplus: list[str] = []
    in_model = False
    for name in files:
        parsed = parse(name)
        if parsed is None:
            surplus.append(name)
            continue
        if parsed.tensor in tensors:
            raise ValueError(
                f"{path}: {tensors[parsed.tensor].name} and {name} are the same tensor, expected one of them"
            )
        tensors[parsed.tensor] = files[name]
        in_model |= parsed.in_model
    layers = [place.layer for place in tensors if place.kind != "weight"]
    if not layers:
        example = next(iter(files), "nothing")
        raise ValueError(
            f"found no Medusa heads in {path} ({len(files)} tensors, the first is {example}), expected residual blocks such "
            "as 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight; is it the right directory?"
        )
    if surplus and not in_model:
        raise ValueError(_surplus_message(path, surplus[0]))
    num_heads, num_layers = max(place.head for place in tensors) + 1, max(layers) + 1
    if num_heads * num_layers > len(tensors):
        raise ValueError(
            f"{path} has {len(tensors)} tensors of heads, expected {num_heads} heads of {num_layers} residual blocks as its names "
            "say: get it again"
        )
    return _Found(
        where,
        {_with_layer(place, num_layers): tensor for place, tensor in tensors.items()},
        num_heads,
        num_layers,
        in_model,
        _json(where / CONFIG_FILE) or _json(where / ADAPTER_CONFIG_FILE),
        _json(where / META_FILE),
    )


def _with_layer(place: HeadTensor, num_layers: int) -> HeadTensor:
    return place._replace(layer=num_layers) if place.layer == OUTPUT_LAYER else place


def _surplus_message(path: Path, name: str) -> str:
    if name == "token_map":
        return (
            f"{path} has a token_map: its heads know a part of the vocabulary only, expected output layers of the whole "
            "vocabulary; take heads that were not truncated"
        )
    return (
        f"{path} has the tensor {name}, expected nothing but Medusa heads in this file; remove it if it is not theirs"
    )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _base_model(found: _Found) -> str:
    for config in (found.canonical_config, found.config):
        if name := text_value(config, "base_model_name_or_path", found.where / CONFIG_FILE):
            return name
    if found.in_model:
        return str(found.where)
    raise ValueError(
        f"{found.where}/{CONFIG_FILE} names no base model (base_model_name_or_path), expected the model that the heads were "
        "trained on; pass it as --base-model"
    )


def _canonical_tensors(found: _Found, served: str) -> tuple[list[LazyTensor], HeadForm]:
    """The tensors of the canonical file and the form that they have.

    Args:
        found: The heads.
        served: Name or path of the model whose lm_head they use where they bring none.
    """
    tensors = [
        tensor._replace(name=place.canonical)
        for place, tensor in sorted(found.tensors.items(), key=lambda item: item[0].canonical)
        if place.kind != "weight"
    ]
    weights = [tensor for tensor in tensors if tensor.name.endswith("weight")]
    for weight in weights:
        if len(weight.shape) != 2:
            raise ValueError(f"{found.where}: {weight.name} is {weight.shape}, expected a matrix: get the heads again")
    if not weights:
        raise ValueError(
            f"{found.where} has biases of residual blocks and no weights, expected both: get the heads again"
        )
    if len(weights) == len(tensors):
        tensors += [_zero_bias(weight) for weight in weights]
    outputs = found.outputs()
    if not outputs:
        own = lm_head(Source(found.where, config={}, meta={}, base_model=served))
        return [*tensors, _cast(own, weights[0].dtype)], "shared"
    if _is_shared(found, outputs):
        return [*tensors, outputs[0]._replace(name=SHARED_OUTPUT_LAYER)], "shared"
    own_layers = (
        tensor._replace(name=place.canonical) for place, tensor in found.tensors.items() if place.kind == "weight"
    )
    return [*tensors, *own_layers], "separate"


def _zero_bias(weight: LazyTensor) -> LazyTensor:
    shape = weight.shape[:1]
    name = weight.name.removesuffix("weight") + "bias"
    return LazyTensor(name, weight.dtype, shape, lambda: torch.zeros(shape, dtype=weight.dtype))


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(SHARED_OUTPUT_LAYER, dtype, tensor.shape, lambda: tensor.load().to(dtype))


def _is_shared(found: _Found, outputs: list[LazyTensor]) -> bool:
    if len(outputs) == 1 and outputs[0].name == SHARED_OUTPUT_LAYER:
        return bool(found.config.get("original_lm_head", found.num_heads > 1))
    if not found.canonical_config.get("original_lm_head"):
        return False
    # Exported with a copy of lm_head for each head; whoever trained them since made them separate.
    return len(outputs) == found.num_heads and _equal(outputs)


def _equal(tensors: list[LazyTensor]) -> bool:
    first = tensors[0].load()
    return all(torch.equal(first, tensor.load()) for tensor in tensors[1:])


def _blocks_repeat(found: _Found) -> bool:
    def blocks() -> Iterator[list[LazyTensor]]:
        for head in range(found.num_heads):
            for kind in sorted({place.kind for place in found.tensors} - {"weight"}):
                yield [found.tensors[HeadTensor(head, layer, kind)] for layer in range(found.num_layers)]

    return all(_equal(copies) for copies in blocks())


def _config(found: _Found, tensors: dict[str, LazyTensor], form: HeadForm, base_model: str) -> dict[str, Any]:
    block = tensors.get("0.0.linear.weight")
    output = tensors.get(SHARED_OUTPUT_LAYER if form == "shared" else f"0.{found.num_layers}.weight")
    if block is None or output is None:
        missing = "residual block" if block is None else "output layer"
        raise ValueError(
            f"{found.where}: head 0 has no {missing}, expected {found.num_heads} whole heads; get it again"
        )
    if len(output.shape) != 2:
        raise ValueError(f"{found.where}: {output.name} is {output.shape}, expected a matrix: get the heads again")
    heads = MedusaHeads(
        block.shape[-1], output.shape[0], found.num_heads, found.num_layers, form, device=torch.device("meta")
    )
    return heads_config(heads, base_model)
