"""Names of parameters without what DDP, FSDP, torch.compile and peft put around a module.

Contract: pure functions of names; imports nothing of ours. Trainers that save a wrapped model leave the wrappers' names in
its files, and whoever matches names exactly then finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_WRAPPERS = {
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning Fabric
    "_fpw_module",  # FSDP of torch 1
    "_fsdp_wrapped_module",
    "_orig_mod",  # torch.compile
}
"""Parts of a name that no model gives to a module of its own."""

_OUTERMOST = (("module",), ("base_model", "model"))
"""DDP's and DeepSpeed's name of the model in them, and peft's: wrappers only where a name begins with them."""

_HOLD_ADAPTERS = {"modules_to_save", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
_ADAPTER = "default"
"""Name of an adapter that is given none; peft leaves it out of its own files, other trainers do not."""


def unwrapped(name: str) -> str:
    """A parameter's name as the bare model has it: `lm_head.weight` of `module._orig_mod.lm_head.weight`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    before = ["", *parts]
    parts = [
        part for part, holder in zip(parts, before, strict=False) if part != _ADAPTER or holder not in _HOLD_ADAPTERS
    ]
    while outer := next((wrapper for wrapper in _OUTERMOST if tuple(parts[: len(wrapper)]) == wrapper), None):
        parts = parts[len(outer) :]
    return ".".join(parts)


def unwrapped_names(names: Iterable[str], where: Path) -> dict[str, str]:
    """The names of a model's or adapter's files by what they are without wrappers, in the same order.

    Raises:
        ValueError: Two of them are the same parameter.
    """
    found: dict[str, str] = {}
    for name in names:
        bare = unwrapped(name)
        if bare in found:
            raise ValueError(f"{where}: {found[bare]} and {name} are the same parameter, expected one of them")
        found[bare] = name
    return found


def check_bare(names: Iterable[str], where: Path, prefix: str = "") -> None:
    """Refuses files for a loader that matches names exactly, which would begin wrapped weights anew.

    Args:
        names: The names in the files.
        where: The files.
        prefix: What names begin with that the loader knows.

    Raises:
        ValueError: A wrapper renamed one.
    """
    for name in names:
        bare = unwrapped(name)
        if name not in (bare, prefix + bare):
            raise ValueError(
                f"{where}: the tensor {name} is one that a wrapper in training renamed, expected {prefix}{bare}, as it would be passed "
                "over: write the model anew with `axolotl-medusa export --model merged`, and give its merged_model as "
                "--base-model with the run's medusa_heads"
            )
