"""Weights of a chain against loops, and against the gradient of the expected length that they are."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from loss_cases import ATOL, HIDDEN, LOSSES, RTOL, VOCAB, output_layer, peak_bytes
from torch.nn import functional as F

from axolotl_medusa.losses.chain import Chain, chain_weights
from axolotl_medusa.losses.chunk_plan import planned_chunks
from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights, reference_loss
from axolotl_medusa.losses.prediction import Accuracies, Prediction, Teacher

POSITIONS = 17
HEADS = 3


class Case:
    """Heads with rows missing here and there, in the middle too, on layers of their own or on one."""

    def __init__(
        self,
        one_layer=False,
        bias=False,
        dtype=torch.float32,
        smoothing=0.5,
        loss="ce",
        matmul_dtype=None,
        vocab=VOCAB,
        positions=POSITIONS,
    ):
        torch.manual_seed(0)
        self.weights = LOSSES[loss]
        layers = [torch.nn.Linear(HIDDEN, vocab, bias=bias).to(dtype) for _ in range(HEADS)]
        self.layers = [layers[0]] * HEADS if one_layer else layers
        self.positions = [torch.arange(positions)]
        self.positions += [torch.randperm(positions)[: positions - 4 * head].sort().values for head in range(1, HEADS)]
        self.hidden = [torch.randn(len(own), HIDDEN, dtype=dtype, requires_grad=True) for own in self.positions]
        self.targets = [torch.randint(vocab, (len(own),)) for own in self.positions]
        self.chain = Chain(self.positions, positions, smoothing)
        teacher = torch.nn.Linear(HIDDEN, vocab).to(dtype).requires_grad_(False)
        self.matmul_dtype = matmul_dtype or dtype
        self.teacher = Teacher(
            torch.randn(positions + HEADS, HIDDEN, dtype=dtype), output_layer(teacher, dtype=self.matmul_dtype)
        )
        self.teacher_logits = teacher(self.teacher.hidden)
        self.wanted = [
            *self.hidden,
            *{id(p): p for layer in layers[:1] if one_layer for p in layer.parameters()}.values(),
        ]
        if not one_layer:
            self.wanted += [p for layer in layers for p in layer.parameters()]

    @property
    def predictions(self):
        return [
            Prediction(
                hidden,
                targets,
                output_layer(layer, dtype=self.matmul_dtype),
                self.weights,
                0.5 + head,
                own + 1 + head if self.weights.needs_teacher else None,
                Accuracies(2),
            )
            for head, (hidden, targets, layer, own) in enumerate(
                zip(self.hidden, self.targets, self.layers, self.positions, strict=True)
            )
        ]

    def loss(self, **options):
        return chunked_loss(
            self.predictions, self.teacher if self.weights.needs_teacher else None, chain=self.chain, **options
        )

    def expected(self):
        """The same from whole logits, by loops."""
        logits = [layer(hidden).float() for layer, hidden in zip(self.layers, self.hidden, strict=True)]
        losses = [
            F.cross_entropy(each.detach(), targets, reduction="none")
            for each, targets in zip(logits, self.targets, strict=True)
        ]
        weights = looped_weights(losses, self.positions, self.chain.smoothing)
        total = 0.0
        for head, prediction in enumerate(self.predictions):
            for row in range(len(weights[head])):
                at = prediction.teacher_rows
                of_teacher = None if at is None else self.teacher_logits[at[row : row + 1]]
                rows = slice(row, row + 1)
                loss, _, _ = reference_loss(logits[head][rows], self.targets[head][rows], of_teacher, self.weights)
                total = total + prediction.scale * weights[head][row] * loss
        return total


def looped_weights(losses, positions, smoothing) -> list[list[float]]:
    """`Σ_{m ≥ j} Π_{i ≤ m} ((1 - α) q_i + α)` where all of the heads up to m have a target, position by position."""
    accepted = [
        {int(at): (1 - smoothing) * torch.exp(-loss).item() + smoothing for at, loss in zip(own, each, strict=True)}
        for own, each in zip(positions, losses, strict=True)
    ]
    weights = []
    for head, own in enumerate(positions):
        weights.append([])
        for at in own.tolist():
            weight, product = 0.0, 1.0
            for last in range(len(positions)):
                product *= accepted[last].get(at, 0.0)
                weight += product if last >= head else 0.0
            weights[head].append(weight)
    return weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_chain_weights_equal_the_loops(smoothing):
    case = Case()
    losses = [torch.rand(len(own)) * 3 for own in case.positions]
    found = chain_weights(losses, case.positions, POSITIONS, smoothing)
    for ours, theirs in zip(found, looped_weights(losses, case.positions, smoothing), strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=RTOL, atol=ATOL)


def test_chain_weights_without_smoothing_are_the_gradient_of_the_expected_length():
    """d (Σ_m Π_{i ≤ m} q_i) / d log q_j, by autograd."""
    log_q = (-3 * torch.rand(POSITIONS, HEADS)).requires_grad_()
    log_q.exp().cumprod(dim=1).sum().backward()
    everywhere = [torch.arange(POSITIONS)] * HEADS
    found = chain_weights([-log_q.detach()[:, head] for head in range(HEADS)], everywhere, POSITIONS, 0.0)
    torch.testing.assert_close(torch.stack(found, 1), log_q.grad, rtol=RTOL, atol=ATOL)


def test_chain_weights_with_the_default_smoothing_compare_with_decays():
    """Three heads at a position where none is right, and at one where all are certain; decay's weights are 1.95."""
    losses = [torch.tensor([100.0, 0.0])] * 3
    none, all_of_them = torch.stack(chain_weights(losses, [torch.arange(2)] * 3, 2, 0.5)).sum(dim=0).tolist()
    assert (none, all_of_them) == (pytest.approx(1.375), pytest.approx(6.0))
    assert none < sum(0.8**k for k in (1, 2, 3)) < all_of_them


def test_chain_weights_end_where_a_head_has_no_target():
    """Head 1 is missing at position 0: head 0 counts for itself alone there, and head 2 for nothing."""
    loss = torch.log(torch.tensor(2.0))
    first, middle, last = chain_weights(
        [loss.repeat(2), loss.repeat(1), loss.repeat(2)], [torch.arange(2), torch.tensor([1]), torch.arange(2)], 2, 0.0
    )
    assert first.tolist() == pytest.approx([0.5, 0.5 + 0.25 + 0.125])
    assert middle.tolist() == pytest.approx([0.25 + 0.125])
    assert last.tolist() == pytest.approx([0.0, 0.125])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 5 * HEADS, None])
@pytest.mark.parametrize("bias", [False, True], ids=["matmul", "any-layer"])
@pytest.mark.parametrize("one_layer", [False, True], ids=["own-layers", "one-layer"])
@pytest.mark.parametrize("loss", ["ce", "kl", "every-term"])
def test_chunked_loss_of_a_chain_equals_the_loops(loss, one_layer, bias, chunk_rows, recompute):
    case = Case(one_layer, bias, loss=loss)
    expected = case.expected()
    gradients = torch.autograd.grad(1.5 * expected, case.wanted)
    found, sums = case.loss(chunk_rows=chunk_rows, recompute=recompute)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)
    for ours, theirs in zip(torch.autograd.grad(1.5 * found, case.wanted), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=2 * ATOL)
    plain = [chunked_loss([each], case.teacher)[1][0] for each in case.predictions]
    for ours, theirs in zip(sums, plain, strict=True):  # what is logged of a head knows no chain
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=RTOL, atol=2 * ATOL)
        assert torch.equal(ours.correct, theirs.correct) and torch.equal(ours.topk_hits, theirs.topk_hits)
    with torch.no_grad():
        torch.testing.assert_close(case.loss(chunk_rows=chunk_rows)[0], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_of_a_chain_keeps_a_converted_copy_of_every_heads_layer(matmul_dtype):
    """Gradients wait for all heads of a chunk, and each is multiplied with its own layer then."""
    dtype = torch.bfloat16 if matmul_dtype == torch.float32 else torch.float32
    case = Case(dtype=dtype, matmul_dtype=matmul_dtype)
    expected = torch.autograd.grad(case.expected(), case.wanted)
    found = torch.autograd.grad(case.loss(chunk_rows=4 * HEADS, recompute=False)[0], case.wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2**-5 * theirs.float().norm()


def test_chunked_loss_of_a_chain_beside_a_base_model_and_a_head_without_rows():
    case = Case()
    base = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCAB, (POSITIONS,))
    case.positions[2], case.hidden[2], case.targets[2] = (
        each[:0] for each in (case.positions[2], case.hidden[2], targets)
    )
    case.chain = Chain(case.positions, POSITIONS, 0.5)
    wanted = [*case.wanted[:2], *case.wanted[3:], hidden, base.weight]
    expected = case.expected() + 0.3 * F.cross_entropy(base(hidden), targets, reduction="sum")
    loss, sums = chunked_loss(
        [*case.predictions, Prediction(hidden, targets, output_layer(base), LossWeights(), 0.3)],
        chain=case.chain,
        chunk_rows=7,
    )
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=ATOL)
    assert len(sums) == HEADS + 1 and sums[2].loss == 0
    theirs = torch.autograd.grad(expected, wanted, allow_unused=True)
    for ours, each in zip(torch.autograd.grad(loss, wanted), theirs, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if each is None else each, rtol=RTOL, atol=2 * ATOL)


def test_planned_chunks_of_a_chain_hold_as_many_rows_as_others():
    case = Case(loss="kl")
    chunks = planned_chunks(case.predictions, case.teacher, 3 * HEADS, chain=case.chain)
    assert [chunk.positions for chunk in chunks] == [slice(at, min(at + 3, POSITIONS)) for at in range(0, POSITIONS, 3)]
    for chunk in chunks:
        assert sum(part.rows.stop - part.rows.start for part in chunk.parts) <= 3 * HEADS
        assert chunk.teacher_rows.stop - chunk.teacher_rows.start <= 3 + HEADS - 1


@pytest.mark.parametrize("one_layer", [False, True], ids=["own-layers", "one-layer"])
def test_chunked_loss_of_a_chain_takes_no_more_memory_than_without(one_layer):
    """Each head's logits wait for the others', and are as much fewer."""
    peaks = {}
    for chained in (False, True):
        case = Case(one_layer, vocab=4000, positions=600)
        chain = case.chain if chained else None
        peaks[chained] = peak_bytes(
            lambda c=case, of=chain: chunked_loss(c.predictions, chain=of, chunk_rows=60, recompute=False)[0].backward()
        )
    assert peaks[True] < 1.1 * peaks[False]
    assert peaks[True] < 4 * 4000 * 3 * 600 / 4, "rows x vocabulary is never in memory"


def test_chunked_loss_of_a_chain_makes_its_tensors_where_the_rows_are():
    case = Case(loss="lk")
    expected, _ = case.loss()
    with torch.device("meta"):
        loss, _ = case.loss(chunk_rows=7)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=ATOL)
    assert {each.grad.device.type for each in case.wanted} == {DEVICE}
