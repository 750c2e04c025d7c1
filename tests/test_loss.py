"""Targets, schedules and row losses against plain loops and plain PyTorch: values, gradients and memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from naive_reference import naive_targets
from torch.nn import functional as F

from axolotl_medusa import loss as loss_module
from axolotl_medusa.loss import (
    IGNORE_INDEX,
    RowLossWeights,
    chunk_losses,
    is_top_token,
    medusa_targets,
    row_losses,
    sample_ids,
    scheduler_factor,
    target_counts,
    top_k_hits,
)

ROWS, HIDDEN, VOCAB = 23, 6, 37
RTOL, ATOL = 1e-5, 1e-6  # fp32 rounding of the same sums in another order
LOSSES = {
    "ce": RowLossWeights(),
    "weighted-ce": RowLossWeights(cross_entropy=0.3),
    "own-softmax": RowLossWeights(own_softmax=0.4),
    "kl": RowLossWeights(cross_entropy=0.0, kl=1.0),
    "all-terms": RowLossWeights(cross_entropy=0.7, kl=1.3, own_softmax=0.25),
}


def test_sample_ids_restart_of_positions_starts_a_sample():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 0, 0, 0, 0]])
    assert sample_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert sample_ids(torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 5])
def test_medusa_targets_equal_the_loop_over_rows_for_random_batches(num_heads):
    generator = torch.Generator().manual_seed(num_heads)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(60):
        batch, seq = integer(1, 3), integer(1, 14)  # often shorter than the number of heads
        labels = torch.randint(0, VOCAB, (batch, seq), generator=generator)
        labels[torch.rand(batch, seq, generator=generator) < integer(0, 3) / 4] = IGNORE_INDEX
        rows = []
        for row in range(batch):
            lengths = [integer(1, 5) for _ in range(seq)]  # more than enough packed samples for the row
            rows.append(torch.cat([torch.arange(length) for length in lengths])[:seq])
            labels[row, seq - integer(0, seq // 2) :] = IGNORE_INDEX  # ragged: padded on the right
        for position_ids in (None, torch.stack(rows), torch.arange(seq).expand(batch, seq)):
            expected = naive_targets(labels, num_heads, position_ids)
            found = medusa_targets(labels, num_heads, position_ids)
            assert torch.equal(found, expected)
            counts = [(expected[..., column] != IGNORE_INDEX).sum().item() for column in range(num_heads + 1)]
            assert target_counts(labels, num_heads, position_ids).tolist() == counts


def test_medusa_targets_of_one_row_are_offset_by_two_plus_the_head():
    targets = medusa_targets(torch.tensor([[10, 11, 12, 13]]), 2)
    ignored = IGNORE_INDEX
    assert targets.tolist() == [[[11, 12, 13], [12, 13, ignored], [13, ignored, ignored], [ignored, ignored, ignored]]]


def test_medusa_targets_row_without_base_target_has_no_head_targets():
    targets = medusa_targets(torch.tensor([[10, IGNORE_INDEX, 12, 13]]), 2)
    assert targets[0, 0].tolist() == [IGNORE_INDEX] * 3
    assert targets[0, 1].tolist() == [12, 13, IGNORE_INDEX]


def test_medusa_targets_leave_the_labels_unchanged():
    labels = torch.tensor([[1, IGNORE_INDEX, 3, 4]])
    before = labels.clone()
    medusa_targets(labels, 3, torch.tensor([[0, 1, 0, 1]]))
    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("shape", "ramp", "values"),
    [
        ("constant", 1.0, {0.0: 1.0, 0.3: 1.0, 1.0: 1.0}),
        ("linear", 1.0, {0.0: 0.0, 0.25: 0.25, 1.0: 1.0}),
        ("sine", 1.0, {0.0: 0.0, 1 / 3: 0.5, 0.5: math.sqrt(0.5), 1.0: 1.0}),
        ("sine", 0.4, {0.0: 0.0, 0.2: math.sqrt(0.5), 0.4: 1.0, 0.7: 1.0, 1.0: 1.0}),
    ],
)
def test_scheduler_factor_at_ends_middle_and_plateau(shape, ramp, values):
    for progress, expected in values.items():
        assert scheduler_factor(shape, ramp, progress) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "Sine", "sine_0.5", ""])
def test_scheduler_factor_unknown_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=f"shape is '{shape}': expected constant, linear or sine"):
        scheduler_factor(shape, 1.0, 0.5)


@pytest.mark.parametrize("name", LOSSES)
def test_chunk_losses_equal_the_plain_formulas_and_their_gradient(name):
    weights = LOSSES[name]
    torch.manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB)).requires_grad_()
    fixed, targets = 3 * torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, cross_entropy, kl, _ = chunk_losses(logits, targets, fixed, weights)
    q, p, one_hot = logits.detach().softmax(-1), fixed.softmax(-1), F.one_hot(targets, VOCAB).float()
    soft = weights.own_softmax * q + (1 - weights.own_softmax) * one_hot
    expected_kl = (p * (p.log() - q.log())).sum()
    expected = weights.cross_entropy * -(soft * q.log()).sum() + weights.kl * expected_kl
    torch.testing.assert_close(loss.detach(), expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(
        cross_entropy, F.cross_entropy(logits.detach(), targets, reduction="sum"), rtol=RTOL, atol=ATOL
    )
    torch.testing.assert_close(kl, expected_kl, rtol=RTOL, atol=ATOL)
    assert not cross_entropy.requires_grad and not kl.requires_grad
    loss.backward()
    gradient = weights.cross_entropy * (q - soft) + weights.kl * (q - p)
    torch.testing.assert_close(logits.grad, gradient, rtol=RTOL, atol=ATOL)


def test_chunk_losses_without_fixed_distribution_have_no_divergence():
    logits, targets = torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, cross_entropy, kl, _ = chunk_losses(logits, targets, None, RowLossWeights(kl=1.0))
    assert kl.item() == 0.0
    assert loss.item() == cross_entropy.item()


def test_chunk_losses_half_precision_logits_are_used_in_fp32():
    logits, fixed = torch.randn(ROWS, VOCAB).bfloat16(), torch.randn(ROWS, VOCAB).bfloat16()
    targets, weights = torch.randint(VOCAB, (ROWS,)), LOSSES["all-terms"]
    for half, full in zip(
        chunk_losses(logits, targets, fixed, weights),
        chunk_losses(logits.float(), targets, fixed.float(), weights),
        strict=True,
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_accuracies_agree_with_topk_and_ties_count_as_right():
    torch.manual_seed(1)
    logits, targets = torch.randn(200, 11), torch.randint(11, (200,))
    hits = top_k_hits(logits, targets, 11)
    for k in range(1, 12):
        assert hits[k - 1] == (logits.topk(k).indices == targets[:, None]).any(-1).sum()
    assert torch.equal(is_top_token(logits, targets), logits.argmax(-1) == targets)
    assert is_top_token(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2])).tolist() == [True]


@pytest.mark.parametrize("every", [1, 3])
def test_row_losses_sampled_accuracies_count_every_nth_row_of_each_chunk(every):
    hidden, layer, targets, _ = case(rows=10)
    result = row_losses(hidden, targets, layer, vocab_size=VOCAB, top_k=4, top_k_every=every, chunk_rows=4)
    sampled = [row for start in (0, 4, 8) for row in range(start, min(start + 4, 10), every)]
    assert result.topk_rows == len(sampled)
    assert torch.equal(result.topk_hits[1:], top_k_hits(layer(hidden)[sampled], targets[sampled], 4)[1:])
    assert torch.equal(result.correct, is_top_token(layer(hidden), targets))


def case(rows=ROWS, dtype=torch.float32, vocab=VOCAB, seed=0):
    """Hidden rows, an output layer with bias, targets, and the logits of a fixed distribution."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(HIDDEN, vocab).to(dtype)
    return torch.randn(rows, HIDDEN, dtype=dtype), layer, torch.randint(vocab, (rows,)), 2 * torch.randn(rows, vocab)


def losses(hidden, targets, layer, *, project=None, **options):
    """`row_losses` through `layer`, whose parameters train if they want to; `project` may wrap the call of it."""
    parameters = list(layer.parameters())
    return row_losses(
        hidden, targets, project or layer, vocab_size=layer.out_features, parameters=parameters, **options
    )


@pytest.mark.parametrize("trained", ["hidden", "parameters", "both"])
@pytest.mark.parametrize("chunk_rows", [1, 4, ROWS - 1, ROWS, 1000, None])
@pytest.mark.parametrize("recompute", [False, True, None], ids=["gradient-in-forward", "recompute", "chosen"])
@pytest.mark.parametrize("name", LOSSES)
def test_row_losses_equal_chunk_losses_of_all_rows(name, recompute, chunk_rows, trained):
    weights = LOSSES[name]
    hidden, layer, targets, fixed = case()
    hidden.requires_grad_(trained != "parameters")
    layer.requires_grad_(trained != "hidden")
    wanted = [tensor for tensor in (hidden, *layer.parameters()) if tensor.requires_grad]
    logits = layer(hidden)
    expected, cross_entropy, kl, _ = chunk_losses(logits, targets, fixed, weights)
    gradients = torch.autograd.grad(2.5 * expected, wanted)
    options = {"weights": weights, "chunk_rows": chunk_rows, "recompute": recompute, "top_k": 3}
    result = losses(hidden, targets, layer, fixed_logits=lambda chunk: fixed[chunk], **options)
    found = torch.autograd.grad(2.5 * result.loss, wanted)
    torch.testing.assert_close(result.loss, expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(result.cross_entropy, cross_entropy, rtol=RTOL, atol=ATOL)  # also after the backward
    torch.testing.assert_close(result.kl, kl, rtol=RTOL, atol=ATOL)
    assert not result.cross_entropy.requires_grad and not result.kl.requires_grad
    assert torch.equal(result.correct, is_top_token(logits, targets))
    assert torch.equal(result.topk_hits, top_k_hits(logits, targets, 3)) and result.topk_rows == ROWS
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("recompute", [False, True])
def test_row_losses_without_rows_are_zero_with_a_zero_gradient_for_every_parameter(recompute):
    hidden, layer, targets, _ = case(rows=0)
    hidden.requires_grad_()
    result = losses(hidden, targets, layer, chunk_rows=3, recompute=recompute)
    assert result.loss.item() == 0.0 and result.cross_entropy.item() == 0.0
    assert result.correct is None and result.topk_hits is None
    result.loss.backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert all(parameter.grad is not None and parameter.grad.abs().max() == 0 for parameter in layer.parameters())


def test_row_losses_without_accuracies_or_weights_are_plain_cross_entropy():
    hidden, layer, targets, _ = case()
    result = row_losses(hidden, targets, layer, vocab_size=VOCAB)
    assert result.correct is None
    torch.testing.assert_close(
        result.loss, F.cross_entropy(layer(hidden), targets, reduction="sum"), rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("why", ["no_grad", "nothing-trains"])
def test_row_losses_without_anything_to_train_record_no_graph(why):
    hidden, layer, targets, _ = case()
    trains = why == "no_grad"
    layer.requires_grad_(trains)
    hidden.requires_grad_(trains)
    with torch.set_grad_enabled(not trains):
        result = losses(hidden, targets, layer, chunk_rows=5)
    assert not result.loss.requires_grad
    expected = F.cross_entropy(layer(hidden), targets, reduction="sum")
    torch.testing.assert_close(result.loss, expected, rtol=RTOL, atol=ATOL, check_stride=False)


def counting(layer, seen, hidden):
    seen.append(hidden.shape[0])
    return layer(hidden)


@pytest.mark.parametrize(
    ("sharding", "passes"), [(None, 1), ("ds_shape", 2), ("device_mesh", 2)], ids=["plain", "zero-3", "fsdp-2"]
)
def test_row_losses_recompute_only_where_parameters_are_sharded(sharding, passes):
    hidden, layer, targets, _ = case()
    if sharding:
        setattr(layer.weight, sharding, "sharded")
    seen: list[int] = []
    result = losses(hidden, targets, layer, project=partial(counting, layer, seen), chunk_rows=5)
    result.loss.backward()
    assert sorted(seen) == sorted([5, 5, 5, 5, 3] * passes)


def test_row_losses_whole_recomputation_counts_nothing_twice():
    hidden, layer, targets, _ = case()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        result = losses(hidden, targets, layer, chunk_rows=5, recompute=True, top_k=VOCAB)
        result.loss.backward()
    torch.testing.assert_close(result.cross_entropy, result.loss.detach(), rtol=RTOL, atol=ATOL)
    assert result.correct.shape == (ROWS,) and result.topk_hits[-1] == ROWS


def test_row_losses_default_chunk_keeps_chunk_logits(monkeypatch):
    hidden, layer, targets, _ = case()
    seen: list[int] = []
    for limit in (10 * VOCAB + 1, VOCAB - 1):  # never less than one row, however large the vocabulary
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", limit)
        row_losses(hidden, targets, partial(counting, layer, seen), vocab_size=VOCAB)
    assert seen == [10, 10, 3] + [1] * ROWS


def peak_bytes(work) -> int:
    """The most memory that tensors made by `work` took at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
def test_row_losses_never_hold_logits_of_more_than_a_few_chunks(recompute):
    rows, vocab, chunk_rows = 640, 4000, 10
    hidden, layer, targets, _ = case(rows=rows, vocab=vocab)
    hidden.requires_grad_()

    def work():
        losses(hidden, targets, layer, chunk_rows=chunk_rows, recompute=recompute).loss.backward()

    chunk_bytes, parameter_bytes = 4 * chunk_rows * vocab, 4 * sum(p.numel() for p in layer.parameters())
    # Logits, log-softmax, their gradients and a comparison for the ranks; parameter gradients once kept and once in flight.
    assert peak_bytes(work) < 6 * chunk_bytes + 4 * parameter_bytes
    assert 6 * chunk_bytes + 4 * parameter_bytes < 4 * rows * vocab / 5, (
        "a test of chunks needs whole logits to be far larger"
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_row_losses_in_bf16_have_an_fp32_loss_and_gradients_of_their_tensors_type(recompute):
    hidden, layer, targets, _ = case(dtype=torch.bfloat16)
    hidden.requires_grad_()
    result = losses(hidden, targets, layer, chunk_rows=4, recompute=recompute)
    assert result.loss.dtype == result.cross_entropy.dtype == result.kl.dtype == torch.float32
    result.loss.backward()
    assert {tensor.grad.dtype for tensor in (hidden, *layer.parameters())} == {torch.bfloat16}


@pytest.mark.parametrize("recompute", [False, True])
def test_row_losses_in_bf16_many_chunks_are_no_further_from_fp32_than_one(recompute):
    """|chunked bf16 - fp32| <= |whole bf16 - fp32| + tol: tells a bug from rounding."""
    rows, chunk_rows = 512, 8
    tolerance = math.sqrt(rows / chunk_rows) * 2**-9  # chunks are summed in bf16, each sum rounded to 8 bits
    hidden, layer, targets, _ = case(rows=rows, dtype=torch.bfloat16)
    exact = torch.nn.Linear(HIDDEN, VOCAB)
    exact.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    F.cross_entropy(exact(hidden.float()), targets, reduction="sum").backward()
    F.cross_entropy(layer(hidden).float(), targets, reduction="sum").backward()
    whole = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    parameters = list(layer.parameters())
    losses(hidden, targets, layer, chunk_rows=chunk_rows, recompute=recompute).loss.backward()
    for ours, theirs, reference in zip(parameters, whole, exact.parameters(), strict=True):
        ours_error, whole_error = (ours.grad - reference.grad).norm(), (theirs - reference.grad).norm()
        assert ours_error <= whole_error + tolerance * reference.grad.norm()
