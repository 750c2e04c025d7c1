"""Puts data_generation/ on the path: its scripts stand outside the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data_generation"))
