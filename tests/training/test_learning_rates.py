"""`medusa_lr_multiplier` acts whatever makes the optimizer and the schedule, or is refused with a reason."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest
import torch
from built_trainers import MULTIPLIER, RATE, built_trainer
from conftest import AXOLOTL_YAML

from axolotl_medusa.model.heads import attached_heads
from axolotl_medusa.training import trainer as trainer_module
from axolotl_medusa.training.yaml_problems import config_problems


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_lr_multiplier": MULTIPLIER, **keys})


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer as axolotl builds it, of a model with heads; keys of the YAML may be given."""
    return partial(built_trainer, tmp_path)


def rates(trainer) -> tuple[set[float], set[float]]:
    """Learning rates of the heads' parameters and of the others, each once; no parameter is in two groups."""
    own = {id(parameter) for parameter in attached_heads(trainer.model).parameters()}
    found = [(id(p), round(float(group["lr"]), 9)) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(found) == len({number for number, _ in found})
    return {rate for number, rate in found if number in own}, {rate for number, rate in found if number not in own}


OPTIMIZERS = [
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "lion_32bit",
    "paged_adamw_8bit",
    "schedule_free_adamw",
    "adopt_adamw",
    "adamc",
    "muon",
    "sinkgd",
    "ao_adamw_fp8",
    "dion",
]
"""Those of axolotl and transformers that can be made here."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_create_optimizer_heads_have_their_own_learning_rate_in_every_optimizer(optimizer, make_trainer):
    trainer = make_trainer(optimizer)
    trainer.create_optimizer()
    assert rates(trainer) == ({RATE * MULTIPLIER}, {RATE})
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    matrices = {id(p) for p in trainer.model.parameters() if p.requires_grad and p.dim() > 1}
    assert matrices <= trained and (optimizer == "muon" or len(trained) == len(list(trainer.model.parameters())))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_create_optimizer_heads_take_steps_that_are_larger_by_the_multiplier(optimizer, make_trainer):
    def step_of(multiplier):
        trainer = make_trainer(optimizer, multiplier)
        trainer.create_optimizer()
        tensors = [attached_heads(trainer.model)[0][0].linear.weight, trainer.model.model.norm.weight]
        before = [tensor.detach().clone() for tensor in tensors]
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainer.optimizer.step()
        return [(tensor - old).norm().item() for tensor, old in zip(tensors, before, strict=True)]

    heads, backbone = step_of(MULTIPLIER)
    heads_alike, backbone_alike = step_of(1.0)
    assert heads == pytest.approx(MULTIPLIER * heads_alike, rel=1e-3)
    assert backbone == backbone_alike > 0


def test_create_optimizer_asked_twice_multiplies_once(make_trainer):
    """DeepSpeed asks the trainer for an optimizer, and the trainer then asks again."""
    trainer = make_trainer()
    first = trainer.create_optimizer()
    assert trainer.create_optimizer() is first
    assert rates(trainer) == ({RATE * MULTIPLIER}, {RATE})


def test_create_optimizer_for_deepspeeds_own_hands_it_the_heads_as_a_group(make_trainer):
    from accelerate.utils import DummyOptim

    trainer = make_trainer()
    trainer.optimizer = DummyOptim(list(trainer.model.parameters()))
    for _ in range(2):
        others, heads = trainer.create_optimizer().params
        assert "lr" not in others and heads["lr"] == RATE * MULTIPLIER
        assert {id(p) for p in heads["params"]} == {id(p) for p in attached_heads(trainer.model).parameters()}
        assert len(others["params"]) + len(heads["params"]) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("multiplier", [1.0, MULTIPLIER])
@pytest.mark.parametrize(
    ("keys", "others"),
    [
        ({"embedding_lr": 5e-5}, {RATE, 5e-5}),
        ({"embedding_lr_scale": 0.5}, {RATE, 5e-4}),
        ({"loraplus_lr_ratio": 16.0, "with_lora": True}, {RATE, 16 * RATE}),
        ({"lr_groups": [{"name": "attention", "modules": ["self_attn"], "lr": 2e-4}]}, {RATE, 2e-4}),
    ],
    ids=["embedding_lr", "embedding_lr_scale", "loraplus", "lr_groups"],
)
def test_create_optimizer_rates_of_other_modules_are_not_the_heads(keys, others, multiplier, make_trainer):
    trainer = make_trainer(multiplier=multiplier, **keys)
    trainer.create_optimizer()
    assert rates(trainer) == ({RATE * multiplier}, others)


def test_create_optimizer_own_learning_rate_of_a_group_of_heads_is_multiplied(make_trainer):
    groups = [{"name": "heads", "modules": ["medusa_heads"], "lr": 2e-4}]
    trainer = make_trainer(lr_groups=groups)
    trainer.create_optimizer()
    assert 2e-4 * MULTIPLIER in rates(trainer)[0] and rates(trainer)[1] == {RATE}


def test_create_optimizer_that_keeps_no_learning_rate_is_one_line(make_trainer, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # axolotl logs each group's learning rate as a number
    monkeypatch.setattr(logging.getLogger("axolotl.core.trainers.mixins.optimizer"), "propagate", False)

    class Relative(torch.optim.SGD):
        def __init__(self, params, **_):
            super().__init__(params)
            for group in self.param_groups:
                group["lr"] = None

    trainer = make_trainer()
    trainer.optimizer_cls_and_kwargs = Relative, {"lr": RATE}
    with pytest.raises(SystemExit, match="medusa_lr_multiplier is 4 but Relative keeps no learning rate"):
        trainer.create_optimizer()


def test_create_optimizer_that_leaves_tensors_out_says_so(make_trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer_module.LOG, "warning", seen.append)
    make_trainer("muon", multiplier=1.0).create_optimizer()
    make_trainer("adamw_torch", multiplier=1.0).create_optimizer()
    assert seen == ["Muon leaves 2 of the heads' 6 tensors as they are"]


SCHEDULERS = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "rex",
    "cosine-min",
    "jagged",
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_create_scheduler_keeps_the_heads_learning_rate_apart(scheduler, make_trainer):
    keys = {"cosine-min": {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1}}
    keys["jagged"] = {"lr_scheduler": "cosine", "jagged_restart_steps": 5}
    trainer = make_trainer(**keys.get(scheduler, {"lr_scheduler": scheduler}))
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(20, optimizer)
    seen = 0
    for _ in range(18):
        optimizer.step()
        trainer.lr_scheduler.step()
        (heads,), (others,) = rates(trainer)
        seen += others > 0
        assert heads == pytest.approx(MULTIPLIER * others, rel=1e-3, abs=1e-9)
    assert seen > 10


IGNORES_IT = {
    "lomo": {"optimizer": "lomo"},
    "adalomo": {"optimizer": "adalomo"},
    "layerwise": {"optimizer": "galore_adamw_layerwise"},
    "one_cycle": {"lr_scheduler": "one_cycle"},
    "deepspeed-scheduler": {"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {}}}},
    "deepspeed-no-rate": {"deepspeed": {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}},
    "deepspeed-optimizer-of-no-shape": {"deepspeed": {"optimizer": "AdamW"}},
}


@pytest.mark.parametrize("keys", IGNORES_IT.values(), ids=IGNORES_IT)
def test_config_problems_what_would_ignore_the_multiplier_is_one_line(keys):
    (line,) = problems(**keys)
    assert line.startswith("medusa_lr_multiplier is 4 but ") and "\n" not in line and "remove" in line
    assert problems(**keys, medusa_lr_multiplier=1.0) == []


def test_config_problems_deepspeed_files_optimizer_is_fine_and_its_scheduler_is_named(tmp_path):
    file = tmp_path / "ds.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto"}}
    file.write_text(json.dumps({"optimizer": optimizer}))
    assert problems(deepspeed=str(file)) == []
    file.write_text(json.dumps({"optimizer": optimizer, "scheduler": {"type": "WarmupDecayLR"}}))
    (line,) = problems(deepspeed=str(file))
    assert f"deepspeed {file} has a scheduler, WarmupDecayLR" in line
    file.write_text(json.dumps({"scheduler": {"type": "WarmupCosineLR"}}))
    assert problems(deepspeed=str(file)) == []
