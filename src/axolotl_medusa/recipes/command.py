"""The command `axolotl-medusa recipe`.

Contract: parses its arguments, writes the YAML that they name, and prints what was chosen and what to run.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

_METHODS = ("medusa-1", "medusa-2", "self-distillation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a model's directory, or a Hub name whose small files are in the Hub's cache"
    )
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default=_METHODS[0],
        help="medusa-1: heads alone; medusa-2: heads and model, after medusa-1; self-distillation: heads and model in one stage, "
        "the model kept near itself (default: medusa-1)",
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs, 0 for a CPU (default: 1)")
    parser.add_argument(
        "--gpu-gib", type=float, metavar="G", help="memory of a GPU in GiB (default: 74, as a GPU of 80 GB has)"
    )
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        default="off",
        help="whether a model that can think will be served so (default: off)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template, for models whose tokenizer has none")
    parser.add_argument(
        "--data", metavar="FILE", help="the model's own answers (default: data/NAME.jsonl, to be generated)"
    )
    parser.add_argument("--out", metavar="X.yml", help="where to write the YAML; a new file (default: print it)")


def run(options: argparse.Namespace) -> None:
    """Writes the recipe, or prints it."""
    from axolotl_medusa.recipes.choices import choose
    from axolotl_medusa.recipes.commands_around import commands_around
    from axolotl_medusa.recipes.model_facts import read_facts
    from axolotl_medusa.recipes.yaml_text import yaml_text

    for value in (options.model, options.chat_template, options.data, options.out):
        if value is not None and not value.isprintable():
            raise ValueError(f"{value!r} has characters that are not printed, expected a name of one line")
    if options.out:
        _check_output(options.out)
    facts = read_facts(options.model, options.chat_template)
    recipe = choose(
        facts,
        options.method,
        gpus=options.gpus,
        gpu_gib=options.gpu_gib,
        thinking=options.thinking == "on",
        data=options.data,
    )
    file = options.out or f"{recipe.output_dir.rpartition('/')[2]}.yml"
    stage_1 = argparse.Namespace(**{**vars(options), "method": _METHODS[0], "out": None})
    commands = commands_around(recipe, file, command_line(options), command_line(stage_1))
    text = yaml_text(recipe, commands)
    if options.out is None:
        print(text, end="")
        return
    Path(options.out).expanduser().write_text(text, encoding="utf-8")
    from axolotl_medusa.estimating.report import recipe as in_words

    print(f"written to {options.out}: {in_words(recipe.plan)}")
    for title, lines in (("generate", commands.data), ("train", commands.train), ("serve", commands.serve)):
        print(f"\n{title}:")
        print("\n".join(f"  {line}" for line in lines))


def command_line(options: argparse.Namespace) -> str:
    """The command that writes the same recipe again."""
    words = ["axolotl-medusa", "recipe", options.model]
    given = {
        "--method": options.method if options.method != _METHODS[0] else None,
        "--gpus": options.gpus if options.gpus != 1 else None,
        "--gpu-gib": None if options.gpu_gib is None else f"{options.gpu_gib:g}",
        "--thinking": "on" if options.thinking == "on" else None,
        "--chat-template": options.chat_template,
        "--data": options.data,
        "--out": options.out,
    }
    for option, value in given.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


def _check_output(path: str) -> None:
    """Raises where the file cannot be written: one that is there may have been edited."""
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no directory, expected one to write {file.name} in: make it first")
    if file.exists():
        raise ValueError(f"{file} is there already, expected a new file: choose another --out, or remove it")
