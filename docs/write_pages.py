"""`make docs`: writes the tables of docs/*.md and of the examples' README that come from the code, between their marks.

    python -m docs.write_pages

A page keeps its prose. What stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from docs.published_models import CONFIGS
from pydantic.fields import FieldInfo

from axolotl_medusa.estimating.memory import GIB, memory_of
from axolotl_medusa.estimating.network import sent_per_step
from axolotl_medusa.estimating.plan import ENGINES, Plan, plan_of
from axolotl_medusa.estimating.report import Estimate, estimate, text_of
from axolotl_medusa.estimating.sizes import ModelSizes, sizes_of
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parent / "examples" / "medusa"
MARKED = re.compile(r"(?s)(?<=<!-- table )(\w+) -->\n.*?(?=<!-- end -->)")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
TYPES = {int: "whole number", float: "number", str: "text"}


def yaml_value(value: Any) -> str:
    """A value as a YAML has it; – for none."""
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def default(key: str, field: FieldInfo) -> str:
    """What a key is when the YAML leaves it out, in a plain run and in one with self-distillation."""
    if field.is_required():
        return "required"
    plain, distilled = (
        getattr(MedusaArgs(medusa_num_heads=1, medusa_self_distillation=on), key) for on in (False, True)
    )
    if plain == distilled or key == "medusa_self_distillation":
        return yaml_value(plain)
    return f"{yaml_value(plain)}; {yaml_value(distilled)} with self-distillation"


def values(field: FieldInfo) -> str:
    """What a key may be: its type with its bounds, or the words that it takes."""
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):  # `X | None`, where no value means the default
        (annotation,) = (each for each in typing.get_args(annotation) if each is not types.NoneType)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(yaml_value(each) for each in typing.get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    bounds = (
        f"{words} {getattr(each, name):g}"
        for each in field.metadata
        for name, words in BOUNDS.items()
        if hasattr(each, name)
    )
    return ", ".join([TYPES[typing.cast(type, annotation)], *bounds])


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def yaml_keys() -> str:
    """Every `medusa_*` key of a YAML."""
    rows = (
        (f"`{key}`", default(key, field), values(field), field.description or "")
        for key, field in MedusaArgs.model_fields.items()
    )
    return table(("key", "default", "values", "meaning"), rows)


def renamed_keys() -> str:
    """Keys of axolotl that old YAMLs have."""
    return table(("key", "today"), ((f"`{key}`", hint) for key, hint in RENAMED_BY_AXOLOTL.items()))


@functools.cache
def sizes(model: str) -> ModelSizes:
    """The sizes of a published model."""
    return sizes_of(model, CONFIGS[model])


def example_estimate(name: str, **options: Any) -> Estimate:
    """What `axolotl-medusa estimate examples/medusa/NAME.yml` finds."""
    cfg = yaml.safe_load((EXAMPLES / f"{name}.yml").read_text(encoding="utf-8"))
    return estimate(cfg, sizes=sizes(cfg["base_model"]), **options)


def shown(command: str, found: Estimate) -> str:
    """A command with what it prints, as a block of Markdown."""
    return "".join(f"    {line}".rstrip() + "\n" for line in (f"$ {command}", *text_of(found).splitlines()))


def estimate_of_qwen3() -> str:
    """An example, and what to change for a small GPU."""
    command = "axolotl-medusa estimate examples/medusa/qwen3.yml --gpu-gib 16"
    return shown(command, example_estimate("qwen3", gpu_gib=16))


SCALING_GPUS = (8, 64, 512)
SCALING: dict[str, dict[str, Any]] = {
    "Medusa-1": {"medusa_only_heads": True},
    "Medusa-2 with LoRA": {
        "medusa_self_distillation": True,
        "adapter": "lora",
        "lora_r": 32,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
        "lora_target_modules": ["lm_head"],
    },
}


def scaling_plan(recipe: str, engine: str, gpus: int) -> Plan:
    """Training of a model with the shape of Llama-3-70B."""
    model = "meta-llama/Meta-Llama-3-70B"
    cfg = {
        "base_model": model,
        "medusa_num_heads": 5,
        "medusa_lm_head": "shared",
        "sequence_len": 4096,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": True,
        "optimizer": "adamw_torch_fused",
        **SCALING[recipe],
    }
    return plan_of(cfg, gpus=gpus, engine=engine, sizes=sizes(model))


def scaling(value: Callable[[Plan], float], digits: int) -> str:
    """A value by recipe, engine and number of GPUs."""
    rows = (
        (recipe, engine, *(f"{value(scaling_plan(recipe, engine, gpus)):,.{digits}f}" for gpus in SCALING_GPUS))
        for recipe in SCALING
        for engine in ENGINES
    )
    return table(("recipe", "engine", *(f"{gpus} GPUs" for gpus in SCALING_GPUS)), rows)


def scaling_memory() -> str:
    """GiB of a GPU at the peak."""
    return scaling(lambda plan: memory_of(plan).peak / GIB, 0)


def scaling_network() -> str:
    """GB that a GPU sends in a step."""
    return scaling(lambda plan: sent_per_step(plan) / 1e9, 1)


TABLES: dict[str, Callable[[], str]] = {
    "yaml_keys": yaml_keys,
    "renamed_keys": renamed_keys,
    "estimate_of_qwen3": estimate_of_qwen3,
    "scaling_memory": scaling_memory,
    "scaling_network": scaling_network,
}


def with_tables(text: str) -> str:
    """The text of a page with its marked tables as the code has them today."""
    return MARKED.sub(lambda mark: f"{mark[1]} -->\n{TABLES[mark[1]]()}", text)


def main() -> None:
    """Writes the pages whose tables have changed."""
    for page in (*sorted(FOLDER.glob("*.md")), *sorted(EXAMPLES.glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page}")


if __name__ == "__main__":
    main()
