"""YAMLs and plans that the tests of tests/estimating share."""

from __future__ import annotations

from typing import Any

from axolotl_medusa.estimating.plan import Plan, plan_of
from axolotl_medusa.estimating.sizes import ModelSizes, sizes_of

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SIZES: ModelSizes = sizes_of("org/model", CONFIG)
MEDUSA_1: dict[str, Any] = {
    "base_model": "org/model",
    "medusa_num_heads": 3,
    "medusa_only_heads": True,
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "attn_implementation": "flash_attention_2",
    "optimizer": "adamw_torch_fused",
    "bf16": True,
}
LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_target_modules": ["lm_head"],
}
MEDUSA_2 = {**MEDUSA_1, **LORA, "medusa_only_heads": False, "gradient_checkpointing": True}
FULL = {**MEDUSA_1, "medusa_only_heads": False, "gradient_checkpointing": True}
RECIPES = {"medusa-1": MEDUSA_1, "medusa-2": MEDUSA_2, "full": FULL}


def plan(cfg: dict[str, Any], gpus: int = 1, engine: str | None = None, **changes: Any) -> Plan:
    return plan_of({**cfg, **changes}, gpus=gpus, engine=engine, sizes=SIZES)
