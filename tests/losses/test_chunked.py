"""Chunked losses against plain PyTorch: values, gradients, accuracies and memory."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from conftest import DEVICE
from loss_cases import ATOL, HIDDEN, LOSSES, ROWS, RTOL, VOCAB, output_layer, peak_bytes
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from axolotl_medusa.losses import chunk_plan, closed_form, matmuls
from axolotl_medusa.losses.chunk_plan import COPIES
from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights, is_top_token, reference_loss, top_k_hits
from axolotl_medusa.losses.prediction import Accuracies, OutputLayer, Prediction, Teacher


class Case:
    """Rows, an output layer with or without bias, targets, and a teacher."""

    def __init__(self, rows=ROWS, dtype=torch.float32, vocab=VOCAB, bias=False, scale=1.0, matmul_dtype=None):
        torch.manual_seed(0)
        self.matmul_dtype = matmul_dtype or dtype
        self.linear = torch.nn.Linear(HIDDEN, vocab, bias=bias).to(dtype)
        self.hidden = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
        self.targets = torch.randint(vocab, (rows,))
        self.teacher_hidden = torch.randn(rows, HIDDEN, dtype=dtype)
        self.teacher_linear = torch.nn.Linear(HIDDEN, vocab).to(dtype).requires_grad_(False)
        self.scale = scale

    @property
    def layer(self) -> OutputLayer:
        return output_layer(self.linear, dtype=self.matmul_dtype)

    @property
    def teacher(self) -> Teacher:
        return Teacher(self.teacher_hidden, output_layer(self.teacher_linear, dtype=self.matmul_dtype))

    @property
    def teacher_logits(self):
        return self.teacher_linear(self.teacher_hidden)

    def loss(self, weights=None, *, accuracies=None, layer=None, **options):
        weights = weights or LossWeights()
        every_row = torch.arange(len(self.targets), device=DEVICE) if weights.needs_teacher else None
        prediction = Prediction(
            self.hidden, self.targets, layer or self.layer, weights, self.scale, every_row, accuracies
        )
        loss, (result,) = chunked_loss([prediction], self.teacher if weights.needs_teacher else None, **options)
        return loss, result

    @property
    def wanted(self):
        return [tensor for tensor in (self.hidden, *self.linear.parameters()) if tensor.requires_grad]


CHUNK_LOGITS = "CHUNK_LOGITS" if DEVICE == "cpu" else "ACCELERATOR_CHUNK_LOGITS"
MODES = {"in-forward": dict(recompute=False), "recompute": dict(recompute=True), "chosen": {}}


@pytest.mark.parametrize("trained", ["hidden", "parameters", "both"])
@pytest.mark.parametrize("chunk_rows", [1, 4, ROWS - 1, ROWS, 1000, None])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_equals_the_reference_of_all_rows(name, bias, mode, chunk_rows, trained):
    weights = LOSSES[name]
    case = Case(bias=bias, scale=0.3)
    case.hidden.requires_grad_(trained != "parameters")
    case.linear.requires_grad_(trained != "hidden")
    logits = case.linear(case.hidden)
    teacher_logits = case.teacher_logits if weights.needs_teacher else None
    expected, sums, _ = reference_loss(logits, case.targets, teacher_logits, weights)
    gradients = torch.autograd.grad(2.5 * 0.3 * expected, case.wanted)
    loss, result = case.loss(weights, chunk_rows=chunk_rows, accuracies=Accuracies(3), **MODES[mode])
    found = torch.autograd.grad(2.5 * loss, case.wanted)
    torch.testing.assert_close(loss, 0.3 * expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(result.loss, expected.detach(), rtol=RTOL, atol=ATOL)  # also after the backward
    torch.testing.assert_close(result.cross_entropy, sums.cross_entropy, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(result.kl, sums.kl, rtol=RTOL, atol=2 * ATOL)
    assert not any(each.requires_grad for each in (result.loss, result.cross_entropy, result.kl))
    assert torch.equal(result.correct, is_top_token(logits, case.targets))
    assert torch.equal(result.topk_hits, top_k_hits(logits, case.targets, 3)) and result.topk_rows == ROWS
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
def test_chunked_loss_of_several_students_of_one_teacher(bias, mode):
    """As the objective has them: rows that are missing here and there, one layer that two share, one without divergence."""
    shared, own = Case(bias=bias), Case(bias=bias, scale=0.7)
    teacher, kl = shared.teacher, LossWeights(cross_entropy=0.5, kl=1.0)
    every = torch.arange(ROWS)
    rows = [every, every[torch.randperm(ROWS)[:15].sort().values], every[9:12], None]
    predictions = []
    for number, chosen in enumerate(rows):
        case = own if number == 1 else shared
        hidden = torch.randn(ROWS if chosen is None else len(chosen), HIDDEN, requires_grad=True)
        weights = LossWeights() if chosen is None else kl
        targets = torch.randint(VOCAB, (len(hidden),))
        predictions.append(Prediction(hidden, targets, case.layer, weights, 0.5 + number, chosen))
    wanted = [each.hidden for each in predictions] + [*shared.linear.parameters(), *own.linear.parameters()]
    expected = 0.0
    for each, chosen in zip(predictions, rows, strict=True):
        teacher_logits = None if chosen is None else shared.teacher_logits[chosen]
        plain, _, _ = reference_loss(each.layer.project(each.hidden), each.targets, teacher_logits, each.weights)
        expected = expected + each.scale * plain
    gradients = torch.autograd.grad(expected, wanted)
    for chunk_rows in (1, 5, 1000):
        loss, results = chunked_loss(predictions, teacher, chunk_rows=chunk_rows, **MODES[mode])
        torch.testing.assert_close(loss, expected, rtol=RTOL, atol=ATOL)
        assert len(results) == len(predictions)
        for ours, theirs in zip(torch.autograd.grad(loss, wanted), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=2 * ATOL)


@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
def test_chunked_loss_computes_the_teacher_once_for_all_students(bias):
    case, seen = Case(bias=bias), []
    every = torch.arange(ROWS)
    predictions = [
        Prediction(case.hidden, case.targets, case.layer, LossWeights(kl=1.0), teacher_rows=every) for _ in range(4)
    ]
    layer = OutputLayer(partial(counting, case.teacher_linear, seen), VOCAB)
    chunked_loss(predictions, Teacher(case.teacher_hidden, layer), chunk_rows=10)
    assert seen == [10, 10, 3]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("weights", ["ce", "kl"])
@pytest.mark.parametrize("mode", MODES)
def test_chunked_loss_sampled_accuracies_count_every_nth_row_of_each_chunk(mode, weights, every, monkeypatch):
    monkeypatch.setattr(closed_form, "_BLOCK_BYTES", 4 * VOCAB * 4)  # blocks must not shift the sample
    case = Case()
    _, result = case.loss(LOSSES[weights], accuracies=Accuracies(4, every), chunk_rows=8, **MODES[mode])
    sampled = [row for start in range(0, ROWS, 8) for row in range(start, min(start + 8, ROWS), every)]
    logits = case.linear(case.hidden)
    assert result.topk_rows == len(sampled)
    assert torch.equal(result.topk_hits, top_k_hits(logits[sampled], case.targets[sampled], 4))
    assert torch.equal(result.correct, is_top_token(logits, case.targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_of_certain_and_of_hopeless_targets(dtype):
    """Probabilities next to 1, whose distance to 1 half precision cannot hold, and below the smallest number."""
    for logit, target in itertools.product((4.0, 8.0, 12.0, 16.0, 30.0, 96.0, 200.0, 1000.0), (0, 1)):
        case = Case(rows=1, dtype=dtype)
        with torch.no_grad():
            case.linear.weight.zero_()
            case.hidden.zero_()
            case.linear.weight[0, 0], case.hidden[0, 0] = 1.0, logit
        case.targets.fill_(target)
        hidden = case.hidden.detach().double().requires_grad_()
        expected = F.cross_entropy(hidden @ case.linear.weight.detach().double().T, case.targets)
        expected.backward()
        loss, result = case.loss(recompute=False, accuracies=Accuracies(1))
        loss.backward()
        rounding = dict(rtol=1e-4, atol=1e-6)
        if dtype == torch.bfloat16:  # on CUDA Liger's kernel takes 1 - p in fp32
            rounding = dict(rtol=2**-7, atol=1e-30 if DEVICE == "cpu" else 1e-6)
        torch.testing.assert_close(loss.double(), expected, **rounding)
        torch.testing.assert_close(case.hidden.grad.double(), hidden.grad, **rounding)
        assert result.correct.item() == (target == 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_chunked_loss_of_broken_logits_is_not_finite(value):
    case = Case()
    with torch.no_grad():
        case.hidden[3, 2] = value
    loss, _ = case.loss(recompute=False)
    assert not torch.isfinite(loss)


def test_chunked_loss_second_backward_says_that_gradients_are_gone():
    loss, _ = Case().loss(recompute=False)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called a second time"):
        loss.backward()


@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_loss_without_rows_is_zero_with_a_zero_gradient_for_every_parameter(recompute, bias):
    case = Case(rows=0, bias=bias)
    for weights in (LossWeights(), LossWeights(kl=1.0)):
        loss, result = case.loss(weights, chunk_rows=3, recompute=recompute)
        assert loss.item() == 0.0 and result.cross_entropy.item() == 0.0
        assert result.correct is None and result.topk_hits is None
        loss.backward()
        assert case.hidden.grad.shape == (0, HIDDEN)
        assert all(each.grad is not None and each.grad.abs().max() == 0 for each in case.linear.parameters())


@pytest.mark.parametrize("why", ["no_grad", "nothing-trains"])
def test_chunked_loss_without_anything_to_train_records_no_graph(why):
    case = Case()
    for tensor in (case.hidden, case.linear):
        tensor.requires_grad_(why == "no_grad")
    with torch.set_grad_enabled(why != "no_grad"):
        loss, _ = case.loss(chunk_rows=5)
    assert not loss.requires_grad
    expected = F.cross_entropy(case.linear(case.hidden), case.targets, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=RTOL, atol=ATOL)


def test_chunked_loss_in_the_forward_computes_no_gradient_for_a_frozen_layer(monkeypatch):
    case = Case()
    case.linear.requires_grad_(False)
    monkeypatch.setattr(matmuls, "add_weight_gradient", pytest.fail)
    case.loss(recompute=False)[0].backward()
    assert case.linear.weight.grad is None and case.hidden.grad is not None


def counting(layer, seen, hidden):
    seen.append(hidden.shape[0])
    return layer(hidden)


@pytest.mark.parametrize(
    ("sharding", "passes"), [(None, 1), ("ds_shape", 2), ("device_mesh", 2)], ids=["plain", "zero-3", "fsdp-2"]
)
def test_chunked_loss_recomputes_only_where_parameters_are_sharded(sharding, passes):
    case, seen = Case(bias=True), []
    if sharding:
        setattr(case.linear.weight, sharding, "sharded")
    layer = output_layer(case.linear, partial(counting, case.linear, seen))
    case.loss(layer=layer, chunk_rows=5)[0].backward()
    assert sorted(seen) == sorted([5, 5, 5, 5, 3] * passes)


@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("weights", ["ce", "kl"])
def test_chunked_loss_of_sharded_parameters_takes_as_many_chunks_as_the_rank_with_most_rows(weights, most, monkeypatch):
    """Each chunk gathers the output layer from all ranks: one chunk less on one of them, and the others wait forever."""

    def all_reduce(counts, operation):
        asked.append((counts.tolist(), operation))
        counts.clamp_(min=most)

    case, asked, seen = Case(bias=True), [], []
    expected, result = case.loss(LOSSES[weights])
    gradients = torch.autograd.grad(expected, case.wanted)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    case.loss(LOSSES[weights], chunk_rows=5)
    assert not asked, "parameters that are whole wait for nobody"
    case.linear.weight.ds_shape = case.linear.weight.shape
    layer = output_layer(case.linear, partial(counting, case.linear, seen))
    loss, again = case.loss(LOSSES[weights], layer=layer, chunk_rows=5, accuracies=Accuracies(3))
    assert asked == [([5], torch.distributed.ReduceOp.MAX)]
    assert seen == [5, 5, 5, 5, 3, 0, 0][: max(5, most)]
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(again.loss, result.loss, rtol=RTOL, atol=ATOL)
    assert again.correct.shape == (ROWS,)
    for ours, theirs in zip(torch.autograd.grad(loss, case.wanted), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)


def test_chunked_loss_whole_recomputation_counts_nothing_twice():
    case = Case()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        loss, result = case.loss(chunk_rows=5, recompute=True, accuracies=Accuracies(VOCAB))
        loss.backward()
    torch.testing.assert_close(result.cross_entropy, loss.detach(), rtol=RTOL, atol=ATOL)
    assert result.correct.shape == (ROWS,) and result.topk_hits[-1] == ROWS


@pytest.mark.parametrize("weights", ["ce", "kl"])
def test_chunked_loss_default_chunk_keeps_chunk_logits(weights, monkeypatch):
    case, seen = Case(bias=True), []
    layer = output_layer(case.linear, partial(counting, case.linear, seen))
    for limit in (COPIES * 10 * VOCAB + 1, VOCAB - 1):  # never less than one row, however large the vocabulary
        monkeypatch.setattr(chunk_plan, CHUNK_LOGITS, limit)
        case.loss(LOSSES[weights], layer=layer)
    assert seen == [10, 10, 3] + [1] * ROWS


@pytest.mark.parametrize(
    ("options", "weights", "chunks"),
    [({}, "ce", 1.5), ({}, "kl", 6), (dict(bias=True), "ce", 4), (dict(bias=True), "all-terms", 8)],
    ids=["matmul-ce", "matmul-kl", "any-layer-ce", "any-layer-all"],
)
def test_chunked_loss_holds_logits_of_few_chunks(options, weights, chunks):
    """One buffer where the layer is a matmul; with a teacher its logits and probabilities too."""
    rows, vocab, chunk_rows = 640, 4000, 10
    case = Case(rows=rows, vocab=vocab, **options)
    peak = peak_bytes(lambda: case.loss(LOSSES[weights], chunk_rows=chunk_rows, recompute=False)[0].backward())
    chunk_bytes, parameter_bytes = 4 * chunk_rows * vocab, 4 * sum(each.numel() for each in case.linear.parameters())
    small = 4 * rows * HIDDEN * 8
    allowed = chunks * chunk_bytes + 3 * parameter_bytes + small
    assert peak < allowed < 4 * rows * vocab / 5


@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_loss_memory_does_not_grow_with_rows_times_vocabulary(recompute):
    peaks = []
    for rows in (100, 800):
        case = Case(rows=rows, vocab=4000)
        peaks.append(peak_bytes(lambda c=case: c.loss(chunk_rows=10, recompute=recompute)[0].backward()))
    assert peaks[1] - peaks[0] < 4 * 700 * 4000 / 10


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
def test_chunked_loss_in_bf16_has_an_fp32_value_and_gradients_of_its_tensors_type(bias, recompute):
    case = Case(dtype=torch.bfloat16, bias=bias)
    loss, result = case.loss(chunk_rows=4, recompute=recompute)
    assert loss.dtype == result.cross_entropy.dtype == result.kl.dtype == torch.float32
    loss.backward()
    assert {tensor.grad.dtype for tensor in case.wanted} == {torch.bfloat16}


@pytest.mark.parametrize("chunk_rows", [8, 512])
@pytest.mark.parametrize("mode", ["in-forward", "recompute"])
@pytest.mark.parametrize(
    ("bias", "matmul_dtype"),
    [(False, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16)],
    ids=["matmul", "matmul-in-fp32", "any-layer"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_in_bf16_is_no_further_from_fp32_than_plain_bf16(name, bias, matmul_dtype, mode, chunk_rows):
    """|ours - fp32| <= |whole bf16 - fp32| + tol: tells a bug from rounding."""
    rows, weights = 512, LOSSES[name]
    tolerance = math.sqrt(rows / chunk_rows) * 2**-9  # chunks are summed in bf16, each sum rounded to 8 bits
    case = Case(rows=rows, dtype=torch.bfloat16, bias=bias, matmul_dtype=matmul_dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in case.wanted]
    exact_teacher = (
        case.teacher_hidden.float() @ case.teacher_linear.weight.float().T + case.teacher_linear.bias.float()
    )
    reference, _, _ = reference_loss(
        F.linear(*exact), case.targets, exact_teacher if weights.needs_teacher else None, weights
    )
    plain_teacher = case.teacher_logits if weights.needs_teacher else None
    plain, _, _ = reference_loss(case.linear(case.hidden), case.targets, plain_teacher, weights)
    ours, _ = case.loss(weights, chunk_rows=chunk_rows, **MODES[mode])
    assert (ours - reference).abs() <= (plain - reference).abs() + 2**-9 * reference.abs()
    for found, theirs, right in zip(
        torch.autograd.grad(ours, case.wanted),
        torch.autograd.grad(plain, case.wanted),
        torch.autograd.grad(reference, exact),
        strict=True,
    ):
        assert (found - right).norm() <= (theirs - right).norm() + tolerance * right.norm()


def test_chunked_loss_in_half_precision_of_certain_and_other_targets_together():
    """Where a target is nearly certain its gradient comes from the other tokens: in those rows alone."""
    case = Case(dtype=torch.bfloat16)
    with torch.no_grad():
        case.hidden[::3] = case.linear.weight[case.targets[::3]] * 30.0
    hidden = case.hidden.detach().double().requires_grad_()
    logits = hidden @ case.linear.weight.detach().double().T
    expected = F.cross_entropy(logits, case.targets, reduction="sum")
    expected.backward()
    certain = logits.softmax(-1)[torch.arange(ROWS), case.targets] > 0.5
    assert 0 < int(certain.sum()) < ROWS
    loss, _ = case.loss(recompute=False)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2**-6, atol=0)
    torch.testing.assert_close(case.hidden.grad.double(), hidden.grad, rtol=2**-5, atol=2**-7)


@pytest.mark.parametrize("rows_at_once", [1, 5, ROWS, ROWS + 1])
def test_chunked_loss_gradient_of_rows_does_not_depend_on_how_many_are_multiplied_at_once(rows_at_once, monkeypatch):
    expected, found = Case(dtype=torch.bfloat16), Case(dtype=torch.bfloat16)
    monkeypatch.setattr(matmuls, "NARROW_HIDDEN", 0)
    expected.loss(recompute=False)[0].backward()
    monkeypatch.setattr(matmuls, "NARROW_HIDDEN", 2**20)
    monkeypatch.setattr(matmuls, "NARROW_ROWS", rows_at_once)
    found.loss(recompute=False)[0].backward()
    for ours, theirs in zip(found.wanted, expected.wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-6, atol=2**-9)


@pytest.mark.parametrize("tokens_at_once", [1, 7, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_chunked_loss_weight_gradient_of_another_type_does_not_depend_on_its_parts(dtypes, tokens_at_once, monkeypatch):
    dtype, matmul_dtype = dtypes
    expected, found = (Case(dtype=dtype, matmul_dtype=matmul_dtype) for _ in range(2))
    expected.loss(recompute=False, chunk_rows=8)[0].backward()
    monkeypatch.setattr(matmuls, "CONVERTED_ELEMENTS", tokens_at_once * HIDDEN)
    found.loss(recompute=False, chunk_rows=8)[0].backward()
    for ours, theirs in zip(found.wanted, expected.wanted, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-6, atol=2**-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_makes_its_tensors_where_the_rows_are(name, bias, mode):
    case = Case(bias=bias)
    expected, _ = case.loss(LOSSES[name], accuracies=Accuracies(3))
    with torch.device("meta"):  # where what is made without saying where would be
        loss, result = case.loss(LOSSES[name], accuracies=Accuracies(3), chunk_rows=5, **MODES[mode])
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=ATOL)
    assert {each.device.type for each in (result.loss, result.correct, *(t.grad for t in case.wanted))} == {DEVICE}


@pytest.mark.parametrize("weights", ["ce", "all-terms"])
@pytest.mark.parametrize("chunk_rows", [8, 1000])
def test_chunked_loss_in_bf16_adds_to_the_gradient_of_an_fp32_layer_in_fp32(chunk_rows, weights):
    """As autocast has it: sums over chunks lose nothing to the rounding of bf16."""
    case = Case(rows=512, matmul_dtype=torch.bfloat16)
    case.teacher_linear.bias = None
    with torch.no_grad():  # what is left to round are the logits and their gradient
        for tensor in (case.hidden, case.linear.weight, case.teacher_hidden, case.teacher_linear.weight):
            tensor.copy_(tensor.bfloat16())
    expected, _, _ = reference_loss(case.linear(case.hidden), case.targets, case.teacher_logits, LOSSES[weights])
    right = torch.autograd.grad(expected, case.linear.weight)[0]
    loss, _ = case.loss(LOSSES[weights], chunk_rows=chunk_rows, recompute=False)
    loss.backward()
    found = case.linear.weight.grad
    assert found.dtype == torch.float32
    assert (found - right).norm() <= 2**-7 * right.norm()


def test_chunked_loss_weight_gradient_of_another_type_takes_memory_for_a_part_of_it(monkeypatch):
    """Beside the bf16 gradient: the layer in fp32 once, a chunk of logits, and a part of the gradient."""
    rows, vocab, part = 64, 16000, 500
    monkeypatch.setattr(matmuls, "CONVERTED_ELEMENTS", part * HIDDEN)
    case = Case(rows=rows, vocab=vocab, dtype=torch.bfloat16, matmul_dtype=torch.float32)
    case.loss(chunk_rows=4, recompute=False)[0].backward()  # memory that is kept is lent again
    case.linear.weight.grad = case.hidden.grad = None
    peak = peak_bytes(lambda: case.loss(chunk_rows=4, recompute=False)[0].backward())
    weight_bytes, chunk_bytes = 2 * vocab * HIDDEN, 4 * 4 * vocab
    assert peak < 3 * weight_bytes + 2 * chunk_bytes + 4 * part * HIDDEN + 4 * rows * HIDDEN * 8


def test_chunked_loss_in_the_forward_multiplies_in_the_layers_type_under_autocast_too():
    plain, under_autocast = (Case(dtype=torch.bfloat16, matmul_dtype=torch.float32) for _ in range(2))
    plain.loss(recompute=False, chunk_rows=8)[0].backward()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, _ = under_autocast.loss(recompute=False, chunk_rows=8)
    loss.backward()
    for ours, theirs in zip(under_autocast.wanted, plain.wanted, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class SumsOfHalvesInFp32(TorchFunctionMode):
    """What CUDA's autocast does to these operations where it is on, and the CPU's does not."""

    NAMES = ("sum", "softmax", "log", "log1p", "exp", "prod", "cumsum", "norm")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on = torch.is_autocast_enabled(DEVICE) and func.__name__ in self.NAMES and "out" not in kwargs
        if is_on and args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_of_certain_targets_is_the_same_under_the_autocast_of_a_gpu(name):
    plain, under_autocast = (Case(dtype=torch.bfloat16) for _ in range(2))
    for case in (plain, under_autocast):
        with torch.no_grad():  # half of the targets have nearly all of the probability
            case.hidden[::2] = 30 * F.normalize(case.linear.weight[case.targets[::2]])
    expected, _ = plain.loss(LOSSES[name], recompute=False, accuracies=Accuracies(3))
    expected.backward()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), SumsOfHalvesInFp32():
        loss, _ = under_autocast.loss(LOSSES[name], recompute=False, accuracies=Accuracies(3))
    loss.backward()
    assert torch.equal(loss, expected)
    for ours, theirs in zip(under_autocast.wanted, plain.wanted, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
