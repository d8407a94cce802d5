"""The layout of KGMEL, which groups the mentions of WikiMEL, RichpediaMEL and WikiDiverse by sentence.

Its files are `data/dataset/<dataset>.json` and `mapping/` beside it, with names, descriptions and images in `data/KB/`.
The folder of raw files may be the repository, its `data/`, or `data/dataset/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from hf_mel.dataset_scripts.builder import mention_row
from hf_mel.dataset_scripts.image_files import images_by_id, read_image, read_images
from hf_mel.dataset_scripts.release import Layout, Release
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import NIL

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_FOLDERS = ("data/dataset/", "dataset/", "")


def files(dataset: str) -> Layout:
    """Returns the files of the layout; `dataset` is KGMEL's name of the data set."""
    names = (f"{dataset}.json", "mapping/ids_split_mappings.json", "mapping/qids_answer.json")
    return [tuple(folder + name for folder in _FOLDERS) for name in names]


def mentions(
    release: Release, dataset: str, split: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Yields the mention rows of one split, in the order of its list of ids.

    A sample is a sentence with several mentions; its id is that of the context. Its image is the file of
    `image/<dataset>/` with the name up to the first dot and `.jpg`. Samples in `ids_blank_image.json` have a blank picture
    there, which is left out.
    """
    split = _SPLITS[split]
    mapping, splits = _read_mapping(release, "ids_split_mappings.json", dataset, dict)
    splits = release.check_record(mapping, dataset, splits, {split: list})
    split_of = release.splits_by_id(mapping, {part: ids for part, ids in splits.items() if isinstance(ids, list)})
    blank_file, blank_ids = _read_mapping(release, "ids_blank_image.json", dataset, list)
    blank = {release.identifier(blank_file, dataset, value) for value in blank_ids}
    folder = release.find_folder(
        images,
        *(f"{base}{name}" for base in _FOLDERS for name in (f"image/{dataset}", "image", "mention_image")),
    )
    samples: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, sample_id, sample in _read_samples(release, dataset):
        if sample_id in samples:
            raise DuplicateIdError(
                f"The id {sample_id!r} occurs twice.",
                file=release.root / name,
                row=sample_id,
                remedy="Remove one of the samples.",
            )
        samples[sample_id] = name, sample
    for sample_id in (key for key, part in split_of.items() if part == split):
        if sample_id not in samples:
            release.problem("split_id_without_sentence", mapping, sample_id, split)
            continue
        name, sample = samples[sample_id]
        image = None
        if sample["imgPath"] and sample_id not in blank:
            file = os.path.basename(sample["imgPath"])
            image = read_image(folder, file.split(".")[0] + ".jpg", file)
            if image is None:
                release.problem("missing_mention_image", name, sample_id, file)
        surfaces = [unquote(surface) for surface in sample["mention"]]
        spans = locate(sample["sentence"], surfaces)
        for k, (surface, gold, (start, end)) in enumerate(zip(surfaces, sample["answer"], spans, strict=True)):
            yield mention_row(
                mention_id=sample_id if len(surfaces) == 1 else f"{sample_id}-{k}",
                context_id=sample_id,
                text=sample["sentence"],
                mention=surface,
                start=start,
                end=end,
                image=image,
                entity_id=release.gold(name, sample_id, gold),
            )


def entities(release: Release, dataset: str, images: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """Yields the entity rows.

    The knowledge base is the list `mapping/qids_candidate.json`. If that was not published, it is the list of golds,
    `mapping/qids_answer.json`. Names and descriptions come from `KB/QID2Label.tsv` or `qid2ne.json`; without them a name
    is the title that the mentions give their gold. Attributes come from `qid2abs.json`, images from `KB/image/`.
    """
    mapping, qids = _read_mapping(release, "qids_candidate.json", dataset, list)
    if not qids:
        mapping, qids = _read_mapping(release, "qids_answer.json", dataset, list)
        release.problem("knowledge_base_of_golds_only", mapping, dataset, f"{len(qids)} entities")
    # The lists contain null or nil for mentions without entity.
    entity_ids = {gold: None for value in qids if (gold := release.gold(mapping, dataset, value)) != NIL}
    names: dict[str, str] = {}
    descriptions: dict[str, str] = {}
    for name, sample_id, sample in _read_samples(release, dataset):
        for title, value in zip(sample["entity"], sample["answer"], strict=True):
            names.setdefault(release.gold(name, sample_id, value), unquote(title))
    if file := release.find_file("qid2ne.json"):
        names.update(release.read_texts(file))
    if file := release.find_file("data/KB/QID2Label.tsv", "KB/QID2Label.tsv", "../KB/QID2Label.tsv", "QID2Label.tsv"):
        for _, line in release.read_lines(file):
            qid, label, description = [*line.split("\t"), "", ""][:3]
            if qid in entity_ids and label:
                names[qid], descriptions[qid] = label, description
    file = release.find_file("qid2abs.json")
    attributes = release.read_texts(file) if file else {}
    folder = release.find_folder(images, "data/KB/image", "KB/image", "../KB/image", "kb_image")
    image_names = images_by_id(folder)
    for qid in entity_ids:
        if not names.get(qid):
            release.problem("entity_without_name", mapping, qid)
        if folder is not None and qid not in image_names:
            release.problem("missing_entity_image", mapping, qid, f"{qid}.jpg")
        yield {
            "entity_id": qid,
            "name": names.get(qid, ""),
            "description": descriptions.get(qid, ""),
            "attributes": attributes.get(qid, ""),
            "aliases": [],
            "images": read_images(folder, image_names.get(qid, [])),
        }


def _read_mapping(release: Release, file: str, dataset: str, expected: type) -> tuple[str, Any]:
    """Reads what one of the files in `mapping/` holds for the data set; an empty `expected` without the file."""
    name = release.find_file(*(f"{folder}mapping/{file}" for folder in _FOLDERS))
    if name is None:
        return file, expected()
    return name, release.check_record(name, dataset, release.read_json(name, dict), {dataset: expected})[dataset]


def _read_samples(release: Release, dataset: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields file, sample id and sample. The three lists of a sample have the same length and hold strings."""
    name = release.find_file(*(f"{folder}{dataset}.json" for folder in _FOLDERS)) or ""
    keys = {"id": object, "sentence": str, "imgPath": str, "mention": list, "entity": list, "answer": list}
    for k, value in enumerate(release.read_json(name, list)):
        sample = release.check_record(name, k, value, keys)
        lists = [sample[key] for key in ("mention", "entity", "answer")]
        if len({len(values) for values in lists}) > 1:
            raise DataFormatError(
                f"The row has {', '.join(str(len(values)) for values in lists)} mentions, entities and answers, expected"
                " the same number of each.",
                file=release.root / name,
                row=k,
            )
        if not all(isinstance(text, str) for text in [*lists[0], *lists[1]]):
            raise DataFormatError(
                "The row has a mention or an entity that is not a string.", file=release.root / name, row=k
            )
        yield name, release.identifier(name, k, sample["id"]), sample
