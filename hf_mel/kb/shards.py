"""hf_mel.kb.shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_mel.errors import KnowledgeBaseError
from hf_mel.files import sealed, write_text, writing
from hf_mel.inference.encodings import concat_encodings, row_bytes
from hf_mel.kb.manifest import DTYPES, _damaged
from hf_mel.schema import entity_features

#: A shard is closed when its encodings reach this size: it bounds the memory of a build.
_SHARD_BYTES = 256 << 20


#: A Parquet row group is what reading one entity reads.
_GROUP_ROWS = 256


_GROUP_BYTES = 16 << 20


_GROUP_VALUES = 1 << 22


_READ_BYTES = 1 << 30


class _ShardWriter:
    """Writes encodings and entity rows side by side, a new pair of files whenever one is full.

    With a folder for `notes`, every pair is noted there when it is finished, and those that were are not written again:
    `done` rows.
    """

    def __init__(
        self, folder: Path, first: int, dtype: str, layout: dict[str, Any] | None = None, notes: Path | None = None
    ):
        self.folder, self.first, self.dtype, self.layout, self.notes = folder, first, DTYPES[dtype], layout, notes
        self._shards: list[dict[str, Any]] = []
        self._encodings: list[dict[str, torch.Tensor]] = []
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = 0
        self._parquet: pq.ParquetWriter | None = None
        if notes is not None:
            self._read_notes(notes)
        self.done = sum(shard["rows"] for shard in self._shards)

    def _read_notes(self, folder: Path) -> None:
        whole = True
        for path in sorted(folder.glob("*.json")):
            note = json.loads(path.read_text(encoding="utf-8"))
            files = [note["shard"][part] for part in ("encodings", "entities")]
            # Not so if the process ended after the last rename, or somebody cleaned up.
            whole = whole and all(_size(self.folder / file["file"]) == file["bytes"] for file in files)
            if whole:
                self._shards.append(note["shard"])
                self.layout = note["layout"]
            else:
                path.unlink()
        named = {shard[part]["file"] for shard in self._shards for part in ("encodings", "entities")}
        for path in self.folder.iterdir():
            if path.name not in named:  # begun, not finished
                path.unlink()

    def add(self, encodings: Mapping[str, torch.Tensor], table: pa.Table) -> None:
        stored = {
            name: tensor.to("cpu", self.dtype if tensor.is_floating_point() else None)
            for name, tensor in encodings.items()
        }
        layout = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape[1:])}
            for name, t in stored.items()
        }
        if self.layout is None:
            self.layout = layout
        elif layout != self.layout:
            raise KnowledgeBaseError(
                f"the encodings of a batch are {_layout_text(layout)}, those before were {_layout_text(self.layout)}.",
                remedy="The processor has to pad every batch to the same length (padding='max_length').",
            )
        self._encodings.append(stored)
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += row_bytes(stored) * table.num_rows
        if sum(t.num_rows for t in self._tables) >= _GROUP_ROWS or sum(t.nbytes for t in self._tables) >= _GROUP_BYTES:
            self._write_group()
        if self._bytes >= _SHARD_BYTES:
            self._close_shard()

    def close(self) -> list[dict[str, Any]]:
        """What `kb.json` says of the shards."""
        if self._rows:
            self._close_shard()
        return self._shards

    def _path(self, kind: str, suffix: str) -> Path:
        return self.folder / f"{kind}-{self.first + len(self._shards):05d}.{suffix}"

    def _write_group(self) -> None:
        path = self._path("entities", "parquet")
        with writing(path):
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(path, self._tables[0].schema, compression="zstd")
            table = pa.concat_tables(self._tables)
            self._parquet.write_table(table, row_group_size=table.num_rows)
        self._tables = []

    def _close_shard(self) -> None:
        if self._tables:
            self._write_group()
        entities, encodings = self._path("entities", "parquet"), self._path("encodings", "safetensors")
        with writing(entities):
            if self._parquet is not None:
                self._parquet.close()
        with writing(encodings):
            save_file(concat_encodings(self._encodings), encodings)
        shard = {"rows": self._rows, "encodings": sealed(encodings), "entities": sealed(entities)}
        if self.notes is not None:
            note = self.notes / f"{len(self._shards):05d}.json"
            write_text(note, [json.dumps({"shard": shard, "layout": self.layout})])
        self._shards.append(shard)
        self._encodings, self._parquet = [], None
        self._rows = self._bytes = 0


def _check_finite(
    encodings: Mapping[str, torch.Tensor], dtype: torch.dtype, ids: Sequence[str], file: str | None
) -> None:
    for name, tensor in encodings.items():
        if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
            bad = (
                (~tensor.to(dtype).isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.to(dtype).isfinite()
            )
            row = int(bad.nonzero()[0])
            overflow = bool(tensor[row].isfinite().all())
            raise KnowledgeBaseError(
                f"the encoding {name!r} of entity {ids[row]!r} "
                + (f"is too large for {str(dtype).removeprefix('torch.')}." if overflow else "is nan or infinite."),
                file=file,
                remedy="Use bfloat16 or float32." if overflow else "Look at the weights of the model.",
            )


@cache
def _schema() -> pa.Schema:
    return entity_features().arrow_schema


def _by_block(numbers: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Groups numbers by the block `starts[b] … starts[b+1]` they are in: (b, their positions in `numbers`)."""
    blocks = np.searchsorted(starts, numbers, side="right") - 1
    for block in np.unique(blocks):
        yield int(block), np.flatnonzero(blocks == block)


def _layout_text(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {spec['dtype']}{spec['shape']}" for name, spec in layout.items())


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_parquet(file: pq.ParquetFile, path: Path) -> None:
    """Refuses other columns, and row groups that say of themselves that they are beyond all bounds."""
    if not file.schema_arrow.equals(_schema()):
        raise _damaged(path, "its columns are not those of entities")
    for k in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(k)
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.num_values > _GROUP_VALUES or chunk.total_uncompressed_size > _READ_BYTES:
                raise _damaged(path, f"row group {k} has {chunk.num_values:,} values in {chunk.path_in_schema}")


def _decoded(table: pa.Table, path: Path) -> pa.Table:
    """A table of dictionaries as plain texts and bytes, unless these would be far larger than what was read."""
    size = sum(_decoded_bytes(chunk) for column in table.columns for chunk in column.chunks)
    if size > _READ_BYTES:
        raise _damaged(path, f"texts and images of {table.num_rows:,} rows decode to {size:,} bytes")
    schema = _schema()
    return table.cast(pa.schema([schema.field(name) for name in table.column_names], metadata=schema.metadata))


def _decoded_bytes(array: pa.Array) -> int:
    if pa.types.is_dictionary(array.type):
        return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if pa.types.is_list(array.type):
        return array.nbytes + _decoded_bytes(array.flatten())
    return sum(_decoded_bytes(part) for part in array.flatten()) if pa.types.is_struct(array.type) else array.nbytes


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException, ValueError) as error:
        if isinstance(error, KnowledgeBaseError):
            raise
        raise _damaged(path, str(error)) from error
