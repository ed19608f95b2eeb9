"""``python -m probkit``."""

from __future__ import annotations

from probkit.cli import main

if __name__ == "__main__":
    main()
