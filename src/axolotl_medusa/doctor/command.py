"""The command `axolotl-medusa doctor`.

Contract: prints what the other modules of this room find.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

_LISTED = 14
"""Width of a name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "heads",
        nargs="?",
        metavar="HEADS",
        help="an output_dir, a checkpoint in it, or a medusa_heads: whether it fits its model",
    )
    parser.add_argument("--base-model", metavar="M", help="directory or Hub name; by default what training wrote down")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Prints what was found.

    Raises:
        RuntimeError: Heads do not fit their model.
        ValueError: A model is named without heads.
    """
    from axolotl_medusa.doctor.heads_and_model import examine

    if options.base_model and not options.heads:
        raise ValueError("--base-model is given without HEADS: name the heads that shall fit it")
    report = examination()
    findings = examine(options.heads, options.base_model) if options.heads else []
    report["heads"] = [asdict(finding) for finding in findings]
    print(json.dumps(report, indent=2) if options.json else text_of(report))
    problems = [finding for finding in findings if finding.kind == "problem"]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RuntimeError(f"{count} with {options.heads}, see above")


def examination() -> dict[str, Any]:
    """What is here, without heads."""
    from axolotl_medusa import __version__
    from axolotl_medusa.doctor.machine import devices
    from axolotl_medusa.doctor.versions import features, installed_versions

    versions = [{**asdict(each), "is_tested": each.is_tested} for each in installed_versions()]
    return {
        "axolotl-medusa": __version__,
        "versions": versions,
        "devices": devices(),
        "features": [asdict(each) for each in features()],
    }


def text_of(report: dict[str, Any]) -> str:
    """The report as lines to read."""
    lines = [f"axolotl-medusa {report['axolotl-medusa']}", "", "versions"]
    lines += [f"  {each['name']:{_LISTED}}{_state(each)}" for each in report["versions"]]
    lines += ["", "devices", *(f"  {_device(each)}" for each in report["devices"])]
    if not any(each["kind"] == "gpu" for each in report["devices"]):
        lines.append("  no GPU that torch sees")
    lines += ["", "features"]
    lines += [f"  {each['extra']:{_LISTED}}{_feature(each)}" for each in report["features"]]
    if not report["features"]:
        lines.append("  unknown: the package is not installed (pip install -e .)")
    if report["heads"]:
        lines += ["", "heads", *(f"  {each['kind']:{_LISTED}}{each['text']}" for each in report["heads"])]
    return "\n".join(lines)


def _state(each: dict[str, Any]) -> str:
    tested = " and ".join(each["tested"])
    if each["version"] is None:
        return f"not installed (tested: {tested})"
    return f"{each['version']}, tested" if each["is_tested"] else f"{each['version']}, not tested (tested: {tested})"


def _device(each: dict[str, Any]) -> str:
    words = [each["name"]]
    if each["kind"] == "cpu":
        words.append(f"{each['cores']} cores")
    else:
        words.append(f"compute capability {each['compute_capability']}")
    if each["memory_gib"] is not None:
        words.append(f"{each['memory_gib']} GiB")
    words.append("fast in bf16" if each["fast_bf16"] else "slow in bf16: use fp32")
    return ", ".join(words)


def _feature(each: dict[str, Any]) -> str:
    if not each["missing"]:
        return f"{each['purpose']}: all here"
    return f'{each["purpose"]}: missing {", ".join(each["missing"])}; pip install "axolotl-medusa[{each["extra"]}]"'
