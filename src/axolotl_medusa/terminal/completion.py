"""Scripts that let a shell complete the command: its subcommands, their options, and what these take.

Contract: reads the arguments that the commands themselves add, so that a script never names what is not there; text out.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "axolotl-medusa"


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        names: All its spellings.
        choices: What it takes, empty where that is open.
        takes_value: Whether a value follows.
        help: What it is for.
    """

    names: tuple[str, ...]
    choices: tuple[str, ...]
    takes_value: bool
    help: str


class Described(NamedTuple):
    """A command.

    Attributes:
        summary: What it does.
        options: Its options.
        words: What its first argument may be, where it is one of a few words.
    """

    summary: str
    options: tuple[Option, ...]
    words: tuple[str, ...]


def described(summary: str, add_arguments: Callable[[argparse.ArgumentParser], None]) -> Described:
    """What a command takes."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    options = tuple(
        Option(
            tuple(action.option_strings),
            tuple(map(str, action.choices or ())),
            action.nargs != 0,
            (action.help or "").replace("%%", "%"),
        )
        for action in shown
        if action.option_strings
    )
    words = next(
        (tuple(map(str, action.choices)) for action in shown if not action.option_strings and action.choices), ()
    )
    return Described(summary, options, words)


def completion_script(shell: str, commands: Mapping[str, Described]) -> str:
    """The script for a shell.

    Args:
        shell: One of `SHELLS`.
        commands: Commands by name.
    """
    if shell == "fish":
        return _fish(commands)
    return _bash(commands) if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _bash(commands: Mapping[str, Described]) -> str:
    function = f"_{re.sub(r'[^a-z]', '_', PROGRAM)}"
    cases = []
    for name, command in commands.items():
        values = [
            f"        {'|'.join(f'{name}:{each}' for each in option.names)}) words={_quoted(option.choices)};;"
            for option in command.options
            if option.choices
        ]
        files = [
            f"        {'|'.join(f'{name}:{each}' for each in option.names)}) words=;;"
            for option in command.options
            if option.takes_value and not option.choices
        ]
        offered = [*command.words, *(each for option in command.options for each in option.names)]
        cases.append("\n".join([*values, *files, f"        {name}:*) words={_quoted(offered)};;"]))
    body = "\n".join(cases)
    return f"""{function}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={_quoted([*commands, "--help", "--version"])}
    else
        case "${{COMP_WORDS[1]}}:$before" in
{body}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F {function} {PROGRAM}
"""


def _fish(commands: Mapping[str, Described]) -> str:
    lines = [f"complete -c {PROGRAM} -n __fish_use_subcommand -l {each}" for each in ("help", "version")]
    for name, command in commands.items():
        lines.append(f"complete -c {PROGRAM} -f -n __fish_use_subcommand -a {name} -d {_fish_text(command.summary)}")
        seen = f"-n {shlex.quote(f'__fish_seen_subcommand_from {name}')}"
        if command.words:
            lines.append(f"complete -c {PROGRAM} -f {seen} -a {_fish_text(' '.join(command.words))}")
        for option in command.options:
            spelled = " ".join(f"-l {each[2:]}" if each.startswith("--") else f"-s {each[1:]}" for each in option.names)
            value = f" -x -a {_fish_text(' '.join(option.choices))}" if option.choices else " -r" * option.takes_value
            lines.append(f"complete -c {PROGRAM} {seen} {spelled}{value} -d {_fish_text(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(words: Sequence[str]) -> str:
    return shlex.quote(" ".join(words))


def _fish_text(text: str) -> str:
    """A text in fish's single quotes, in which only the quote and the backslash mean something."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
