"""Published Medusa heads in any known format, rewritten as a heads directory.

Contract: writes what `published_heads` found, and no name of a format but the canonical one. Tensors go through one at a
time, bit by bit as they were; where they are of several types, they become the one that holds all their values.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, HEADS_FOLDER, META_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.head_form import FORM_KEY, HeadForm
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import HeadsFile, heads_config, verify_heads, weight_hash
from axolotl_medusa.model.json_files import read_json_if_there
from axolotl_medusa.model.secrets import without_secrets
from axolotl_medusa.model.sources import Source
from axolotl_medusa.model.tensor_files import LazyTensor, write_json, write_tensors
from axolotl_medusa.serving.head_names import HeadTensor
from axolotl_medusa.serving.published_heads import PublishedHeads, find_published_heads
from axolotl_medusa.serving.served_model import lm_head


def import_heads(directory: str | Path, out: str | Path, base_model: str | None = None) -> list[str]:
    """Writes heads of any known format as a heads directory.

    Known are the formats of FasterDecoding (current, legacy and merged), TGI, LoRAX, vLLM, TensorRT-LLM (its checkpoints
    too), rtp-llm, SGLang and ModelOpt, heads that peft saved among its `modules_to_save`, and the heads directory itself;
    each of them also with the names of DDP, FSDP, torch.compile or peft around, and under a key of a training checkpoint.

    Args:
        directory: The heads, or the model or adapter that holds them.
        out: The heads directory to write: new, empty, or with earlier heads in the canonical form, which are replaced.
        base_model: Name or path of the model that the heads were trained on; by default what the config says.

    Returns:
        What was found, a line each for the user to read.

    Raises:
        ValueError: There are no heads, or they are damaged; no base model is known and one is needed; or `out` holds
            anything else.
    """
    out = Path(out)
    _check_out(out)
    found = find_published_heads(Path(directory))
    base = base_model or found.base_model()
    tensors, form = _canonical_tensors(found, base_model, base)
    notes = _notes(found, form)
    by_name = {tensor.name: tensor for tensor in tensors}
    config = _config(found, by_name, form, base)
    sketch = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in by_name.items()}
    verify_heads(HeadsFile(sketch, config), str(found.where))
    if found.num_layers > 1 and _blocks_repeat(found):
        notes.append(
            f"the {found.num_layers} blocks of every head are equal, as trainers write them that repeat one block: "
            "they are kept as independent blocks, which compute the same"
        )
    if found.has_lora and out.resolve() != (found.where / HEADS_FOLDER).resolve():
        notes.append(
            f"they were trained together with a LoRA in {found.where}, which a server needs too: import them with "
            f"--out {found.where / HEADS_FOLDER} and export {found.where}"
        )
    if not found.adapter_config and not found.has_lora and found.own_lm_head() is not None and base != str(found.where):
        notes.append(
            f"they lie in a whole model: if it was trained together with them, serve that one, with --base-model {found.where}"
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
        meta, config = read_json_if_there(directory / META_FILE), read_json_if_there(directory / CONFIG_FILE)
    except ValueError:
        return False
    return (
        bool({"recipe", "imported"} & meta.keys())
        and "export" not in meta
        and config.get("model_type", "medusa") == "medusa"
    )


def _notes(found: PublishedHeads, form: HeadForm) -> list[str]:
    notes = [f"{found.num_heads} heads of {found.num_layers} residual blocks, {form}"]
    if not any(place.kind == "linear.bias" for place in found.tensors):
        notes.append("the blocks have no biases: zeros were added, which compute the same")
    said = found.config.get("medusa_num_layers")
    if type(said) is int and said != found.num_layers:
        notes.append(
            f"{CONFIG_FILE} says {said} residual blocks per head, the file has {found.num_layers}, which counts"
        )
    if len(dtypes := found.dtypes()) > 1:
        *names, common = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, _common_type(found)))
        notes.append(f"the tensors are {' and '.join(names)}: all became {common}, which changes no value")
    return notes


def _common_type(found: PublishedHeads) -> torch.dtype:
    """The smallest type that holds the values of every tensor."""
    return functools.reduce(torch.promote_types, found.dtypes())


def _canonical_tensors(found: PublishedHeads, base_model: str | None, base: str) -> tuple[list[LazyTensor], HeadForm]:
    """The tensors of the canonical file and the form that they have.

    Args:
        found: The heads.
        base_model: The model that the user named.
        base: Name or path of the model that they were trained on.
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
    form: HeadForm = "shared"
    outputs = found.outputs()
    if not outputs:
        tensors.append(_served_lm_head(found, base_model, base)._replace(name=SHARED_OUTPUT_LAYER))
    elif _is_trained(found, outputs):
        form = "trained"
        place = HeadTensor(0, found.num_layers, "weight")
        tensors.append(outputs[0]._replace(name=place.canonical))
    elif _is_shared(found, outputs):
        tensors.append(outputs[0]._replace(name=SHARED_OUTPUT_LAYER))
    else:
        form = "separate"
        own = (place for place in found.tensors if place.kind == "weight")
        tensors += [found.tensors[place]._replace(name=place.canonical) for place in own]
    return [_cast(tensor, _common_type(found)) for tensor in tensors], form


def _served_lm_head(found: PublishedHeads, base_model: str | None, base: str) -> LazyTensor:
    """The output layer of heads that bring none: that of the model that the user named, they lie in, or the config names."""
    own = None if base_model else found.own_lm_head()
    served = base_model or found.named_base_model() or base
    return own or lm_head(Source(found.where, config={}, meta={}, base_model=served))


def _zero_bias(weight: LazyTensor) -> LazyTensor:
    shape = weight.shape[:1]
    name = weight.name.removesuffix("weight") + "bias"
    return LazyTensor(name, weight.dtype, shape, lambda: torch.zeros(shape, dtype=weight.dtype))


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    if tensor.dtype == dtype:
        return tensor
    return tensor._replace(dtype=dtype, load=lambda: tensor.load().to(dtype))


def _is_trained(found: PublishedHeads, outputs: list[LazyTensor]) -> bool:
    """Whether one output layer was trained for all heads, which an export may hold in copies."""
    says_so = "trained" in (found.config.get(FORM_KEY), found.canonical_config.get(FORM_KEY))
    return says_so and (len(outputs) == 1 or (len(outputs) == found.num_heads and _equal(outputs)))


def _is_shared(found: PublishedHeads, outputs: list[LazyTensor]) -> bool:
    if len(outputs) == 1 and outputs[0].name.endswith(SHARED_OUTPUT_LAYER):
        return bool(found.config.get("original_lm_head", found.num_heads > 1))
    if not found.canonical_config.get("original_lm_head"):
        return False
    # Exported with a copy of lm_head for each head; whoever trained them since made them separate.
    return len(outputs) == found.num_heads and _equal(outputs)


def _equal(tensors: list[LazyTensor]) -> bool:
    """Whether tensors have the same bits; one of them is in memory at a time."""
    first = weight_hash(tensors[0].load())
    return all(weight_hash(tensor.load()) == first for tensor in tensors[1:])


def _blocks_repeat(found: PublishedHeads) -> bool:
    def blocks() -> Iterator[list[LazyTensor]]:
        for head in range(found.num_heads):
            for kind in sorted({place.kind for place in found.tensors} - {"weight"}):
                yield [found.tensors[HeadTensor(head, layer, kind)] for layer in range(found.num_layers)]

    return all(_equal(copies) for copies in blocks())


def _config(found: PublishedHeads, tensors: dict[str, LazyTensor], form: HeadForm, base_model: str) -> dict[str, Any]:
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
