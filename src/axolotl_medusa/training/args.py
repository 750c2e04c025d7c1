"""The YAML keys: defaults, bounds, meaning, and every contradiction that can be seen before a model loads.

Contract: imports nothing of ours and neither axolotl nor torch. Defaults come from the recipes of the Medusa paper
(arXiv 2401.10774, section 3) as its first public trainer shipped them, unless a key says otherwise.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from axolotl_medusa.model.file_names import HEADS_FILE, HEADS_FOLDER
from axolotl_medusa.training.schedule import parse_schedule

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")

RENAMED_BY_AXOLOTL = {
    "flash_attention": "use attn_implementation: flash_attention_2",
    "xformers_attention": "use attn_implementation: xformers",
    "sdp_attention": "use attn_implementation: sdpa",
    "landmark_attention": "remove it; axolotl ignores it",
    "xpos_rope": "remove it; axolotl ignores it",
    "flash_attn_fuse_qkv": "remove it; axolotl ignores it",
    "flash_attn_rms_norm": "remove it; axolotl no longer has it",
    "is_llama_derived_model": "remove it; axolotl sees it from the model",
    "is_mistral_derived_model": "remove it; axolotl sees it from the model",
    "is_falcon_derived_model": "remove it; axolotl sees it from the model",
    "is_qwen_derived_model": "remove it; axolotl sees it from the model",
    "gptq_groupsize": "remove it; axolotl ignores it",
    "gptq_model_v1": "remove it; axolotl ignores it",
    "rope_scaling": "write it under overrides_of_model_config",
    "max_packed_sequence_len": "use sequence_len with sample_packing: true",
    "sample_packing_seq_len_multiplier": "remove it; axolotl ignores it",
    "dataset_processes": "use dataset_num_proc",
    "data_seed": "use seed",
    "noisy_embedding_alpha": "use neftune_noise_alpha",
    "lora_out_dir": "use output_dir",
    "relora_steps": "remove it; ReLoRA does not work with Medusa heads",
    "relora_warmup_steps": "remove it; ReLoRA does not work with Medusa heads",
    "log_sweep_min_lr": "remove it; axolotl ignores it",
    "log_sweep_max_lr": "remove it; axolotl ignores it",
    "evaluation_strategy": "use eval_strategy",
    "eval_table_size": "use generate_samples: true and num_generation_samples",
    "eval_table_max_new_tokens": "use generation_max_new_tokens",
    "eval_max_new_tokens": "use generation_max_new_tokens",
    "wandb_run_id": "use wandb_name for the run's name; wandb_run_id is its id now, which resumes that run",
    "local_rank": "remove it; the launcher sets it",
    "debug": "remove it; use `axolotl preprocess --debug`",
}
"""Keys of the first Medusa fork of axolotl, and of the axolotl it was made from, with what to write today: axolotl 0.19
refuses, has renamed, sets by itself or ignores them."""


class MedusaArgs(BaseModel):
    """The `medusa_*` keys of an axolotl YAML."""

    medusa_num_heads: int = Field(
        ge=1,
        le=16,
        description="Number of heads N; head i predicts the token i + 2 ahead. Recipes: 5 (paper), 3 for a chain.",
    )
    medusa_num_layers: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Residual blocks per head, independent of each other. Default: paper, 1.",
    )
    medusa_only_heads: bool = Field(
        default=False,
        description="true: Medusa-1, the backbone is frozen. false: Medusa-2, heads and backbone together.",
    )
    medusa_heads_coefficient: float = Field(
        allow_inf_nan=False,
        default=0.2,
        gt=0.0,
        description="λ0, weight of the heads' losses. Default: paper, section 2.2.2, 0.2.",
    )
    medusa_decay_coefficient: float = Field(
        allow_inf_nan=False,
        default=0.8,
        gt=0.0,
        le=1.0,
        description="Head i (from 0) is weighted λ0 · decay^(i + 1). Default: paper, 0.8.",
    )
    medusa_scheduler: str = Field(
        default="constant",
        description="Factor on λ0 over training: constant, linear, sine, or sine_R (sine up to the fraction R, then 1).",
    )
    medusa_lr_multiplier: float = Field(
        allow_inf_nan=False,
        default=1.0,
        gt=0.0,
        description="Learning rate of the heads relative to the backbone's. The recipes use 4.",
    )
    medusa_num_unfreeze_layers: int = Field(
        default=0,
        ge=0,
        description="Train only the last n decoder layers and the final norm with the heads; 0: all layers.",
    )
    medusa_checkpoint_layers: int = Field(
        default=0,
        ge=0,
        description="Medusa-2: recompute activations of the first n decoder layers in the backward; gradient_checkpointing does all.",
    )
    medusa_self_distillation: bool = Field(
        default=False,
        description="Adds KL(frozen self ‖ trained self) to the base loss; the teacher is the model with adapters off.",
    )
    medusa_lm_coefficient: float | None = Field(
        allow_inf_nan=False,
        default=None,
        ge=0.0,
        description="Weight of the base model's own CE. Default: 1.0, or 0.0 with self-distillation.",
    )
    medusa_kl_coefficient: float | None = Field(
        allow_inf_nan=False,
        default=None,
        ge=0.0,
        description="Weight of the self-distillation KL. Default: 1.0 with self-distillation.",
    )
    medusa_distillation_regularization: float = Field(
        allow_inf_nan=False,
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="α: base targets are α · own softmax + (1 - α) · one-hot.",
    )
    medusa_logging: bool = Field(
        default=True, description="Log per-head losses and accuracies, and the acceptance length."
    )
    medusa_logging_topk: int = Field(default=5, ge=1, le=100, description="Accuracies logged: top 1 to k.")
    medusa_lm_head: Literal["separate", "shared"] = Field(
        default="separate",
        description="separate: each head owns an output layer started from lm_head (v1). shared: heads reuse lm_head (v2).",
    )
    medusa_init_from: str | None = Field(
        default=None,
        description="Canonical directory, or an output_dir, whose heads training starts from (stage 2 after stage 1).",
    )
    medusa_head_loss: Literal["ce", "kl"] = Field(
        default="ce",
        description="ce, or kl: heads learn the base model's own distribution (the frozen self's in self-distillation).",
    )
    medusa_hidden_cache: str | None = Field(
        default=None,
        description="Directory where Medusa-1 keeps the backbone's hidden states, so that later epochs and runs skip it.",
    )
    medusa_hidden_cache_limit_gb: float = Field(
        allow_inf_nan=False,
        default=100.0,
        gt=0.0,
        description="Largest cache that is begun, in 10^9 bytes: counted rows · hidden size · 2. Default: a tenth of a 1 TB disk.",
    )

    @field_validator(
        "medusa_num_heads",
        "medusa_num_layers",
        "medusa_num_unfreeze_layers",
        "medusa_checkpoint_layers",
        "medusa_logging_topk",
        mode="before",
    )
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a whole number")
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        problems = unknown_key_problems(data) if isinstance(data, Mapping) else []
        if problems:
            raise ValueError("; ".join(problems))
        if isinstance(data, Mapping):  # `key:` without a value means the default
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return data

    @model_validator(mode="after")
    def _fill_dependent_defaults(self) -> MedusaArgs:
        if self.medusa_lm_coefficient is None:
            self.medusa_lm_coefficient = 0.0 if self.medusa_self_distillation else 1.0
        if self.medusa_kl_coefficient is None:
            self.medusa_kl_coefficient = 1.0 if self.medusa_self_distillation else 0.0
        return self


def unknown_key_problems(cfg: Mapping[str, Any]) -> list[str]:
    """One line for each `medusa_*` key that does not exist, with the nearest one that does."""
    problems = []
    for key in sorted(str(key) for key in cfg if str(key).startswith("medusa")):
        if key not in MedusaArgs.model_fields:
            names = [name.removeprefix("medusa_") for name in MedusaArgs.model_fields]
            stem = key.removeprefix("medusa").lstrip("_")
            nearest = difflib.get_close_matches(stem, names, n=1, cutoff=0.5)
            nearest = nearest or [name for name in names if stem and name.startswith(stem)]
            hint = (
                f"did you mean medusa_{nearest[0]}?" if nearest else f"known keys: {', '.join(MedusaArgs.model_fields)}"
            )
            problems.append(f"{key} is not a key of axolotl-medusa: {hint}")
    return problems


def renamed_key_hints(cfg: Mapping[str, Any]) -> list[str]:
    """One line for each key of an old YAML that axolotl has since renamed or dropped; blank and false ones do nothing."""
    used = {key for key in RENAMED_BY_AXOLOTL if cfg.get(key) is not None and cfg.get(key) is not False}
    hints = [f"{key}: {hint}" for key, hint in RENAMED_BY_AXOLOTL.items() if key in used]
    datasets = cfg.get("datasets")
    for dataset in datasets if isinstance(datasets, list) else []:
        if isinstance(dataset, Mapping) and str(dataset.get("type") or "").startswith("sharegpt"):
            hints.append(
                f"datasets type sharegpt ({dataset.get('path')}): use `type: chat_template`, "
                "`field_messages: conversations`, `message_property_mappings: {role: from, content: value}` "
                "instead of type and conversation; where the tokenizer has no chat template, also `chat_template: jinja` and "
                "`chat_template_jinja: FILE` (Vicuna's: examples/medusa/vicuna.jinja)"
            )
    if cfg.get("fsdp"):
        hints.append("fsdp: use fsdp_version: 2, and fsdp_config with its keys' names without `fsdp_`")
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed.startswith("deepspeed/") and not Path(deepspeed).is_file():
        hints.append(f"deepspeed {deepspeed} does not exist: use deepspeed_configs, e.g. deepspeed_configs/zero2.json")
    return hints


def config_problems(cfg: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the Medusa part of a YAML, one line each, found before the model loads.

    Args:
        cfg: The whole YAML as a mapping, before or after axolotl's own validation.

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
    problems += _recipe_problems(args, cfg)
    if "medusa_num_heads" not in bad:
        problems += _size_problems(args, cfg)
    problems += _trainer_problems(args, cfg)
    problems += _hidden_cache_problems(args, cfg)
    problems += _base_model_problems(cfg)
    if args.medusa_init_from is not None:
        problems += _init_from_problems(args, bad)
    return problems


def heads_directory(path: str | Path) -> Path:
    """The canonical directory at `path`, which is one itself or an output_dir that holds one as `medusa_heads`."""
    path = Path(path).expanduser()
    return path / HEADS_FOLDER if (path / HEADS_FOLDER).is_dir() else path


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


def _recipe_problems(args: MedusaArgs, cfg: Mapping[str, Any]) -> list[str]:
    problems = []
    adapter = cfg.get("adapter")
    if args.medusa_only_heads and args.medusa_self_distillation:
        problems.append(
            "medusa_only_heads and medusa_self_distillation are both true: with a frozen backbone there is nothing to distil; "
            "for Medusa-2 set medusa_only_heads: false, for Medusa-1 remove medusa_self_distillation "
            "(heads learn the model's own distribution with medusa_head_loss: kl)"
        )
    if args.medusa_self_distillation and not adapter:
        problems.append(
            "medusa_self_distillation is true without an adapter: the teacher is the same model with its adapters off; "
            "set adapter: lora or qlora"
        )
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
    if args.medusa_num_unfreeze_layers and cfg.get("unfrozen_parameters"):
        problems.append("medusa_num_unfreeze_layers and unfrozen_parameters are both set: keep one of the two")
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
    fsdp_config = cfg.get("fsdp_config") or {}
    if fsdp_config or cfg.get("fsdp"):
        nested = (
            (fsdp_config.get("fsdp_version") or fsdp_config.get("version"))
            if isinstance(fsdp_config, Mapping)
            else None
        )
        version = str(cfg.get("fsdp_version") or nested or 1)  # axolotl's own default
        if version != "2":
            problems.append(
                f"fsdp_version is {version}: its flattened parameters cannot hold heads beside frozen layers; "
                "set fsdp_version: 2"
            )
    if cfg.get("label_smoothing_factor"):
        problems.append("label_smoothing_factor replaces the loss that trains the heads; remove it")
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
    if cfg.get("neftune_noise_alpha"):
        problems.append(
            f"medusa_hidden_cache keeps hidden states and neftune_noise_alpha: {cfg['neftune_noise_alpha']} changes them each time; "
            "remove one"
        )
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        problems.append(
            f"medusa_hidden_cache {directory} is a file: expected a directory, or a path where one can be made"
        )
    return problems


def _base_model_problems(cfg: Mapping[str, Any]) -> list[str]:
    name = str(cfg.get("base_model") or "")
    if not name:
        return []  # axolotl says so itself
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            return [f"base_model {name} has no config.json: expected a Hugging Face model directory"]
        if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
            return [f"base_model {name} has no weights ({', '.join(_WEIGHT_PATTERNS)}): is the download complete?"]
    elif name.startswith(("/", ".", "~")):
        return [f"base_model {name} does not exist: expected a model directory or a hub name"]
    return []


def _init_from_problems(args: MedusaArgs, bad: set[Any]) -> list[str]:
    directory = heads_directory(str(args.medusa_init_from))
    config_file = directory / "config.json"
    if not config_file.is_file() or not (directory / HEADS_FILE).is_file():
        return [
            f"medusa_init_from {args.medusa_init_from} holds no heads: expected config.json and medusa_lm_head.safetensors there or "
            "in its medusa_heads folder; run stage 1 first"
        ]
    config = json.loads(config_file.read_text(encoding="utf-8"))
    found = {
        "medusa_num_heads": config.get("medusa_num_heads"),
        "medusa_num_layers": config.get("medusa_num_layers"),
        "medusa_lm_head": "shared" if config.get("original_lm_head") else "separate",
    }
    return [
        f"{key} is {getattr(args, key)!r} but the heads in medusa_init_from {args.medusa_init_from} have {value!r}: use the same value"
        for key, value in found.items()
        if key not in bad and value != getattr(args, key)
    ]
