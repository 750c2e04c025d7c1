"""Who gathers and who copies where ZeRO-3 or FSDP2 divides parameters; neither engine runs here, their marks are enough."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_model, randomize

from axolotl_medusa.model import divided_parameters
from axolotl_medusa.model.divided_parameters import fill, gathered, host_copy, is_divided, local_part, whole_shape
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import heads_tensors, load_into, parameter_hash
from axolotl_medusa.model.tensor_files import LazyTensor

DIVIDED = pytest.mark.parametrize("divided", [False, True], ids=["whole", "zero3"])


def zero3(parameter: torch.nn.Parameter, rank: int = 0, ranks: int = 2) -> None:
    """Leaves of a parameter what DeepSpeed leaves: an empty tensor, and this rank's part of its values."""
    size = -(-parameter.numel() // ranks)
    part = torch.full((size,), float("nan"))  # what pads the last part is never set
    own = parameter.detach().flatten()[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    part.ds_numel = size
    parameter.ds_shape, parameter.ds_numel, parameter.ds_tensor = parameter.shape, parameter.numel(), part
    parameter.data = torch.empty(0)


@pytest.fixture
def gathers(monkeypatch) -> list[tuple[list[int], int | None]]:
    """Numbers of elements in every gathering of ZeRO-3, and the rank whose writes it keeps."""
    seen = []

    @contextlib.contextmanager
    def record(parameters, modifier_rank=None):
        seen.append(([parameter.ds_numel for parameter in parameters], modifier_rank))
        for parameter in parameters:
            parameter.data = torch.full(parameter.ds_shape, 0.5)
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", record)
    return seen


@pytest.fixture
def this_rank(monkeypatch):
    def be(rank: int) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)

    be(0)
    return be


def model_with_heads(form: str, divided: bool):
    model = make_model()
    attach_heads(model, randomize(MedusaHeads(HIDDEN, VOCAB, 3, form=form)))
    if divided:
        for parameter in model.parameters():
            zero3(parameter)
    return model


@DIVIDED
@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_are_copied_by_the_rank_that_keeps_them_alone(form, divided, gathers, monkeypatch):
    model = model_with_heads(form, divided)
    copied = []
    monkeypatch.setattr(divided_parameters, "whole", lambda tensor: copied.append(tensor.numel()) or tensor)
    assert heads_tensors(model, keep=False) == {}
    others, gathers[:] = list(gathers), []
    assert divided or not copied
    tensors = heads_tensors(model, keep=True)
    assert len(tensors) == (9 if form == "separate" else 7)
    assert gathers == others, "ranks that gather in another order wait for each other for ever"
    assert bool(gathers) is divided
    assert all(len(sizes) == 1 for sizes, _ in gathers), "more than one tensor was whole at a time"
    assert all(tensor.numel() for tensor in tensors.values())


@DIVIDED
def test_a_hash_is_made_by_the_rank_that_keeps_it_alone(divided, gathers):
    weight = model_with_heads("shared", divided).lm_head.weight
    assert parameter_hash(weight, keep=False) == ""
    assert len(parameter_hash(weight)) == 64
    assert len(gathers) == (2 if divided else 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_saved_heads_are_read_by_rank_0_alone_tensor_by_tensor(rank, gathers, this_rank):
    this_rank(rank)
    model = model_with_heads("separate", divided=True)
    read = []

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        read.append(name)
        return torch.ones(shape)

    shapes = {name: whole_shape(parameter) for name, parameter in model.medusa_heads.named_parameters()}
    tensors = {
        name: LazyTensor(name, torch.float32, shape, lambda name=name, shape=shape: load(name, shape))
        for name, shape in shapes.items()
    }
    load_into(model, tensors)
    assert read == (list(shapes) if rank == 0 else [])
    assert gathers == [([parameter.ds_numel], 0) for parameter in model.medusa_heads.parameters()]


def test_fill_reads_into_a_whole_parameter_on_every_rank(this_rank):
    this_rank(1)
    parameter = torch.nn.Parameter(torch.zeros(3))
    fill(parameter, torch.ones(3))
    assert torch.equal(parameter, torch.ones(3))


def test_gathered_keeps_nobodys_writes_unless_asked(gathers):
    parameter = torch.nn.Parameter(torch.zeros(3))
    zero3(parameter)
    with gathered([parameter]):
        assert parameter.shape == (3,)
    assert gathers == [([3], None)]


def test_host_copy_is_a_copy_that_later_steps_do_not_change():
    parameter = torch.nn.Parameter(torch.ones(3))
    copy = host_copy(parameter)
    parameter.data.zero_()
    assert torch.equal(copy, torch.ones(3)) and not copy.requires_grad


@pytest.mark.parametrize(("rank", "values"), [(0, [1.0, 2.0, 3.0]), (1, [4.0, 5.0])])
def test_local_part_of_a_zero3_parameter_is_its_own_values_without_padding(rank, values, this_rank):
    this_rank(rank)
    parameter = torch.nn.Parameter(torch.arange(1.0, 6.0))
    zero3(parameter, rank)
    assert is_divided(parameter) and whole_shape(parameter) == (5,)
    assert local_part(parameter).tolist() == values


def test_local_part_of_a_dtensor_waits_for_no_other_rank():
    class Sharded(torch.Tensor):
        def to_local(self):
            return torch.ones(2)

        def detach(self):
            return self

        def full_tensor(self):
            raise AssertionError("a collective on one rank")

    part = torch.zeros(4).as_subclass(Sharded)
    assert is_divided(part)
    assert local_part(part).tolist() == [1.0, 1.0]


def test_local_part_of_a_whole_parameter_is_all_of_it():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not is_divided(parameter)
    assert torch.equal(local_part(parameter), torch.ones(3))


@pytest.fixture
def mesh():
    """A mesh of this one process."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fill_hands_values_to_a_dtensor_without_replacing_it(mesh):
    """An optimizer knows the parameter by its identity and its memory."""
    from torch.distributed.tensor import Shard, distribute_tensor

    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)]))
    memory = parameter.to_local().data_ptr()
    fill(parameter, torch.arange(6, dtype=torch.float64).view(3, 2))
    assert parameter.to_local().data_ptr() == memory
    assert torch.equal(parameter.full_tensor(), torch.arange(6.0).view(3, 2))
