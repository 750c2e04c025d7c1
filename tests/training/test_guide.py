"""The guide at the top of `training/objective.py` names functions and classes that are there."""

from __future__ import annotations

import importlib
import operator
import re
from pathlib import Path

import axolotl_medusa
from axolotl_medusa.training import objective, trainer
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.objective import Objective
from axolotl_medusa.training.plugin import MedusaPlugin

PACKAGE = Path(axolotl_medusa.__file__).parent
OF_AXOLOTLS_BATCHES = {"input_ids", "labels", "position_ids"}
OF_THE_FORWARD = {"num_items_in_batch", "medusa_coefficient", "hidden_rows"}


def exists(name: str) -> bool:
    """Whether a name of the guide is a module of the training room or the package, or a part of one, or stands below it."""
    parts = name.split(".")
    for room in ([], ["training"]):
        for length in range(len(parts), 0, -1):
            path = PACKAGE.joinpath(*room, *parts[:length])
            if path.with_suffix(".py").is_file():
                module = importlib.import_module(".".join(["axolotl_medusa", *room, *parts[:length]]))
                rest = ".".join(parts[length:])
                return not rest or has(module, rest)
    return any(has(place, name) for place in (objective, trainer, objective._MicroBatch))


def has(place: object, name: str) -> bool:
    try:
        operator.attrgetter(name)(place)
    except AttributeError:
        return False
    return True


def test_guide_every_name_in_it_exists():
    names = set(re.findall(r"`([^`]+)`", objective.__doc__))
    fields = {*MedusaArgs.model_fields, *Objective.__dataclass_fields__}
    others = {"medusa_*", "kl", "medusa_heads"} | OF_AXOLOTLS_BATCHES | OF_THE_FORWARD | fields
    of_plugin = {name for name in names if name.startswith("MedusaPlugin.")}
    assert len(names) > 30 and len(of_plugin) == 2
    assert [name for name in sorted(names - others - of_plugin) if not exists(name)] == []
    assert all(has(MedusaPlugin, name.removeprefix("MedusaPlugin.")) for name in of_plugin)


def test_guide_a_name_that_is_gone_is_found():
    assert (
        not exists("learning_rates.create_optimizer") and not exists("config_problems") and not exists("closed_form.x")
    )
