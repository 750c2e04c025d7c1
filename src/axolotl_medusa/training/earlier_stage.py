"""`lora_model_dir` that names what an earlier run left: heads are there too, and they would start at zero again.

Contract: knows the layout of an output_dir (`model.sources`) and adapters by their JSON file; loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, HEADS_FILE, HEADS_FOLDER, META_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.sources import trained_model
from axolotl_medusa.training.named_files import is_file, named_path

_HEADS_OF_THE_FORK = "medusa_head"


def take_heads_of_earlier_stage(cfg: MutableMapping[str, Any]) -> list[str]:
    """Starts from the heads that lie beside an adapter, or where the first fork's YAMLs say that stage 1 is.

    `medusa_init_from` is set where it is not, and `lora_model_dir` becomes the adapter that those heads belong to, if any.

    Args:
        cfg: The YAML before validation; changed in place.

    Returns:
        A line for each key that was set.

    Raises:
        ValueError: A JSON file there is damaged, or it holds both an adapter and a full model.
    """
    name = cfg.get("lora_model_dir")
    if not isinstance(name, str) or not name or cfg.get("merge_lora") or cfg.get("inference"):
        return []
    directory = named_path(name)
    if not is_file(directory / HEADS_FOLDER / HEADS_FILE):
        return []
    meta_file = directory / HEADS_FOLDER / META_FILE
    adapter, full_model = trained_model(directory, read_json(meta_file) if is_file(meta_file) else {})
    if full_model is not None:
        return []  # refused with the other files: an adapter is expected
    lines = []
    if not cfg.get("medusa_init_from"):
        cfg["medusa_init_from"] = name
        lines.append(f"medusa_init_from: {name}, the heads in lora_model_dir")
    if adapter is None:
        cfg["lora_model_dir"] = None
        lines.append(f"lora_model_dir: unset, because Medusa-1 left no adapter in {name}; a new one is made")
    elif adapter != directory:
        cfg["lora_model_dir"] = str(adapter)
        lines.append(f"lora_model_dir: {adapter}, the adapter that the heads in {name} were trained on")
    return lines


def adapter_with_heads_problems(cfg: Mapping[str, Any]) -> list[str]:
    """A line where `lora_model_dir` is an adapter that holds heads among its `modules_to_save`, and nothing uses them."""
    name = cfg.get("lora_model_dir")
    if (
        not isinstance(name, str)
        or not name
        or cfg.get("medusa_init_from")
        or cfg.get("merge_lora")
        or cfg.get("inference")
    ):
        return []
    file = named_path(name) / ADAPTER_CONFIG_FILE
    if not is_file(file):
        return []
    try:
        modules = read_json(file).get("modules_to_save")
    except ValueError:
        return []  # reported with the other files
    if not any(str(module).split(".")[0] == _HEADS_OF_THE_FORK for module in modules or []):
        return []
    return [
        f"lora_model_dir {name} is an adapter with Medusa heads in it (modules_to_save {_HEADS_OF_THE_FORK}), which peft passes "
        f"over: run `axolotl-medusa import {name} --to canonical --out HEADS` and set medusa_init_from: HEADS"
    ]
