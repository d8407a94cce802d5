"""Encoding the entities of one knowledge base in several processes ([`~hf_mel.kb.shared_work`]).

A unit is a whole shard, or a part of one where there are few. The units depend on the entities and the batch size. The first
process joins the parts of shards, batch by batch as one process writes them, and installs the knowledge base. Its files are
those of one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

from hf_mel.inference.encode import encode_batches, window_rows
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.left_out import LeftOutTexts
from hf_mel.inference.ranking import ProcessGroup
from hf_mel.kb.encoding import check_encodes_entities, iter_stored_tables, write_encodings
from hf_mel.kb.folders import lock_existing
from hf_mel.kb.manifest import MANIFEST_NAME
from hf_mel.kb.shards import ShardWriter, layout_and_rows, map_encodings
from hf_mel.kb.shared_work import SharedFolder, WorkUnit, check_same_settings, wait_for, work_together, work_units
from hf_mel.protocols import entity_token_masks


def build_together(
    target: Path,
    settings: Mapping[str, Any],
    source: datasets.Dataset,
    name: str | None,
    inputs: ModelInputs,
    *,
    dtype: str,
    batch_size: int,
    group: ProcessGroup,
    progress: bool,
    finish: Callable[[Path, list[dict[str, Any]], dict[str, Any]], None],
) -> None:
    """Encodes entities in several processes, which all make this call with the same arguments.

    Args:
        target (`Path`): The folder of the knowledge base.
        settings (mapping): Everything that the knowledge base depends on, by names for error messages.
        source (`datasets.Dataset`): N entities.
        name (`str`, *optional*): Their source, for error messages.
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor.
        dtype, batch_size, progress: As in [`~hf_mel.kb.knowledge_base.KnowledgeBase.build`].
        group ([`~hf_mel.inference.ranking.ProcessGroup`]): The processes.
        finish: Called by the first process with the folder of the files, the manifest entries of the shards, and the layout
            of their encodings.

    Raises:
        KnowledgeBaseError: The processes have other settings, or do not see one folder.
        LostProcessError: Another process was killed, or its host no longer runs. Each process finds this out by itself.
        Exception: The error of the first process that has one; all processes raise it. It says whether finished units are
            kept, with which the same call goes on.
    """
    check_same_settings(group, {**settings, "batch size": batch_size}, target)
    with group.raise_together():
        layout, shard_rows = _layout_of_entities(source, inputs, dtype, batch_size)
    step = window_rows(batch_size)
    units = work_units(len(source), shard_rows, step)

    def encode(work: SharedFolder, chosen: list[WorkUnit]) -> None:
        writer = _UnitsWriter(work, chosen, dtype, layout, step)
        if chosen:
            rows = [row for unit in chosen for row in unit.rows]
            write_encodings(source.select(rows), name, inputs, writer, batch_size, progress)

    def join(work: SharedFolder) -> None:
        finish(work.stage / "kb", _joined(work, units, source, name, dtype, layout, batch_size), layout)

    work_together(
        target,
        {**settings, "window": step, "shard": shard_rows},
        units,
        group,
        encode,
        join,
        lock=lambda: lock_existing(target),
    )
    wait_for(
        (target / MANIFEST_NAME).is_file, target, "The folder that the first process wrote is not seen by this one."
    )


def _layout_of_entities(
    source: datasets.Dataset, inputs: ModelInputs, dtype: str, batch_size: int
) -> tuple[dict[str, Any], int]:
    """Returns the layout of the encodings of an entity, and the rows of a full shard, by encoding the first entity."""
    check_encodes_entities(inputs.model)
    with evaluation_mode(inputs.model):
        encodings = next(encode_batches(inputs, source.select([0]), "entities", batch_size=1))
    inputs.left_out = LeftOutTexts(inputs.processor)  # the entity is counted with its batch
    return layout_and_rows(encodings, dtype, window_rows(batch_size), entity_token_masks(inputs.model))


class _UnitsWriter:
    """Writes the units of one process. It has the interface of a `ShardWriter` for encoding.

    Args:
        work ([`~hf_mel.kb.shared_work.SharedFolder`]): The working folder.
        units (list of [`~hf_mel.kb.shared_work.WorkUnit`]): The units, ascending.
        dtype (`str`): The dtype in which floating-point encodings are stored.
        layout (mapping): Dtype and shape of one row of each encoding.
        step (`int`): Rows of a window.
    """

    def __init__(self, work: SharedFolder, units: Sequence[WorkUnit], dtype: str, layout: dict[str, Any], step: int):
        self.dtype = dtype
        self._work, self._layout, self._step = work, layout, step
        self._units: Iterator[WorkUnit] = iter(units)
        self._unit: WorkUnit | None = None
        self._writer: ShardWriter | None = None
        self._missing = 0
        self._next_unit()

    def _next_unit(self) -> None:
        self._unit = next(self._units, None)
        if self._unit is not None:
            number = self._unit.shard if self._unit.is_shard else self._unit.number
            self._writer = ShardWriter(self._work.own, number, self.dtype, self._layout, step=self._step)
            self._missing = len(self._unit.rows)

    def add(self, encodings: Mapping[str, torch.Tensor], table: pa.Table) -> None:
        """Appends a batch, which is in one unit."""
        self._work.stop_with_others()
        assert self._unit is not None
        assert self._writer is not None
        # The tables of parts are made again from the source when they are joined, with their images.
        self._writer.add(encodings, table if self._unit.is_shard else table.select(["entity_id"]))
        self._missing -= table.num_rows
        if not self._missing:
            (entry,) = self._writer.close()
            self._work.finish(self._unit, entry)
            self._next_unit()


def _joined(
    work: SharedFolder,
    units: Sequence[WorkUnit],
    source: datasets.Dataset,
    name: str | None,
    dtype: str,
    layout: dict[str, Any],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Joins parts of shards in the folder of the shards, and returns the manifest entries of all shards."""
    shards: list[dict[str, Any]] = []
    for number, of_shard in itertools.groupby(units, lambda unit: unit.shard):
        parts = [(unit, work.entry_of(unit)) for unit in of_shard]
        if parts[0][0].is_shard:
            shards.append(parts[0][1])
            continue
        writer = ShardWriter(work.stage / "kb", number, dtype, layout, step=window_rows(batch_size))
        for unit, entry in parts:
            path = work.stage / unit.folder / entry["encodings"]["file"]
            writer.add_stored(map_encodings(path, len(unit.rows), layout))
            for table in iter_stored_tables(source.select(unit.rows), name, batch_size):
                writer.add_table(table)
        shards += writer.close()
    return shards
