"""Leaves out the images of training data that cannot be opened."""

from __future__ import annotations

from typing import Any

import datasets
from accelerate import PartialState

from hf_mel.data.image_checks import without_bad_images
from hf_mel.errors import ImageError
from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.probe import sees_images, sees_images_in_pairs
from hf_mel.inference.ranking import process_group
from hf_mel.kb.encoding import report_bad_images
from hf_mel.protocols import Reranker, knows_posts


def with_readable_images(
    model: Any, processor: Any, *tables: datasets.Dataset | None
) -> tuple[datasets.Dataset | None, ...]:
    """Returns tables of mentions, entities or posts without the images that are missing or damaged, and warns of their number.

    Every image is opened, because training draws one of an entity's images. Several processes share the rows. Nothing is
    opened for a model that reads no images.

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`], *optional*): The model. `None`, in
            pre-training: one that reads images.
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        tables (`datasets.Dataset`, *optional*): The tables. `None` stays `None`.

    Raises:
        ImageError: No image of a table can be opened.
    """
    if model is None:
        is_read = True
    elif isinstance(model, Reranker):
        is_read = sees_images_in_pairs(processor)
    else:
        is_read = sees_images(processor, posts=knows_posts(model))
    if not is_read:
        return tables
    bad_images: list[ImageError] = []
    processes = PartialState()
    gather = process_group(processes).gather
    checked = tuple(
        rows
        if rows is None
        else without_bad_images(
            rows,
            file=None,
            bad_images=bad_images,
            every=True,
            part=part_of(len(rows), processes.process_index, processes.num_processes),
            gather=gather,
        )
        for rows in tables
    )
    report_bad_images(bad_images)
    return checked
