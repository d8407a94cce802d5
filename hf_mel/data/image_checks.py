"""The policy for images of rows that are missing or broken: each is listed, and its row goes on without it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import datasets

from hf_mel.data.images import verify_image
from hf_mel.errors import ImageError

#: Rows whose images are in memory at a time.
_ROWS = 64


def without_bad_images(
    rows: datasets.Dataset,
    *,
    file: str | None,
    bad_images: list[ImageError] | None,
    every: bool = False,
    part: range | None = None,
    gather: Callable[[Any], list[Any]] = lambda outcome: [outcome],
) -> datasets.Dataset:
    """Returns the rows without images that cannot be opened. Of several images of an entity, those before the first good
    one are checked, because an entity is shown by its first.

    Args:
        rows (`datasets.Dataset`): N entities, mentions or posts.
        file (`str`, *optional*): Their source, for error messages.
        bad_images (list of [`~hf_mel.errors.ImageError`], *optional*): Receives an error for each bad image, with the id of
            its row. Without a list, the first one is raised.
        every (`bool`, *optional*, defaults to `False`): Whether all images of an entity are checked, because training draws
            one of them. Then the first error is raised if no image is good, as where a folder is not mounted.
        part (`range`, *optional*): The numbers of the rows whose images this process opens. Default: all.
        gather (callable): Returns what this process passes to it, and the others to theirs, in the order of the parts.

    Returns:
        `datasets.Dataset` of N rows: `rows` itself if all images are good.

    Raises:
        ImageError: An image is bad, and there is no list; or `every` image is bad.
    """
    column = "images" if "images" in rows.column_names else "image"
    id_column = next(name for name in ("mention_id", "post_id", "entity_id") if name in rows.column_names)
    images = rows.select_columns([id_column, column]).with_format("arrow")  # the plain format would decode them
    part = range(len(rows)) if part is None else part
    kept: dict[int, Any] = {}
    bad: list[ImageError] = []
    num_good = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(part.start, part.stop, _ROWS):
            batch = images[first : min(first + _ROWS, part.stop)].to_pylist()
            checked = threads.map(partial(_check, id_column=id_column, column=column, file=file, every=every), batch)
            for number, (good, errors) in enumerate(checked, first):
                num_good += len(good)
                if errors and bad_images is None:
                    raise errors[0]
                if errors:
                    bad += errors
                    kept[number] = good if column == "images" else next(iter(good), None)
    parts = gather((kept, bad, num_good))
    # Another process may have more rows, which its caller finds out.
    kept = {number: good for of_part, _, _ in parts for number, good in of_part.items() if number < len(rows)}
    bad = [error for _, errors, _ in parts for error in errors]
    if every and bad and not any(good for _, _, good in parts):
        raise bad[0]
    if bad_images is not None:
        bad_images += bad
    return _replace(rows, column, kept) if kept else rows


def _check(
    row: Mapping[str, Any], *, id_column: str, column: str, file: str | None, every: bool
) -> tuple[list[Any], list[ImageError]]:
    """Returns the images of a row from the first good one, and the errors of those before it; with `every`, all good ones."""
    images = [image for image in (row[column] if column == "images" else [row[column]]) or () if image is not None]
    good: list[Any] = []
    errors: list[ImageError] = []
    for number, image in enumerate(images):
        try:
            verify_image(image)
            if not every:
                return images[number:], errors
            good.append(image)
        except ImageError as error:
            name = f"{image['path']}: " if image["bytes"] is None and image["path"] else ""
            errors.append(ImageError(f"{name}{error.message}", file=file, row=row[id_column], remedy=error.remedy))
    return good, errors


def _replace(rows: datasets.Dataset, column: str, values: Mapping[int, Any]) -> datasets.Dataset:
    """Returns the rows with other values in one column of some of them. All others stay where they are on disk."""
    parts: list[datasets.Dataset] = []
    undecoded = rows.with_format("arrow")
    first = 0
    # Rows of one run differ from their place in the sorted list by the same number.
    for _, group in itertools.groupby(enumerate(sorted(values)), lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        if first < run[0]:
            parts.append(rows.select(range(first, run[0])))
        first = run[-1] + 1
        changed = undecoded[run[0] : first].to_pylist()
        changed = [{**row, column: values[number]} for number, row in zip(run, changed, strict=True)]
        parts.append(datasets.Dataset.from_list(changed, features=rows.features))
    if first < len(rows):
        parts.append(rows.select(range(first, len(rows))))
    return datasets.concatenate_datasets(parts)
