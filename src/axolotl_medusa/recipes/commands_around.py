"""The commands around a recipe: the model's own answers, the training, and the server with the heads.

Contract: pure functions of a recipe and of the name of its file.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from axolotl_medusa.recipes.choices import Recipe

_ADDRESS = "http://localhost:8000/v1"
_NO_THOUGHTS = """--default-chat-template-kwargs '{"enable_thinking": false}'"""
_PROMPTS = "data_generation/prompts.jsonl"
_HOW_MANY = "Its 27,350 prompts are varied. Add those of the kind that the model will be asked: data_generation/combine.py --weights."


@dataclass(frozen=True)
class Commands:
    """Lines of the header: commands, and what to know about them.

    Attributes:
        data: How the model answers prompts.
        train: How the heads are trained.
        serve: How they are served.
        recipe: What writes the recipe again.
    """

    data: tuple[str, ...]
    train: tuple[str, ...]
    serve: tuple[str, ...]
    recipe: str


def commands_around(recipe: Recipe, file: str, made_by: str, stage_1: str) -> Commands:
    """The commands around a recipe.

    Args:
        recipe: What was chosen.
        file: The YAML.
        made_by: The command that chose it.
        stage_1: The command for the stage before it, where there is one.
    """
    return Commands(_data(recipe), _train(recipe, file, stage_1), _serve(recipe, file), made_by)


def _template_options(recipe: Recipe) -> str:
    """Options of the server that decide how the model is prompted; the same before and after the training."""
    facts = recipe.facts
    template = f" --chat-template {shlex.quote(facts.template_file)}" if facts.template_file else ""
    return template + (f" {_NO_THOUGHTS}" if facts.thoughts == "switch" and not recipe.thinking else "")


def _data(recipe: Recipe) -> tuple[str, ...]:
    facts, path = recipe.facts, recipe.keys["datasets"][0]["path"]
    options = " --chat"
    if recipe.thinking:
        tokens = recipe.keys["sequence_len"]  # an eighth is left for the question
        options += f" --thinking on --split_turns --max_tokens {tokens - tokens // 8}"
    notes = [_HOW_MANY]
    if facts.thoughts == "switch":
        mode = "with" if recipe.thinking else "without"
        other = "off" if recipe.thinking else "on"
        notes.append(
            f"These are answers {mode} thinking, for a server {mode} it; --thinking {other} makes the other recipe."
        )
    if recipe.thinking:
        notes.append("The server has no --reasoning-parser: the thoughts must stay in the answers.")
    if facts.refuses_system:
        notes.append(
            "The template refuses system turns: `clean.py --system join` puts those of your data into the first question."
        )
    return (
        f"vllm serve {shlex.quote(facts.name)}{_template_options(recipe)}",
        f"python data_generation/generate.py --server {_ADDRESS} --data_path {_PROMPTS} \\",
        f"    --output_path {shlex.quote(path)}{options}",
        *notes,
    )


def _train(recipe: Recipe, file: str, stage_1: str) -> tuple[str, ...]:
    processes = f"--num_processes {recipe.plan.gpus} " if recipe.plan.gpus > 1 else ""
    command = f"accelerate launch {processes}-m axolotl.cli.train {shlex.quote(file)}"
    if recipe.method != "medusa-2":
        return (command,)
    keys = recipe.keys
    heads = f"medusa_num_heads: {keys['medusa_num_heads']} and medusa_lm_head: {keys['medusa_lm_head']}"
    return (
        command,
        f"It starts from the heads in {keys['medusa_init_from']}. Stage 1, to be run before, has a YAML of its own,",
        f"with {heads} as here:",
        f"    {stage_1}",
    )


def _serve(recipe: Recipe, file: str) -> tuple[str, ...]:
    output = recipe.output_dir.removeprefix("./")
    model, merge = recipe.facts.name, tuple[str, ...]()
    if recipe.method != "medusa-1":
        model = f"{output}/merged"
        merge = (f"axolotl merge-lora {shlex.quote(file)}   # writes {model}",)
    heads = f'{{"method": "medusa", "model": "{output}/medusa_heads", "num_speculative_tokens": {recipe.plan.heads}}}'
    return (
        *merge,
        f"vllm serve {shlex.quote(model)}{_template_options(recipe)} \\",
        f"    --speculative-config '{heads}'",
        "vLLM has this method up to version 0.32.",
    )
