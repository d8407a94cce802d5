"""Encoding entities into the shards of a knowledge base, and comparing them with those that are stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import datasets
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from hf_mel.errors import ImageError, KnowledgeBaseError
from hf_mel.inference.encode import encode_batches
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.probe import unread_columns
from hf_mel.inference.ranking import SingleProcess
from hf_mel.kb.entities import EntitiesLike, checked_images, columns_to_store, describe_bad_images, row_digest
from hf_mel.kb.shards import check_finite, entity_schema, further_columns
from hf_mel.protocols import MelProcessor, Retriever, knows_posts
from hf_mel.schema import DESCRIBING_COLUMNS

logger = logging.getLogger(__name__)


class EncodingsWriter(Protocol):
    """Writes encodings and their rows: a [`~hf_mel.kb.shards.ShardWriter`], or the share of one of several processes."""

    dtype: str

    def add(self, encodings: Mapping[str, torch.Tensor], table: pa.Table) -> None:
        """Appends a batch."""
        ...


def open_inputs(
    entities: EntitiesLike,
    name: str | None,
    model: Any,
    processor: MelProcessor,
    posts: str | datasets.Dataset | None,
    bad_images: list[ImageError] | None,
    group: SingleProcess | None = None,
) -> ModelInputs:
    """Returns the inputs of a model, with posts whose images have been checked as those of the entities have.

    `group` is that of [`~hf_mel.kb.entities.open_entities`].
    """
    inputs = ModelInputs.from_data(None if name is None else entities, model, processor, posts)  # type: ignore[arg-type]
    if inputs.prototypes is None or inputs.prototypes.posts is None:
        return inputs
    posts = checked_images(inputs.prototypes.posts, name, bad_images, group or SingleProcess())
    return ModelInputs(model, processor, posts)


def report_bad_images(bad_images: list[ImageError] | None) -> list[dict[str, Any]]:
    """Warns of images that were left out, and returns them as plain data for JSON."""
    if bad_images:
        logger.warning(
            "%s missing or damaged, and left out. The first: %s",
            "1 image is" if len(bad_images) == 1 else f"{len(bad_images):,} images are",
            bad_images[0],
        )
    return describe_bad_images(bad_images or ())


def check_encodes_entities(model: Any) -> None:
    """Raises a `KnowledgeBaseError` if a model is no retriever."""
    if not isinstance(model, Retriever):
        raise KnowledgeBaseError(
            f"{type(model).__name__} cannot encode entities without a mention.",
            remedy="Give a retriever; a reranker only orders the candidates that a retriever found.",
        )


def write_encodings(
    source: datasets.Dataset,
    name: str | None,
    inputs: ModelInputs,
    writer: EncodingsWriter,
    batch_size: int,
    progress: bool,
) -> None:
    """Encodes entities batch by batch and passes encodings and rows to `writer`."""
    check_encodes_entities(inputs.model)
    _warn_of_unread_columns(source, inputs)
    with evaluation_mode(inputs.model):
        batches = encode_batches(inputs, source, "entities", batch_size=batch_size, progress=progress)
        for encodings, table in zip(batches, iter_stored_tables(source, name, batch_size), strict=True):
            check_finite(encodings, writer.dtype, table["entity_id"].to_pylist(), name)
            writer.add(encodings, table)


def iter_stored_tables(source: datasets.Dataset, name: str | None, batch_size: int) -> Iterator[pa.Table]:
    """Yields the entities as they are stored, batch by batch."""
    further = further_columns(source)
    undecoded = source.with_format("arrow")  # the plain format would decode every image
    for first in range(0, len(source), batch_size):
        yield _table_to_store(undecoded[first : first + batch_size], further, name)


def _table_to_store(batch: pa.Table, further: Mapping[str, pa.DataType], name: str | None) -> pa.Table:
    """Returns undecoded entities as they are stored: the columns of the schema, and `further` ones in these types."""
    schema = entity_schema()
    table = pa.Table.from_pydict(columns_to_store(batch.select(schema.names).to_pydict(), name), schema=schema)
    for column, column_type in further.items():
        table = table.append_column(pa.field(column, column_type), batch[column].cast(column_type))
    return table


def source_digests(source: datasets.Dataset, name: str | None, progress: bool) -> Iterator[bytes]:
    """Yields the digest of each entity as it would be stored."""
    with tqdm(total=len(source), desc="Comparing", unit="row", delay=1, disable=not progress) as bar:
        for table in iter_stored_tables(source, name, 256):
            for row in table.to_pylist():
                yield row_digest(row)
                bar.update()


def _warn_of_unread_columns(source: datasets.Dataset, inputs: ModelInputs) -> None:
    """Logs which text columns have values that the processor does not read, because users see them beside results."""
    filled = [
        column
        for column in DESCRIBING_COLUMNS
        if column in source.column_names and any(any(value or ()) for value in source[column])
    ]
    if unread := unread_columns(inputs.processor, filled, posts=knows_posts(inputs.model)):
        logger.warning(
            "%s does not read all columns that the entities fill. These change no score: %s. To use them, train a model "
            "whose processor reads them.",
            type(inputs.processor).__name__,
            ", ".join(unread),
        )
