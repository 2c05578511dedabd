"""``python -m aep_ext``: the command ``aep``."""

from __future__ import annotations

import sys

from aep_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
