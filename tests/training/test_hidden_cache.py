"""Stored hidden states: which sample they belong to, what a crash leaves, and that training from them is the same."""

from __future__ import annotations

import json
import logging
from collections import namedtuple

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_model, randomize
from datasets import Dataset

from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training import hidden_cache
from axolotl_medusa.training.hidden_cache import (
    CachedRows,
    CrossedSamplesError,
    HiddenCache,
    batch_samples,
    cache_identity,
    dataset_samples,
)
from axolotl_medusa.training.objective import Objective, install_objective

LENGTHS = (9, 5, 14, 7)
OTHER_ORDER = 1e-5
"""fp32 rounding of matmuls of other shapes, relative to the states."""


def make_rows(seed: int = 1) -> list[dict[str, list[int]]]:
    """Four samples with masked turns; the second ends masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * 2 + ids[2:]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    rows[1]["labels"][3:] = [IGNORE_INDEX] * 2
    rows[2]["labels"][6:9] = [IGNORE_INDEX] * 3
    return rows


def packed(rows, order, padding: int = 0) -> dict[str, torch.Tensor]:
    """One row of a batch as axolotl's collator packs it: positions restart, the mask is dropped."""
    columns = {name: [value for index in order for value in rows[index][name]] for name in ("input_ids", "labels")}
    positions = [position for index in order for position in range(len(rows[index]["input_ids"]))]
    columns["input_ids"] += [0] * padding
    columns["labels"] += [IGNORE_INDEX] * padding
    columns["position_ids"] = positions + list(range(padding))
    return {name: torch.tensor([values]) for name, values in columns.items()}


def padded(rows, order) -> dict[str, torch.Tensor]:
    width = max(len(rows[index]["input_ids"]) for index in order)
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        name: torch.tensor([rows[index][name] + [value] * (width - len(rows[index][name])) for index in order])
        for name, value in fill.items()
    }


@pytest.fixture
def rows():
    return make_rows()


def keys(batch) -> list[bytes]:
    return [sample.key for sample in batch_samples(batch)]


def test_samples_are_the_same_alone_packed_and_padded(rows):
    alone = [keys(padded(rows, [index]))[0] for index in range(4)]
    assert len(set(alone)) == 4
    assert keys(packed(rows, [2, 0, 3], padding=5)) == [alone[2], alone[0], alone[3]]
    assert keys(padded(rows, [1, 2])) == [alone[1], alone[2]]


@pytest.mark.parametrize("column", ["input_ids", "labels", "attention_mask"])
def test_samples_that_differ_before_their_last_label_are_others(rows, column):
    before = keys(padded(rows, [0]))
    rows[0][column][4] = 0
    assert keys(padded(rows, [0])) != before


def test_samples_without_a_target_are_left_out(rows):
    rows[3]["labels"] = [5] + [IGNORE_INDEX] * 6  # the first token of a sample is no target
    assert len(keys(packed(rows, [0, 3, 2]))) == 2


def test_counted_rows_of_samples_are_those_of_the_objective_in_order(rows):
    batch = packed(rows, [2, 1, 0, 3], padding=3)
    targets = medusa_targets(batch["labels"], 3, batch["position_ids"])
    counted = (targets[0, :, 0] != IGNORE_INDEX).nonzero().flatten().tolist()
    expected = [t for s in batch_samples(batch) for t in counted if s.start <= t < s.stop]
    assert counted == expected
    assert [s.num_rows for s in batch_samples(batch)] == [
        sum(s.start <= t < s.stop for t in counted) for s in batch_samples(batch)
    ]


def test_dataset_samples_count_rows_and_share_duplicates(rows):
    dataset = Dataset.from_list([*rows, rows[0]])
    assert dataset_samples(dataset) == {keys(padded(rows, [i]))[0]: n for i, n in enumerate((7, 1, 9, 5))}


def test_dataset_samples_of_a_stream_or_of_nothing_are_refused(rows):
    with pytest.raises(ValueError, match="training data is a IterableDataset: do not stream it"):
        dataset_samples(Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match="nothing to store"):
        dataset_samples(Dataset.from_list([{**rows[0], "labels": [IGNORE_INDEX] * 9}]))


class FakeTokenizer:
    def __init__(self, vocab):
        self.get_vocab = lambda: vocab


def identity(rows, change: str = "") -> dict[str, str]:
    model = make_model(max_position_embeddings=64 if change == "config" else 128)
    if change == "attention":
        model.set_attn_implementation("eager")
    if change == "weights":
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    if change == "data":
        rows = rows[1:]
    if change == "data-order":
        rows = rows[::-1]
    if change == "heads":
        attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2))
    vocab = {"a": 1 if change == "tokenizer" else 0, "b": 2}
    precision = "bf16" if change == "precision" else "no"
    return cache_identity(model, FakeTokenizer(vocab), dataset_samples(Dataset.from_list(rows)), precision)


@pytest.mark.parametrize("change", ["weights", "config", "attention", "precision", "tokenizer", "data"])
def test_identity_differs_in_what_was_changed(rows, change):
    before, after = identity(rows), identity(rows, change)
    assert {name for name in before if before[name] != after[name]} == {change}


@pytest.mark.parametrize("change", ["", "heads", "data-order"])
def test_identity_is_the_same_with_other_heads_and_in_another_order(rows, change):
    assert identity(rows, change) == identity(rows)


@pytest.fixture
def known(rows) -> dict[bytes, int]:
    return dataset_samples(Dataset.from_list(rows))


@pytest.fixture
def open_cache(tmp_path, known):
    def run(limit_gb: float = 1.0, **changes: str) -> HiddenCache:
        return HiddenCache.open(tmp_path / "cache", {"weights": "1", **changes}, known, HIDDEN, limit_gb)

    return run


def states(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(num_rows))


def test_cache_gives_back_what_was_written_in_bf16_also_to_another_opening(open_cache, known):
    first, second = open_cache(), open_cache()
    for count, key in enumerate(known, start=1):
        assert not first.has(key) and not second.has(key)
        first.write(key, states(known[key]))
        assert first.has(key) and second.has(key)
        assert first.num_stored == second.num_stored == count
    third = open_cache()
    for key, num_rows in known.items():
        assert third.has(key)
        assert torch.equal(third.read(key), states(num_rows).bfloat16())
    assert len({path.name for path in third.directory.parent.iterdir()}) == 1
    meta = json.loads((third.directory / "meta.json").read_text())
    assert meta["rows"] == 22 and meta["samples"] == 4 and meta["weights"] == "1"


def test_cache_has_the_same_places_in_another_order_of_the_data(open_cache, known, tmp_path):
    cache = open_cache()
    for key, num_rows in known.items():
        cache.write(key, states(num_rows))
    turned = HiddenCache.open(tmp_path / "cache", {"weights": "1"}, dict(reversed(known.items())), HIDDEN, 1.0)
    assert all(turned.has(key) for key in known)


def test_cache_of_another_identity_is_another_directory(open_cache, known):
    cache, key = open_cache(), next(iter(known))
    cache.write(key, states(known[key]))
    other = open_cache(weights="2")
    assert other.directory != cache.directory and not other.has(key)


def test_cache_rows_without_a_mark_or_unlike_their_mark_are_not_stored(open_cache, known):
    """What a crash can leave: data before the mark, a mark whose data never reached the disk, half of the data."""
    cache = open_cache()
    one, two, three, four = known
    for key in known:
        cache.write(key, states(known[key]))
    cache._marks[cache._places[one][0]] = 0
    cache._hidden[cache._places[two][1]] = 0
    cache._hidden[cache._places[three][1].start] = 0
    again = open_cache()
    assert [again.has(key) for key in known] == [False, False, False, True]
    again.write(two, states(known[two]))
    assert open_cache().has(two)


def test_cache_reserves_its_space_and_keeps_what_is_there(open_cache, known):
    cache, key = open_cache(), next(iter(known))
    file = cache.directory / "hidden.bin"
    assert file.stat().st_size == cache.num_bytes == 22 * HIDDEN * 2
    assert file.stat().st_blocks * 512 >= cache.num_bytes
    cache.write(key, states(known[key]))
    assert open_cache().has(key)


def test_cache_larger_than_its_limit_is_refused_before_anything_is_made(open_cache, tmp_path):
    with pytest.raises(
        ValueError, match=r"22 rows of 32 in bf16 need 1.41e-06 GB, more than .*limit_gb 1e-06: raise it"
    ):
        open_cache(limit_gb=1e-6)
    assert not (tmp_path / "cache").exists()


def test_cache_larger_than_the_free_disk_is_refused_unless_it_is_there_already(open_cache, monkeypatch):
    usage = namedtuple("usage", "free")
    free = {"bytes": hidden_cache._DISK_MARGIN_BYTES + 100}
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda _: usage(free["bytes"]))
    with pytest.raises(ValueError, match="the disk has 2 GB free and 2 of them stay free: make room"):
        open_cache()
    free["bytes"] += 22 * HIDDEN * 2
    open_cache()
    free["bytes"] = hidden_cache._DISK_MARGIN_BYTES
    open_cache()


def test_cache_that_cannot_be_made_is_one_line(open_cache, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"medusa_hidden_cache .* cannot be made \(.*\): choose a directory"):
        open_cache()


def build(form="shared", head_loss="ce", only_heads=True, dtype=torch.float32):
    model = make_model().to(dtype)
    attach_heads(model, randomize(MedusaHeads(HIDDEN, VOCAB, 3, form=form, dtype=dtype)))
    if only_heads:
        model.requires_grad_(False)
    model.medusa_heads.requires_grad_(True)
    install_objective(model, Objective(only_heads=only_heads, head_loss=head_loss))
    return model


@pytest.fixture
def backbone_runs():
    """Counts the runs of a model's backbone; `backbone_of(model)` is what the trainer hands to the cache."""

    class Runs(list):
        def backbone_of(self, model):
            model.model.register_forward_pre_hook(lambda *_: self.append(1))

            def run(batch):
                with torch.no_grad():
                    return model(**batch, return_hidden_rows=True).hidden_rows

            return run

    return Runs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_loss", ["ce", "kl", "lk"])
@pytest.mark.parametrize("form", ["shared", "separate"])
def test_objective_of_given_rows_is_bitwise_that_of_the_backbone(rows, backbone_runs, form, head_loss, dtype):
    model = build(form, head_loss, dtype=dtype)
    run_backbone = backbone_runs.backbone_of(model)
    batch = packed(rows, [2, 1, 0, 3], padding=2)
    expected = model(**batch, medusa_coefficient=0.2)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    hidden_rows = run_backbone(batch)
    assert hidden_rows.shape == (22, HIDDEN) and len(backbone_runs) == 2
    model.zero_grad()
    found = model(**batch, medusa_coefficient=0.2, hidden_rows=hidden_rows)
    found.loss.backward()
    assert len(backbone_runs) == 2
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.metric_sums, expected.metric_sums)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_objective_refuses_given_rows_where_the_backbone_trains(rows):
    model, batch = build(only_heads=False), packed(rows, [0])
    for options in ({"hidden_rows": torch.zeros(7, HIDDEN)}, {"return_hidden_rows": True}):
        with pytest.raises(ValueError, match="expected only_heads"):
            model(**batch, **options)


def test_backbone_runs_once_for_each_sample_however_it_is_packed(rows, backbone_runs, open_cache):
    model, cached = build(), CachedRows(open_cache())
    run_backbone = backbone_runs.backbone_of(model)
    alone = [run_backbone(padded(rows, [index])) for index in range(4)]
    backbone_runs.clear()
    first = cached(packed(rows, [2, 0], padding=3), run_backbone)
    assert len(backbone_runs) == 2, "the batch, and one of its samples alone"
    cached(packed(rows, [1, 3]), run_backbone)
    assert len(backbone_runs) == 3, "the check is made once"
    found = cached(packed(rows, [3, 2, 1, 0]), run_backbone)
    again = CachedRows(open_cache())(padded(rows, [2, 0]), run_backbone)
    assert len(backbone_runs) == 3
    assert first.dtype == torch.bfloat16 and torch.equal(again, first)
    expected = torch.cat([alone[index] for index in (3, 2, 1, 0)])
    assert (found - expected).abs().max() <= (2**-8 + OTHER_ORDER) * expected.abs().max()


def test_batch_with_a_missing_sample_keeps_the_stored_states_of_the_others(rows, open_cache):
    """Else a resumed run would see other bits than the one before it."""
    cached = CachedRows(open_cache())
    cached(packed(rows, [0]), lambda _: torch.ones(7, HIDDEN))
    found = cached(
        packed(rows, [3, 0]), lambda batch: torch.full((12 if batch["labels"].shape[1] > 9 else 7, HIDDEN), 1.5)
    )
    assert torch.equal(found[5:], torch.ones(7, HIDDEN).bfloat16())


def test_samples_that_are_not_in_the_data_are_computed_each_time_and_named_once(
    rows, backbone_runs, open_cache, caplog
):
    model, cached = build(), CachedRows(open_cache())
    run_backbone = backbone_runs.backbone_of(model)
    cut = {name: values[:, :-3] for name, values in packed(rows, [0, 3]).items()}
    with caplog.at_level(logging.WARNING):
        found = [cached(cut, run_backbone) for _ in range(2)]
    assert torch.equal(*found) and torch.equal(found[0], run_backbone(cut).bfloat16())
    assert cached.num_unknown == 2 and len(backbone_runs) == 2 + 1 + 1
    (record,) = caplog.records
    assert "a sample of 4 tokens is not in the training data" in record.message


def test_backbone_runs_where_another_process_needs_it(rows, backbone_runs, open_cache):
    run_backbone = backbone_runs.backbone_of(build())
    cached = CachedRows(open_cache())
    first = cached(packed(rows, [0]), run_backbone)
    joined = CachedRows(open_cache(), any_rank=lambda flags: [True, True])
    assert torch.equal(joined(packed(rows, [0]), run_backbone), first)
    assert len(backbone_runs) == 3, "the batch, the batch, and along with the other's check"


def test_batch_without_a_target_has_no_rows(rows, backbone_runs, open_cache):
    batch = packed(rows, [0])
    batch["labels"][:] = IGNORE_INDEX
    run_backbone = backbone_runs.backbone_of(build())
    assert CachedRows(open_cache())(batch, run_backbone).shape == (0, HIDDEN)
    joined = CachedRows(open_cache(), any_rank=lambda flags: [True, True])
    assert joined(batch, run_backbone).shape == (0, HIDDEN)
    assert len(backbone_runs) == 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_packed_samples_do_not_see_each_other_as_axolotl_packs_them(rows, family):
    """Axolotl drops the attention mask of packed rows; transformers then tells samples apart by their positions."""
    model = make_model(family).eval()
    for order in ([2, 0, 3], [1, 2]):
        batch = packed(rows, order, padding=4)
        start = sum(len(rows[index]["input_ids"]) for index in order[:-1])
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([rows[order[-1]]["input_ids"]]))[0][0]
            inside = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0][
                0
            ]
        difference = (inside[start : start + len(alone)] - alone).abs().max()
        assert difference <= OTHER_ORDER * alone.abs().max()


def test_packed_samples_that_see_each_other_are_refused(rows, open_cache, backbone_runs):
    run_backbone = backbone_runs.backbone_of(build())
    batch = packed(rows, [2, 0])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])  # transformers then no longer looks at the positions
    with pytest.raises(CrossedSamplesError, match=r"differ by .* does not keep packed samples apart"):
        CachedRows(open_cache())(batch, run_backbone)
    assert open_cache().num_stored == 0
