"""What the trainer makes of the YAML: the objective, the trainable set, the order of the data."""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.dict import DictDefault
from conftest import COMMON, HIDDEN, VOCAB, add_lora, make_model
from datasets import Dataset
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from axolotl_medusa.losses import prediction
from axolotl_medusa.model.anatomy import backbone
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training import trainer as trainer_module
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.epoch_shuffle import EpochShuffle
from axolotl_medusa.training.objective import install_objective, metric_names
from axolotl_medusa.training.trainable import check_trainable, heads_dtype, set_trainable
from axolotl_medusa.training.trainer import MedusaTrainer, objective_of, warn_of_slow_precision


def config(**keys):
    """A validated YAML: our keys with their defaults, and axolotl's as they are."""
    ours = {key: value for key, value in keys.items() if key in MedusaArgs.model_fields}
    args = MedusaArgs.model_validate({"medusa_num_heads": 2, **ours})
    return DictDefault({**keys, **args.model_dump()})


def with_heads(model):
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2))
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("medusa_only_heads", True),
        ("medusa_decay_coefficient", 0.5),
        ("medusa_lm_coefficient", 0.5),
        ("medusa_kl_coefficient", 0.5),
        ("medusa_self_distillation", True),
        ("medusa_distillation_regularization", 0.5),
        ("medusa_head_loss", "kl"),
        ("medusa_head_weighting", "chain"),
        ("medusa_chain_smoothing", 0.1),
        ("medusa_logging", False),
        ("medusa_logging_topk", 3),
    ],
)
def test_objective_of_turning_a_key_changes_the_objective(key, value):
    assert objective_of(config(**{key: value})) != objective_of(config())


def test_metric_names_without_logging_are_losses_only():
    names = metric_names(2, objective_of(config(medusa_logging=False)))
    assert names == ["base_loss", "medusa0_loss", "medusa1_loss"]


@pytest.mark.parametrize(
    ("keys", "is_fast", "expected"),
    [
        (dict(bf16=True), False, 1),
        (dict(bfloat16=True), False, 1),
        (dict(bf16=True), True, 0),
        (dict(bf16=False), False, 0),
    ],
)
def test_bf16_on_a_cpu_without_fast_matmuls_for_it_is_warned_of(keys, is_fast, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(prediction, "multiplies_bf16", lambda: is_fast)
    monkeypatch.setattr(trainer_module.LOG, "warning", seen.append)
    warn_of_slow_precision(with_heads(make_model()), config(**keys))
    assert len(seen) == expected
    assert all("bf16: false" in message for message in seen)


def test_set_trainable_medusa1_is_the_heads_alone():
    model = with_heads(make_model())
    set_trainable(model, config(medusa_only_heads=True))
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith("medusa_heads.")}
    counts = check_trainable(model, config(medusa_only_heads=True))
    assert counts["heads"] > 0 and counts["adapter"] == counts["backbone"] == 0


def test_set_trainable_medusa1_freezes_an_adapter_too():
    model = with_heads(add_lora(make_model()))
    set_trainable(model, config(medusa_only_heads=True, adapter="qlora"))
    assert not [name for name in trainable(model) if "lora_" in name]


def test_set_trainable_with_lora_is_adapter_and_heads():
    model = with_heads(add_lora(make_model()))
    set_trainable(model, config(adapter="lora"))
    assert all("lora_" in name or "medusa_heads" in name for name in trainable(model))
    counts = check_trainable(model, config(adapter="lora"))
    assert counts["adapter"] > 0 and counts["backbone"] == 0


@pytest.mark.parametrize(
    ("family", "layer", "norm"),
    [
        ("llama", "model.layers.1.", "model.norm."),
        ("phi-lm-head-bias", "model.layers.1.", "model.final_layernorm."),
        ("gpt2", "transformer.h.1.", "transformer.ln_f."),
    ],
)
def test_set_trainable_last_layers_are_the_last_layers_and_the_final_norm(family, layer, norm):
    model = with_heads(make_model(family))
    set_trainable(model, config(medusa_num_unfreeze_layers=1))
    names = {name for name in trainable(model) if not name.startswith("medusa_heads.")}
    assert all(name.startswith((layer, norm)) for name in names)
    assert any(name.startswith(layer) for name in names) and any(name.startswith(norm) for name in names)


FINAL_NORMS = {
    "bloom": (("h", "ln_f"), {"n_layer": 2, "n_head": 4}),
    "opt": (("layers", "final_layer_norm"), {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN}),
    "falcon": (("h", "ln_f"), {}),
    "gpt_neox": (("layers", "final_layer_norm"), {}),
    "gpt_neo": (("h", "ln_f"), {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "gptj": (("h", "ln_f"), {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "mpt": (("blocks", "norm_f"), {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "stablelm": (("layers", "norm"), {}),
    "xglm": (("layers", "layer_norm"), {"d_model": HIDDEN, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "biogpt": (("layers", "layer_norm"), {}),
    "lfm2": (("layers", "embedding_norm"), {}),
    "gemma2": (("layers", "norm"), {}),
    "olmo2": (("layers", "norm"), {}),
    "starcoder2": (("layers", "norm"), {}),
    "mamba": (("layers", "norm_f"), {"state_size": 8}),
    "gemma3n_text": (
        ("layers", "norm"),
        {
            "intermediate_size": [64, 64],
            "layer_types": ["full_attention"] * 2,
            "activation_sparsity_pattern": [0.0, 0.0],
        }
        | {
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
        },
    ),
    "bart": (
        ("layers", None),
        {"d_model": HIDDEN, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    ),
}
"""Names of the layers and of the final norm (Bart has none), and sizes where a family calls them otherwise."""


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_set_trainable_final_norm_and_no_other_trains_in_every_family(family):
    (layers, norm), changes = FINAL_NORMS[family]
    common = {key: value for key, value in COMMON.items() if key not in ("head_dim", "attn_implementation")}
    options = AutoConfig.for_model(family, **{**common, **changes})
    model = with_heads(AutoModelForCausalLM.from_config(options, attn_implementation="eager").float())
    set_trainable(model, config(medusa_num_unfreeze_layers=1))
    parts = [name.split(".") for name in trainable(model) if not name.startswith("medusa_heads.")]
    assert {tuple(part[part.index(layers) :][:2]) if layers in part else part[-2] for part in parts} == {
        (layers, "1"),
        *([norm] if norm else []),
    }
    if norm:  # and it is the one whose output the heads see
        outputs = []
        module = next(
            module for name, module in model.named_modules() if name.split(".")[-1] == norm and "layers.0" not in name
        )
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        with torch.no_grad():
            hidden = backbone(model.eval())(input_ids=torch.arange(3, 9)[None], use_cache=False)[0]
        assert torch.equal(outputs[-1], hidden)


def test_set_trainable_more_layers_than_the_model_has_is_an_error():
    with pytest.raises(ValueError, match="medusa_num_unfreeze_layers is 3 but the model has 2 decoder layers"):
        set_trainable(with_heads(make_model()), config(medusa_num_unfreeze_layers=3))


def test_check_trainable_frozen_heads_are_an_error():
    model = with_heads(make_model())
    model.medusa_heads[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="tensors of the heads are frozen"):
        check_trainable(model, config())


def test_check_trainable_backbone_beside_medusa1_is_an_error():
    model = with_heads(make_model())
    with pytest.raises(RuntimeError, match="beside the heads are trainable"):
        check_trainable(model, config(medusa_only_heads=True))


def test_check_trainable_medusa2_without_backbone_is_an_error():
    model = with_heads(make_model())
    set_trainable(model, config(medusa_only_heads=True))
    with pytest.raises(RuntimeError, match="none of it is trainable"):
        check_trainable(model, config())


def test_check_trainable_backbone_beside_an_adapter_is_an_error():
    model = with_heads(add_lora(make_model()))
    model.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(RuntimeError, match="so would the backbone"):
        check_trainable(model, config(adapter="lora"))


def test_heads_dtype_is_fp32_under_autocast_and_the_backbones_without():
    model = make_model().bfloat16()
    assert str(heads_dtype(model, config(bf16=True))) == "torch.float32"
    assert str(heads_dtype(model, config(bf16=False))) == "torch.bfloat16"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_heads_dtype_is_what_the_yaml_says_whatever_the_backbone(wanted):
    for model in (make_model(), make_model().bfloat16()):
        for bf16 in (True, False):
            assert str(heads_dtype(model, config(bf16=bf16, medusa_heads_dtype=wanted))) == f"torch.{wanted}"


def test_epoch_shuffle_depends_on_seed_and_epoch_alone():
    one, two = EpochShuffle(50, seed=1), EpochShuffle(50, seed=1)
    assert list(one) == list(two) == list(one)
    assert sorted(one) == list(range(50))
    one.set_epoch(1)
    assert list(one) != list(two)
    two.set_epoch(1)
    assert list(one) == list(two)
    assert list(EpochShuffle(50, seed=2)) != list(EpochShuffle(50, seed=1))


@pytest.mark.parametrize(
    ("base", "options", "shuffled"),
    [
        (RandomSampler, {}, True),
        (RandomSampler, {"is_training": True}, True),
        (RandomSampler, {"is_training": False}, False),
        (SequentialSampler, {"is_training": False}, False),
        (SequentialSampler, {}, False),
    ],
)
def test_only_packed_training_data_is_shuffled_and_axolotl_hears_which_it_is(base, options, shuffled, monkeypatch):
    calls = []

    def packer(_self, base_sampler, dataset, **given):
        calls.append((base_sampler, given))
        return SimpleNamespace(epoch=0)

    monkeypatch.setattr(AxolotlTrainer, "_create_multipack_sampler", packer)
    trainer = object.__new__(MedusaTrainer)
    trainer.args = SimpleNamespace(seed=1, data_seed=None)
    data = Dataset.from_dict({"input_ids": [[1], [2]]})
    trainer._create_multipack_sampler(base(data), data, **options)
    ((sampler, given),) = calls
    assert isinstance(sampler, EpochShuffle if shuffled else base) and given == options


def test_loss_is_not_logged_as_a_perplexity(monkeypatch):
    seen = {}
    monkeypatch.setattr(Trainer, "log", lambda _self, logs, *_: seen.update(logs))
    trainer = object.__new__(MedusaTrainer)
    trainer.args = SimpleNamespace(world_size=1, include_tkps=False)
    trainer._medusa_sums, trainer._medusa_factor = {"train": None, "eval": None}, 1.0
    trainer._stored_metrics = {"train": {}, "eval": {}}
    trainer.log({"loss": 1.0})
    assert seen["loss"] == 1.0 and ("ppl" in seen) is not hasattr(AxolotlTrainer, "reports_token_perplexity")


@pytest.fixture
def said(monkeypatch):
    lines = {"info": [], "warning": []}
    monkeypatch.setattr(
        trainer_module, "LOG", SimpleNamespace(info=lines["info"].append, warning=lines["warning"].append)
    )
    return lines


@pytest.mark.parametrize(("epochs", "max_steps", "warned"), [(1, -1, True), (2, -1, False), (1, 50, False)])
def test_open_hidden_cache_announces_its_size_and_warns_where_no_sample_comes_twice(
    tmp_path, said, epochs, max_steps, warned
):
    trainer = SimpleNamespace(
        medusa_cfg=config(
            medusa_only_heads=True, medusa_hidden_cache=str(tmp_path / "c"), medusa_hidden_cache_limit_gb=0.5
        ),
        model=with_heads(make_model()),
        processing_class=SimpleNamespace(get_vocab=dict),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}),
        accelerator=SimpleNamespace(mixed_precision="no", is_main_process=True),
        args=SimpleNamespace(
            world_size=1, num_train_epochs=epochs, max_steps=max_steps, main_process_first=lambda desc: nullcontext()
        ),
        _any_rank=list,
    )
    MedusaTrainer.open_hidden_cache(trainer)
    (line,) = said["info"]
    assert line.endswith("2 rows of 32 in bf16, 1.28e-07 GB; 0 of 1 samples are stored")
    assert bool(said["warning"]) is warned
    assert trainer._cached_rows.cache.directory.parent == tmp_path / "c"


def test_every_data_set_that_is_read_has_columns_of_tokens_alone(monkeypatch):
    """Also the one that `axolotl evaluate` hands over."""
    monkeypatch.setattr(AxolotlTrainer, "_get_dataloader", lambda _self, dataset, **_: dataset)
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    trainer = object.__new__(MedusaTrainer)
    assert trainer._get_dataloader(Dataset.from_list([{**row, "id": "x"}]), description="Evaluation").to_list() == [row]


@pytest.mark.parametrize("method", ["_load_best_model", "_load_from_checkpoint"])
def test_checkpoint_without_heads_that_fit_is_one_line(method, tmp_path):
    trainer = SimpleNamespace(
        model=with_heads(make_model()),
        state=SimpleNamespace(best_model_checkpoint=str(tmp_path)),
        medusa_cfg=config(medusa_only_heads=True),
        is_deepspeed_enabled=False,
    )
    trainer._load_heads = MethodType(MedusaTrainer._load_heads, trainer)
    with pytest.raises(SystemExit, match=f"axolotl-medusa: {tmp_path}/medusa_heads/.* does not exist"):
        getattr(MedusaTrainer, method)(trainer, *([str(tmp_path)] if method == "_load_from_checkpoint" else []))


@pytest.mark.parametrize("drop_attention_mask", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_columns_of_the_data_that_the_model_takes_reach_it(with_lora, drop_attention_mask, tmp_path):
    """Positions that skip (`use_pose`) and a mask of the user's own must not be dropped where nothing is packed."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    model = with_heads(add_lora(make_model()) if with_lora else make_model())
    install_objective(model, objective_of(config()))
    row = {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 1], "position_ids": [0, 9], "note": "x"}
    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        sample_packing=drop_attention_mask,
        sample_packing_drop_attention_mask=drop_attention_mask,
    )
    trainer = MedusaTrainer(model=model, args=args, train_dataset=Dataset.from_list([row]))
    kept = set(trainer._remove_unused_columns(trainer.train_dataset, "evaluation").column_names)
    assert kept == {"input_ids", "labels", "position_ids"} | (set() if drop_attention_mask else {"attention_mask"})
