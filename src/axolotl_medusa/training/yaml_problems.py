"""Every contradiction in a YAML that can be seen before a model loads, one line each, all in one go.

Contract: pure functions of the YAML and of the small files that it names; imports neither axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from axolotl_medusa.training.args import MedusaArgs, unknown_key_problems
from axolotl_medusa.training.divided_models import fsdp_problems
from axolotl_medusa.training.learning_rates import learning_rate_problems
from axolotl_medusa.training.named_files import divides_weights, file_problems, is_file, named_path
from axolotl_medusa.training.refused_keys import refused_key_problems
from axolotl_medusa.training.schedule import parse_schedule

_LONGEST_LINE = 1000
"""Characters."""


def config_problems(cfg: Mapping[str, Any], missing_fsdp_version: int = 1) -> list[str]:
    """Everything that is wrong with the Medusa part of a YAML, one line each, found before the model loads.

    Args:
        cfg: The whole YAML as a mapping, before or after axolotl's own validation.
        missing_fsdp_version: What axolotl takes where the YAML has no `fsdp_version`.

    Returns:
        Lines that say what was found, what was expected and what to do; empty when all is well.
    """
    problems = unknown_key_problems(cfg)
    known = {key: cfg[key] for key in MedusaArgs.model_fields if cfg.get(key) is not None}
    bad: set[Any] = set()
    try:
        args = MedusaArgs.model_validate(known)
    except ValidationError as error:
        problems += [_bound_problem(details) for details in error.errors()]
        bad = {details["loc"][0] for details in error.errors() if details["loc"]}
        good = {key: value for key, value in known.items() if key not in bad}
        args = MedusaArgs.model_validate({"medusa_num_heads": 1, **good})  # contradictions are reported in the same run
    problems += _schedule_problems(args)
    problems += _base_loss_problems(args, cfg)
    problems += _weighting_problems(args)
    problems += _layer_problems(args, cfg)
    if "medusa_num_heads" not in bad:
        problems += _size_problems(args, cfg)
    problems += _trainer_problems(args, cfg)
    problems += fsdp_problems(cfg, missing_fsdp_version)
    problems += _hidden_cache_problems(args, cfg)
    problems += _draft_vocab_problems(args, cfg)
    problems += file_problems(args, cfg, bad)
    problems += learning_rate_problems(args, cfg)
    problems += refused_key_problems(args, cfg)
    return [_of_readable_length(problem) for problem in problems]


def _of_readable_length(line: str) -> str:
    """A line without the middle of a value that fills a page."""
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def _bound_problem(details: Any) -> str:
    key = ".".join(str(part) for part in details["loc"]) or "YAML"
    if details["type"] == "missing":
        return f"{key} is missing: set the number of heads, e.g. `medusa_num_heads: 5`"
    found = details.get("input")
    return f"{key} is {found!r}: {details['msg'][0].lower()}{details['msg'][1:]}"


def _schedule_problems(args: MedusaArgs) -> list[str]:
    try:
        parse_schedule(args.medusa_scheduler)
    except ValueError as error:
        return [str(error)]
    return []


def _base_loss_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    problems = []
    if args.medusa_only_heads and args.medusa_self_distillation:
        problems.append(
            "medusa_only_heads and medusa_self_distillation are both true: with a frozen backbone there is nothing to distil; "
            "for Medusa-2 set medusa_only_heads: false, for Medusa-1 remove medusa_self_distillation "
            "(heads learn the model's own distribution with medusa_head_loss: kl)"
        )
    if args.medusa_self_distillation and not cfg.get("adapter"):
        problems.append(
            "medusa_self_distillation is true without an adapter: the teacher is the same model with its adapters off; "
            "set adapter: lora or qlora"
        )
    if args.medusa_kl_coefficient and not args.medusa_self_distillation:
        problems.append(
            f"medusa_kl_coefficient is {args.medusa_kl_coefficient} without medusa_self_distillation: there is no teacher; "
            "set medusa_self_distillation: true or remove the coefficient"
        )
    if args.medusa_self_distillation and cfg.get("medusa_kl_coefficient") == 0.0:
        problems.append(
            "medusa_kl_coefficient is 0 with medusa_self_distillation: true, which then does nothing; remove one"
        )
    if args.medusa_distillation_regularization and args.medusa_only_heads:
        problems.append(
            "medusa_distillation_regularization shapes the base loss, which medusa_only_heads: true does not train; remove one"
        )
    if args.medusa_distillation_regularization and args.medusa_self_distillation and not args.medusa_lm_coefficient:
        problems.append(
            "medusa_distillation_regularization shapes the base model's CE, whose weight medusa_lm_coefficient is 0 with "
            "self-distillation; set medusa_lm_coefficient or remove the regularization"
        )
    if args.medusa_only_heads and not args.medusa_self_distillation and args.medusa_lm_coefficient != 1.0:
        problems.append(
            "medusa_lm_coefficient weights the base loss, which medusa_only_heads: true does not train; remove one"
        )
    return problems


def _weighting_problems(args: MedusaArgs) -> list[str]:
    unused = {"decay": "medusa_chain_smoothing", "chain": "medusa_decay_coefficient"}[args.medusa_head_weighting]
    if getattr(args, unused) == MedusaArgs.model_fields[unused].default:
        return []
    return [
        f"{unused} is {getattr(args, unused)} with medusa_head_weighting: {args.medusa_head_weighting}, which does not use it; "
        "remove one of the two"
    ]


def _layer_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    problems = []
    adapter = cfg.get("adapter")
    if args.medusa_num_unfreeze_layers and adapter:
        problems.append(
            f"medusa_num_unfreeze_layers is {args.medusa_num_unfreeze_layers} with adapter: {adapter}: an adapter freezes all "
            "layers; remove one of the two"
        )
    if args.medusa_num_unfreeze_layers and args.medusa_only_heads:
        problems.append(
            f"medusa_num_unfreeze_layers is {args.medusa_num_unfreeze_layers} with medusa_only_heads: true, which freezes every "
            "layer; set medusa_only_heads: false or remove medusa_num_unfreeze_layers"
        )
    if args.medusa_checkpoint_layers and args.medusa_only_heads:
        problems.append(
            f"medusa_checkpoint_layers is {args.medusa_checkpoint_layers} with medusa_only_heads: true, which keeps no activations of "
            "the layers; remove it"
        )
    if args.medusa_checkpoint_layers and cfg.get("gradient_checkpointing"):
        problems.append(
            f"medusa_checkpoint_layers is {args.medusa_checkpoint_layers} with gradient_checkpointing: "
            f"{cfg['gradient_checkpointing']}, which recomputes all layers; set gradient_checkpointing: false or remove it"
        )
    for key in ("unfrozen_parameters", "lisa_step_interval"):
        if args.medusa_num_unfreeze_layers and cfg.get(key) and not args.medusa_only_heads:
            problems.append(f"medusa_num_unfreeze_layers and {key} are both set: keep one of the two")
    return problems


def _size_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    sequence_len = cfg.get("sequence_len")
    if isinstance(sequence_len, int) and args.medusa_num_heads + 2 > sequence_len:
        return [
            f"medusa_num_heads is {args.medusa_num_heads} but sequence_len is {sequence_len}: head {args.medusa_num_heads - 1} "
            f"predicts {args.medusa_num_heads + 1} tokens ahead and would never have a target; lower one or raise the other"
        ]
    return []


def _trainer_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    problems = []
    if cfg.get("rl") or cfg.get("reward_model") or cfg.get("process_reward_model"):
        problems.append(
            "rl and reward models train with other losses: Medusa heads need plain fine-tuning; remove rl/reward_model"
        )
    metric = str(cfg.get("metric_for_best_model") or "")
    if "medusa" in metric and not args.medusa_logging:
        problems.append(
            f"metric_for_best_model is {metric} but medusa_logging is false: the metric would not exist; set it to true"
        )
    for key in ("relora", "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"):
        value = cfg.get(key)
        if value is True or value not in (None, False, 0, 1):
            problems.append(
                f"{key} is {value}: targets of Medusa heads reach across its parts and it is not supported; remove it"
            )
    return problems


def _draft_vocab_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    if args.medusa_draft_vocab is None:
        return []
    problems = [
        f"medusa_draft_vocab counts the tokens of all samples beforehand, which {key} does not tell; remove one"
        for key in ("streaming", "pretraining_dataset")
        if cfg.get(key)
    ]
    if divides_weights(cfg):
        problems.append(
            "medusa_draft_vocab takes rows of lm_head once the data is known, and ZeRO-3 and FSDP have divided it by then; train "
            "with DDP or ZeRO-1 or 2, or remove medusa_draft_vocab"
        )
    return problems


def _hidden_cache_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    directory = args.medusa_hidden_cache
    if directory is None:
        if args.medusa_hidden_cache_limit_gb != MedusaArgs.model_fields["medusa_hidden_cache_limit_gb"].default:
            return [
                "medusa_hidden_cache_limit_gb is set without medusa_hidden_cache, which it limits; set or remove both"
            ]
        return []
    problems = []
    if not args.medusa_only_heads:
        problems.append(
            "medusa_hidden_cache keeps what a frozen backbone says, and medusa_only_heads: false trains it; remove one"
        )
    for key in ("streaming", "pretraining_dataset"):
        if cfg.get(key):
            problems.append(
                f"medusa_hidden_cache needs to know every sample beforehand, which {key} does not tell; remove one"
            )
    if cfg.get("use_pose"):
        problems.append(
            "medusa_hidden_cache finds a sample by its tokens, and use_pose gives the same tokens other positions each time; remove one"
        )
    if cfg.get("neftune_noise_alpha"):
        problems.append(
            f"medusa_hidden_cache keeps hidden states and neftune_noise_alpha: {cfg['neftune_noise_alpha']} changes them each time; "
            "remove one"
        )
    if is_file(named_path(directory)):
        problems.append(
            f"medusa_hidden_cache {directory} is a file: expected a directory, or a path where one can be made"
        )
    return problems
