"""The heads' learning rate, `medusa_lr_multiplier` times the backbone's: its parameter groups, and what would ignore them.

Contract: knows the YAML and an optimizer's `param_groups`; imports neither axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.named_files import deepspeed_config

_SCALED_SCHEDULERS = {"WarmupCosineLR"}
"""DeepSpeed's schedulers that scale each group's learning rate; the others set one for all."""

_RATES_OF_MODULES = ("lr_groups", "loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale")
"""Keys that give some modules a learning rate of their own."""

_OWN_GROUPS = {"muon", "muon_8bit", "dion", "sinkgd"}
"""Optimizers that axolotl makes from the whole model, past those keys."""


def learning_rate_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    """One line for each choice in the YAML under which a learning rate of its own would do nothing."""
    optimizer = str(getattr(cfg.get("optimizer"), "value", cfg.get("optimizer")))
    problems = [
        f"{key} is set but optimizer: {optimizer} makes its groups without it, and it would do nothing; use another optimizer or "
        f"remove {key}"
        for key in _RATES_OF_MODULES
        if cfg.get(key) and optimizer in _OWN_GROUPS
    ]
    if args.medusa_lr_multiplier == 1.0:
        return problems
    found = f"medusa_lr_multiplier is {args.medusa_lr_multiplier:g} but "
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        problems.append(
            f"{found}optimizer: {optimizer} steps every parameter with one learning rate; use another optimizer or remove "
            "medusa_lr_multiplier"
        )
    if cfg.get("lr_scheduler") == "one_cycle":
        problems.append(
            f"{found}lr_scheduler: one_cycle sets one learning rate for every parameter; use another scheduler or remove "
            "medusa_lr_multiplier"
        )
    return problems + _deepspeed_problems(found, cfg)


def _deepspeed_problems(found: str, cfg: Mapping[str, Any]) -> list[str]:
    try:
        config = deepspeed_config(cfg)
    except ValueError:
        return []  # reported with the other files
    name = cfg["deepspeed"] if isinstance(cfg.get("deepspeed"), str) else "the configuration"
    problems = []
    scheduler, optimizer = config.get("scheduler"), config.get("optimizer")
    if scheduler is not None and _part(scheduler, "type") not in _SCALED_SCHEDULERS:
        problems.append(
            f"{found}deepspeed {name} has a scheduler, {_part(scheduler, 'type')}, that sets one learning rate for every parameter: "
            "remove it there (lr_scheduler of the YAML is used then) or remove medusa_lr_multiplier"
        )
    if optimizer is not None and _part(_part(optimizer, "params"), "lr") is None:
        problems.append(
            f'{found}deepspeed {name} has an optimizer without a learning rate: add "lr": "auto" to its params, or remove the '
            "optimizer there (optimizer of the YAML is used then)"
        )
    return problems


def _part(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def rates_of_heads(
    names: Iterable[str], rate: float, lr_groups: Sequence[Mapping[str, Any]] | None
) -> dict[str, float]:
    """Learning rate of each of the heads' parameters before it is multiplied.

    Axolotl gives a rate of `lr_groups` to matrices alone; the biases of heads have the one of their matrices here.

    Args:
        names: Full names of the heads' parameters in the model.
        rate: The run's.
        lr_groups: The YAML's; the first of their modules that is part of a name counts, as in axolotl.
    """
    of_module = {module: float(group["lr"]) for group in lr_groups or () for module in group["modules"]}
    return {name: next((own for module, own in of_module.items() if module in name), rate) for name in names}


def separate_heads(
    optimizer: Any, heads: Iterable[Any], multiplier: float, own_rates: Mapping[int, float] | None
) -> None:
    """Moves the heads' parameters into groups of their own learning rate.

    Args:
        optimizer: A fresh optimizer.
        heads: The heads' parameters.
        multiplier: Their learning rate relative to that of the group they are in.
        own_rates: Learning rates by the parameters' ids that are multiplied instead of the group's, where groups are made for
            other modules.

    Raises:
        ValueError: Groups that hold the heads have no learning rate, or none holds them.
    """
    own = {id(parameter) for parameter in heads}
    moved = 0
    for group in list(optimizer.param_groups):
        parameters = [parameter for parameter in group["params"] if id(parameter) in own]
        if not parameters:
            continue
        if group.get("lr") is None:
            moved = 0
            break
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        options = {key: value for key, value in group.items() if key != "params"}
        by_rate: dict[float, list[Any]] = {}
        for parameter in parameters:
            rate = options["lr"] if own_rates is None else own_rates[id(parameter)]
            by_rate.setdefault(rate, []).append(parameter)
        for rate, members in by_rate.items():
            optimizer.add_param_group({**options, "params": members, "lr": rate * multiplier})
        moved += len(parameters)
    if not moved:
        raise ValueError(
            f"medusa_lr_multiplier is {multiplier:g} but {type(optimizer).__name__} keeps no learning rate for the heads' parameters: "
            "use another optimizer or remove medusa_lr_multiplier"
        )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def left_out(optimizer: Any, heads: Iterable[Any]) -> int:
    """How many of the heads' tensors an optimizer does not train, 0 where it steps parameters in another way than by groups."""
    own = {id(parameter) for parameter in heads}
    held = own & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return len(own) - len(held) if held else 0


def heads_group_for_deepspeed(
    parameters: Iterable[Any], heads: Iterable[Any], learning_rate: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer that DeepSpeed makes: the backbone's at the configuration's learning rate, the heads' at theirs.

    Args:
        parameters: All trainable parameters.
        heads: The heads' parameters.
        learning_rate: The heads' learning rate.
    """
    own = {id(parameter) for parameter in heads}
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "lr": learning_rate}]
    for parameter in parameters:
        groups[id(parameter) in own]["params"].append(parameter)
    return [group for group in groups if group["params"]]
