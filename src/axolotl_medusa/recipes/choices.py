"""The values of a recipe: those of the Medusa paper, changed as far as the model and the GPUs ask for.

Contract: numbers and names in, keys of a YAML out; reads no file. What fits is what `estimating` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from axolotl_medusa.estimating.advice import ZERO_FILES, changes_until_it_fits
from axolotl_medusa.estimating.memory import GIB, memory_of
from axolotl_medusa.estimating.plan import Plan, plan_of
from axolotl_medusa.recipes.model_facts import ModelFacts

Method = Literal["medusa-1", "medusa-2", "self-distillation"]
METHODS: tuple[Method, ...] = get_args(Method)

DEFAULT_GIB = 74.0
"""A GPU of 80 GB."""

MOST_OWN_OUTPUTS = 1_000_000_000
"""Parameters of heads' own output layers: training takes 14 bytes of each."""
LARGEST_SHARE = 0.25
"""Of the heads' own output layers, in the model's parameters."""

_HEADS = {"gpu": 5, "cpu": 3}
"""The paper's, and as many as the chain of drafts that we serve from a CPU."""
_SEQUENCES = 8
"""Of an optimizer step, over all GPUs."""
_CPU_SEQUENCE = 1024
_THINKING_SEQUENCE = 8192

MEDUSA_1: dict[str, Any] = {
    "medusa_only_heads": True,
    "medusa_heads_coefficient": 0.2,
    "medusa_scheduler": "constant",
    "learning_rate": 5e-4,
    "warmup_steps": 40,
}
_SELF_DISTILLATION: dict[str, Any] = {
    "medusa_only_heads": False,
    "medusa_self_distillation": True,
    "medusa_heads_coefficient": 0.01,
    "medusa_scheduler": "sine",
    "learning_rate": 1e-4,
    "warmup_steps": 20,
}
_LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
}
_KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)


@dataclass(frozen=True)
class Recipe:
    """A YAML as keys, and what they mean.

    Attributes:
        facts: Of the model.
        method: What is trained.
        keys: The YAML's keys with their values.
        reasons: By key why a value is not the paper's.
        plan: What the YAML means for memory.
        thinking: Whether the model is trained and served with thoughts.
    """

    facts: ModelFacts
    method: Method
    keys: Mapping[str, Any]
    reasons: Mapping[str, str]
    plan: Plan
    thinking: bool

    @property
    def output_dir(self) -> str:
        """Where it is trained to."""
        return str(self.keys["output_dir"])


def choose(
    facts: ModelFacts,
    method: Method = "medusa-1",
    *,
    gpus: int = 1,
    gpu_gib: float | None = None,
    thinking: bool = False,
    data: str | None = None,
) -> Recipe:
    """The recipe for a model.

    Args:
        facts: Of the model.
        method: What is trained.
        gpus: Number of GPUs; 0 for a CPU.
        gpu_gib: Memory of a GPU; `DEFAULT_GIB` where it is not given.
        thinking: Whether the model will be asked to think, where its template leaves that open.
        data: File of conversations; by default where `generate.py` is told to write them.

    Raises:
        ValueError: The model cannot be trained so, or not on such GPUs.
    """
    _check(facts, method, gpus, gpu_gib, thinking)
    thinking = thinking or facts.thoughts == "always"
    keys = {**_common(facts, method, gpus, data), **_of_method(facts, method), **_of_machine(gpus)}
    keys["sequence_len"] = _sequence(facts, method, gpus, thinking)
    if not facts.flash_attention:
        keys["attn_implementation"] = "sdpa"
    reasons: dict[str, str] = {}
    plan = plan_of(keys, gpus=max(gpus, 1), device="gpu" if gpus else "cpu", sizes=facts.sizes)
    if gpus:
        keys, reasons, plan = _fitted(keys, plan, DEFAULT_GIB if gpu_gib is None else gpu_gib)
    return Recipe(facts, method, keys, {**_reasons(keys, plan), **reasons}, plan, thinking)


def _check(facts: ModelFacts, method: Method, gpus: int, gpu_gib: float | None, thinking: bool) -> None:
    if gpus < 0:
        raise ValueError(f"--gpus is {gpus}: expected a number of GPUs, or 0 for a CPU")
    if gpu_gib is not None and not 0 < gpu_gib < float("inf"):
        raise ValueError(f"--gpu-gib is {gpu_gib:g}: expected a number above 0")
    if gpu_gib is not None and not gpus:
        raise ValueError(f"--gpu-gib is {gpu_gib:g} with --gpus 0, which trains on a CPU: leave out one of the two")
    if thinking and facts.thoughts == "none":
        raise ValueError(
            f"--thinking on, but the chat template of {facts.name} has no enable_thinking: leave the option out"
        )
    if method != "medusa-1" and not facts.sizes.matrices:
        raise ValueError(
            f"{facts.name} has no linear layers that LoRA knows in its decoder: expected --method medusa-1, which leaves the model "
            "as it is"
        )


def _common(facts: ModelFacts, method: Method, gpus: int, data: str | None) -> dict[str, Any]:
    heads = _HEADS["gpu" if gpus else "cpu"]
    outputs = heads * facts.sizes.output
    separate = gpus and outputs <= min(MOST_OWN_OUTPUTS, LARGEST_SHARE * facts.sizes.parameters)
    dataset: dict[str, Any] = {
        "path": data or f"data/{facts.slug}.jsonl",
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
    }
    keys: dict[str, Any] = {
        "base_model": facts.name,
        "plugins": ["axolotl_medusa.MedusaPlugin"],
        "medusa_num_heads": heads,
        "medusa_num_layers": 1,
        "medusa_lm_head": "separate" if separate else "shared",
        "medusa_decay_coefficient": 0.8,
        "medusa_lr_multiplier": 4.0,
        "datasets": [dataset],
        "val_set_size": 0.01,
        "dataset_prepared_path": f"outputs/prepared/{facts.slug}",
        "output_dir": output_dir(facts, method),
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "num_epochs": 2,
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "evals_per_epoch": 4,
        "saves_per_epoch": 2,
        "save_total_limit": 2,
        "seed": 42,
    }
    if facts.template_file is not None:
        keys |= {"chat_template": "jinja", "chat_template_jinja": facts.template_file}
    if facts.pad_token is not None:
        keys["special_tokens"] = {"pad_token": facts.pad_token}
    return keys


def output_dir(facts: ModelFacts, method: Method) -> str:
    """Where a model is trained to."""
    return f"./outputs/{facts.slug}-{'medusa1' if method == 'medusa-1' else 'medusa2'}"


def _of_method(facts: ModelFacts, method: Method) -> dict[str, Any]:
    if method == "medusa-1":
        return MEDUSA_1
    adapter = {**_LORA, **_KERNELS}
    if not facts.tied:  # on a tied one `axolotl merge-lora` would change the input embedding too
        adapter["lora_target_modules"] = ["lm_head"]
    if method == "self-distillation":
        return {**_SELF_DISTILLATION, **adapter}
    return {**MEDUSA_1, "medusa_only_heads": False, "medusa_init_from": output_dir(facts, "medusa-1"), **adapter}


def _of_machine(gpus: int) -> dict[str, Any]:
    if not gpus:
        return {
            "attn_implementation": "sdpa",
            "gradient_checkpointing": False,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "optimizer": "adamw_torch",
            "warmup_steps": 10,
            "bf16": False,
            "tf32": False,
        }
    micro_batch = 2 if 2 * gpus <= _SEQUENCES else 1
    return {
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": True,
        "micro_batch_size": micro_batch,
        "gradient_accumulation_steps": max(1, _SEQUENCES // (micro_batch * gpus)),
        "optimizer": "adamw_bnb_8bit",
        "bf16": "auto",
        "tf32": True,
    }


def _sequence(facts: ModelFacts, method: Method, gpus: int, thinking: bool) -> int:
    wanted = 2048 if method == "self-distillation" else 4096
    wanted = _THINKING_SEQUENCE if thinking else wanted if gpus else _CPU_SEQUENCE
    return min(wanted, facts.positions or wanted)


def _fitted(keys: Mapping[str, Any], plan: Plan, gib: float) -> tuple[dict[str, Any], dict[str, str], Plan]:
    """The keys with what has to be changed for the memory of a GPU, the reasons, and the plan then.

    Raises:
        ValueError: Nothing makes it fit.
    """
    found = _changed(keys, plan, gib)
    if memory_of(found[2]).peak / GIB > gib:  # ZeRO-3 came before 4 bits, which do not go together
        rounded = {**keys, "load_in_4bit": True, **({"adapter": "qlora"} if "adapter" in keys else {})}
        in_4_bits = _changed(rounded, _planned(rounded, plan), gib)
        in_4_bits[1]["load_in_4bit"] = f"to fit {gib:g} GiB: the base model is rounded to 4 bits"
        found = min(found, in_4_bits, key=lambda each: memory_of(each[2]).peak)
    changed, reasons, plan = found
    peak = memory_of(plan).peak / GIB
    if peak > gib:
        count = "a GPU" if plan.gpus == 1 else f"each of {plan.gpus} GPUs"
        raise ValueError(
            f"{plan.sizes.name} needs {peak:.1f} GiB on {count} at the least, found --gpu-gib {gib:g}: take larger GPUs, more of them "
            "(--gpus) or a smaller model"
        )
    if plan.engine != "ddp":
        changed["deepspeed"] = ZERO_FILES[plan.engine]
    return changed, {key: reason for key, reason in reasons.items() if key in changed}, plan


def _changed(keys: Mapping[str, Any], plan: Plan, gib: float) -> tuple[dict[str, Any], dict[str, str], Plan]:
    """The keys with the changes of `estimating.advice`, as far as they go, the reasons, and the plan then."""
    changed, reasons = dict(keys), dict[str, str]()
    for change in changes_until_it_fits(keys, plan, gib):
        if change.plan.gpus != plan.gpus:
            break
        changed |= change.keys
        reasons |= dict.fromkeys(change.keys, f"to fit {gib:g} GiB: {change.price}")
        plan = change.plan
    if changed.get("load_in_4bit") and changed["medusa_only_heads"]:  # the plugin quantizes a frozen model by itself
        changed = {key: value for key, value in changed.items() if key != "adapter" and not key.startswith("lora_")}
    plan = _planned(changed, plan)
    if plan.engine == "zero-3":
        alone = _planned({**changed, "optimizer": "adamw_torch_fused"}, plan)
        if memory_of(alone).peak / GIB <= gib:
            changed["optimizer"], plan = "adamw_torch_fused", alone
            reasons["optimizer"] = "ZeRO-3 shares out its state; 8 bits would save little"
    return changed, reasons, plan


def _planned(keys: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan of other keys on the same GPUs with the same engine."""
    return plan_of(keys, gpus=plan.gpus, engine=plan.engine, device=plan.device, sizes=plan.sizes)


def gib_of_medusa_1(recipe: Recipe) -> float:
    """GiB of a GPU with the lines that turn self-distillation into Medusa-1."""
    keys = {**recipe.keys, **MEDUSA_1, "medusa_self_distillation": False}
    keys.pop("deepspeed", None)  # its file may be elsewhere
    return memory_of(_planned(keys, recipe.plan)).peak / GIB


def _reasons(keys: Mapping[str, Any], plan: Plan) -> dict[str, str]:
    """Comments of keys whose values follow from the model, or are not what a reader expects."""
    reasons = {}
    if keys["medusa_lm_head"] == "shared" and plan.device == "gpu":
        own = replace(plan, shared=False)
        train = (memory_of(own).peak - memory_of(plan).peak) / GIB
        serve = 2 * own.own_outputs / GIB
        reasons["medusa_lm_head"] = (
            f"separate: {train:.0f} GiB more to train and {serve:.1f} GiB more to serve, for a vocabulary of {plan.sizes.vocab:,}"
        )
    if keys.get("adapter"):
        reasons["lora_mlp_kernel"] = (
            "axolotl's fused kernels pass by the layers' own forward, where ZeRO-3 gathers weights"
            if plan.engine == "zero-3"
            else "axolotl's fused kernels share one dropout mask between projections; the recipe does not"
        )
        reasons["lora_target_linear"] = "every linear layer except lm_head"
    if "lora_target_modules" in keys:
        reasons["lora_target_linear"] += " ..."
        reasons["lora_target_modules"] = "... to which axolotl adds these"
    if keys["medusa_only_heads"] is False and keys.get("medusa_self_distillation"):
        values = {**MEDUSA_1, "medusa_self_distillation": False}
        reasons |= {key: f"Medusa-1: {shown(value)}" for key, value in values.items()}
    return reasons


def shown(value: Any) -> str:
    """A number or switch as the YAMLs write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if float(f"{value:.1e}") == value else repr(value)
    return str(value)
