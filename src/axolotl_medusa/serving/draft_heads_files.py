"""Reads heads for a drafter: a heads directory, or what `axolotl-medusa export --to vllm` writes.

Contract: knows names of tensors and the keys of `config.json`; holds the stacked weights and one tensor more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_medusa.model.file_names import CONFIG_FILE
from axolotl_medusa.model.head_form import DRAFT_VOCAB_KEY, form_of
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.tensor_files import TensorFiles
from axolotl_medusa.serving.draft_heads import DraftHeads
from axolotl_medusa.serving.head_names import OUTPUT_LAYER, HeadTensor, parse


@dataclass(frozen=True)
class Part:
    """Which rows of the output layers a rank of tensor parallelism holds.

    Attributes:
        rank: From 0.
        ranks: How many there are.
    """

    rank: int = 0
    ranks: int = 1

    def rows(self, vocab_size: int) -> slice:
        """The rank's rows: equal parts, the last one may be shorter."""
        size = -(-vocab_size // self.ranks)
        return slice(min(self.rank * size, vocab_size), min((self.rank + 1) * size, vocab_size))


def read_draft_heads(
    directory: Path,
    num_heads: int,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    part: Part = Part(),
) -> DraftHeads:
    """Reads the first heads of a directory.

    Args:
        directory: A heads directory or an export for vLLM.
        num_heads: Heads to read: drafts per step.
        sizes: `hidden_size` and `vocab_size` of the served model.
        dtype: The type to hold them in: the model's.
        device: Where to hold them.
        part: This rank's part of the output layers.

    Raises:
        ValueError: The directory holds no heads, fewer of them, or heads of a model of another size.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(
            f"medusa_heads is {directory}, which has no {CONFIG_FILE}: expected the medusa_heads of a training, or what "
            "`axolotl-medusa export --to vllm` wrote"
        )
    config = read_json(directory / CONFIG_FILE)
    for key, size in sizes.items():
        if config.get(key) != size:
            raise ValueError(
                f"{directory} holds heads with {key} {config.get(key)}, expected {size} as the served model has: serve the model "
                "that they were trained on"
            )
    files = TensorFiles.open(directory)
    names = {found.tensor: name for name in files if (found := parse(name)) is not None}
    there = 1 + max((tensor.head for tensor in names), default=-1)
    if there < num_heads:
        raise ValueError(
            f"num_speculative_tokens is {num_heads}, expected at most {there}, the number of heads in {directory}"
        )
    return _stacked(files, names, config, num_heads, dtype, device, part)


def _stacked(
    files: TensorFiles,
    names: Mapping[HeadTensor, str],
    config: Mapping[str, Any],
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    part: Part,
) -> DraftHeads:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = 1 + max((tensor.layer for tensor in names if tensor.kind == "linear.weight"), default=-1)
    if not layers:
        raise ValueError(f"{files.where} holds no residual blocks, expected Medusa heads")

    def read(tensor: HeadTensor, shape: tuple[int, ...]) -> Tensor:
        name = names.get(tensor, tensor.canonical)
        if name not in files or files.shape(name) != shape:
            found = files.shape(name) if name in files else "missing"
            raise ValueError(f"{files.where}: {name} is {found}, expected {shape}: get the heads again")
        return files.load(name)

    def stack(layer: int, kind: Any, *shape: int, rows: slice = slice(None), heads: int = num_heads) -> Tensor:
        length = len(range(*rows.indices(shape[0])))
        stacked = torch.empty((heads, length, *shape[1:]), dtype=dtype, device=device)
        for head in range(heads):
            stacked[head].copy_(read(HeadTensor(head, layer, kind), shape)[rows])
        return stacked

    weights = tuple(stack(layer, "linear.weight", hidden, hidden) for layer in range(layers))
    has_bias = any(tensor.kind == "linear.bias" for tensor in names)
    biases = tuple(
        stack(layer, "linear.bias", hidden)
        if has_bias
        else torch.zeros((num_heads, hidden), dtype=dtype, device=device)
        for layer in range(layers)
    )
    output = next((tensor.layer for tensor in names if tensor.kind == "weight"), None)
    form = form_of({"original_lm_head": False, **config})
    if output is None or form == "shared":
        return DraftHeads(weights, biases)
    if config.get(DRAFT_VOCAB_KEY):
        raise ValueError(
            f"{files.where} holds heads that choose among {config[DRAFT_VOCAB_KEY]} of the model's tokens, which this drafter does not "
            "serve: train them without medusa_draft_vocab"
        )
    if output not in (OUTPUT_LAYER, layers):
        raise ValueError(f"{files.where} has an output layer after {output} blocks of {layers}: get the heads again")
    rows, layers_of_their_own = part.rows(vocab), 1 if form == "trained" else num_heads
    outputs = stack(output, "weight", vocab, hidden, rows=rows, heads=layers_of_their_own)
    return DraftHeads(weights, biases, outputs, rows.start)
