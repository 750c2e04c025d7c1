"""Every command's help ends with an example that it takes, and exit statuses are what is documented."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from axolotl_medusa.cli import COMMANDS, main
from axolotl_medusa.terminal.help_texts import EXAMPLES, EXIT_STATUSES

ROOT = Path(__file__).parents[2]


def test_every_command_has_an_example():
    assert set(EXAMPLES) == set(COMMANDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_taken_by_its_command(name):
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    words = shlex.split(EXAMPLES[name])
    parser.parse_args(words[: words.index(">")] if ">" in words else words)


@pytest.mark.parametrize("prog", ["axolotl-medusa", "axolotl medusa"])
def test_help_shows_the_example_as_it_is_typed(prog, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["recipe", "--help"], prog=prog)
    assert f"example: {prog} recipe Qwen/Qwen3-8B --method" in capsys.readouterr().out


def test_help_and_page_name_every_exit_status(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"(?m)^\| (\d+) \| (.+?)(?:, .*)? \|$", page)) == {
        str(number): meaning.split(",")[0] for number, meaning in EXIT_STATUSES.items()
    }
    assert all(f"{number} {meaning}" in printed for number, meaning in EXIT_STATUSES.items())


def test_files_that_examples_name_exist():
    named = set(re.findall(r"\bdata_generation/\S+", " ".join(EXAMPLES.values())))
    assert named and all((ROOT / file).is_file() for file in named)
