"""What a user is told when the loss is not finite, also where this rank holds only parts of the weights, or none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from axolotl_medusa.training.stopping import largest_weight, nonfinite_loss, stop


def model_of(**values: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in values.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return model


def empty_on_this_rank(model: nn.Module, name: str) -> None:
    parameter = getattr(model, name)
    parameter.ds_shape, parameter.ds_numel, parameter.data = parameter.shape, parameter.numel(), torch.empty(0)


def told(model: nn.Module, fp16: bool = False) -> str:
    return str(nonfinite_loss(float("nan"), 7, model, SimpleNamespace(fp16=fp16, output_dir="out")).code)


def test_largest_weight_prefers_nan():
    assert largest_weight(model_of(a=torch.tensor([1e9]), b=torch.tensor([1.0, float("nan")])))[0] == "b"
    assert largest_weight(model_of(a=torch.tensor([-3.0]), b=torch.tensor([2.0]))) == ("a", 3.0)


def test_largest_weight_passes_over_what_this_rank_does_not_hold_and_over_packed_weights():
    model = model_of(a=torch.tensor([1e9]), b=torch.tensor([2.0]), packed=torch.tensor([255], dtype=torch.uint8))
    empty_on_this_rank(model, "a")
    assert largest_weight(model) == ("b", 2.0)
    empty_on_this_rank(model, "b")
    assert largest_weight(model) == ("", 0.0)


@pytest.mark.parametrize(
    ("fp16", "cause"),
    [(True, "activations overflow in fp16; train with bf16"), (False, "check the data of this step")],
)
def test_nonfinite_loss_with_healthy_weights_blames_activations(fp16, cause):
    message = told(model_of(a=torch.ones(2)), fp16)
    assert message.startswith("axolotl-medusa: the loss is nan at step 7; all weights look healthy: ")
    assert cause in message and "checkpoints in out are untouched" in message


def test_nonfinite_loss_names_the_weight_that_grew():
    message = told(model_of(a=torch.ones(2), b=torch.full((2,), 1e30)))
    assert "b has grown to 1e+30" in message and "lower learning_rate" in message


def test_nonfinite_loss_says_where_it_saw_only_this_ranks_part():
    model = model_of(a=torch.ones(2), b=torch.ones(2))
    empty_on_this_rank(model, "b")
    assert "all weights look healthy on this rank" in told(model)


def test_stop_is_one_line_and_status_1():
    assert stop("why").code == "axolotl-medusa: why"
