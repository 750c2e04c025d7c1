"""Keys of old YAMLs that axolotl has renamed or dropped since, and what to write today.

Contract: functions of the YAML, which look at files that it names; they need neither axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_medusa.training.named_files import is_file

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
    if isinstance(deepspeed, str) and deepspeed.startswith("deepspeed/") and not is_file(Path(deepspeed)):
        hints.append(f"deepspeed {deepspeed} does not exist: use deepspeed_configs, e.g. deepspeed_configs/zero2.json")
    return hints
