"""Every parameter's learning rate and weight decay: the heads' rate, `lr_groups` and weight decay together, by optimizer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from built_trainers import DECAY, MULTIPLIER, RATE, built_trainer
from conftest import AXOLOTL_YAML

from axolotl_medusa.model.heads import attached_heads
from axolotl_medusa.training.yaml_problems import config_problems

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "muon"]
ATTENTION, HEADS = 2e-4, 3e-4
ATTENTION_GROUP = {"name": "attention", "modules": ["self_attn"], "lr": ATTENTION}
HEADS_GROUP = {"name": "heads", "modules": ["medusa_heads"], "lr": HEADS}
GROUPS = {
    "none": None,
    "attention": [ATTENTION_GROUP],
    "heads": [HEADS_GROUP],
    "both": [ATTENTION_GROUP, HEADS_GROUP],
}


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer as axolotl builds it, of a model with heads; keys of the YAML may be given."""
    return partial(built_trainer, tmp_path)


def found(trainer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by its name; each is in one group."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    members = [(names[id(p)], group) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(members) == len(dict(members))
    return {
        name: (round(float(group["lr"]), 9), group["wd"] if "wd" in group else group["weight_decay"])
        for name, group in members
    }


def expected(trainer, groups, multiplier) -> dict[str, tuple[float, float]]:
    """What the YAML means, parameter by parameter."""
    own = {id(parameter) for parameter in attached_heads(trainer.model).parameters()}
    asked = {group["modules"][0]: group["lr"] for group in groups or ()}
    result = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head, is_matrix = id(parameter) in own, parameter.dim() > 1
        is_embedding = "embed_tokens" in name or "lm_head" in name
        rate = next((asked[module] for module in asked if module in name), RATE)
        if not is_head and (is_embedding or not is_matrix):
            rate = RATE  # axolotl gives a rate of lr_groups to matrices of layers alone
        # With lr_groups axolotl makes the groups itself, and lets no embedding decay.
        decays = is_matrix and not (is_embedding and groups)
        result[name] = (round(rate * multiplier if is_head else rate, 9), DECAY if decays else 0.0)
    return result


@pytest.mark.parametrize("multiplier", [1.0, MULTIPLIER])
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [(optimizer, groups) for optimizer in OPTIMIZERS for groups in GROUPS if optimizer != "muon" or groups == "none"],
)
def test_every_parameter_has_the_rate_and_the_decay_that_the_yaml_means(
    optimizer, groups, with_lora, multiplier, make_trainer
):
    asked = GROUPS[groups]
    trainer = make_trainer(optimizer, multiplier, with_lora, **({"lr_groups": asked} if asked else {}))
    trainer.create_optimizer()
    means = expected(trainer, asked, multiplier)
    if (
        optimizer == "muon"
    ):  # axolotl 0.19 hands it matrices alone, and says which of the heads' tensors that leaves out
        means = {name: value for name, value in means.items() if trainer.model.get_parameter(name).dim() > 1}
    assert found(trainer) == means


def test_heads_in_a_group_keep_its_rate_beside_a_rate_for_embeddings(make_trainer):
    trainer = make_trainer(lr_groups=[HEADS_GROUP], embedding_lr=5e-5)
    trainer.create_optimizer()
    rates = {rate for name, (rate, _) in found(trainer).items() if "medusa_heads" in name}
    assert rates == {HEADS * MULTIPLIER}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_all_that_it_holds(optimizer, make_trainer):
    trainer = make_trainer(optimizer)
    trainer.create_optimizer()
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(found(trainer))


@pytest.mark.parametrize("multiplier", [1.0, MULTIPLIER])
@pytest.mark.parametrize(
    "keys",
    [
        {"lr_groups": [HEADS_GROUP]},
        {"embedding_lr": 5e-5},
        {"embedding_lr_scale": 0.5},
        {"loraplus_lr_ratio": 16.0, "adapter": "lora"},
    ],
    ids=lambda keys: next(iter(keys)),
)
@pytest.mark.parametrize("optimizer", ["muon", "dion", "sinkgd"])
def test_lr_groups_with_an_optimizer_that_makes_its_own_groups_are_refused(optimizer, keys, multiplier):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_lr_multiplier": multiplier, **keys}
    (line,) = config_problems({**cfg, "optimizer": optimizer})
    key = next(iter(keys))
    assert line.startswith(f"{key} is set but optimizer: {optimizer} makes its groups without it")
    assert line.endswith(f"use another optimizer or remove {key}")
    assert config_problems({**cfg, "optimizer": "adamw_torch"}) == []
