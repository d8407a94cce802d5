"""Columns of Parquet files: reading them, comparing them with the schema, and finding the images in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_mel.files import local_path
from hf_mel.schema import entity_features, mention_features, post_features

#: Id column of each kind of rows. The first of them that a configuration has decides its kind.
ID_COLUMNS = {"mentions": "mention_id", "posts": "post_id", "entities": "entity_id"}
#: Required columns of each kind of rows.
SCHEMAS: dict[str, Callable[..., datasets.Features]] = {
    "mentions": mention_features,
    "entities": entity_features,
    "posts": post_features,
}
_ROWS_PER_READ = 1_000


def kind_of(columns: Iterable[str]) -> str | None:
    """Returns the kind of rows that have these columns: "mentions", "posts", "entities", or `None` if unknown."""
    columns = set(columns)
    return next((kind for kind, column in ID_COLUMNS.items() if column in columns), None)


def read_parquet(file: Any, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yields the rows of a Parquet file in tables of at most 1,000 rows. An empty file gives one empty table."""
    parquet = pq.ParquetFile(local_path(file) if isinstance(file, Path) else file)
    if parquet.metadata.num_rows == 0:
        yield parquet.read(columns=columns)
    for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
        yield pa.Table.from_batches([batch])


def schema_mismatch(schema: pa.Schema, features: datasets.Features) -> str:
    """Describes the columns of `features` that `schema` lacks or has with another type. Empty if all match."""
    if missing := [name for name in features if name not in schema.names]:
        return f"missing: {', '.join(missing)}; found: {', '.join(schema.names)}"
    return ", ".join(
        f"{expected.name} is {schema.field(expected.name).type}"
        for expected in features.arrow_schema
        if not _is_compatible(schema.field(expected.name).type, expected.type)
    )


def _is_compatible(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two Arrow types hold the same kind of values. Integers may have another width, offsets another size."""
    kinds = pa.types
    if kinds.is_list(expected):
        is_list = kinds.is_list(actual) or kinds.is_large_list(actual)
        return is_list and _is_compatible(actual.value_type, expected.value_type)
    if kinds.is_struct(expected):
        return kinds.is_struct(actual) and all(
            (index := actual.get_field_index(field.name)) >= 0 and _is_compatible(actual[index].type, field.type)
            for field in expected
        )
    if kinds.is_string(expected):
        return kinds.is_string(actual) or kinds.is_large_string(actual)
    if kinds.is_binary(expected):
        return kinds.is_binary(actual) or kinds.is_large_binary(actual)
    return actual == expected or (kinds.is_integer(actual) and kinds.is_integer(expected))


def images_in(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Buffer | None]]:
    """Yields (row, bytes) of each image of a column, without copying the bytes.

    The bytes are `None` for an image of which only a path is stored. A column without images yields nothing.
    """
    first_row = 0
    for chunk in column.chunks:
        rows: Sequence[int] = range(len(chunk))
        images = chunk
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            rows, images = pc.list_parent_indices(chunk).to_pylist(), pc.list_flatten(chunk)
        if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
            contents = pc.struct_field(images, "bytes")
            for row, image, content in zip(rows, images, contents, strict=True):
                if content.is_valid:
                    yield first_row + row, content.as_buffer()
                elif image.is_valid:
                    yield first_row + row, None
        first_row += len(chunk)
