"""Finds and reads the image files of a release."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


def read_image(folder: Path | None, *names: str) -> dict[str, Any] | None:
    """Reads the first of `names` that is a file in `folder`.

    A name with folders (`"Q42/0.jpg"`, `"data/images/7.jpg"`) is first taken as a path below `folder`, then its last
    part is looked for in `folder` itself.

    Returns:
        `dict` or `None`: The cell of an image column, with the bytes of the file unchanged; `None` without a file. The
        cell has no file name, because some releases name images after the gold entity. Only that of a file which exists
        and cannot be read has its path, so that the build lists it.
    """
    if folder is None:
        return None
    for name in names:
        paths = [name] if ".." not in Path(name).parts and not Path(name).is_absolute() else []
        for path in (folder / part for part in (*paths, os.path.basename(name))):
            try:
                if path.is_file():
                    return {"bytes": path.read_bytes(), "path": None}
            except (OSError, ValueError) as error:  # also a name that no file can have: the image is missing
                if isinstance(error, PermissionError):
                    return {"bytes": None, "path": os.fspath(path)}
    return None


def read_images(folder: Path | None, names: Iterable[str]) -> list[dict[str, Any]]:
    """Reads those of `names` that are files in `folder`, as [`read_image`] does."""
    return [image for name in names if (image := read_image(folder, name))]


def images_by_id(folder: Path | None) -> dict[str, list[str]]:
    """Lists the images of a folder in which files are named after entity ids.

    An entity may have `<id>.jpg` (or another image suffix), `<id>_0.jpg`, `<id>-1.jpg`, … and a folder `<id>/`. They
    come in this order, numbers by their value.

    Returns:
        `dict[str, list[str]]`: Paths relative to `folder`, by entity id.
    """
    images: dict[str, list[tuple[int, list[Any], str]]] = {}
    if folder is not None:
        for entry in os.scandir(folder):
            if entry.is_dir():
                for name in os.listdir(entry.path):
                    if name.lower().endswith(_IMAGE_SUFFIXES):
                        images.setdefault(entry.name, []).append((2, _natural_key(name), f"{entry.name}/{name}"))
            elif entry.name.lower().endswith(_IMAGE_SUFFIXES):
                stem = os.path.splitext(entry.name)[0]
                numbered = re.fullmatch(r"(.+)[_-](\d+)", stem)
                rank, entity_id = (1, numbered[1]) if numbered else (0, stem)
                images.setdefault(entity_id, []).append((rank, _natural_key(entry.name), entry.name))
    return {entity_id: [name for _, _, name in sorted(names)] for entity_id, names in images.items()}


def _natural_key(name: str) -> list[Any]:
    """A sort key that compares digits in a name by their value."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
