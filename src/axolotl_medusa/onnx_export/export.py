"""Trained heads and their model as an ONNX directory that `onnx_decoding` runs without torch.

Contract: writes a directory whole: `medusa_onnx.json` comes last. What was written is run in ONNX Runtime and compared with
torch before the command ends.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from axolotl_medusa.decoding.load_target import load_source
from axolotl_medusa.decoding.target_cache import check_target, mixes_layer_types, sliding_window
from axolotl_medusa.model.anatomy import causal_lm, embedding_shape, output_embedding
from axolotl_medusa.model.file_names import CARD_FILE, CONFIG_FILE, META_FILE
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import package_version, read_heads
from axolotl_medusa.model.secrets import without_secrets
from axolotl_medusa.model.sources import Source
from axolotl_medusa.model.tensor_files import write_json
from axolotl_medusa.onnx_decoding.directory import PRECISIONS, About, file_digest
from axolotl_medusa.onnx_decoding.graph_names import ABOUT_FILE, FORMAT, MODEL_DATA_FILE, MODEL_FILE, head_file
from axolotl_medusa.onnx_export.card import onnx_card
from axolotl_medusa.onnx_export.graphs import BITS, check_packages, quantize, write_head_graph, write_step_graph
from axolotl_medusa.onnx_export.step_graph import OPSET
from axolotl_medusa.onnx_export.verify import expected_of, verify_onnx
from axolotl_medusa.serving.export import prepared_directory

LOG = logging.getLogger(__name__)

TARGET = "onnx"
"""What `--to` takes."""

HEADS_PRECISIONS = {"fp32": "int8", "int8": "int4", "int4": "int4"}
"""Precision of the heads' output layers by the model's: drafts are verified, so it changes speed and never the text."""

_VERSIONS_OF = ("axolotl-medusa", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(
    source: Source, out: str | Path, precision: str = "fp32", heads_precision: str | None = None, verify: bool = True
) -> str | None:
    """Writes an ONNX directory.

    Args:
        source: The heads and their model, from `find_source`.
        out: The directory to write; new, empty, or with an earlier export, whose files are replaced.
        precision: `fp32`, or `int8` or `int4` for the model's matrices; activations are fp32.
        heads_precision: Of the heads' output layers, by default as `HEADS_PRECISIONS` says.
        verify: Whether the directory is run and compared with torch.

    Returns:
        A line on what the comparison found, None without it.

    Raises:
        ValueError: The model cannot be expressed, or what was written gives other logits or tokens, and stays for inspection.
        RuntimeError: A package is missing.
    """
    out = Path(out).expanduser()
    heads_precision = heads_precision or HEADS_PRECISIONS.get(precision, "int8")
    for name, value in (("precision", precision), ("heads-precision", heads_precision)):
        if value not in PRECISIONS:
            raise ValueError(f"--{name} is {value}, expected one of {', '.join(PRECISIONS)}")
    check_packages()
    model, heads = _loaded(source)
    about = about_model(model, heads, precision)
    expected = expected_of(model, heads, source.tokenizer_files()) if verify else None
    _prepare(source, out)
    names = [*_write_heads(model, heads, out, heads_precision), MODEL_FILE, MODEL_DATA_FILE]
    del heads
    gc.collect()
    write_step_graph(model, about, out / MODEL_FILE)
    del model
    gc.collect()
    if precision in BITS:
        quantize(out / MODEL_FILE, BITS[precision], data_file=MODEL_DATA_FILE)
    _write_about(source, out, about, heads_precision, names)
    return None if expected is None else verify_onnx(out, expected)


def about_model(model: nn.Module, heads: MedusaHeads, precision: str = "fp32") -> About:
    """Sizes of a model and its heads as `medusa_onnx.json` has them.

    Raises:
        ValueError: Its layers have caches of different shapes.
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    kv_heads, head_size = _cache_sizes(model)
    eos = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    eos_token_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    vocab_size, hidden_size = embedding_shape(output_embedding(model))
    return About(
        precision=precision,
        layers=int(config.num_hidden_layers),
        kv_heads=kv_heads,
        head_size=head_size,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        context=getattr(config, "max_position_embeddings", None) or 0,
        window=sliding_window(config) or 0,
        mixes=mixes_layer_types(config) and sliding_window(config) is not None,
        num_heads=heads.num_heads,
        draft_top_k=vocab_size,
        eos_token_ids=eos_token_ids,
    )


@torch.no_grad()
def _cache_sizes(model: nn.Module) -> tuple[int, int]:
    """Heads of keys and values and the size of each, as a forward makes them."""
    lm = causal_lm(model)
    cache = lm(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True).past_key_values
    shapes = {tuple(states.shape) for layer in cache.layers for states in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ValueError(
            f"{type(lm).__name__} keeps keys and values of several shapes ({sorted(shapes)}), expected one: ONNX directories have "
            "one buffer shape for all layers; export to another target"
        )
    _, kv_heads, _, head_size = shapes.pop()
    return kv_heads, head_size


def _loaded(source: Source) -> tuple[nn.Module, MedusaHeads]:
    """The model in fp32 with its adapter merged, and the heads."""
    heads = read_heads(source.heads_dir).as_heads().float().eval()
    model = load_source(source, torch.float32)
    merge = getattr(model, "merge_and_unload", None)
    merged: nn.Module = merge() if callable(merge) else model
    merged = merged.eval().requires_grad_(False)
    check_target(merged)
    return merged, heads


def _prepare(source: Source, out: Path) -> None:
    exported = {"target": TARGET, "config": source.config, "adapter": False}
    files = {file.name: file for file in source.tokenizer_files()}
    prepared_directory(source, out)
    write_json(out / META_FILE, {**without_secrets(source.meta), "export": {**exported, "files": sorted(files)}})
    for name, file in files.items():
        shutil.copyfile(file, out / name)


def _write_heads(model: nn.Module, heads: MedusaHeads, out: Path, precision: str) -> list[str]:
    """Writes every head; one that shares the model's output layer gets a copy of it."""
    names = []
    for index in range(heads.num_heads):
        layer = heads.output_layer(index) or rows_of(cast(nn.Linear, output_embedding(model)), heads.token_map)
        name = head_file(index)
        write_head_graph(heads.blocks(index), layer, out / name, heads.token_map)
        if precision in BITS:
            quantize(out / name, BITS[precision], data_file=None)
        names.append(name)
    return names


def rows_of(layer: nn.Linear, token_map: Tensor | None) -> nn.Linear:
    """The model's output layer, or of a draft vocabulary its rows alone."""
    if token_map is None:
        return layer
    rows = nn.Linear(layer.in_features, len(token_map), bias=layer.bias is not None)
    with torch.no_grad():
        rows.weight.copy_(layer.weight[token_map])
        if layer.bias is not None:
            rows.bias.copy_(layer.bias[token_map])
    return rows


def _write_about(source: Source, out: Path, about: About, heads_precision: str, names: list[str]) -> None:
    write_json(out / CONFIG_FILE, without_secrets(source.config))
    (out / CARD_FILE).write_text(
        without_secrets(onnx_card(about, heads_precision, source.base_model)), encoding="utf-8"
    )
    files = {name: {"bytes": (out / name).stat().st_size, "sha256": file_digest(out / name)} for name in names}
    content: dict[str, Any] = {
        "format": FORMAT,
        "model": dataclasses.asdict(about),
        "heads_precision": heads_precision,
        "opset": OPSET,
        "base_model": source.base_model,
        "lm_head_sha256": source.meta.get("lm_head_sha256"),
        "versions": {name: package_version(name) for name in _VERSIONS_OF},
        "files": files,
    }
    write_json(out / ABOUT_FILE, without_secrets(content))
