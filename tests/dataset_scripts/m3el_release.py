"""A small invented M3EL in the layout this project expects of it, malformed data included: a byte-order mark, Windows line ends,
ids as numbers and texts, NIL in several spellings, offsets that do not fit, missing images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import picture

OPTIONS: dict[str, Any] = {"allow_count_mismatch": True}
SPLITS = {"mentions": {"train": 5, "validation": 2, "test": 1}, "entities": {"kb": 3}}

LONG = " ".join(f"w{k}" for k in range(150))
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "train": [
        {
            "document_id": "tt01",
            "text": "Cape Man saves Nordby. Falk plays Cape Man.",
            "mentions": [
                {
                    "mention": "Cape Man",
                    "start": 34,
                    "end": 42,
                    "gold": "Cape Man",
                    "candidates": ["Cape Man", 77],
                    "priors": [0.75, 0.25],
                },
                {
                    "mention": "Falk",
                    "start": 1,
                    "end": 2,
                    "gold": 77,
                    "candidates": [["77", 0.5], ["Cape Man", 0.125]],
                },
                {"mention": "Nordby", "gold": "Nil"},
                {"mention": "Gotham", "gold": None},
            ],
            "visual_mentions": [
                {"image": "tt01/1.jpg", "region": [0, 0, 12.5, 16], "gold": "77", "candidates": ["77"], "priors": [1]},
                {"image": "gone.jpg", "gold": "77"},
                {"image": "2.png", "gold": "Cape Man"},
            ],
        }
    ],
    "val": [
        {
            "document_id": 2,
            "text": f"{LONG} Falk {LONG}",
            "mentions": [{"mention": "Falk", "gold": "77"}],
            "visual_mentions": [{"image": "tt01/1.jpg", "region": [], "gold": ""}],
        }
    ],
    "test": [{"document_id": "tt03", "text": "Falk", "mentions": [{"mention": "Falk", "gold": "77"}]}],
}
ENTITIES: list[dict[str, Any]] = [
    {"entity_id": "Cape Man", "name": "Cape Man", "description": "A hero.", "aliases": ["The Cape"]},
    {"entity_id": 77, "name": "Ada Falk", "description": None, "entity_images": ["77_0.jpg", "77_1.jpg"]},
    {"entity_id": "78", "name": "Bo Falk"},
]


def write_lines(path: Path, records: list[Any]) -> None:
    text = "".join(f"{json.dumps(record, ensure_ascii=False)}\r\n" for record in records)
    path.write_bytes(f"\ufeff{text}\r\n".encode())


def write(folder: Path) -> Path:
    """Writes the release."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in DOCUMENTS.items():
        write_lines(folder / f"{split}.jsonl", documents)
    write_lines(folder / "entities.jsonl", ENTITIES)
    for path, data in (
        ("images/tt01/1.jpg", picture("red")),
        ("images/2.png", picture("green", form="PNG")),
        ("entity_images/77_0.jpg", picture("blue")),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
