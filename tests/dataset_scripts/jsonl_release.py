"""A user's own rows in every form they may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import picture

OPTIONS: dict[str, Any] = {
    "config_options": {
        "mentions": "{folder}/mentions.jsonl",
        "entities": "{folder}/entities.tsv",
        "posts": "{folder}/posts.json",
    }
}
SPLITS = {
    "mentions": {"train": 3, "validation": 1, "test": 2},
    "entities": {"kb": 3},
    "posts": {"kb": 2},
}
MENTIONS: list[dict[str, Any]] = [
    {"text": "Ada met Bo.", "mention": "Ada", "entity_id": "E1", "split": "train", "image": "pictures/a.jpg"},
    {"text": "Ada met Bo.", "mention": "Bo", "entity_id": None, "split": "train", "image": "pictures/a.jpg"},
    {"text": "Bo, Bo!", "mention": "Bo", "start": 4, "end": 6, "entity_id": 2, "split": "train", "context_id": "bobo"},
    {"text": "Bo, Bo!", "mention": "Bo", "entity_id": "[nil]", "split": "Dev", "context_id": "bobo", "id": "m4"},
    {"text": "Cy ist müde 😴", "mention": "😴", "entity_id": "E3", "split": "test", "topic": "sleep"},
    {"text": "Cy again", "mention": "Bo", "entity_id": "E3", "split": "test", "candidates": ["E3", "E1"]},
]
ENTITIES = [
    ["entity_id", "name", "attributes", "aliases", "images"],
    ["E1", "Ada Falk", "Occupation: sailor.", "Ada|A. F.", "pictures/e1.png|pictures/a.jpg"],
    ["2", "Bo Falk", '"Said ""no"",\tthen yes."', "", ""],
    ["E3", "Cy", "", "", ""],
]
POSTS: list[dict[str, Any]] = [
    {"entity_id": "E1", "text": "Ahoy", "image": "pictures/a.jpg"},
    {"id": 7, "entity_id": 2, "text": "No."},
]


def write(folder: Path) -> None:
    """Mentions as JSONL with Windows line ends, entities as TSV with a byte-order mark, posts as a JSON list."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures/a.jpg").write_bytes(picture("red"))
    (folder / "pictures/e1.png").write_bytes(picture("navy", form="PNG"))
    lines = [json.dumps(row, ensure_ascii=k % 2 == 0) for k, row in enumerate(MENTIONS)]
    (folder / "mentions.jsonl").write_bytes("\r\n".join([*lines, "", ""]).encode())
    table = "".join("\t".join(cells) + "\n" for cells in ENTITIES)
    (folder / "entities.tsv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (folder / "posts.json").write_text(json.dumps(POSTS, indent=1), encoding="utf-8")


def write_folder(folder: Path) -> None:
    """The same, with the mentions in a file per split and without a column that says so."""
    write(folder)
    for split, name in (("train", "train.csv"), ("Dev", "dev.csv"), ("test", "test.csv")):
        columns = ["id", "context_id", "text", "mention", "start", "end", "entity_id", "image", "topic", "candidates"]
        rows = [row for row in MENTIONS if row["split"] == split]
        lines = [",".join(columns)]
        for row in rows:
            cells = ["" if row.get(c) is None else "|".join(row[c]) if c == "candidates" else row[c] for c in columns]
            lines.append(",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "mentions.jsonl").unlink()
