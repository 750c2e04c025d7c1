"""What the help of `medusa_distillation_regularization` says of its gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model, randomize

from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.objective import Objective, install_objective


def loss_and_gradients(with_lora: bool, **weights: float) -> tuple[float, dict[str, torch.Tensor]]:
    """One forward and backward of Medusa-2 on random tokens."""
    model = add_lora(make_model(), ["q_proj"]) if with_lora else make_model()
    attach_heads(model, randomize(MedusaHeads(HIDDEN, VOCAB, 2, form="shared")))
    install_objective(model, Objective(**weights))
    tokens = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    loss = model.eval()(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize(
    ("with_lora", "lm", "kl"), [(False, 1.0, 0.0), (True, 0.5, 1.0)], ids=["full", "self-distillation"]
)
def test_regularization_has_the_gradient_of_a_smaller_lm_coefficient(with_lora, lm, kl, alpha):
    """d/dz of CE against α·softmax(z) + (1 - α)·onehot, the softmax held still: softmax - target = (1 - α)(softmax - onehot)."""
    regularized, found = loss_and_gradients(
        with_lora, lm_coefficient=lm, kl_coefficient=kl, distillation_regularization=alpha
    )
    smaller, expected = loss_and_gradients(with_lora, lm_coefficient=lm * (1 - alpha), kl_coefficient=kl)
    plain, other = loss_and_gradients(with_lora, lm_coefficient=lm, kl_coefficient=kl)
    assert found.keys() == expected.keys() == other.keys() and found
    for name, gradient in expected.items():
        # fp32 rounding of sums in another order, relative to the tensor's largest gradient
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    assert any(not torch.allclose(found[name], other[name], rtol=1e-2) for name in found)
    assert regularized != pytest.approx(smaller, rel=1e-3), "the logged losses differ"


def test_help_of_the_regularization_says_so():
    text = MedusaArgs.model_fields["medusa_distillation_regularization"].description
    assert "medusa_lm_coefficient times (1 - α)" in text and "gradient" in text
