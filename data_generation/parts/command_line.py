"""What the commands of this directory share: flags as fields of a dataclass, and one-line messages.

Each flag is accepted with underscores and with hyphens. Knows nothing about what the commands do.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from parts.secrets import without_secrets

Flags = TypeVar("Flags")


def number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns a parser for flags that are finite numbers from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"found {text}, expected a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when the text is no number at all
    return parse


def flag(text: str, default: Any = None, **options: Any) -> dict[str, Any]:
    """Describes the command-line flag of a field, in the words of ArgumentParser.add_argument."""
    return {
        "help": f"{text} (default: {default})" if default else text,
        "default": default,
        **options,
    }


def parse_flags(settings: type[Flags], doc: str | None, argv: Sequence[str] | None = None) -> Flags:
    """Parses the command line into a dataclass whose fields carry `flag` as their metadata.

    Args:
        settings: The dataclass.
        doc: Docstring of the command; its first line is the description that --help shows.
        argv: Arguments without the command's name; None for those of the process.
    """
    parser = Parser(description=(doc or "").partition("\n")[0], allow_abbrev=False)
    for setting in fields(settings):  # type: ignore[arg-type]
        spellings = dict.fromkeys([f"--{setting.name}", f"--{setting.name.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=setting.name, **setting.metadata)
    return settings(**vars(parser.parse_args(argv)))


class Parser(argparse.ArgumentParser):
    """A parser whose errors show no credentials: they quote what was typed."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with the usage and one line."""
        super().error(without_secrets(message))


def speaker(script: str) -> Callable[[str], None]:
    """Returns a function that prints one line to stderr under the command's name, without credentials, above a progress bar.

    Args:
        script: The command's `__file__`.
    """
    name = Path(script).name

    def say(text: str) -> None:
        tqdm.write(f"{name}: {without_secrets(text)}", file=sys.stderr)

    return say
