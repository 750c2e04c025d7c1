"""How many inputs the readers get."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    asked = os.environ.get("MEDUSA_FUZZ_INPUTS")
    parser.addoption(
        "--fuzz-inputs", type=int, default=int(asked) if asked else None, help="damaged files in all (default: 12,000)"
    )
