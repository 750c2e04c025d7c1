"""A shell completes the command: what it would offer is asked of the shell itself."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from axolotl_medusa.cli import COMMANDS, main
from axolotl_medusa.serving.format_rules import TARGETS
from axolotl_medusa.terminal.completion import SHELLS, Described, Option, completion_script, described


@pytest.fixture
def offered(capsys, tmp_path):
    """What bash offers for a line that is being typed."""
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def ask(*words: str) -> list[str]:
        typed = f"COMP_WORDS=(axolotl-medusa {shlex.join(words)}); COMP_CWORD={len(words)}"
        line = f"source {script}; {typed}; _axolotl_medusa; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    return ask


def test_bash_offers_commands_options_and_their_values(offered):
    assert set(offered("")) == {*COMMANDS, "--help", "--version"}
    assert offered("rec") == ["recipe"]
    assert offered("recipe", "org/model", "--me") == ["--method"]
    assert offered("recipe", "--method", "") == ["medusa-1", "medusa-2", "self-distillation"]
    assert offered("export", "out", "--to", "") == [*TARGETS, "onnx"]
    assert offered("completion", "z") == ["zsh"]


def test_bash_leaves_names_of_files_to_its_default(offered):
    assert offered("recipe", "--out", "") == []
    assert offered("export", "out") == []


def test_option_that_help_does_not_show_is_not_offered(offered):
    assert "--backbone" not in offered("export", "--") and "--model" in offered("export", "--")


@pytest.mark.parametrize("shell", SHELLS)
def test_script_of_every_shell_names_every_command_and_is_accepted_by_it(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    if shell == "zsh":
        assert script.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_fish_is_told_options_values_and_what_they_are_for():
    option = Option(("-q", "--quick"), ("a", "b"), True, "it's 100%")
    script = completion_script("fish", {"do": Described("does it", (option,), ("now", "later"))})
    assert "complete -c axolotl-medusa -f -n __fish_use_subcommand -a do -d 'does it'\n" in script
    seen = "complete -c axolotl-medusa"
    assert f"{seen} -f -n '__fish_seen_subcommand_from do' -a 'now later'\n" in script
    assert f"{seen} -n '__fish_seen_subcommand_from do' -s q -l quick -x -a 'a b' -d 'it\\'s 100%'\n" in script


def test_options_are_those_that_a_command_adds():
    def add(parser):
        parser.add_argument("kind", choices=("x", "y"))
        parser.add_argument("--out", help="where")
        parser.add_argument("--all", action="store_true")

    found = described("does it", add)
    assert found.words == ("x", "y")
    assert found.options[1:] == (
        Option(("--out",), (), True, "where"),
        Option(("--all",), (), False, ""),
    )
