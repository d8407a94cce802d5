"""Small invented WikiMELs in the three layouts of its releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import write_cleaned, write_entity_images, write_kgmel, write_melbench

OPTIONS: dict[str, Any] = {"allow_count_mismatch": True}
SPLITS = {"mentions": {"train": 5, "validation": 2, "test": 2}, "entities": {"kb": 4}}


def write(folder: Path) -> None:
    """MELBench's sentences with GHMFC's maps, a byte-order mark and Windows line ends in one of them."""
    write_melbench(folder)
    write_entity_images(folder / "entity_images")
    names = folder / "qid2ne.json"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n"))


LAYOUTS = {
    "mimic": (
        lambda folder: write_cleaned(folder, "WIKIMEL"),
        {"mentions": {"train": 3, "validation": 1, "test": 1}, "entities": {"kb": 3}},
    ),
    "kgmel": (
        lambda folder: write_kgmel(folder, "WikiMEL"),
        {"mentions": {"train": 3, "validation": 1, "test": 2}, "entities": {"kb": 3}},
    ),
}
