"""Shards of a knowledge base: pairs of a safetensors file of encodings and a Parquet file of entity rows.

[`ShardWriter`] writes them. The other functions read files that may come from an untrusted source.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_mel.errors import KnowledgeBaseError
from hf_mel.files import fsync_and_describe, local_path, write_errors, write_text
from hf_mel.inference import padding
from hf_mel.inference.encodings import concat_encodings
from hf_mel.inference.quantisation import LARGEST_VALUE, QUANTISED, SCALES, layout_of, quantised, stored_layout
from hf_mel.kb.manifest import MANIFEST_NAME, damage_error
from hf_mel.schema import entity_features

#: A shard is closed when its encodings reach this size, which bounds the memory of a build.
_SHARD_BYTES = 256 << 20
#: A Parquet row group ends after this many rows or bytes. Reading one entity reads one row group.
_GROUP_ROWS = 256
_GROUP_BYTES = 16 << 20
#: Limits for untrusted files: values per column of a row group, and decoded bytes per read.
_MAX_GROUP_VALUES = 1 << 22
_MAX_READ_BYTES = 1 << 30
#: Decoded row groups that a knowledge base keeps, and the largest of them: texts have fewer bytes, and images more.
_KEPT_BYTES, _KEPT_GROUP_BYTES = 64 << 20, 1 << 20
#: A `ParquetFile` that two threads read at once can crash the process.
_READING = threading.Lock()


class ShardWriter:
    """Writes encodings and entity rows in parallel, and starts a new pair of files whenever one is full.

    Args:
        folder (`Path`): The folder to write to.
        first (`int`): The number of the first shard.
        dtype (`str`): One of [`~hf_mel.kb.manifest.DTYPES`].
        layout (`dict`, *optional*): Encoding name → form and shape of one row, which all batches must match. Default:
            that of the first batch.
        step (`int`): A full shard has a multiple of so many rows.
        notes (`Path`, *optional*): A folder in which finished shards are recorded. Shards recorded there by an
            interrupted build are kept, and `num_finished` counts their rows.
        masks (mapping, *optional*): The [`~hf_mel.protocols.entity_token_masks`] of the model. A given layout has them.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        dtype: str,
        layout: dict[str, Any] | None = None,
        *,
        step: int = 1,
        notes: Path | None = None,
        masks: Mapping[str, str] | None = None,
    ):
        self.folder, self.first, self.layout, self.notes, self.dtype = folder, first, layout, notes, dtype
        self.step, self._masks = step, masks or {}
        self._shards: list[dict[str, Any]] = []
        self._encodings: list[dict[str, torch.Tensor]] = []
        self._tables: list[pa.Table] = []
        self._rows = 0
        self._parquet: pq.ParquetWriter | None = None
        if notes is not None:
            self._resume(notes)
        self.num_finished = sum(shard["rows"] for shard in self._shards)

    def _resume(self, notes: Path) -> None:
        all_complete = True
        for path in sorted(notes.glob("*.json")):
            note = json.loads(path.read_text(encoding="utf-8"))
            entries = [note["shard"][part] for part in ("encodings", "entities")]
            # Files are missing if the process ended after the final rename, or if someone deleted them.
            all_complete = all_complete and all(
                _file_size(self.folder / entry["file"]) == entry["bytes"] for entry in entries
            )
            if all_complete:
                self._shards.append(note["shard"])
                self.layout = note["layout"]
            else:
                path.unlink()
        finished = {shard[part]["file"] for shard in self._shards for part in ("encodings", "entities")}
        for path in self.folder.iterdir():
            if path.name not in finished:
                path.unlink()

    def add(self, encodings: Mapping[str, torch.Tensor], table: pa.Table) -> None:
        """Appends a batch.

        Args:
            encodings (`Mapping[str, torch.Tensor]`): Tensors with first axis B.
            table (`pyarrow.Table`): B rows with the columns of [`entity_schema`].

        Raises:
            KnowledgeBaseError: dtypes or shapes differ from those of earlier batches, or a file cannot be written.
        """
        masks = self._masks if self.layout is None else padding.masks_of(self.layout)
        stored, layout = _stored(encodings, self.dtype, masks)
        if self.layout is None:
            self.layout = layout
        elif layout != self.layout:
            raise KnowledgeBaseError(
                f"The encodings of this batch are {_layout_text(layout)}, but earlier ones were "
                f"{_layout_text(self.layout)}.",
                remedy="Let the processor pad every batch to the same length (padding='max_length').",
            )
        self.add_stored(stored)
        self.add_table(table)

    def add_stored(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Appends tensors as they are stored, which have the layout of this writer. Their tables follow."""
        self._encodings.append(dict(stored))

    def add_table(self, table: pa.Table) -> None:
        """Appends the table of rows whose encodings were appended."""
        assert self.layout is not None
        self._tables.append(table)
        self._rows += table.num_rows
        if sum(t.num_rows for t in self._tables) >= _GROUP_ROWS or sum(t.nbytes for t in self._tables) >= _GROUP_BYTES:
            self._write_group()
        if self._rows * _padded_bytes(self.layout) >= _SHARD_BYTES and self._rows % self.step == 0:
            self._close_shard()

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard and returns the manifest entries of all shards."""
        if self._rows:
            self._close_shard()
        return self._shards

    def _path(self, kind: str, suffix: str) -> Path:
        return self.folder / f"{kind}-{self.first + len(self._shards):05d}.{suffix}"

    def _write_group(self) -> None:
        path = self._path("entities", "parquet")
        with write_errors(path):
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(local_path(path), self._tables[0].schema, compression="zstd")
            table = pa.concat_tables(self._tables)
            self._parquet.write_table(table, row_group_size=table.num_rows)
        self._tables = []

    def _close_shard(self) -> None:
        if self._tables:
            self._write_group()
        entities, encodings = self._path("entities", "parquet"), self._path("encodings", "safetensors")
        with write_errors(entities):
            if self._parquet is not None:
                self._parquet.close()
        assert self.layout is not None
        stored = concat_encodings(self._encodings)
        with write_errors(encodings):
            save_file(stored | padding.first_vectors(stored, self.layout), encodings)
        shard = {
            "rows": self._rows,
            "encodings": fsync_and_describe(encodings),
            "entities": fsync_and_describe(entities),
        }
        if self.notes is not None:
            note = self.notes / f"{len(self._shards):05d}.json"
            write_text(note, [json.dumps({"shard": shard, "layout": self.layout})])
        self._shards.append(shard)
        self._encodings, self._parquet = [], None
        self._rows = 0


def layout_and_rows(
    encodings: Mapping[str, torch.Tensor], dtype: str, step: int, masks: Mapping[str, str]
) -> tuple[dict[str, Any], int]:
    """Returns the layout that a [`ShardWriter`] finds in encodings, and the rows of a full shard, a multiple of `step`."""
    _, layout = _stored(encodings, dtype, masks)
    step_bytes = max(1, _padded_bytes(layout) * step)
    return layout, step * -(-_SHARD_BYTES // step_bytes)


def _padded_bytes(layout: Mapping[str, Any]) -> int:
    """Returns the bytes of a stored row, with padding. They decide where a shard ends, so that all builds agree."""
    unmasked = {name: {key: spec[key] for key in ("dtype", "shape")} for name, spec in layout.items()}
    tensors = stored_layout(unmasked).values()
    return sum(getattr(torch, spec["dtype"]).itemsize * math.prod(spec["shape"]) for spec in tensors)


def _stored(
    encodings: Mapping[str, torch.Tensor], dtype: str, masks: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors in which encodings are stored as `dtype`, and their layout. Few bits leave padding out."""
    encodings = {name: tensor.to("cpu") for name, tensor in encodings.items()}
    if dtype in QUANTISED:
        _check_masks(encodings, masks)
        layout = layout_of(encodings, dtype, masks)
        return quantised(encodings, layout), layout
    of_torch = getattr(torch, dtype)
    stored = {k: tensor.to(of_torch) if tensor.is_floating_point() else tensor for k, tensor in encodings.items()}
    return stored, tensor_layout(stored)


def _check_masks(encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str]) -> None:
    """Checks that the masks that a model names are masks of its encodings."""
    for name, mask in masks.items():
        tensor, kept = encodings.get(name), encodings.get(mask)
        if (
            tensor is None
            or kept is None
            or not tensor.is_floating_point()
            or tensor.dim() < 3
            or (kept.dtype, kept.shape) != (torch.bool, tensor.shape[:2])
        ):
            raise KnowledgeBaseError(
                f"The model says that {mask!r} is the mask of {name!r}, but these are no encodings bool [N, L] and float "
                "[N, L, d] of N entities.",
                remedy="Correct entity_token_masks of the model.",
            )


def tensor_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Returns the dtype and the shape of one row of each tensor."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
        for name, tensor in tensors.items()
    }


def check_finite(encodings: Mapping[str, torch.Tensor], dtype: str, ids: Sequence[str], file: str | None) -> None:
    """Checks that encodings of B entities are finite after conversion to `dtype`, one of [`~hf_mel.kb.manifest.DTYPES`].

    Raises:
        KnowledgeBaseError: A value is nan or infinite, or overflows in `dtype`; names the entity.
    """
    converted = torch.float32 if dtype in QUANTISED else getattr(torch, dtype)
    for name, tensor in encodings.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.to(converted)
        finite = values.abs() <= LARGEST_VALUE if dtype in QUANTISED else values.isfinite()
        if finite.all():
            continue
        finite_rows = finite.flatten(1).all(1) if tensor.dim() > 1 else finite
        row = int((~finite_rows).nonzero()[0])
        overflows = bool(tensor[row].isfinite().all())
        raise KnowledgeBaseError(
            f"The encoding {name!r} of entity {ids[row]!r} "
            + (f"is too large for {dtype}." if overflows else "is nan or infinite."),
            file=file,
            remedy="Use bfloat16 or float32." if overflows else "Check the weights of the model.",
        )


@cache
def entity_schema() -> pa.Schema:
    """Returns the Arrow schema of entity rows, without further columns of their source."""
    return entity_features().arrow_schema


def stored_type(column_type: pa.DataType) -> pa.DataType | None:
    """Returns the type in which a further column of entities is stored, to filter by; `None` for one that is left out.

    Texts, numbers, truth values, dates, times and lists of texts are stored.
    """
    types = pa.types
    if types.is_string(column_type) or types.is_large_string(column_type):
        return pa.string()
    if types.is_integer(column_type):
        return pa.int64()
    if types.is_floating(column_type):
        return pa.float64()
    if types.is_boolean(column_type):
        return column_type
    if types.is_date(column_type):
        return pa.date32()
    if types.is_timestamp(column_type):
        return pa.timestamp("us", column_type.tz)
    if types.is_list(column_type) or types.is_large_list(column_type):
        return pa.list_(pa.string()) if stored_type(column_type.value_type) == pa.string() else None
    return None


def further_columns(entities: datasets.Dataset) -> dict[str, pa.DataType]:
    """Returns the columns of entities beside those of [`entity_schema`] that are stored, and the types that they get."""
    names = [name for name in entities.column_names if name not in entity_schema().names]
    types = {name: stored_type(entities.features.arrow_schema.field(name).type) for name in names}
    return {name: column_type for name, column_type in types.items() if column_type is not None}


def group_by_block(numbers: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Groups numbers by the block `starts[b]:starts[b + 1]` that contains them.

    Yields:
        `tuple[int, np.ndarray]`: b, and the positions in `numbers` of the numbers in block b.
    """
    blocks = np.searchsorted(starts, numbers, side="right") - 1
    for block in np.unique(blocks):
        yield int(block), np.flatnonzero(blocks == block)


def _layout_text(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {spec['dtype']}{spec['shape']}" for name, spec in layout.items())


def _file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def map_encodings(path: Path, rows: int, layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Maps the encodings of a shard into memory. They stay readable when the file is deleted.

    Args:
        path (`Path`): The safetensors file.
        rows (`int`): The number of rows in the manifest.
        layout (mapping): Encoding name → form and shape of one row in the manifest.

    Returns:
        `dict`: The tensors of the file: of quantised encodings the integers and, under another name, their scales.

    Raises:
        KnowledgeBaseError: The file cannot be read, or is not as the manifest says.
    """
    with read_errors(path), safe_open(path, framework="pt") as file:
        # Pages are read on use, and the system drops them when memory is short.
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensor_layout(tensors) != stored_layout(layout) or not _have_rows(tensors, rows, layout):
        raise damage_error(path, f"its tensors do not match {MANIFEST_NAME}")
    return tensors


def _have_rows(tensors: Mapping[str, torch.Tensor], rows: int, layout: Mapping[str, Any]) -> bool:
    """Whether tensors with the right shapes of a row have this number of rows, and the vectors of these rows."""
    masks = padding.masks_of(layout)
    per_row = [tensor for name, tensor in tensors.items() if name.removesuffix(SCALES) not in masks]
    if any(tensor.shape[:1] != (rows,) for tensor in per_row):
        return False
    ends = padding.num_vectors(tensors, layout)
    return all(len(tensors[name]) == len(tensors[name + SCALES]) == ends[mask] for name, mask in masks.items())


def take_rows(
    tensors: Mapping[str, torch.Tensor], rows: np.ndarray, layout: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns what [`map_encodings`] gave of some rows, for encodings of a layout: views, where rows follow one another.

    Raises:
        `ValueError`: The numbers of their vectors are not in the file.
    """
    masks, index = padding.masks_of(layout), as_index(rows)
    vectors = {mask: as_index(n) for mask, n in padding.vectors_of_rows(tensors, index, layout).items()}
    return {
        name: tensors[name][vectors[masks[of]] if (of := name.removesuffix(SCALES)) in masks else index]
        for name in stored_layout(layout)
    }


def as_index(rows: np.ndarray) -> slice | torch.Tensor:
    """Returns row numbers as an index of tensors: a slice, which gives a view, if they follow one another."""
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


class DecodedGroups:
    """The decoded row groups that were read last, up to a number of bytes. Threads may share them.

    Candidates of successive mentions lie in the same row groups, and decoding one takes a millisecond.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[Any, pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> pa.Table | None:
        """Returns what was kept under a key."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def keep(self, key: Any, table: pa.Table) -> None:
        """Keeps a row group, and drops those that were not read for the longest time."""
        with self._lock:
            if key in self._tables:
                return
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > _KEPT_BYTES:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes


class EntityTable:
    """The entities of a shard, mapped into memory. They stay readable when the file is deleted.

    The file has the columns of [`entity_schema`], and after them those of its source that are stored ([`stored_type`]).

    Args:
        path (`Path`): The Parquet file.
        rows (`int`): The number of rows in the manifest.
        kept ([`DecodedGroups`], *optional*): Row groups that the tables of a knowledge base keep.

    Raises:
        KnowledgeBaseError: The file cannot be read. Its content is checked when rows are read.
    """

    def __init__(self, path: Path, rows: int, kept: DecodedGroups | None = None):
        self.path, self.num_rows, self._kept = path, rows, kept or DecodedGroups()
        with read_errors(path), pa.memory_map(str(path)) as file:
            self._bytes = file.read_buffer()  # keeps the mapping, and needs no open file

    @cached_property
    def _parquet(self) -> tuple[pq.ParquetFile, np.ndarray]:
        """The opened file, and the first row of each row group."""
        file = pq.ParquetFile(pa.BufferReader(self._bytes))
        check_parquet(file, self.path)
        # Read as dictionaries, a string that occurs a million times is held once: see decode_table.
        parts = (file.schema.column(number) for number in range(len(file.schema)))
        columns = [part.path for part in parts if part.physical_type == "BYTE_ARRAY"]
        file = pq.ParquetFile(pa.BufferReader(self._bytes), metadata=file.metadata, read_dictionary=columns)
        if file.metadata.num_rows != self.num_rows:
            raise damage_error(self.path, f"its {file.metadata.num_rows} rows do not match {MANIFEST_NAME}")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the file, with the types in which they are returned."""
        with read_errors(self.path):
            schema = pq.read_schema(pa.BufferReader(self._bytes))
            names = schema.names[len(entity_schema()) :]
            stored = [pa.field(name, stored_type(schema.field(name).type)) for name in names]
            return pa.schema([*entity_schema(), *stored], metadata=entity_schema().metadata)

    def read(self, rows: np.ndarray, columns: list[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Reads rows of the shard.

        Args:
            rows (integers [R]): Rows of the shard, in any order.
            columns (`list[str]`): The columns to read. Those that the file lacks are left out.

        Yields:
            `tuple[pyarrow.Table, np.ndarray]`: Rows of one row group, and their positions in `rows`.

        Raises:
            KnowledgeBaseError: The file is damaged.
        """
        with read_errors(self.path):
            file, starts = self._parquet
            columns = [column for column in columns if column in self.schema.names]
            for group, positions in group_by_block(rows, starts):
                inside = pa.array(rows[positions] - starts[group])
                key = (self, group, *columns)
                decoded = self._kept.get(key)
                if decoded is None:
                    # Decoding a row group of texts takes less time than starting threads.
                    with _READING:
                        table = file.read_row_group(group, columns=columns, use_threads=False).select(columns)
                    if _decoded_size(table) > _KEPT_GROUP_BYTES:
                        yield decode_table(table.take(inside), self.schema, self.path), positions
                        continue
                    decoded = decode_table(table, self.schema, self.path)
                    self._kept.keep(key, decoded)
                yield decoded.take(inside), positions

    def read_column(self, column: str) -> list[Any]:
        """Reads one column of all rows.

        Raises:
            KnowledgeBaseError: The file is damaged.
        """
        return self.read_array(column).to_pylist()

    def read_array(self, column: str) -> pa.ChunkedArray:
        """Reads one column of all rows; nulls for a column that the file lacks.

        Raises:
            KnowledgeBaseError: The file is damaged.
        """
        with read_errors(self.path):
            file, _ = self._parquet
            if column not in self.schema.names:
                return pa.chunked_array([pa.nulls(self.num_rows)])
            # Arrow cannot read lists of several row groups at once as dictionaries.
            with _READING:
                groups = [file.read_row_group(group, columns=[column]) for group in range(file.num_row_groups)]
            return pa.concat_tables([decode_table(group, self.schema, self.path) for group in groups]).column(0)


def check_parquet(file: pq.ParquetFile, path: Path) -> None:
    """Checks the columns and the declared row-group sizes of an untrusted Parquet file before it is read.

    Raises:
        KnowledgeBaseError: The columns are not those of [`entity_schema`] and others that are stored, or a row group exceeds
            the limits.
    """
    schema, base = file.schema_arrow, entity_schema()
    others = [stored_type(field.type) for field in list(schema)[len(base) :]]
    names = schema.names
    if list(schema)[: len(base)] != list(base) or None in others or len(set(names)) < len(names):
        raise damage_error(path, "its columns are not those of entities")
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for chunk in (group.column(column) for column in range(group.num_columns)):
            if chunk.num_values > _MAX_GROUP_VALUES or chunk.total_uncompressed_size > _MAX_READ_BYTES:
                raise damage_error(
                    path, f"row group {number} has {chunk.num_values:,} values in {chunk.path_in_schema}"
                )


def decode_table(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """Converts dictionary-encoded columns to plain strings and bytes.

    Raises:
        KnowledgeBaseError: The decoded size exceeds the limit, as in a decompression bomb.
    """
    if (size := _decoded_size(table)) > _MAX_READ_BYTES:
        raise damage_error(path, f"texts and images of {table.num_rows:,} rows decode to {size:,} bytes")
    table = table.cast(pa.schema([schema.field(name) for name in table.column_names], metadata=schema.metadata))
    table.validate(full=True)  # of damaged texts, too, which Arrow would return
    return table


def _decoded_size(table: pa.Table) -> int:
    """Returns the bytes of a table whose dictionaries are decoded."""
    return sum(_decoded_bytes(chunk) for column in table.columns for chunk in column.chunks)


def _decoded_bytes(array: pa.Array) -> int:
    if pa.types.is_dictionary(array.type):
        return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if pa.types.is_list(array.type):
        return array.nbytes + _decoded_bytes(array.flatten())
    return sum(_decoded_bytes(part) for part in array.flatten()) if pa.types.is_struct(array.type) else array.nbytes


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns errors while reading a file of a shard into [`~hf_mel.errors.KnowledgeBaseError`]."""
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException, ValueError) as error:
        if isinstance(error, KnowledgeBaseError):
            raise
        raise damage_error(path, str(error)) from error
