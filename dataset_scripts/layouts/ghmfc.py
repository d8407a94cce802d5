"""GHMFC's files of entities: names and attributes by QID, shared by its versions of WikiMEL and RichpediaMEL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hf_mel.dataset_scripts.image_files import images_by_id, read_images
from hf_mel.dataset_scripts.release import Release
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL


def entities(
    release: Release, names_file: str, attributes_file: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Yields entity rows, with the images that [`~hf_mel.dataset_scripts.image_files.images_by_id`] finds.

    Args:
        release ([`~hf_mel.dataset_scripts.release.Release`]): The release.
        names_file, attributes_file (`str`): JSON files that map QIDs to names and to attributes.
        images (`str` or `os.PathLike`, *optional*): The user's folder of entity images.

    Raises:
        DataFormatError: A file is malformed, or a QID is a spelling of [`NIL`].
    """
    folder = release.find_folder(images, "entity_images", "entity_imgs")
    image_names = images_by_id(folder)
    attributes = release.read_texts(attributes_file)
    names = release.read_texts(names_file)
    for qid in attributes:
        if qid not in names:
            release.problem("attributes_without_entity", attributes_file, qid)
    for qid, name in names.items():
        if not attributes.get(qid):
            release.problem("entity_without_attributes", attributes_file, qid)
        if folder is not None and qid not in image_names:
            release.problem("missing_entity_image", names_file, qid, f"{qid}.jpg")
        if release.gold(names_file, qid, qid) == NIL:
            raise DataFormatError(
                f"The id {qid!r} is a spelling of {NIL} and cannot name an entity.",
                file=release.root / names_file,
                row=qid,
                remedy="Remove the entry.",
            )
        yield {
            "entity_id": qid,
            "name": name,
            "description": "",
            "attributes": attributes.get(qid, ""),
            "aliases": [],
            "images": read_images(folder, image_names.get(qid, [])),
        }
