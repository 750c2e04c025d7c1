"""The examples that `axolotl-medusa recipe` writes are its output, and the others differ where the README says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_files import BIG, FOLDER, NAMES, load, table_after, text_of
from published_cache import write_cache

from axolotl_medusa.cli import main

pytestmark = pytest.mark.usefixtures("no_network")

ROWS = {
    row[0].strip("`").removesuffix(".yml"): row for row in table_after("## Which of these files the command writes")[1:]
}
MADE = ("mistral_7b_instruct", "qwen3", "zephyr_7b_self_distillation")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a recipe reads of a checkout and of the Hub's cache, and no YAML yet."""
    write_cache(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "examples" / "medusa").mkdir(parents=True)
    shutil.copy(FOLDER / "vicuna.jinja", tmp_path / "examples" / "medusa")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str) -> str:
    """What the command that the README names for an example writes."""
    (command,) = re.findall(r"`recipe (.+?)`", ROWS[name][1])
    file = f"examples/medusa/{name}.yml"
    assert main(["recipe", *command.split(), "--out", file]) == 0
    return Path(file).read_text(encoding="utf-8")


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_readme_says_of_every_example_whether_a_recipe_is_it():
    assert set(ROWS) == set(NAMES)
    assert {name for name, row in ROWS.items() if row[2] == "nothing"} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_example_is_the_output_of_its_command_byte_for_byte(name, checkout):
    assert made(name) == text_of(name)


@pytest.mark.parametrize("name", sorted(set(BIG) - set(MADE)))
def test_example_differs_from_a_recipe_in_the_keys_that_the_readme_names(name, checkout):
    named = set(re.findall(r"`([\w*]+)`", ROWS[name][2]))
    prefixes = tuple(key.removesuffix("*") for key in named if key.endswith("*"))
    found = differing(yaml.safe_load(made(name)), load(name))
    kept = {key for key in found if not (prefixes and key.startswith(prefixes))}
    assert kept == {key for key in named if not key.endswith("*")}
    assert all(any(key.startswith(prefix) for key in found) for prefix in prefixes)
