"""Keys and plugins of axolotl that take away the loss, the trainer or the parameters that heads need, each with the reason.

Contract: pure functions of the YAML; imports neither axolotl nor torch. Keys of axolotl that change a loss or the order of
the data and are not here were tried: heads train on the same losses with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_medusa.training.args import MedusaArgs

_OTHER_LOSS = "it replaces the loss by one of the model's own logits, and the heads would not train"
_OTHER_TRAINER = "it brings a trainer of its own, and the plugin's trainer computes the heads' losses"

REFUSED_KEYS = {
    "use_eaft": _OTHER_LOSS,
    "use_dft": _OTHER_LOSS,
    "label_smoothing_factor": "it replaces the loss that trains the heads",
    "liger_use_token_scaling": "it weights the tokens of a loss that this plugin computes itself, and would do nothing",
    "kd_trainer": f"{_OTHER_TRAINER}; to learn a model's own distribution use medusa_self_distillation or medusa_head_loss: kl",
    "trainer_cls": f"{_OTHER_TRAINER}; it would do nothing",
    "diffusion_lm": "it masks tokens at random, and heads predict the tokens that follow",
    "balance_labels": "its sampler was not shown to keep the plugin's order of the data; all losses are means over the whole "
    "optimizer step without it",
    "orpo_alpha": "it is for preference training, and would do nothing",
}
"""Keys that are refused whatever else the YAML says."""

REFUSED_PLUGINS = {
    "axolotl.integrations.kd": _OTHER_TRAINER,
    "axolotl.integrations.diffusion": _OTHER_TRAINER,
    "axolotl.integrations.diffusion_decision": _OTHER_TRAINER,
    "axolotl.integrations.hatchery": _OTHER_TRAINER,
    "axolotl.integrations.mixlora": _OTHER_TRAINER,
    "axolotl.integrations.nemo_gym": "it is for reinforcement learning, and heads need plain fine-tuning",
    "axolotl.integrations.llm_compressor": "it wraps the trainer's loss",
    "axolotl.integrations.context_parallel": "it splits sequences between processes, and targets of heads reach across the parts",
}
"""Modules of plugins that are refused."""

REFUSED_WITH_A_FROZEN_BACKBONE = {
    "neftune_noise_alpha": "a frozen backbone answers as it does when it is served, and the noise would do nothing",
    "unfrozen_parameters": "the backbone is frozen, and it would do nothing",
    "fix_untrained_tokens": "it changes the model's embeddings, and Medusa-1 writes no model: the heads would fit none on disk",
    "lisa_step_interval": "it trains some layers of the backbone in turn, and the backbone is frozen",
}
"""Keys that are refused with `medusa_only_heads: true`."""


def refused_key_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    """One line for each key or plugin in the YAML that training of heads cannot use.

    Args:
        args: The Medusa part of the YAML.
        cfg: The whole YAML.
    """
    problems = [_line(key, cfg[key], reason) for key, reason in REFUSED_KEYS.items() if cfg.get(key)]
    plugins = cfg.get("plugins")
    for name in plugins if isinstance(plugins, list) else []:
        for module, reason in REFUSED_PLUGINS.items():
            if str(name).startswith(f"{module}."):
                problems.append(f"plugin {name} cannot be used with Medusa heads: {reason}; remove it")
    if args.medusa_only_heads:
        for key, reason in REFUSED_WITH_A_FROZEN_BACKBONE.items():
            is_named_already = key == "neftune_noise_alpha" and args.medusa_hidden_cache
            if cfg.get(key) and not is_named_already:
                problems.append(f"{key} with medusa_only_heads: true: {reason}; remove one")
    if getattr(cfg.get("optimizer"), "value", cfg.get("optimizer")) == "polora":
        problems.append("optimizer: polora trains LoRA's matrices only, and heads are none; use another optimizer")
    return problems


def _line(key: str, value: Any, reason: str) -> str:
    return f"{key}: {value} cannot be used with Medusa heads: {reason}; remove it"
