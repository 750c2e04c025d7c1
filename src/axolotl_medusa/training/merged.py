"""Heads beside the model that `axolotl merge-lora` writes: the ones that were trained with its adapter.

Contract: knows a heads directory and the files of a model; loads the merged model's output embedding and nothing else of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.model.file_names import (
    CONFIG_FILE,
    HEADS_FILE,
    HEADS_FOLDER,
    META_FILE,
    SHARED_OUTPUT_LAYER,
    TOKENIZER_FILES,
)
from axolotl_medusa.model.heads_directory import open_heads, weight_hash
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.stored_embeddings import stored_output_embedding
from axolotl_medusa.model.tensor_files import LazyTensor, write_json, write_tensors
from axolotl_medusa.training.named_files import is_file, named_path


def trained_heads(adapter_path: str, output_dir: str) -> Path | None:
    """The heads directory of the run that an adapter is merged for: beside the adapter, else in the run's output_dir."""
    directories = [named_path(name) / HEADS_FOLDER for name in (adapter_path, output_dir)]
    return next((directory for directory in directories if is_file(directory / HEADS_FILE)), None)


def write_heads_of_merged(heads_dir: Path, merged: str) -> Path:
    """Writes `merged/medusa_heads`, whose model is the merged one, ready for servers, `export` and decoding.

    The heads' own tensors stay as they are. The output layer of the shared form becomes the merged model's, rounded as it
    is, and the files name that model instead of the base model and the adapter.

    Args:
        heads_dir: The heads that were trained with the adapter.
        merged: The merged model's directory.

    Returns:
        The directory.

    Raises:
        ValueError: A file is damaged, or the merged model has another vocabulary or hidden size than the heads.
    """
    tensors, config = open_heads(heads_dir), read_json(heads_dir / CONFIG_FILE)
    meta = read_json(heads_dir / META_FILE) if is_file(heads_dir / META_FILE) else {}
    output = stored_output_embedding(named_path(merged))
    expected = (config["vocab_size"], config["hidden_size"])
    if tuple(output.shape) != expected:
        raise ValueError(
            f"{merged}: {output.name} is {list(output.shape)}, but the heads in {heads_dir} were trained with {list(expected)} "
            "(vocabulary, hidden size): merge the adapter that they were trained with"
        )
    weight = output.load()
    directory = named_path(merged) / HEADS_FOLDER
    directory.mkdir(exist_ok=True)
    own = [_of_merged(tensor, weight) for tensor in tensors.values()]
    write_tensors(directory / HEADS_FILE, own)
    write_json(directory / CONFIG_FILE, {**config, "base_model_name_or_path": merged})
    if meta:
        write_json(directory / META_FILE, _meta_of_merged(meta, config, weight))
    for pattern in TOKENIZER_FILES:
        for file in heads_dir.glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return directory


def _of_merged(tensor: LazyTensor, output_layer: torch.Tensor) -> LazyTensor:
    if tensor.name != SHARED_OUTPUT_LAYER:
        return tensor
    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, lambda: output_layer.to(tensor.dtype))


def _meta_of_merged(meta: Mapping[str, Any], config: Mapping[str, Any], output_layer: torch.Tensor) -> dict[str, Any]:
    """What training wrote down, with the mark of heads whose config names the model that they are served with."""
    changes = {
        "lm_head_sha256": weight_hash(output_layer),
        "export": {"target": "merge-lora", "config": dict(config), "adapter": False, "files": []},
    }
    yaml = meta.get("yaml")
    if meta.get("recipe") == "medusa-1" and isinstance(yaml, Mapping):
        changes["yaml"] = {**yaml, "lora_model_dir": None}  # that adapter is in the merged model now
    return {**meta, **changes}
