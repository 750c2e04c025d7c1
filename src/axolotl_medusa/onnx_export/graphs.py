"""Writes a model's step and its heads as ONNX files, and holds their matrices in fewer bits.

Contract: modules in, files out. torch's own exporter makes the graphs, ONNX Runtime's own quantiser changes them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_medusa.errors import first_line
from axolotl_medusa.onnx_decoding.directory import About
from axolotl_medusa.onnx_decoding.graph_names import (
    ASKED,
    ATTENTION_BIAS,
    BEST,
    COLUMNS,
    HIDDEN_STATES,
    INPUT_IDS,
    LOG_PROBABILITIES,
    LOGITS,
    LOGITS_OF,
    POSITION_IDS,
    SLIDING_BIAS,
    TOKENS,
    TOP_K,
    cache_names,
    written,
)
from axolotl_medusa.onnx_export.step_graph import OPSET, HeadGraph, StepGraph

BITS = {"int8": 8, "int4": 4}
"""Bits of a weight by precision; others are kept as they are."""

_BLOCK = 32
"""Weights that share a scale."""

_ACCURACY_LEVEL = 4
"""Activations are rounded to int8 for the product with int8 or int4 weights: the level that CPUs have instructions for."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Checks that what exporting needs is installed.

    Raises:
        RuntimeError: A package is missing.
    """
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(
                f"exporting to ONNX needs {package} ({first_line(error)}): pip install 'axolotl-medusa[onnx]'"
            ) from error
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(f"exporting to ONNX needs torch 2.8 or later, found {torch.__version__}: update torch")


def write_step_graph(model: nn.Module, about: About, file: Path) -> None:
    """Exports a causal LM in fp32, its weights in a file beside the graph.

    Raises:
        ValueError: The exporter cannot follow the model.
    """
    batch, new, columns, asked, wanted = (
        torch.export.Dim(name) for name in ("batch", "new", "columns_", "asked_", "wanted")
    )
    ids = torch.zeros(2, 3, dtype=torch.long)
    bias, rows = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [0, 1, 2]])
    buffers = [torch.zeros(2, about.kv_heads, 5, about.head_size) for _ in range(2 * about.layers)]
    names = cache_names(about.layers)
    inputs: dict[str, Any] = {  # no tensor twice: the exporter would take two inputs for one
        "input_ids": ids,
        "position_ids": rows.clone(),
        "attention_bias": bias,
        "sliding_bias": bias.clone() if about.mixes else None,
        "columns": rows,
        "asked": rows[:, :2].clone(),
        "logits_of": torch.tensor([0, 1]),
        "cache": buffers,
    }
    shapes = {
        "input_ids": {0: batch, 1: new},
        "position_ids": {0: batch, 1: new},
        "attention_bias": {0: batch, 1: new, 2: columns},
        "sliding_bias": {0: batch, 1: new, 2: columns} if about.mixes else None,
        "columns": {0: batch, 1: new},
        "asked": {0: batch, 1: asked},
        "logits_of": {0: wanted},
        "cache": [{0: batch, 2: columns}] * len(buffers),
    }
    sliding = [SLIDING_BIAS] if about.mixes else []
    _export(
        StepGraph(model),
        file,
        inputs,
        shapes,
        [INPUT_IDS, POSITION_IDS, ATTENTION_BIAS, *sliding, COLUMNS, ASKED, LOGITS_OF, *names],
        [BEST, HIDDEN_STATES, LOGITS, *map(written, names)],
        external_data=True,
    )


def write_head_graph(blocks: nn.Module, output_layer: nn.Linear, file: Path, token_map: Tensor | None = None) -> None:
    """Exports one head in fp32, its weights in the same file; with a `token_map`, that of a draft vocabulary.

    Raises:
        ValueError: The exporter cannot follow it.
    """
    hidden = torch.zeros(2, output_layer.in_features)
    _export(
        HeadGraph(blocks, output_layer, token_map),
        file,
        {"hidden": hidden, "top_k": torch.tensor([2])},
        {"hidden": {0: torch.export.Dim("batch")}, "top_k": None},
        [HIDDEN_STATES, TOP_K],
        [TOKENS, LOG_PROBABILITIES],
        external_data=False,
    )


def _export(
    graph: nn.Module,
    file: Path,
    inputs: dict[str, Any],
    shapes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    *,
    external_data: bool,
) -> None:
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph.eval(),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"torch's exporter cannot follow this model ({type(cause).__name__}: {first_line(cause)}): ONNX has no graph of it; "
                "export to another target"
            ) from error
        if program is None:
            raise RuntimeError("torch.onnx.export gave no program: update torch")
        for node in program.model.graph:
            if node.op_type == "TopK":  # their last axis is an input's value, not that of the example
                _set_shapes([*node.outputs, *program.model.graph.outputs], ["batch", TOP_K])
        program.save(str(file), external_data=external_data)


def _set_shapes(values: Sequence[Any], names: list[str]) -> None:
    shape = importlib.import_module("onnx_ir").Shape
    for value in values:
        value.shape = shape(names)


def quantize(file: Path, bits: int, *, data_file: str | None = None) -> None:
    """Holds the constant matrices of a graph in `bits` bits, in blocks with a scale each; biases and embeddings stay.

    Args:
        file: The graph, with its external data beside it if it has any; it is replaced.
        bits: 4 or 8.
        data_file: Name of the external data file, None where the weights are in the graph's own file.
    """
    onnx = importlib.import_module("onnx")
    quantizer_module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    model = onnx.load(str(file))
    _constant_matrices(model.graph, onnx)
    quantizer = quantizer_module.MatMulNBitsQuantizer(
        model, bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=_ACCURACY_LEVEL
    )
    with _quiet():
        quantizer.process()
    small = quantizer.model.model
    file.unlink()
    if data_file is None:
        onnx.save(small, str(file))
        return
    (file.parent / data_file).unlink()
    onnx.save(small, str(file), save_as_external_data=True, location=data_file, size_threshold=1024)


def _constant_matrices(graph: Any, onnx: Any) -> None:
    """Turns `x @ transpose(constant)` into `x @ constant`: a tied lm_head is the embedding, transposed in the graph."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    used = [name for node in graph.node for name in node.input]
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in constants]:
        users = [user for user in graph.node if node.output[0] in user.input]
        if any(user.op_type != "MatMul" or user.input[1] != node.output[0] for user in users):
            continue
        origin = constants[node.input[0]]
        weight = onnx.numpy_helper.to_array(origin).T.copy()
        graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
        graph.node.remove(node)
        if used.count(origin.name) == 1:
            graph.initializer.remove(origin)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter and the quantiser say about themselves from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
