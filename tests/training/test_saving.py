"""When heads are written, by which rank, and what happens where one rank alone is asked to save what all of them hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import HIDDEN, VOCAB, make_model

from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import lm_head_hash, read_heads
from axolotl_medusa.training import saving
from axolotl_medusa.training.saving import HeadsSaver, check_heads_were_left
from axolotl_medusa.training.trainer import MedusaTrainer


@pytest.fixture
def saver(tmp_path):
    """A saver, and as `model.written` what the model's own `save_pretrained` was given."""

    def make(only_heads: bool = True) -> HeadsSaver:
        model = make_model()
        attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2, form="separate"))
        model.requires_grad_(not only_heads)
        model.written = []
        model.save_pretrained = lambda directory, state_dict=None, **_: model.written.append(state_dict)
        cfg = DictDefault({"base_model": "org/base", "output_dir": str(tmp_path), "medusa_only_heads": only_heads})
        return HeadsSaver(model, cfg, SimpleNamespace(save_pretrained=lambda directory: None))

    return make


@pytest.fixture
def hashes(monkeypatch):
    """How often lm_head was hashed."""
    seen = []
    compute = saving.parameter_hash
    monkeypatch.setattr(saving, "parameter_hash", lambda weight, keep=True: seen.append(keep) or compute(weight, keep))
    return seen


def divide(model) -> None:
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape


def test_the_model_of_a_process_that_does_not_write_saves_nothing(saver, tmp_path):
    """axolotl saves at the end on every machine, and those may share the disk."""
    for only_heads in (True, False):
        own = saver(only_heads)
        own.writes = False
        own.model.save_pretrained(tmp_path / "out")
        assert not own.model.written and not own.written and not (tmp_path / "out").exists()


def test_a_frozen_lm_head_is_hashed_once_for_all_checkpoints(saver, hashes, tmp_path):
    own = saver()
    for number in range(3):
        own.model.save_pretrained(tmp_path / str(number))
    assert hashes == [True]
    assert read_heads(tmp_path / "2" / "medusa_heads").meta["lm_head_sha256"] == lm_head_hash(own.model)


def test_a_trained_lm_head_is_hashed_at_each_checkpoint(saver, hashes, tmp_path):
    own = saver(only_heads=False)
    own.model.save_pretrained(tmp_path / "0")
    with torch.no_grad():
        own.model.lm_head.weight.add_(1.0)
    own.model.save_pretrained(tmp_path / "1")
    assert len(hashes) == 2
    assert read_heads(tmp_path / "1" / "medusa_heads").meta["lm_head_sha256"] == lm_head_hash(own.model)


def test_a_rank_that_does_not_write_neither_copies_nor_hashes(saver, monkeypatch):
    own = saver()
    monkeypatch.setattr(saving, "heads_meta", lambda *_: pytest.fail("made for nobody"))
    with own.collecting(writes=False):
        assert own._collected is None


@pytest.mark.parametrize(("only_heads", "backbones"), [(True, 0), (False, 1)])
def test_save_inside_collecting_writes_what_was_collected(only_heads, backbones, saver, tmp_path):
    own = saver(only_heads)
    with own.collecting(writes=True):
        own.model.medusa_heads[0][0].linear.bias.data.fill_(7.0)  # later than the copy
        own.model.save_pretrained(tmp_path / "a", state_dict=own.model.state_dict())
    assert read_heads(tmp_path / "a" / "medusa_heads").tensors["0.0.linear.bias"].abs().max() == 0
    assert len(own.model.written) == backbones
    assert not any("medusa_heads" in name for written in own.model.written for name in written)


@pytest.mark.parametrize("by_itself", [True, False], ids=["engine-saves-by-itself", "engine-asks-the-model"])
def test_saving_leaves_heads_whatever_the_engine_saves(by_itself, saver, tmp_path):
    own = saver(only_heads=False)
    with own.saving(tmp_path / "a", writes=True):
        own.model.medusa_heads[0][0].linear.bias.data.fill_(7.0)  # later than the copy
        if not by_itself:
            own.model.save_pretrained(tmp_path / "a", state_dict=own.model.state_dict())
    assert read_heads(tmp_path / "a" / "medusa_heads").tensors["0.0.linear.bias"].abs().max() == 0
    assert own.written == [tmp_path / "a"], "once"
    check_heads_were_left(str(tmp_path / "a"), own.written)


def test_saving_on_a_rank_that_does_not_write_leaves_nothing(saver, tmp_path):
    own = saver(only_heads=False)
    with own.saving(tmp_path / "a", writes=False):
        pass
    assert own.written == [] and not (tmp_path / "a").exists()


def test_heads_of_an_earlier_run_are_not_those_of_this_one(saver, tmp_path):
    saver().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"no heads were written to {tmp_path}/medusa_heads: .* the last checkpoint"):
        check_heads_were_left(str(tmp_path), [tmp_path / "checkpoint-4"])


def test_heads_that_are_not_whole_are_an_error(saver, tmp_path):
    own = saver()
    own.model.save_pretrained(tmp_path)
    file = tmp_path / "medusa_heads" / "medusa_lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"medusa_lm_head\.safetensors"):
        check_heads_were_left(str(tmp_path), own.written)


def test_save_of_divided_weights_by_one_rank_stops_and_names_the_last_whole_checkpoint(saver, tmp_path):
    own = saver()
    divide(own.model)
    for number, is_whole in ((4, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if is_whole:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").touch()
    with pytest.raises(SystemExit, match=rf"resume_from_checkpoint: {tmp_path}/checkpoint-20 goes on from there$"):
        own.model.save_pretrained(tmp_path)
    assert not (tmp_path / "medusa_heads").exists() and not own.model.written


def test_save_of_divided_weights_by_one_rank_without_a_checkpoint_says_so(saver, tmp_path):
    own = saver()
    divide(own.model)
    with pytest.raises(SystemExit, match=r"there is no checkpoint to resume from$"):
        own.model.save_pretrained(tmp_path)


def test_an_interrupt_while_all_ranks_save_does_not_write_a_backbone_of_parts(saver, tmp_path):
    own = saver(only_heads=False)
    with own.collecting(writes=True):
        divide(own.model)
        with pytest.raises(SystemExit, match="nothing was written"):
            own.model.save_pretrained(tmp_path)
    assert not own.model.written


@pytest.mark.parametrize("writes", [True, False])
def test_medusa1_saves_without_gathering_the_backbone(writes, saver):
    """The trainer's own save_model, which gathers all weights under an engine, is not even called."""
    saved = []
    trainer = SimpleNamespace(
        _saver=saver(),
        medusa_cfg=DictDefault({"medusa_only_heads": True}),
        args=SimpleNamespace(should_save=writes, push_to_hub=False, output_dir="out"),
        _save=saved.append,
    )
    MedusaTrainer.save_model(trainer, "out/checkpoint-2", _internal_call=True)
    MedusaTrainer.save_model(trainer)
    assert saved == (["out/checkpoint-2", "out"] if writes else [])
