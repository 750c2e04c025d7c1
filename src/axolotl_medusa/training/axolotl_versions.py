"""What differs between the versions of axolotl that this package works with, asked of the axolotl that is installed.

Contract: the only module that knows of such differences, and of what axolotl has beyond its plugin API; asks for attributes
and answers, never for version numbers. A hook that only newer versions call needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_NEWEST_FSDP_VERSION = 2


def missing_fsdp_version() -> int:
    """Which FSDP axolotl takes where a YAML has `fsdp_config` and no `fsdp_version`: 1 until axolotl 0.19, later 2."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fill_in = getattr(AxolotlInputConfig, "check_fsdp_version_in_fsdp_config", None)
    if fill_in is None:
        return _NEWEST_FSDP_VERSION
    return int(fill_in({"fsdp_config": {"reshard_after_forward": True}})["fsdp_version"])


def keep_from_telemetry(keys: Iterable[str]) -> None:
    """Lets axolotl's telemetry leave out the values of keys, as it does for its own keys that hold paths."""
    from axolotl.telemetry import manager

    manager.FIELDS_TO_REDACT.update(keys)


def unread_options(arguments: list[str]) -> list[str]:
    """Options of a command line that are meant for our keys and that axolotl does not read.

    `axolotl train x.yml --medusa_num_heads 3` hands options that axolotl does not know to the launcher, and the launcher
    `python` drops them. The module `axolotl.cli.train` reads them.

    Args:
        arguments: The process's command line.
    """
    if not arguments or Path(arguments[0]).name != "axolotl":
        return []
    return [argument for argument in arguments[1:] if argument.startswith(("--medusa_", "--medusa-"))]
