"""Reads and verifies the images of a builder's examples on all cores."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from hf_mel.building.columns import ID_COLUMNS, kind_of
from hf_mel.building.id_set import IdSet
from hf_mel.data.images import resize_image, verify_image
from hf_mel.errors import ImageError
from hf_mel.schema import NIL

#: A row, or `None` if it is left out, and its problems: (kind, row id, detail).
RowAndProblems = tuple[dict[str, Any] | None, list[tuple[str, str, str]]]

#: Number of rows per core whose images are read ahead.
_ROWS_PER_CORE = 8
#: Number of image digests to remember, so that an image shared by many rows is verified once.
_MAX_VERDICTS = 10_000


@contextmanager
def image_threads() -> Iterator[ThreadPoolExecutor]:
    """Opens a pool with one thread per core. Decoding images releases the GIL. An error cancels waiting work."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def embed_images(
    examples: Iterable[dict[str, Any]],
    features: datasets.Features,
    entity_ids: IdSet,
    threads: ThreadPoolExecutor,
    resize: int | None,
) -> Iterator[RowAndProblems]:
    """Yields each example as a row with the bytes of its images, in order.

    An image that is missing or cannot be read is left out of its row. A row whose gold entity is not in the knowledge
    base is left out. Both are problems.

    Args:
        examples (iterable of `dict`): Rows as the builder yields them.
        features (`datasets.Features`): Their columns.
        entity_ids ([`~hf_mel.building.id_set.IdSet`]): Ids of the knowledge base.
        threads (`ThreadPoolExecutor`): Threads that read and decode images.
        resize (`int`, *optional*): Limit on the longest side of an image, in pixels.
    """
    kind = kind_of(features) or ""
    id_column = ID_COLUMNS[kind]
    columns = [name for name, feature in features.items() if _holds_images(feature)]
    embed = partial(_embed_row, columns=columns, id_column=id_column, verdicts={}, resize=resize)
    limit = _ROWS_PER_CORE * (os.cpu_count() or 1)
    waiting: deque[RowAndProblems | Future[RowAndProblems]] = deque()
    for example in examples:
        row = features.encode_example(example)
        if kind != "entities" and row["entity_id"] != NIL and row["entity_id"] not in entity_ids:
            waiting.append((None, [("gold_not_in_kb", row[id_column], row["entity_id"])]))
        elif any(row[column] for column in columns):
            waiting.append(threads.submit(embed, row))
        else:
            waiting.append((row, []))
        while waiting and (len(waiting) > limit or not isinstance(waiting[0], Future)):
            yield _wait_for(waiting.popleft())
    while waiting:
        yield _wait_for(waiting.popleft())


def _wait_for(item: RowAndProblems | Future[RowAndProblems]) -> RowAndProblems:
    return item.result() if isinstance(item, Future) else item


def _embed_row(
    row: dict[str, Any], columns: list[str], id_column: str, verdicts: dict[bytes, str | None], resize: int | None
) -> RowAndProblems:
    problems: list[tuple[str, str, str]] = []
    for column in columns:
        images = row[column] if isinstance(row[column], list) else [row[column]]
        embedded = []
        for image in images:
            if image is None:
                continue
            try:
                # The path is dropped, because file names can reveal the gold entity.
                embedded.append({"bytes": _verified_bytes(image, verdicts, resize), "path": None})
            except FileNotFoundError:
                problems.append(("missing_image", row[id_column], os.path.basename(image["path"])))
            except ImageError as error:
                problems.append(("broken_image", row[id_column], error.message))
            except OSError as error:
                problems.append(("broken_image", row[id_column], f"The image file cannot be read ({error.strerror})."))
        row[column] = embedded if isinstance(row[column], list) else (embedded[0] if embedded else None)
    return row, problems


def _verified_bytes(image: dict[str, Any], verdicts: dict[bytes, str | None], resize: int | None) -> bytes:
    """Returns the bytes to store for an image.

    Args:
        image (`dict`): `{"bytes", "path"}`; a path is read if the bytes are `None`.
        verdicts (`dict[bytes, str or None]`): Cache of error messages by sha256, `None` for a good image.
        resize (`int`, *optional*): Limit on the longest side, in pixels.

    Raises:
        ImageError: The image cannot be decoded.
        OSError: The file cannot be read.
    """
    data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    if resize is not None:
        return resize_image(data, resize)
    digest = hashlib.sha256(data).digest()
    if digest not in verdicts:
        if len(verdicts) > _MAX_VERDICTS:
            verdicts.clear()
        try:
            verify_image(data)
            verdicts[digest] = None
        except ImageError as error:
            verdicts[digest] = error.message
            raise
    elif (verdict := verdicts.get(digest)) is not None:
        raise ImageError(verdict)
    return data


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or isinstance(getattr(feature, "feature", None), datasets.Image)
