"""A recipe as the text of a YAML: its header, then its keys in groups, each with its reason.

Contract: pure functions of a recipe; the same recipe is the same text, byte for byte.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_medusa.estimating.memory import GIB, Memory, memory_of
from axolotl_medusa.recipes.choices import Recipe, gib_of_medusa_1, shown
from axolotl_medusa.recipes.commands_around import Commands

_GROUPS: tuple[tuple[str, ...], ...] = (
    ("base_model", "load_in_4bit", "plugins"),
    (
        "medusa_num_heads",
        "medusa_num_layers",
        "medusa_only_heads",
        "medusa_self_distillation",
        "medusa_lm_head",
        "medusa_heads_coefficient",
        "medusa_decay_coefficient",
        "medusa_scheduler",
        "medusa_lr_multiplier",
        "medusa_init_from",
    ),
    (
        "adapter",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_linear",
        "lora_target_modules",
        "lora_mlp_kernel",
        "lora_qkv_kernel",
        "lora_o_kernel",
    ),
    (
        "datasets",
        "chat_template",
        "chat_template_jinja",
        "special_tokens",
        "val_set_size",
        "dataset_prepared_path",
        "output_dir",
    ),
    ("sequence_len", "sample_packing", "pad_to_sequence_len", "attn_implementation", "gradient_checkpointing"),
    (
        "micro_batch_size",
        "gradient_accumulation_steps",
        "num_epochs",
        "optimizer",
        "lr_scheduler",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
    ),
    ("bf16", "tf32", "deepspeed"),
    ("logging_steps", "evals_per_epoch", "saves_per_epoch", "save_total_limit", "seed"),
)
KEYS = frozenset(key for group in _GROUPS for key in group)

_CARDS_GB = (16, 24, 40, 48, 80, 96, 141, 192)
"""Memory of usual GPUs, as they are sold."""
_USABLE = 0.95
_WIDTH = 120
_INDENT = "#        "

_WORDS = {
    "medusa-1": "Medusa-1: {heads} heads on a frozen backbone, trained on the model's own answers.",
    "medusa-2": "Medusa-2, second of two stages: {heads} heads and the backbone (LoRA) together, on the model's own answers.",
    "self-distillation": "Medusa-2 with self-distillation; Medusa-1 by editing the six lines marked "
    '"Medusa-1:" (LoRA then stays at zero).',
}
_LIMITS = {
    "medusa-1": "the output is the heads only; the backbone is not written again.",
    "medusa-2": "the base loss is cross-entropy with the data; --method self-distillation keeps the model closer to itself. "
    "The heads belong to the merged model.",
    "self-distillation": "the base loss is the KL to the frozen model alone; medusa_lm_coefficient adds cross-entropy. "
    "The heads belong to the merged model.",
}
_SWITCH = (
    "A template with thoughts, such as Qwen3's, puts `<think></think>` before the last answer of a conversation; axolotl masks "
    "that, and the answer and thoughts in it are trained. In earlier turns such templates leave thoughts out."
)


def yaml_text(recipe: Recipe, commands: Commands) -> str:
    """The whole file."""
    groups = [list(_group(recipe, names)) for names in _GROUPS]
    groups[6] += _several_gpus(recipe)
    body = "\n\n".join("\n".join(lines) for lines in groups if lines)
    return f"{_header(recipe, commands)}\n\n{body}\n\n# wandb_project: medusa\n# wandb_name:\n"


def _header(recipe: Recipe, commands: Commands) -> str:
    title = f"{recipe.facts.title}, {_WORDS[recipe.method].format(heads=recipe.plan.heads)}"
    limits = _LIMITS[recipe.method] + (f" {_SWITCH}" if recipe.facts.thoughts == "switch" else "")
    sections = [
        *_wrapped(title, "# ", "#   "),
        "#",
        *_wrapped(f"Needs: {_needs(recipe)}"),
        *_lines("Data:  ", commands.data),
        *_lines("Run:   ", commands.train),
        *_lines("Next:  ", commands.serve),
        *_wrapped(f"Limits: {limits}"),
        f"# Made by: {commands.recipe}",
    ]
    return "\n".join(sections)


def _wrapped(text: str, first: str = "# ", later: str = _INDENT) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _lines(name: str, lines: tuple[str, ...]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{_INDENT}{line}".rstrip() if number else f"# {name}{line}"


def _needs(recipe: Recipe) -> str:
    plan, memory = recipe.plan, memory_of(recipe.plan)
    if plan.device == "cpu":
        return f"a CPU with {memory.peak / GIB + 1:.0f} GiB free. {_estimated(memory)}."
    card = next((size for size in _CARDS_GB if round(memory.peak / GIB) * GIB < _USABLE * size * 1e9), None)
    size = f"{card} GB" if card else f"{memory.peak / GIB / _USABLE:.0f} GiB"
    gpus = f"1 GPU with {size}" if plan.gpus == 1 else f"{plan.gpus} GPUs with {size} each"
    medusa_1 = f"; Medusa-1 {gib_of_medusa_1(recipe):.0f} GiB" if recipe.method == "self-distillation" else ""
    return f"{gpus}. {_estimated(memory, plan.gpus)}{medusa_1}."


def _estimated(memory: Memory, gpus: int = 1) -> str:
    parts = {
        "base model": memory.weights,
        "all that trains": memory.heads + memory.gradients + memory.optimizer,
        "gathered weights": memory.gathered,
        "activations and losses": memory.activations + memory.losses,
    }
    named = " + ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value)
    runtime = (
        f"{memory.runtime / GIB:g} for CUDA" if memory.runtime >= GIB else f"{memory.runtime / GIB:.1f} for Python"
    )
    each = " on each" if gpus > 1 else ""
    return f"Estimated, not measured: {round(memory.peak / GIB)} GiB{each} = {named} + {runtime}"


def _several_gpus(recipe: Recipe) -> list[str]:
    plan = recipe.plan
    if plan.device == "cpu" or plan.gpus > 1:
        return []
    return ["# deepspeed: deepspeed_configs/zero1.json # several GPUs: optimizer states are shared out"]


def _group(recipe: Recipe, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if name in recipe.keys:
            yield from _key(name, recipe.keys[name], recipe.reasons.get(name))


def _key(name: str, value: Any, reason: str | None = None) -> Iterator[str]:
    comment = f" # {reason}" if reason else ""
    if isinstance(value, list | Mapping):
        yield f"{name}:{comment}"
        yield from _block(value)
    else:
        yield f"{name}: {_scalar(value)}{comment}"


def _block(value: list[Any] | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"  {name}: {_scalar(inner)}"
        return
    for entry in value:
        if isinstance(entry, Mapping):
            lines = [f"{name}: {_scalar(inner)}" for name, inner in entry.items()]
            yield f"  - {lines[0]}"
            yield from (f"    {line}" for line in lines[1:])
        else:
            yield f"  - {_scalar(entry)}"


def _scalar(value: Any) -> str:
    """A value as YAML; a text is quoted where it would be read as something else."""
    import yaml

    if not isinstance(value, str):
        return shown(value)
    try:
        if yaml.safe_load(f"key: {value} # comment") == {"key": value}:
            return value
    except yaml.YAMLError:
        pass
    return json.dumps(value, ensure_ascii=False)
