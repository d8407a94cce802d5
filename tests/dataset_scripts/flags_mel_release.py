"""FlagsMEL is generated: there is no release to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {}
SPLITS = {
    "mentions": {"train": 2400, "validation": 400, "test": 800},
    "entities": {"kb": 129},
    "posts": {"kb": 772},
}


def write(folder: Path) -> None:
    """Nothing."""
