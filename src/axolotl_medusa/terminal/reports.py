"""The report of an evaluation, printed and written.

Contract: pure output of what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_medusa.measuring.step_times import StepTimes


def write_report(report: Mapping[str, Any], path: str | None) -> None:
    """Writes a report where it was asked for."""
    if path:
        Path(path).expanduser().write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_report(report: Mapping[str, Any], times: StepTimes) -> None:
    """Prints what a user looks for."""
    hardware = report["hardware"]
    threads = hardware.get("torch_threads") or hardware["threads"]
    print(f"{report['model']['type']}, {report['model']['dtype']}, {hardware['device']}, {threads} threads")
    for name, group in {"all prompts": report["overall"], **report["categories"]}.items():
        print(f"\n{name} ({group['prompts']})")
        for head in group["heads"]:
            tops = ", ".join(f"top {top} {value:.3f}" for top, value in head["top"].items() if value is not None)
            print(f"  head {head['head']}: {tops or 'no positions'}")
        for decoder, row in group["decoders"].items():
            print(
                f"  {decoder}: acceptance length {row['acceptance_length']:.3f}, {row['tokens_per_s']:.1f} tokens/s, "
                f"{row['speed_up']:.2f} x plain, output equal to plain for {row['agreement']:.1%} of prompts"
            )
    ratios = ", ".join(f"{nodes}: {ratio:.2f}" for nodes, ratio in times.ratios.items())
    print(f"\na step by nodes, in plain steps of {times.plain_s * 1000:.1f} ms: {ratios}")
