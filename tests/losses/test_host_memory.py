"""Memory that is kept from one step to the next: lent again once it is free, and never while anything uses it."""

from __future__ import annotations

import pytest
import torch
from loss_cases import output_layer

from axolotl_medusa.losses import chunk_plan, host_memory
from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights
from axolotl_medusa.losses.host_memory import _Pool
from axolotl_medusa.losses.prediction import Prediction, Teacher

CPU = torch.device("cpu")
SIZE = 2**20


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    fresh = _Pool()
    monkeypatch.setattr(host_memory, "_POOLS", {"logits": fresh})
    return fresh


def kept_bytes():
    return sum(block.size for pool in host_memory._POOLS.values() for block in pool._blocks)


def floats(rows=512):
    return host_memory.empty("logits", [rows, 1024], torch.float32, CPU)


def test_memory_is_lent_again_once_no_tensor_uses_it():
    first = floats()
    place = first.data_ptr()
    view = first[3:5].T
    del first
    assert floats().data_ptr() != place  # a view of the first still has it
    del view
    assert floats().data_ptr() == place


def test_a_gradient_keeps_its_memory_until_it_is_dropped():
    class Giving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, parameter):
            ctx.gradient = [floats().fill_(2.0)]
            return parameter.sum()

        @staticmethod
        def backward(ctx, grad_output):
            return ctx.gradient.pop()

    parameter = torch.nn.Parameter(torch.zeros(512, 1024))
    Giving.apply(parameter).backward()
    place = parameter.grad.data_ptr()
    Giving.apply(parameter).backward()  # a second part of an accumulated gradient
    assert parameter.grad.data_ptr() == place and bool((parameter.grad == 4.0).all())
    floats().fill_(7.0)
    assert bool((parameter.grad == 4.0).all())
    parameter.grad = None
    assert {floats().data_ptr() for _ in range(2)} & {place}


def test_the_smallest_free_memory_that_is_large_enough_is_lent():
    small, middle, large = (
        host_memory.empty("logits", [size], torch.uint8, CPU) for size in (SIZE, 2 * SIZE, 4 * SIZE)
    )
    place = middle.data_ptr()
    del small, middle, large
    assert host_memory.empty("logits", [SIZE + 1], torch.uint8, CPU).data_ptr() == place


def test_sizes_that_grow_do_not_add_up(pool):
    in_use = floats()
    for size in range(1, 9):
        host_memory.empty("logits", [size * SIZE], torch.uint8, CPU)
    assert sum(block.size for block in pool._blocks) == in_use.nbytes + 8 * SIZE


def test_memory_for_one_use_is_not_lent_for_another():
    gradient = host_memory.empty("gradient", [4 * SIZE], torch.uint8, CPU)
    place = gradient.data_ptr()
    del gradient
    assert host_memory.empty("logits", [SIZE], torch.uint8, CPU).data_ptr() != place
    assert kept_bytes() == 5 * SIZE
    assert host_memory.empty("gradient", [3 * SIZE], torch.uint8, CPU).data_ptr() == place


def test_small_tensors_are_not_kept(pool):
    assert host_memory.empty("logits", [3, 5], torch.bfloat16, CPU).shape == (3, 5)
    assert pool._blocks == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_lent_tensors_have_the_shape_and_type_asked_for(dtype):
    found = host_memory.empty("logits", [1024, 600], dtype, CPU)
    assert found.shape == (1024, 600) and found.dtype == dtype and found.is_contiguous()
    assert found.data_ptr() % 64 == 0


def test_steps_of_medusa_2_need_the_memory_of_the_first_one(monkeypatch):
    """Small buffers must not take the large blocks of the gradients, which would then be made anew at every step."""
    monkeypatch.setattr(host_memory, "_SMALLEST", 0)
    hidden, vocab, rows = 64, 1000, 40
    adapted, own, frozen = (torch.nn.Linear(hidden, vocab, bias=bias) for bias in (True, False, False))
    frozen.requires_grad_(False)
    sizes = []
    for _ in range(4):
        states = torch.randn(rows, hidden, requires_grad=True)
        targets = torch.randint(vocab, (rows,))
        base = Prediction(states, targets, output_layer(adapted), LossWeights(kl=1.0), 1.0, torch.arange(rows))
        head = Prediction(states, targets, output_layer(own))
        monkeypatch.setattr(chunk_plan, "CHUNK_LOGITS", 20 * vocab)
        chunked_loss([head, base], Teacher(states.detach(), output_layer(frozen)))[0].backward()
        adapted.zero_grad()
        own.zero_grad()
        sizes.append(kept_bytes())
    assert sizes == [sizes[0]] * 4
    assert sizes[0] >= own.weight.nbytes
