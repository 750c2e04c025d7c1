"""The commands that decode, each with the least that it needs to run."""

from __future__ import annotations

from pathlib import Path


def arguments(command: str, directory: Path, max_new_tokens: int) -> list[str]:
    """A command's arguments for the run in `run` and the prompts in `prompts.jsonl` of a directory."""
    options = {
        "generate": ["--prompt", "Hi"],
        "chat": [],
        "demo": ["--prompt", "Hi"],
        "evaluate": ["--prompts", directory / "prompts.jsonl"],
        "tree": ["--calibration", directory / "prompts.jsonl", "--out", directory / "tree.json"],
    }[command]
    return [str(part) for part in (command, directory / "run", *options, "--max-new-tokens", max_new_tokens)]
