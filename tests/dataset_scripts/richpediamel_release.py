"""Small invented RichpediaMELs in the layouts of its releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import write_cleaned, write_ghmfc, write_json, write_kgmel

OPTIONS: dict[str, Any] = {"allow_count_mismatch": True}
SPLITS = {"mentions": {"train": 27, "validation": 3, "test": 10}, "entities": {"kb": 40}}


def write(folder: Path) -> None:
    """GHMFC's files, with the list of its pictures; one of two is there."""
    write_ghmfc(folder)
    write_json(folder / "img_list.json", ["raw_data/imgs/Q7003.jpg", "raw_data/imgs/Q7004.jpg"])
    (folder / "raw_data/imgs").mkdir(parents=True)
    (folder / "raw_data/imgs/Q7003.jpg").write_bytes((folder / "entity_images/Q7003.jpg").read_bytes())


LAYOUTS = {
    "mimic": (
        lambda folder: write_cleaned(folder, "RichpediaMEL", "mention_images"),
        {"mentions": {"train": 3, "validation": 1, "test": 1}, "entities": {"kb": 3}},
    ),
    "kgmel": (
        lambda folder: write_kgmel(folder, "RichpediaMEL"),
        {"mentions": {"train": 3, "validation": 1, "test": 2}, "entities": {"kb": 3}},
    ),
}
