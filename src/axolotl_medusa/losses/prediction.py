"""What the losses are asked for: rows of a student with their targets, its output layer, and the teacher.

Contract: describes and computes nothing; knows nothing about models, axolotl or files. A student is whatever predicts
tokens and is trained: the base model, or one head. The teacher gives a distribution to learn, and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_medusa.cpu_instructions import multiplies_bf16
from axolotl_medusa.losses.cross_entropy_and_kl import CROSS_ENTROPY, LossWeights

Project = Callable[[Tensor], Tensor]
"""Maps hidden rows `[rows, hidden]` to logits `[rows, vocab]`."""


@dataclass(frozen=True)
class OutputLayer:
    """An output layer as the losses see it.

    Attributes:
        project: Hidden rows to logits.
        vocab_size: V.
        parameters: What `project` uses; those that require a gradient get one.
        weight: `[V, H]` where logits are nothing but `hidden @ weight.T`; None otherwise.
        dtype: What `hidden @ weight.T` is computed in, see `matmul_dtype`.
    """

    project: Project
    vocab_size: int
    parameters: Sequence[Tensor] = ()
    weight: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that want a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


@dataclass(frozen=True)
class Accuracies:
    """Which accuracies are wanted.

    Attributes:
        top_k: Top 1 to k.
        every: Beyond the top token they come from every n-th row of a chunk.
    """

    top_k: int
    every: int = 1


@dataclass(frozen=True)
class Prediction:
    """Rows of one student.

    Attributes:
        hidden: Input of the output layer, `[rows, hidden]`.
        targets: Token ids, `[rows]`, none ignored.
        layer: The output layer.
        weights: What a row's loss is made of.
        scale: Factor on the sum of the rows' losses.
        teacher_rows: For every row the teacher's row that speaks of the same token, ascending, `[rows]`; None where the
            loss has no distance from it.
        accuracies: Accuracies wanted, if any.
    """

    hidden: Tensor
    targets: Tensor
    layer: OutputLayer
    weights: LossWeights = CROSS_ENTROPY
    scale: Tensor | float = 1.0
    teacher_rows: Tensor | None = None
    accuracies: Accuracies | None = None


@dataclass(frozen=True)
class Teacher:
    """Whose distribution students learn: rows of hidden states `[rows, hidden]` and their output layer."""

    hidden: Tensor
    layer: OutputLayer


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which operands of `dtype` are multiplied: fp32 for bf16 on a CPU that has no fast matmuls for it."""
    is_slow = dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bf16()
    return torch.float32 if is_slow else dtype
