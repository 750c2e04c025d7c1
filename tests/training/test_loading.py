"""What `axolotl evaluate` finds in output_dir becomes the model: single and sharded weights, adapters, heads alone."""

from __future__ import annotations

import copy
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import HIDDEN, VOCAB, add_lora, make_model, randomize
from training_outputs import as_if_trained, save_base, write_run

from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training import loading
from axolotl_medusa.training.loading import load_heads, load_trained_model

LORA_TARGETS = ["q_proj", "lm_head"]


def fresh(family="llama", lora=False, num_heads=3, **options):
    """The model as axolotl builds it before training: seed 0 as the base, adapters that do nothing, heads at zero."""
    model = make_model(family)
    if lora:
        model = add_lora(model, LORA_TARGETS, **options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, num_heads, form="shared"))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


def heads_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "medusa_heads" in name}


@pytest.fixture
def said(monkeypatch):
    lines = {"info": [], "warning": []}
    monkeypatch.setattr(loading, "LOG", SimpleNamespace(info=lines["info"].append, warning=lines["warning"].append))
    return lines


@pytest.fixture
def cfg(tmp_path):
    def make(**keys):
        return DictDefault({"output_dir": str(tmp_path / "out"), "base_model": str(tmp_path / "base"), **keys})

    return make


@pytest.fixture
def trained(tmp_path):
    """Writes an output_dir and returns the model that it holds."""

    def make(recipe="medusa-2", family="llama", lora=False, shard=None, **options):
        save_base(tmp_path / "base", make_model(family))
        model = add_lora(make_model(family), LORA_TARGETS) if lora else make_model(family)
        if recipe == "medusa-2":
            as_if_trained(model)
        write_run(tmp_path / "out", model, recipe, tmp_path / "base", **options)
        if shard:
            for file in (tmp_path / "out").glob("model*"):
                file.unlink()
            bare = copy.deepcopy(model)
            del bare.medusa_heads
            bare.save_pretrained(tmp_path / "out", max_shard_size=shard)
            assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
        return model

    return make


def assert_becomes(model, expected) -> None:
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    found, wanted = heads_of(model), heads_of(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["single", "sharded"])
def test_full_weights_of_output_dir_become_the_model(family, shard, trained, cfg, said):
    expected, model = trained(family=family, shard=shard), fresh(family)
    assert not torch.equal(logits(model), logits(expected))
    load_trained_model(model, cfg())
    assert_becomes(model, expected)
    assert said["info"][-1].endswith("out; evaluating all that it holds: heads and full model")


def test_the_adapter_of_output_dir_becomes_the_models(trained, cfg, said):
    expected, model = trained(lora=True), fresh(lora=True)
    assert not torch.allclose(logits(model), logits(expected), atol=1e-3)
    load_trained_model(model, cfg(adapter="lora"))
    assert_becomes(model, expected)
    assert said["info"][-1].endswith("out; evaluating all that it holds: heads and adapter") and not said["warning"]


def test_another_adapter_that_training_started_from_is_not_evaluated_and_said(trained, cfg, said):
    expected, model = trained(lora=True), fresh(lora=True)
    load_trained_model(model, cfg(adapter="lora", lora_model_dir="earlier"))
    assert_becomes(model, expected)
    assert "not that of lora_model_dir earlier" in said["warning"][0]


def test_the_adapter_of_output_dir_named_by_the_user_is_nothing_to_warn_of(trained, cfg, said, tmp_path):
    trained(lora=True)
    load_trained_model(fresh(lora=True), cfg(adapter="lora", lora_model_dir=str(tmp_path / "out")))
    assert not said["warning"]


def test_heads_of_medusa1_leave_the_model_as_it_is(trained, cfg, said):
    expected, model = trained("medusa-1"), fresh()
    load_trained_model(model, cfg())
    assert_becomes(model, expected)
    assert said["info"][-1].endswith("out; evaluating all that it holds: heads")


def test_medusa1_heads_under_another_adapter_than_in_training_are_refused(trained, cfg):
    trained("medusa-1", yaml=None)
    load_trained_model(fresh(), cfg())
    trained("medusa-1", yaml={"lora_model_dir": "adapter"})
    with pytest.raises(ValueError, match="trained with lora_model_dir: adapter, the YAML has unset"):
        load_trained_model(fresh(), cfg())
    load_trained_model(fresh(), cfg(lora_model_dir="adapter"))


@pytest.mark.parametrize("exists", [False, True])
def test_without_a_run_the_heads_stay_and_it_is_said_which_they_are(exists, cfg, said, tmp_path):
    if exists:
        (tmp_path / "out").mkdir()
    model = fresh()
    before = heads_of(randomize(model.medusa_heads) and copy.deepcopy(model))
    load_trained_model(model, cfg())
    load_trained_model(model, cfg(medusa_init_from="stage1"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads_of(model).items())
    untrained, first_stage = said["warning"]
    assert untrained.startswith("evaluating untrained heads: ")
    assert first_stage.startswith("evaluating the heads of medusa_init_from stage1: ")


def test_a_run_that_did_not_end_is_refused_with_its_checkpoint(trained, cfg, tmp_path):
    trained(lora=True)
    shutil.rmtree(tmp_path / "out" / "medusa_heads")
    with pytest.raises(
        ValueError, match=r"^evaluate measures what output_dir holds, and .*give a checkpoint, e\.g\. \S+4$"
    ):
        load_trained_model(fresh(lora=True), cfg())
    load_trained_model(fresh(lora=True), cfg(output_dir=str(tmp_path / "out" / "checkpoint-4")))


@pytest.mark.parametrize(
    ("run", "model", "message"),
    [
        ({"lora": True}, {}, "holds an adapter and the YAML builds none: set adapter"),
        ({}, {"lora": True}, "holds a full model and the YAML puts an adapter on it: remove adapter"),
        ({"lora": True}, {"lora": True, "use_rslora": True}, "use_rslora False and the YAML True"),
        ({"lora": True}, {"lora": True, "num_heads": 2}, "saved heads do not fit"),
        ({"family": "qwen3"}, {}, r"not named or shaped as those of base_model .*, e\.g\. model\..*_norm\.weight: set"),
        ({}, {"family": "qwen3"}, r"not named or shaped as those of base_model .*, e\.g\. model\..*_norm\.weight: set"),
    ],
    ids=["no-adapter", "adapter", "scale", "heads", "more-names", "fewer-names"],
)
def test_a_run_that_does_not_fit_the_yaml_is_refused(run, model, message, trained, cfg):
    trained(**run)
    with pytest.raises(ValueError, match=message):
        load_trained_model(fresh(**model), cfg())


def test_an_adapter_on_other_layers_is_refused(trained, cfg):
    trained(lora=True)
    model = add_lora(make_model(), ["q_proj"])
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 3, form="shared"))
    with pytest.raises(
        ValueError, match=r"does not fit the one that the YAML builds \(.*lm_head.* has no place in it\)"
    ):
        load_trained_model(model, cfg())


def test_an_adapter_for_another_vocabulary_is_refused(trained, cfg):
    trained(lora=True)
    model = add_lora(make_model(vocab_size=VOCAB + 1), LORA_TARGETS)
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB + 1, 3, form="shared"))
    with pytest.raises(ValueError, match="does not fit the one that the YAML builds"):
        load_trained_model(model, cfg())


@pytest.mark.parametrize(("lora", "held"), [(True, "an adapter"), (False, "a full model")], ids=["adapter", "full"])
def test_a_trained_model_without_heads_is_not_passed_over(lora, held, trained, cfg, tmp_path):
    trained(lora=lora)
    shutil.rmtree(tmp_path / "out" / "medusa_heads")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    model = fresh(lora=lora)
    with pytest.raises(ValueError, match=f"out holds {held} and no medusa_heads"):
        load_trained_model(model, cfg())
    if not lora:
        load_trained_model(model, cfg(base_model=str(tmp_path / "out")))


DAMAGE = {
    "no-weights": (lambda run: (run / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut-off-weights": (
        lambda run: os.truncate(run / "adapter_model.safetensors", 500),
        r"adapter_model\.safetensors is not a",
    ),
    "config-is-no-json": (
        lambda run: (run / "adapter_config.json").write_text('{"r": 4,'),
        r"adapter_config\.json is not JSON",
    ),
    "config-is-a-list": (lambda run: (run / "adapter_config.json").write_text("[]"), "expected an object"),
    "config-of-nothing": (lambda run: (run / "adapter_config.json").write_text("{}"), "has r 8 and the YAML 4"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_one_line_that_names_it(damage, message, trained, cfg, tmp_path):
    trained(lora=True)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        load_trained_model(fresh(lora=True), cfg())
    assert str(tmp_path / "out") in str(error.value) and "\n" not in str(error.value)


def test_a_base_model_that_is_output_dir_is_loaded_already(trained, cfg, tmp_path):
    trained()
    model = fresh("qwen3")  # would not fit
    load_trained_model(model, cfg(base_model=str(tmp_path / "out")))


def test_load_heads_takes_a_checkpoint(trained, tmp_path, said):
    expected, model = trained("medusa-1"), fresh()
    load_heads(model, tmp_path / "out" / "checkpoint-4")
    assert_becomes(model, expected)
