"""The YAMLs that tests are about, read from where they stand: the examples, their README, and one of the old fork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL, renamed_key_hints

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "medusa"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
OLD_YAMLS = (ROOT / "docs" / "old_yamls.md").read_text(encoding="utf-8")
EXAMPLES = sorted(FOLDER.glob("*.yml"))
NAMES = [file.stem for file in EXAMPLES]
BIG = [name for name in NAMES if name != "smollm2"]
GPUS = {"qwen3_32b": 4}
OLD_FORK = Path(__file__).parent / "data" / "old_fork_vicuna.yml"

LORA = {
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_target_modules": ["lm_head"],
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
MEDUSA_1 = {
    "medusa_only_heads": True,
    "medusa_heads_coefficient": 0.2,
    "medusa_scheduler": "constant",
    "learning_rate": 5e-4,
    "warmup_steps": 40,
    "sequence_len": 4096,
}
STAGE_2 = {**MEDUSA_1, **LORA, "medusa_only_heads": False}
SELF_DISTILLATION = {
    **STAGE_2,
    "medusa_self_distillation": True,
    "medusa_heads_coefficient": 0.01,
    "medusa_scheduler": "sine",
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "sequence_len": 2048,
}
"""The three recipes of the Medusa paper as its first public trainer shipped them, and their LoRA."""

FINE_TUNE = {"learning_rate": 2e-4, "warmup_steps": 20, "sequence_len": 2048}
"""What differs from stage 2 where Medusa-2 runs beside an ordinary fine-tune."""

_FORK_LORA = {
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj", "lm_head"],
    "lora_modules_to_save": None,
    "save_total_limit": 1,
}
_FORK_QLORA = {**_FORK_LORA, "adapter": "qlora", "load_in_4bit": True}
_FORK_SELF_DISTILLATION = {
    **_FORK_LORA,
    "adapter": "lora",
    "sequence_len": 2048,
    "learning_rate": 0.0001,
    "warmup_steps": 20,
    "debug": True,
    "medusa_heads_coefficient": 0.01,
    "medusa_scheduler": "sine",
    "medusa_only_heads": None,
    "medusa_self_distillation": True,
}
_STAGE_1 = {"ddp_find_unused_parameters": True, "save_total_limit": 1}
FORK: dict[str, dict[str, Any]] = {
    "vicuna_7b_stage1": {**_STAGE_1, "wandb_project": "medusa_test", "output_dir": "./vicuna_7b_stage1"},
    "vicuna_7b_qlora_stage1": {**_STAGE_1, **_FORK_QLORA, "output_dir": "./vicuna_7b_qlora_stage1"},
    "vicuna_7b_qlora_stage2": {
        **_FORK_QLORA,
        "output_dir": "./vicuna_7b_qlora_stage2",
        "lora_model_dir": "./vicuna_7b_qlora_stage1",
        "medusa_only_heads": None,
    },
    "vicuna_13b_qlora_stage2": {
        **_FORK_QLORA,
        "base_model": "lmsys/vicuna-13b-v1.5",
        "output_dir": "./vicuna_13b_qlora_stage2",
        "lora_model_dir": "./vicuna_13b_qlora_stage1",
        "medusa_only_heads": None,
    },
    "vicuna_33b_together": {
        **_FORK_SELF_DISTILLATION,
        "base_model": "lmsys/vicuna-33b-v1.3",
        "output_dir": "./vicuna_33b",
        "gradient_accumulation_steps": 16,
        "micro_batch_size": 1,
    },
    "zephyr_together": {
        **_FORK_SELF_DISTILLATION,
        "base_model": "HuggingFaceH4/zephyr-7b-beta",
        "model_type": "MistralForCausalLM",
        "is_llama_derived_model": None,
        "is_mistral_derived_model": True,
        "output_dir": "./zephyr",
        "datasets": [{"path": "zephyr_self_distill.jsonl", "type": "sharegpt", "conversation": "zephyr"}],
    },
}
"""What each recipe of the first fork writes beside `old_fork_vicuna.yml`; a key without a value is blank there. Its other
YAMLs for 13 billion parameters differ from those for 7 in names alone."""


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yml").read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text_of(name))


def header_of(name: str) -> str:
    """The comment block that a file opens with, lines joined."""
    lines = text_of(name).splitlines()
    block = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in block)


def table_after(heading: str, page: str = README) -> list[list[str]]:
    """Rows of the first table behind `heading` in a page, by default the README, the first being its column names."""
    lines = page[page.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def known_keys() -> set[str]:
    """Keys that axolotl or this plugin reads; axolotl drops all others silently."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    aliases = {field.alias for field in AxolotlInputConfig.model_fields.values() if field.alias}
    return set(AxolotlInputConfig.model_fields) | aliases | set(MedusaArgs.model_fields)


def old_yaml() -> dict[str, Any]:
    return yaml.safe_load(OLD_FORK.read_text(encoding="utf-8"))


def fork_yaml(name: str) -> dict[str, Any]:
    """A recipe of the first fork, key by key."""
    return {**old_yaml(), **FORK[name]}


def with_hints_applied(cfg: dict[str, Any]) -> dict[str, Any]:
    """The old YAML with the plugin, and with exactly what `renamed_key_hints` complains of written as its hints say."""
    hinted = {key for key, value in cfg.items() if key in RENAMED_BY_AXOLOTL and renamed_key_hints({key: value})}
    kept = {key: value for key, value in cfg.items() if key not in hinted}
    today = {
        "datasets": [
            {
                "path": dataset["path"],
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            }
            for dataset in cfg["datasets"]
        ],
        "chat_template": "jinja",
        "chat_template_jinja": "examples/medusa/vicuna.jinja",
        "attn_implementation": "flash_attention_2",
    }
    return {**kept, **today, "plugins": ["axolotl_medusa.MedusaPlugin"]}
