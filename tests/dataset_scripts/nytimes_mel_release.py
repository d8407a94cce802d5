"""A small invented NYTimes-MEL in the three forms of its authors' code, malformed data included: "missing" and null answers,
QIDs without name, Windows line ends, a missing image, names that hold other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import picture, write_json

OPTIONS: dict[str, Any] = {"allow_count_mismatch": True}
SPLITS = {"mentions": {"train": 3, "validation": 1, "test": 3}, "entities": {"kb": 4}}

#: key: (sentence before the replacement, after it, image, [(mention, entity, QID)]).
CAPTIONS: dict[str, tuple[str, str, str, list[tuple[str, str, str | None]]]] = {
    "31": ("Ada Falk at sea", "Addie at sea", "imgs/31.jpg", [("Addie", "Ada Falk", "Q901")]),
    "32": (
        "Ada Falk with Bo Falk and Bo Falk Jr.",
        "Addie with Bo and Junior.",
        "imgs/32.jpg",
        [("Addie", "Ada Falk", "Q901"), ("Bo", "Bo Falk", "Q902"), ("Junior", "Bo Falk Jr", None)],
    ),
    "33-1": ("Bo Falk, miller", "Bo Falk, miller", "imgs/33.jpg", [("Bo Falk", "Bo Falk", "Q902")]),
    "34": (
        "José Brun greets Ada Falk",
        "José greets Ada Falk",
        "imgs/gone.jpg",
        [("José", "José Brun", "Q904"), ("Ada Falk", "Ada Falk", "Q901")],
    ),
}
QIDS = {"Ada Falk": "Q901", "Bo Falk": "Q902", "José Brun": "Q904", "Joseph Brun": "Q904", "Cy Orr": "Q905"}


def write_rest(folder: Path) -> None:
    write_json(folder / "splits.json", {"train": ["32"], "dev": ["31"], "test": ["33-1", 34, "39"]})
    for path, colour in (("imgs/31.jpg", "red"), ("imgs/32.jpg", "green"), ("imgs/33.jpg", "blue")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(colour))
    (folder / "entity_imgs").mkdir(exist_ok=True)
    (folder / "entity_imgs" / "Q901.jpg").write_bytes(picture("red"))


def write_12n(folder: Path) -> Path:
    """One sample a caption, sentences after the replacement."""
    samples = {
        key: {
            "id": key,
            "sentence": after,
            "imgPath": image,
            "mentions": [mention for mention, _, _ in found],
            "entities": [entity for _, entity, _ in found],
            "answer": ["missing" if qid is None else qid for _, _, qid in found],
        }
        for key, (_, after, image, found) in CAPTIONS.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(samples, indent=1).replace("\n", "\r\n")
    (folder / "nel_12n.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    write_json(folder / "ne2qid.json", {**QIDS, "Nemo Nobody": "missing"})
    write_rest(folder)
    return folder


write = write_12n


def write_121(folder: Path) -> Path:
    """One sample a mention; the single ones first."""
    samples: dict[str, Any] = {}
    for key, (_, after, image, found) in sorted(CAPTIONS.items(), key=lambda item: len(item[1][3])):
        for k, (mention, entity, qid) in enumerate(found):
            own = key if len(found) == 1 else f"{key}-{k}"
            samples[own] = {"id": own, "sentence": after, "imgPath": image}
            samples[own] |= {"mentions": mention, "entities": entity, "answer": qid}
    write_json(folder / "nel_121.json", samples)
    write_json(folder / "ne2qid.json", QIDS)
    write_rest(folder)
    return folder


def write_dataset(folder: Path) -> Path:
    """Sentences before the replacement, and the QIDs apart."""
    samples = {
        key: {
            "sentence": before,
            "imgPath": image,
            "mentions": [mention for mention, _, _ in found],
            "entities": [entity for _, entity, _ in found],
        }
        for key, (before, _, image, found) in CAPTIONS.items()
    }
    write_json(folder / "dataset.json", samples)
    write_json(folder / "ne2qid.json", QIDS)
    write_rest(folder)
    return folder


LAYOUTS = {"nel_121": (write_121, SPLITS), "dataset": (write_dataset, SPLITS)}
