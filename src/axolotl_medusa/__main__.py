"""`python -m axolotl_medusa`: the `axolotl-medusa` command."""

from __future__ import annotations

import sys

from axolotl_medusa.cli import main

sys.exit(main())
