"""The layout of MIMIC's authors, who distribute cleaned files of WikiMEL, RichpediaMEL and WikiDiverse.

Its files are `<prefix>_{train,dev,test}.json`, `qid2id.json` and `kb_entity.json`, with images in `mention_image/` and
`kb_image/`. The files of M3EL's and MMoE's authors have the same form, with `desc` in place of `attr`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from hf_mel.dataset_scripts.builder import mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.release import Layout, Release
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError, UnknownEntityError
from hf_mel.schema import NIL

_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_QIDS = "qid2id.json"
_ENTITIES = "kb_entity.json"


def files(prefix: str) -> Layout:
    """Returns the files of the layout; `prefix` begins the names of the mention files."""
    return [*(f"{prefix}_{split}.json" for split in _SPLITS.values()), _QIDS, _ENTITIES]


def mentions(
    release: Release, prefix: str, split: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Yields the mention rows of one split, in file order.

    The format has no ids of rows: `mention_id` is `<split>-<row, from 0>`. Rows with the same sentence and image form one
    context, which is named after its first row. Mentions are percent-decoded.
    """
    split = _SPLITS[split]
    name = f"{prefix}_{split}.json"
    folder = release.find_folder(images, "mention_image", "mention_images")
    kb_rows, qids = _read_qids(release)
    keys = {"sentence": str, "mentions": str, "imgPath": str, "answer": object}
    samples = [release.check_record(name, k, value, keys) for k, value in enumerate(release.read_json(name, list))]
    contexts: dict[tuple[str, str], list[int]] = {}
    for k, sample in enumerate(samples):
        contexts.setdefault((sample["sentence"], sample["imgPath"]), []).append(k)
    for members in contexts.values():
        spans = locate(samples[members[0]]["sentence"], [unquote(samples[k]["mentions"]) for k in members])
        for k, span in zip(members, spans, strict=True):
            samples[k].update(span=span, context=members[0])
    missing: set[str] = set()
    for k, sample in enumerate(samples):
        image = None
        if file := os.path.basename(sample["imgPath"]):
            # The authors' loader cuts the name at its first dot, so files may be stored under the shorter name.
            image = read_image(folder, sample["imgPath"], file.split(".")[0] + ".jpg")
            if image is None and file not in missing:
                missing.add(file)
                release.problem("missing_mention_image", name, k, file)
        gold = release.gold(name, k, sample["answer"])
        start, end = sample["span"]
        yield mention_row(
            mention_id=f"{split}-{k}",
            context_id=f"{split}-{sample['context']}",
            text=sample["sentence"],
            mention=unquote(sample["mentions"]),
            start=start,
            end=end,
            image=image,
            entity_id=qids[kb_rows[gold]] if gold in kb_rows else gold,
        )


def entities(release: Release, images: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """Yields the entity rows in the order of the knowledge base. Names are percent-decoded.

    The text of an entity is `attr`, which becomes its attributes, or `desc`, which becomes its description.

    Raises:
        DataFormatError: The ids are not 0, 1, 2, … in file order, or an entity has neither `attr` nor `desc`.
        UnknownEntityError: `qid2id.json` names a row that the knowledge base does not have.
    """
    folder = release.find_folder(images, "kb_image", "kb_images")
    kb_rows, qids = _read_qids(release)
    records = release.read_json(_ENTITIES, list)
    for qid, row in kb_rows.items():
        if not 0 <= row < len(records):
            raise UnknownEntityError(
                f"The QID points at row {row}, but {_ENTITIES} has {len(records)} rows.",
                file=release.root / _QIDS,
                row=qid,
                remedy="Use both files of one download.",
            )
    for k, value in enumerate(records):
        record = release.check_record(_ENTITIES, k, value, {"id": object, "entity_name": str, "image_list": list})
        row = _row_number(release, _ENTITIES, k, record["id"])
        if row != k:
            raise DataFormatError(
                f"The entity has id {row}, expected {k}.",
                file=release.root / _ENTITIES,
                row=k,
                remedy="Keep the entities in the order of their ids.",
            )
        text_keys = [key for key in ("attr", "desc") if key in record] or ["attr"]
        record = release.check_record(
            _ENTITIES, k, {key: "" if v is None else v for key, v in record.items()}, dict.fromkeys(text_keys, str)
        )
        if k not in qids:
            release.problem("entity_without_qid", _ENTITIES, k, f"entity_id is kb-{k}")
        stored = []
        for file in record["image_list"]:
            file = release.identifier(_ENTITIES, k, file)
            image = read_image(folder, file)
            if image is None:
                release.problem("missing_entity_image", _ENTITIES, k, file)
            else:
                stored.append(image)
        yield {
            "entity_id": qids.get(k, f"kb-{k}"),
            "name": unquote(record["entity_name"]),
            "description": record.get("desc", ""),
            "attributes": record.get("attr", ""),
            "aliases": [],
            "images": stored,
        }


def _read_qids(release: Release) -> tuple[dict[str, int], dict[int, str]]:
    """Reads the first line of `qid2id.json`, which is all that belongs to the format, without the key "nil".

    Returns:
        `tuple[dict, dict]`: Row of the knowledge base by QID, and QID by row. If two QIDs name one row, the second
        mapping has the first of them.
    """
    rows: dict[str, int] = {}
    qids: dict[int, str] = {}
    for key, value in release.read_json(_QIDS, dict, first_line=True).items():
        if release.gold(_QIDS, key, key) == NIL:
            continue
        qid = release.identifier(_QIDS, key, key)
        rows[qid] = _row_number(release, _QIDS, key, value)
        qids.setdefault(rows[qid], qid)
    return rows, qids


def _row_number(release: Release, name: str, row: str | int, value: Any) -> int:
    text = release.identifier(name, row, value)
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise DataFormatError(f"The value is {text[:40]!r}, expected a number.", file=release.root / name, row=row)
    return int(text)
