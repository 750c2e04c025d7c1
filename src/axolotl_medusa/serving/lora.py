"""Peft's LoRA files: what an adapter does to each parameter of a model, and how that is added to it.

Contract: knows adapter files and matrices; which model they belong to is `serving.served_model`'s to say.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from torch import Tensor

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.sources import adapter_file
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles

_PEFT_PREFIX = "base_model.model."
_LORA_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<matrix>[AB])(\.weight)?")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save)\.")
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

_NOT_MERGED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
)
"""Settings of peft that make a LoRA something else than `W + scaling · B A` of one matrix."""

_STARTS_ON_BASE_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave W as it is; the others (PiSSA, LoftQ, ...) train beside a changed W."""

HOW_ELSE = (
    "merge it with `axolotl merge-lora` and export the run's medusa_heads with the merged directory as --base-model"
)
"""What to do with an adapter that is not merged here."""

_LONGEST_PATTERN, _REPETITIONS = 300, 2
_REPETITION = re.compile(r"(?<!\\)[*+?{]")
_SLOW = re.compile(r"\)[*+?{]|\(\?|\\\d")
"""Of a module's pattern: repeated groups may take time that doubles with each letter of a name."""
_LARGEST_ALPHA = 1e9

_BLOCK_ELEMENTS = 1 << 20
"""Elements of a matrix that are merged at once: 4 MB of fp32."""


@dataclass
class Change:
    """What an adapter does to one parameter.

    Attributes:
        whole: The parameter as it was saved with the adapter, in place of the base model's.
        low_rank: LoRA's matrices A `[rank, in]` and B `[out, rank]`, whose product is added to it.
        scaling: Factor of B A.
        is_embedding: Whether (B A)ᵀ is what is added: an embedding is `[in, out]`.
        rows: Trained rows `[number, hidden_size]`, in place of those of the tokens `row_ids`.
        row_ids: Token ids of `rows`.
    """

    whole: LazyTensor | None = None
    low_rank: dict[str, LazyTensor] = field(default_factory=dict)
    scaling: float = 1.0
    is_embedding: bool = False
    rows: LazyTensor | None = None
    row_ids: list[int] = field(default_factory=list)


def read_adapter(adapter_dir: Path) -> tuple[dict[str, Any], dict[str, Change]]:
    """Reads an adapter that training wrote; its tensors are not loaded yet.

    Returns:
        Its `adapter_config.json`, and what it does by the name of the model's parameter.

    Raises:
        ValueError: A file or tensor is missing, or the adapter is of a kind that is not merged here.
    """
    config = read_json(adapter_dir / ADAPTER_CONFIG_FILE)
    _check_mergeable(config, adapter_dir)
    file = adapter_file(adapter_dir)
    changes: defaultdict[str, Change] = defaultdict(Change)
    for tensor in TensorFiles.open(file).values():
        name = tensor.name.removeprefix(_PEFT_PREFIX)
        if match := _LORA_MATRIX.fullmatch(name):
            change = changes[match["module"] + ".weight"]
            change.low_rank[match["matrix"]] = tensor
            change.is_embedding = match["embedding"] is not None
            change.scaling = _scaling(config, match["module"], change)
        elif name.endswith(_TOKEN_ROWS):
            module = name.removesuffix(_TOKEN_ROWS)
            changes[module + ".weight"].rows = tensor
            changes[module + ".weight"].row_ids = _row_ids(config, module)
        elif "lora_" in name or "token_adapter" in name:
            raise ValueError(f"{file}: {tensor.name} is not part of plain LoRA: {HOW_ELSE}")
        elif ".original_module." not in name:
            # modules_to_save, trained biases, or embeddings that peft saved because they were resized or targeted
            changes[_WRAPPER.sub(".", name)].whole = tensor
    for parameter, change in changes.items():
        if len(change.low_rank) == 1:
            raise ValueError(f"{file} has only lora_{next(iter(change.low_rank))} of {parameter}: get the file again")
    return config, dict(changes)


def _check_mergeable(config: dict[str, Any], adapter_dir: Path) -> None:
    start = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA":
        kind = f"peft_type {first_line(str(config.get('peft_type')))}"
    elif setting := next((name for name in _NOT_MERGED if config.get(name)), None):
        kind = f"a LoRA with {setting}"
    elif start not in _STARTS_ON_BASE_WEIGHTS:
        kind = f"a LoRA with init_lora_weights: {first_line(str(start))}, whose base weights were changed"
    else:
        return
    raise ValueError(f"{adapter_dir} is {kind}, expected plain LoRA: {HOW_ELSE}")


def _scaling(config: dict[str, Any], module: str, change: Change) -> float:
    """LoRA's factor, alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""
    for matrix, tensor in change.low_rank.items():
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{tensor.name} is {tensor.shape}, expected the matrix {matrix} of a LoRA: get the file again"
            )
    rank = change.low_rank["A"].shape[0] if "A" in change.low_rank else change.low_rank["B"].shape[1]
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{ADAPTER_CONFIG_FILE}: alpha_pattern is {shorten(patterns)}, expected numbers by module")
    alpha = next((own for pattern, own in patterns.items() if _fits(pattern, module)), None)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha <= _LARGEST_ALPHA:
        raise ValueError(f"{ADAPTER_CONFIG_FILE}: lora_alpha is {shorten(alpha)}, expected a number from 0")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _fits(pattern: str, module: str) -> bool:
    """Whether a module is one of a pattern's, a regular expression as peft reads it.

    Raises:
        ValueError: It is none, or one that may take forever.
    """
    try:
        if len(pattern) > _LONGEST_PATTERN or _SLOW.search(pattern) or len(_REPETITION.findall(pattern)) > _REPETITIONS:
            raise ValueError("too many repetitions")
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{ADAPTER_CONFIG_FILE}: alpha_pattern has {ascii(pattern)[:100]} ({error}), expected the name of a module: {HOW_ELSE}"
        ) from error


def _row_ids(config: dict[str, Any], module: str) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((own for name, own in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
        raise ValueError(
            f"{ADAPTER_CONFIG_FILE}: trainable_token_indices is {shorten(indices)}, expected the token ids of {module}'s rows"
        )
    return indices


def changed(base: LazyTensor, change: Change, *, transposed: bool, resizable: bool, adapter_dir: Path) -> LazyTensor:
    """The parameter with the change on it, in the base model's type; computed when it is loaded.

    Args:
        base: The base model's parameter.
        change: What the adapter does to it.
        transposed: The parameter is `[in, out]`, as an embedding.
        resizable: Its number of rows may differ from the base model's, as an embedding's after new tokens.
        adapter_dir: Where the adapter is from, for messages.

    Raises:
        ValueError: Shapes do not fit.
    """
    _check_shapes(base, change, transposed, resizable, adapter_dir)
    start = base if change.whole is None else change.whole

    def load() -> Tensor:
        weight = start.load()
        if change.low_rank:
            a, b = (change.low_rank[matrix].load().float() for matrix in "AB")
            add_low_rank_(weight, a, b, change.scaling, transposed)
        if change.rows is not None:
            weight[change.row_ids] = change.rows.load().to(weight.dtype)
        return weight.to(base.dtype)

    return LazyTensor(base.name, base.dtype, start.shape, load)


def _check_shapes(base: LazyTensor, change: Change, transposed: bool, resizable: bool, adapter_dir: Path) -> None:
    shape = base.shape if change.whole is None else change.whole.shape
    problems = []
    if shape != base.shape and not (resizable and shape[1:] == base.shape[1:]):
        problems.append(f"is {shape} in the adapter")
    if change.low_rank:
        a, b = change.low_rank["A"].shape, change.low_rank["B"].shape
        product = (*b[:1], *a[1:])[:: -1 if transposed else 1]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or product != shape:
            problems.append(f"has LoRA matrices A {a} and B {b}")
    if change.rows is not None and change.rows.shape != (len(change.row_ids), *shape[1:]):
        problems.append(f"has {change.rows.shape} trained rows for {len(change.row_ids)} tokens")
    elif change.rows is not None and max(change.row_ids, default=0) >= shape[0]:
        problems.append(f"has a trained row for token {max(change.row_ids)}")
    if problems:
        raise ValueError(
            f"{base.name} is {base.shape} in the base model but {' and '.join(problems)} of {adapter_dir}: "
            "give the model that it was trained on as --base-model"
        )


def add_low_rank_(weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool = False) -> None:
    """`weight += scaling * (b @ a)` in place, a block of rows at a time: summed in fp32, rounded once.

    Args:
        weight: The matrix, `[out, in]`, in any floating type.
        a: `[rank, in]`, fp32.
        b: `[out, rank]`, fp32.
        scaling: Factor of the product.
        transposed: `weight` is `[in, out]`, and the product is transposed.
    """
    lines = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for begin in range(0, weight.shape[0], lines):
        block = weight[begin : begin + lines]
        delta = (b @ a[:, begin : begin + lines]).T if transposed else b[begin : begin + lines] @ a
        block.copy_(delta.mul_(scaling).add_(block))
