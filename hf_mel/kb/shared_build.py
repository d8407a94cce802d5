"""Encoding the entities of one knowledge base in several processes, on one host or on several with a shared folder.

The entities are divided into *units*: whole shards, or parts of shards where there are few. A process writes each of its
units to a folder of its own, renames it into the common one, and notes it there. The units depend on the entities and the
batch size, not on the processes, so that a build goes on with another number of them. The first process joins the parts of
shards, batch by batch as one process writes them, and installs the knowledge base. Its files are those of one process.

Processes wait for each other by reading notes, because collective calls have a time limit and a unit may take hours. Each has
a file that a thread touches while it goes on. It deletes the file if it has an error, which a full disk does not prevent. One
whose file no longer changes was killed, or its host no longer runs.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

from hf_mel.errors import KnowledgeBaseError, LostProcessError, MelError
from hf_mel.files import building_folder, building_path, read_json, write_errors, write_text
from hf_mel.inference.encode import encode_batches, window_rows
from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.left_out import LeftOutTexts
from hf_mel.inference.ranking import ProcessGroup
from hf_mel.kb.encoding import check_encodes_entities, iter_stored_tables, write_encodings
from hf_mel.kb.folders import lock_existing
from hf_mel.kb.manifest import MANIFEST_NAME
from hf_mel.kb.shards import ShardWriter, layout_and_rows, map_encodings
from hf_mel.protocols import entity_token_masks

logger = logging.getLogger(__name__)

#: Units that a build has at least, if it has as many windows: an interrupted process loses one.
_MIN_UNITS = 64
#: Seconds between two looks at the notes of other processes.
_POLL_SECONDS = 0.5
#: Seconds in which a file of one host appears on the others. NFS keeps lists of folders for up to a minute.
_SEEN_SECONDS = 90.0
#: Seconds between two signs of a process, and those without a sign after which it is taken for lost. A process gives signs while
#: it encodes: PyTorch lets other threads run.
_SIGN_SECONDS, _LOST_SECONDS = 30.0, 600.0


@dataclass(frozen=True)
class EncodingUnit:
    """Consecutive entities that one process encodes.

    Args:
        number (`int`): Its place among all units.
        shard (`int`): The shard with its entities.
        rows (`range`): The rows of its entities.
        is_shard (`bool`): Whether it is the whole shard.
    """

    number: int
    shard: int
    rows: range
    is_shard: bool

    @property
    def folder(self) -> str:
        """The folder of its finished files, below the working folder."""
        return "kb" if self.is_shard else "parts"

    @property
    def note(self) -> str:
        """The name of the note that says that it is finished."""
        return f"{self.number:07d}.json"


def encoding_units(num_rows: int, shard_rows: int, step: int) -> list[EncodingUnit]:
    """Divides entities into units, in order. A unit starts with a window, so that batches are those of one process.

    Args:
        num_rows (`int`): Number of entities.
        shard_rows (`int`): Rows of a full shard, a multiple of `step`.
        step (`int`): Rows of a window ([`~hf_mel.inference.encode.window_rows`]).
    """
    num_shards = -(-num_rows // shard_rows)
    units: list[EncodingUnit] = []
    for shard in range(num_shards):
        first, stop = shard * shard_rows, min((shard + 1) * shard_rows, num_rows)
        windows = -(-(stop - first) // step)
        parts = min(windows, -(-_MIN_UNITS // num_shards))
        for part in range(parts):
            chosen = part_of(windows, part, parts)
            rows = range(first + chosen.start * step, min(first + chosen.stop * step, stop))
            units.append(EncodingUnit(len(units), shard, rows, parts == 1))
    return units


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
    _check_same_settings(group, {**settings, "batch size": batch_size}, target)
    with group.raise_together():
        layout, shard_rows = _layout_of_entities(source, inputs, dtype, batch_size)
    units = encoding_units(len(source), shard_rows, window_rows(batch_size))
    stage, run, is_first = building_path(target), uuid.uuid4().hex, group.index == 0
    with ExitStack() as stack:
        with group.raise_together():
            if is_first:
                fingerprint = json.dumps(
                    {**settings, "window": window_rows(batch_size), "shard": shard_rows}, sort_keys=True
                )
                stack.enter_context(lock_existing(target))
                stack.enter_context(building_folder(target, fingerprint, survives_errors=True))
                _start_run(stage, units, run)
        run = group.gather(run)[0]
        work = _SharedFolder(stage, run, group, dtype, layout, window_rows(batch_size))
        with group.raise_together():
            _wait_for(work.going.is_dir, stage, "The folder of the first process is not seen by this one.")
            work.enter()
        with group.raise_together():
            _wait_for(lambda: not work.has_failed(), stage, "The files of another process are not seen by this one.")
        todo = group.gather([unit.number for unit in units if read_json(stage / "notes" / unit.note) is None])[0]
        if is_first and len(todo) < len(units):
            done = len(source) - sum(len(units[number].rows) for number in todo)
            logger.info("Resuming the interrupted build of %s; %s entities are done.", target, f"{done:,}")
        share = part_of(len(todo), group.index, group.size)
        with _saying_what_is_kept(stage), group.raise_together(), work.telling_others():
            chosen = [units[number] for number in todo[share.start : share.stop]]
            work.encode(chosen, source, name, inputs, batch_size, progress)
            work.wait_until(lambda: work.num_finished() == len(units))
            if is_first:
                finish(stage / "kb", work.join(units, source, name, batch_size), layout)
                work.joining.rename(work.joined)
            work.wait_until(work.joined.exists)
    _wait_for(
        (target / MANIFEST_NAME).is_file, target, "The folder that the first process wrote is not seen by this one."
    )


def _check_same_settings(group: ProcessGroup, settings: Mapping[str, Any], target: Path) -> None:
    """Checks that all processes build the same."""
    every = group.gather(dict(settings))
    for number, other in enumerate(every):
        if names := sorted(key for key in every[0] if other[key] != every[0][key]):
            raise KnowledgeBaseError(
                f"Process {number} has another {' and '.join(names)} than process 0.",
                file=target,
                remedy="Start all processes with the same command, and give all hosts the same models, data and images.",
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


def _start_run(stage: Path, units: Sequence[EncodingUnit], run: str) -> None:
    """Clears what interrupted runs left in the working folder, but for finished units, and lets other processes in."""
    folders = [stage / name for name in ("kb", "parts", "notes")]
    with write_errors(stage):
        for folder in folders:
            folder.mkdir(exist_ok=True)
        kept = {*folders, stage / "fingerprint"}
        for unit in units:
            note = stage / "notes" / unit.note
            paths = _complete_files(stage / unit.folder, read_json(note))
            kept.update([note, *paths] if paths else [])
        for path in [*stage.iterdir(), *(entry for folder in folders for entry in folder.iterdir())]:
            if path in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in ("joining", "going"):
            (stage / f"run-{run}" / name).mkdir(parents=True)


def _complete_files(folder: Path, entry: Any) -> list[Path]:
    """Returns the files of a shard's manifest entry; none if one is missing or has another size."""
    try:
        sizes = {folder / entry[part]["file"]: entry[part]["bytes"] for part in ("encodings", "entities")}
    except (KeyError, TypeError):
        return []
    is_complete = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return list(sizes) if is_complete else []


def _wait_for(is_true: Callable[[], bool], file: Path, problem: str) -> None:
    """Waits until something that another process has written is seen.

    Raises:
        KnowledgeBaseError: It is not seen in time.
    """
    deadline = time.monotonic() + _SEEN_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise KnowledgeBaseError(
                problem, file=file.absolute(), remedy="Give an output on a disk that all processes share, by one path."
            )
        time.sleep(_POLL_SECONDS)


@contextmanager
def _saying_what_is_kept(stage: Path) -> Iterator[None]:
    """Adds to an error of the block that the working folder has finished units, if it has some."""
    try:
        yield
    except Exception as error:
        if not any((stage / "notes").glob("*.json")):
            raise
        kept = f"The finished part of the build is kept: repeat the command to go on, or delete {stage.absolute()}."
        if isinstance(error, MelError):
            raise error.changed(remedy=f"{error.remedy} {kept}" if error.remedy else kept) from error
        if sys.version_info >= (3, 11):
            error.add_note(kept)
        else:
            logger.error(kept)
        raise


class _OthersFailed(Exception):
    """Another process has an error, which it reports itself."""


class _SharedFolder:
    """The working folder of a run, as one process uses it. It has the interface of a `ShardWriter` for encoding.

    Args:
        stage (`Path`): The folder.
        run (`str`): An id of the run, which processes of a killed run do not have.
        group ([`~hf_mel.inference.ranking.ProcessGroup`]): The processes.
        dtype (`str`): The dtype in which floating-point encodings are stored.
        layout (mapping): Dtype and shape of one row of each encoding.
        step (`int`): Rows of a window.
    """

    def __init__(self, stage: Path, run: str, group: ProcessGroup, dtype: str, layout: dict[str, Any], step: int):
        self.stage, self.layout, self.dtype, self.step = stage, layout, dtype, step
        folder = stage / f"run-{run}"
        self.own, self.going = folder / f"process-{group.index}", folder / "going"
        # Renamed, and not made, because the disk may be full by then.
        self.joining, self.joined = folder / "joining", folder / "joined"
        self._signs = [self.going / str(number) for number in range(group.size)]
        self._sign = self._signs[group.index]
        #: The last sign of each process that this one has seen, and the seconds for which it has seen no other.
        self._seen: list[tuple[int, float]] = [(0, 0.0)] * group.size
        self._last_look = time.monotonic()
        self._units: Iterator[EncodingUnit] = iter(())
        self._unit: EncodingUnit | None = None
        self._writer: ShardWriter | None = None
        self._missing = 0

    def enter(self) -> None:
        """Makes the folder of this process, and its file that shows that it goes on."""
        with write_errors(self.own):
            self.own.mkdir()
            self._sign.touch()

    @contextmanager
    def telling_others(self) -> Iterator[None]:
        """Lets the other processes stop at once if this one raises an error, and ends the block if another one has."""
        is_over = threading.Event()
        signs = threading.Thread(target=self._give_signs, args=[is_over], daemon=True)
        signs.start()
        try:
            yield
        except _OthersFailed:
            pass
        except LostProcessError:
            raise
        except Exception:
            with suppress(OSError):
                self._sign.unlink()
            raise
        finally:
            is_over.set()
            signs.join()

    def _give_signs(self, is_over: threading.Event) -> None:
        while not is_over.wait(_SIGN_SECONDS):
            with suppress(OSError):  # a shared disk that is away for a while
                os.utime(self._sign)

    def has_failed(self) -> bool:
        """Returns whether a process has deleted its file.

        Raises:
            LostProcessError: The folder is no longer there.
        """
        try:
            return len(os.listdir(self.going)) < len(self._signs)
        except FileNotFoundError as error:
            raise LostProcessError(
                "The first process has ended, and its folder was deleted.",
                file=self.stage,
                remedy="Repeat the command.",
            ) from error

    def _check_others(self) -> None:
        """Raises an error if another process has failed or is lost.

        Clocks of hosts differ, so changes are counted and times are not compared. Time in which this process did not look
        does not count, because a disk that hangs stops all processes.
        """
        if self.has_failed():
            raise _OthersFailed
        since_look = time.monotonic() - self._last_look
        if since_look < _SIGN_SECONDS:
            return
        self._last_look += since_look
        for number, path in enumerate(self._signs):
            try:
                sign = path.stat().st_mtime_ns
            except FileNotFoundError as error:
                raise _OthersFailed from error
            last, silence = self._seen[number]
            silence = silence + min(since_look, 2 * _SIGN_SECONDS) if sign == last else 0.0
            self._seen[number] = sign, silence
            if silence > _LOST_SECONDS:
                raise LostProcessError(
                    f"Process {number} has given no sign for {silence / 60:.0f} minutes. It was killed, or its host no "
                    "longer runs.",
                    file=self.stage,
                    remedy="End the processes that still run, and repeat the command.",
                )

    def encode(
        self,
        units: Sequence[EncodingUnit],
        source: datasets.Dataset,
        name: str | None,
        inputs: ModelInputs,
        batch_size: int,
        progress: bool,
    ) -> None:
        """Encodes units in ascending order."""
        if not units:
            return
        rows = [row for unit in units for row in unit.rows]
        self._units = iter(units)
        self._next_unit()
        write_encodings(source.select(rows), name, inputs, self, batch_size, progress)

    def _next_unit(self) -> None:
        self._unit = next(self._units, None)
        if self._unit is not None:
            number = self._unit.shard if self._unit.is_shard else self._unit.number
            self._writer = ShardWriter(self.own, number, self.dtype, self.layout, step=self.step)
            self._missing = len(self._unit.rows)

    def add(self, encodings: Mapping[str, torch.Tensor], table: pa.Table) -> None:
        """Appends a batch, which is in one unit."""
        if self.has_failed():
            raise _OthersFailed
        assert self._unit is not None
        assert self._writer is not None
        # The tables of parts are made again from the source when they are joined, with their images.
        self._writer.add(encodings, table if self._unit.is_shard else table.select(["entity_id"]))
        self._missing -= table.num_rows
        if not self._missing:
            self._finish(self._unit, self._writer)
            self._next_unit()

    def _finish(self, unit: EncodingUnit, writer: ShardWriter) -> None:
        """Moves the files of a unit to their place, and notes it."""
        (entry,) = writer.close()
        with write_errors(self.stage):
            for part in ("encodings", "entities"):
                os.replace(self.own / entry[part]["file"], self.stage / unit.folder / entry[part]["file"])
        write_text(self.stage / "notes" / unit.note, [json.dumps(entry)])

    def num_finished(self) -> int:
        """Returns the number of units that are noted."""
        return sum(1 for _ in (self.stage / "notes").glob("*.json"))

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Waits for the other processes.

        Raises:
            _OthersFailed: A process has an error.
            LostProcessError: A process was killed, or its host no longer runs.
        """
        while not is_true():
            self._check_others()
            time.sleep(_POLL_SECONDS)

    def join(
        self, units: Sequence[EncodingUnit], source: datasets.Dataset, name: str | None, batch_size: int
    ) -> list[dict[str, Any]]:
        """Joins parts of shards in the folder of the shards, and returns the manifest entries of all shards."""
        shards: list[dict[str, Any]] = []
        for number, group in itertools.groupby(units, lambda unit: unit.shard):
            parts = [(unit, read_json(self.stage / "notes" / unit.note)) for unit in group]
            if parts[0][0].is_shard:
                shards.append(parts[0][1])
                continue
            writer = ShardWriter(self.stage / "kb", number, self.dtype, self.layout, step=self.step)
            for unit, entry in parts:
                path = self.stage / unit.folder / entry["encodings"]["file"]
                writer.add_stored(map_encodings(path, len(unit.rows), self.layout))
                for table in iter_stored_tables(source.select(unit.rows), name, batch_size):
                    writer.add_table(table)
            shards += writer.close()
        return shards
