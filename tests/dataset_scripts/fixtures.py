"""Small invented releases in the exact layouts of the real ones."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image


def picture(colour: str, size: tuple[int, int] = (24, 16), form: str = "JPEG") -> bytes:
    """An image file of one colour."""
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


NAMES = {
    "Q901": "Ada Falk",
    "Q902": "Bo Falk (miller, born 1871)",
    "Q903": "Berta von Holm",
    "Q904": "José Brun",
}
ATTRIBUTES = {
    "Q901": "Sex: female. Occupation: sailor.",
    "Q902": "Sex: male. Birth: 1871, Nordby. Occupation: miller.",
    "Q903": "Occupation: .",
    "Q904": "",
}


def melbench_samples() -> dict[str, dict[str, Any]]:
    samples = [
        ("101", "Ada Falk at the harbour of Nordby", ["Ada Falk"], ["Q901"]),
        ("102", "Falk and Falk on Bo Falk's barge", ["Bo Falk", "Falk", "Falk"], ["Q902", "Q901", "Q902"]),
        ("103", "Berta von Holm, c. 1902", ["Berta Holm"], ["Q903"]),
        ("104", "Jon José Brun", ["José Brun", "Brun"], ["Q904", "Q904"]),
        ("105", "The Falk twins", ["Falk", "Falk"], ["Q901", "Q902"]),
    ]
    return {
        key: {
            "id": key,
            "sentence": sentence,
            "mentions": mentions,
            "entities": [NAMES[gold] for gold in golds],
            "answer": golds,
        }
        for key, sentence, mentions, golds in samples
    }


def write_melbench(root: Path) -> Path:
    """MELBench's WikiMEL with GHMFC's maps: 5 train, 2 validation and 2 test mentions, 4 entities; 1 image missing."""
    write_json(root / "Wikidata-MEL.json", melbench_samples())
    write_json(root / "splits.json", {"train": ["103", "101", "102", "199"], "test": ["105"], "dev": ["104"]})
    write_json(root / "qid2ne.json", NAMES)
    write_json(root / "qid2abs.json", ATTRIBUTES)
    (root / "mention_images").mkdir()
    for key, colour in (("101", "red"), ("102", "green"), ("104", "blue"), ("105", "grey")):
        (root / "mention_images" / f"{key}.jpg").write_bytes(picture(colour))
    return root


def write_ghmfc(root: Path, test: bool = True, long: bool = True) -> Path:
    """GHMFC's RichpediaMEL: 40 entities, 30 mentions in train.json, 10 in test.json; one entity image."""
    qids = [f"Q{7000 + k}" for k in range(40)]
    names = {qid: f"Person {k}" for k, qid in enumerate(qids)}

    def samples(part: list[str]) -> dict[str, dict[str, str]]:
        return {
            qid: {
                "id": qid,
                "sentence": f"{names[qid]}  was a potter.",
                "mentions": names[qid],
                "entities": names[qid],
                "answer": qid,
            }
            for qid in part
        }

    write_json(root / "train.json", samples(qids[:30]))
    if test:
        write_json(root / "test.json", samples(qids[30:]))
    write_json(root / "qid2ne.json", names)
    write_json(root / "qid2abs.json", dict.fromkeys(qids, "Occupation: potter."))
    if long:
        write_json(root / "qid2abs_long.json", {qid: f"Occupation: potter. Birth: {k}." for k, qid in enumerate(qids)})
    (root / "entity_images").mkdir()
    (root / "entity_images" / "Q7003.jpg").write_bytes(picture("gold"))
    return root


def write_cleaned(root: Path, prefix: str, mention_folder: str = "mention_image") -> Path:
    """The layout of MIMIC's authors: 3 train, 1 dev and 1 test mentions, 3 entities, percent-encoded names."""
    root.mkdir(parents=True, exist_ok=True)
    rows = {
        "train": [
            {"sentence": "Brun met Ada.", "mentions": "Ada", "imgPath": "a/x/12.v2.png", "answer": "Q901"},
            {"sentence": "Elsewhere.", "mentions": "Jos%C3%A9%20Brun", "imgPath": "", "answer": "Q904"},
            {"sentence": "Brun met Ada.", "mentions": "Brun", "imgPath": "a/x/12.v2.png", "answer": "Q904"},
        ],
        "dev": [{"sentence": "Nobody knows Holm.", "mentions": "Holm", "imgPath": "77.jpg", "answer": "nil"}],
        "test": [{"sentence": "Berta", "mentions": "Berta", "imgPath": "13.jpg", "answer": "Q903"}],
    }
    for split, samples in rows.items():
        write_json(root / f"{prefix}_{split}.json", samples)
    (root / "qid2id.json").write_text('{"nil": -1, "Q901": 0, "Q904": 1, "Q903": 2}\n{"Q1": 0}\n', encoding="utf-8")
    entities = [
        {"entity_name": "Ada%20Falk", "attr": ATTRIBUTES["Q901"], "image_list": ["Q901_0.PNG", "Q901_1.jpg"]},
        {"entity_name": "Jos%C3%A9%20Brun", "attr": "", "image_list": []},
        {"entity_name": "Berta von Holm", "attr": "Occupation: poet.", "image_list": ["gone.jpg"]},
    ]
    write_json(root / "kb_entity.json", [{"id": k, "type": "entity", **row} for k, row in enumerate(entities)])
    for path, data in (
        (f"{mention_folder}/12.jpg", picture("red")),
        (f"{mention_folder}/13.jpg", picture("green")),
        ("kb_image/Q901_0.PNG", picture("red", form="PNG")),
        ("kb_image/Q901_1.jpg", picture("navy")),
    ):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(data)
    return root


def write_kgmel(root: Path, dataset: str) -> Path:
    """KGMEL's layout: 3 train, 1 val and 2 test mentions, 3 entities of which one has no label; ids as numbers."""
    samples = [
        {"id": 0, "sentence": "Brun met Ada.", "imgPath": "mention_0.v1.png", "mention": ["Ada", "Brun"]},
        {"id": 1, "sentence": "Holm again", "imgPath": "mention_1.jpg", "mention": ["Holm"]},
        {"id": "2", "sentence": "Nobody knows Holm.", "imgPath": "mention_2.jpg", "mention": ["Holm"]},
        {"id": 3, "sentence": "Ada and Jos\u00e9 Brun", "imgPath": "", "mention": ["Ada", "Jos%C3%A9%20Brun"]},
        {"id": 4, "sentence": "In no split", "imgPath": "", "mention": []},
    ]
    answers = [["Q901", "Q904"], ["Q903"], ["nil"], ["Q901", "Q904"], []]
    rows = [
        {**sample, "answer": golds, "entity": [NAMES.get(gold, "") for gold in golds]}
        for sample, golds in zip(samples, answers, strict=True)
    ]
    write_json(root / f"data/dataset/{dataset}.json", rows)
    mapping = root / "data/dataset/mapping"
    write_json(mapping / "ids_split_mappings.json", {dataset: {"train": [1, 0, 77], "val": [2], "test": ["3"]}})
    write_json(mapping / "ids_blank_image.json", {dataset: [2]})
    write_json(mapping / "qids_answer.json", {dataset: ["Q901", "Q903", "Q904", None], "Other": []})
    (root / "data/KB/image").mkdir(parents=True)
    (root / "data/KB/image/Q901.png").write_bytes(picture("red", form="PNG"))
    (root / "data/KB/QID2Label.tsv").write_bytes(
        b"\xef\xbb\xbfQ901\tAda Falk\ta sailor\r\nQ77\tNobody\t\r\nQ904\tJos\xc3\xa9 Brun\r\n"
    )
    folder = root / f"data/dataset/image/{dataset}"
    folder.mkdir(parents=True)
    (folder / "mention_0.jpg").write_bytes(picture("green"))
    (folder / "mention_2.jpg").write_bytes(picture("white"))
    return root


def write_entity_images(folder: Path) -> dict[str, list[bytes]]:
    """Pictures of two entities under every name a release may give them; what each has, in order."""
    files = {
        "Q901": ["Q901.jpg", "Q901_0.PNG", "Q901_2.jpg", "Q901_10.jpg", "Q901/1.jpg", "Q901/12.jpg"],
        "Q902": ["Q902-1.jpeg"],
    }
    contents: dict[str, list[bytes]] = {}
    for k, (qid, names) in enumerate(files.items()):
        for i, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture("navy", (8 + i, 8 + k), "PNG" if name.endswith("PNG") else "JPEG"))
            contents.setdefault(qid, []).append(path.read_bytes())
    (folder / "Q902.txt").write_text("no picture")
    return contents
