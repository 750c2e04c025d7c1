"""Exits that tell the user in one line what went wrong, and what a loss that is not finite most likely comes from.

Contract: knows parameters and axolotl's training arguments; looks only at what this rank holds, because other ranks may
not be here.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from axolotl_medusa.model.divided_parameters import is_divided, local_part

_LARGEST_WEIGHT = 1e4
"""Weights of working models stay far below; NaN is not below either. Only used to name the cause of a NaN loss."""


def stop(message: str) -> SystemExit:
    """An exit with status 1 and one line, without the traceback that a user's mistake does not need."""
    return SystemExit(f"axolotl-medusa: {message}")


def nonfinite_loss(loss: float, step: int, model: nn.Module, args: Any) -> SystemExit:
    """The exit for a loss that is NaN or infinite.

    Args:
        loss: The loss.
        step: The optimizer step that it belongs to.
        model: The model, as the steps before left it.
        args: The training arguments.
    """
    name, largest = largest_weight(model)
    healthy = "all weights look healthy" + (" on this rank" if any(map(is_divided, model.parameters())) else "")
    if not largest < _LARGEST_WEIGHT:
        cause = (
            f"{name} has grown to {largest:.3g}: an earlier step was too large; lower learning_rate or "
            "medusa_lr_multiplier, lengthen warmup_steps, or set max_grad_norm"
        )
    elif args.fp16:
        cause = f"{healthy}: activations overflow in fp16; train with bf16"
    else:
        cause = f"{healthy}: activations overflow; check the data of this step and the model's precision"
    return stop(
        f"the loss is {loss} at step {step}; {cause}. Stopped before the step changed anything; "
        f"checkpoints in {args.output_dir} are untouched."
    )


def largest_weight(model: nn.Module) -> tuple[str, float]:
    """Name and size of the largest weight that this rank holds, NaN before all others; of none the size is 0."""
    sizes = {"": 0.0}
    for name, parameter in model.named_parameters():
        part = local_part(parameter)
        if part.numel() and part.is_floating_point():
            sizes[name] = part.abs().max().item()
    name = max(sizes, key=lambda name: math.inf if math.isnan(sizes[name]) else sizes[name])
    return name, sizes[name]
