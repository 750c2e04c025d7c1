"""The pages: tables that the code writes, links that lead somewhere, commands and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs import write_pages
from docs.write_pages import MARKED, TABLES, table, with_tables

from axolotl_medusa.cli import COMMANDS
from axolotl_medusa.serving.format_rules import TARGETS
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "examples/medusa", "data_generation", "benchmarks", "benchmarks/results")
PAGES = {str(page.relative_to(ROOT)): page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))}
WRITTEN = [name for name, page in PAGES.items() if MARKED.search(page.read_text(encoding="utf-8"))]


def text_of(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page is called."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_with_tables_from_the_code_are_four():
    assert WRITTEN == ["docs/old_yamls.md", "docs/scaling.md", "docs/yaml_keys.md", "examples/medusa/README.md"]
    assert {mark[1] for name in WRITTEN for mark in MARKED.finditer(text_of(name))} == set(TABLES)


@pytest.mark.parametrize("name", WRITTEN)
def test_committed_tables_are_what_the_code_says(name):
    assert text_of(name) == with_tables(text_of(name)), "run `make docs`"


def test_table_of_keys_has_every_key_with_default_and_values():
    rows = {line.split(" | ")[0]: line for line in text_of("docs/yaml_keys.md").splitlines() if line.startswith("| `")}
    assert set(rows) == {f"| `{key}`" for key in MedusaArgs.model_fields}
    assert "| required | whole number, at least 1, at most 16 |" in rows["| `medusa_num_heads`"]
    assert "| `1.0`; `0.0` with self-distillation | number, at least 0 |" in rows["| `medusa_lm_coefficient`"]
    assert "| `ce` | `ce`, `kl`, `tv`, `lk`" in rows["| `medusa_head_loss`"]


def test_table_of_renamed_keys_has_every_key():
    page = text_of("docs/old_yamls.md")
    assert all(f"| `{key}` | {hint} |" in page for key, hint in RENAMED_BY_AXOLOTL.items())


def test_scaling_page_has_every_engine_for_8_64_and_512_gpus():
    tables = text_of("docs/scaling.md").split("<!-- table ")[1:]
    assert [table.split(" ")[0] for table in tables] == ["scaling_memory", "scaling_network"]
    for each in tables:
        assert "| recipe | engine | 8 GPUs | 64 GPUs | 512 GPUs |" in each
        rows = [line.split(" | ")[:2] for line in each.splitlines() if line.startswith("| Medusa")]
        assert rows == [[f"| {recipe}", engine] for recipe in write_pages.SCALING for engine in write_pages.ENGINES]


def test_table_escapes_what_would_end_a_cell():
    assert table(("a",), [("b | c",)]) == "| a |\n| --- |\n| b \\| c |\n"


def test_pages_are_written_where_their_tables_have_changed(tmp_path, monkeypatch, capsys):
    (tmp_path / "prose.md").write_text("nothing is marked here\n")
    (tmp_path / "keys.md").write_text("# Keys\n<!-- table yaml_keys -->\nold\n<!-- end -->\nAfter.\n")
    monkeypatch.setattr(write_pages, "FOLDER", tmp_path)
    monkeypatch.setattr(write_pages, "EXAMPLES", tmp_path / "none")
    write_pages.main()
    assert capsys.readouterr().out == f"written: {tmp_path / 'keys.md'}\n"
    begin, end = "# Keys\n<!-- table yaml_keys -->\n", "<!-- end -->\nAfter.\n"
    assert (tmp_path / "keys.md").read_text() == begin + TABLES["yaml_keys"]() + end
    write_pages.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text_of(name)):
        path, _, anchor = target.partition("#")
        page = (PAGES[name].parent / path) if path else PAGES[name]
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?m)(?:^ *|`|&& )make (\w[\w-]*)", text_of(name))
    assert {"test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_pages_exist(name):
    named = set(re.findall(r"axolotl-medusa ([a-z]+) (?=[A-Z.])", text_of(name)))
    assert named <= set(COMMANDS)


def test_formats_page_lists_every_target():
    assert set(TARGETS) <= set(re.findall(r"`([a-z-]+)`", text_of("docs/formats.md")))


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 170


def test_index_names_every_page_of_docs():
    linked = set(re.findall(r"\]\((\w+\.md)\)", text_of("docs/README.md")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_contributing_names_files_and_folders_that_exist():
    page = text_of("CONTRIBUTING.md")
    tree = page.split("```")[1]
    top = ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        top = name if not line.startswith(" ") else top
        assert (ROOT / (name if name == top else top + name)).exists(), name
    files = re.findall(r"`((?:src|tests|data_generation)/[\w/]+\.py)`", page)
    assert len(files) >= 8
    for file in files:
        assert (ROOT / file).is_file(), file


def test_data_generation_readme_names_every_module():
    page = text_of("data_generation/README.md")
    modules = {file.name for file in (ROOT / "data_generation").rglob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f" {name} " not in page} == set()


@pytest.mark.parametrize("test", re.findall(r"`(tests/[^`]+)`", text_of("docs/field.md")))
def test_tests_that_the_page_of_reports_names_exist(test):
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file()
