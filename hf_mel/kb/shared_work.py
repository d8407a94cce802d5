"""Work on the entities of a knowledge base that several processes share, on one host or on several with a shared folder.

The entities are divided into *units*. A process writes the files of each of its units to a folder of its own, renames them
into a common one, and notes the unit there. The units do not depend on the processes, so that work goes on with another
number of them, also after one process alone. The first process makes the result of the files of all units.

Processes wait for each other by reading notes, because collective calls have a time limit and a unit may take hours. Each has
a file that a thread touches while it goes on. It deletes the file if it has an error, which a full disk does not prevent. One
whose file no longer changes was killed, or its host no longer runs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mel.errors import KnowledgeBaseError, LostProcessError, MelError
from hf_mel.files import building_folder, building_path, read_json, write_errors, write_text
from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.ranking import SingleProcess

logger = logging.getLogger(__name__)

#: Units that work has at least, if it has as many windows: an interrupted process loses one.
_MIN_UNITS = 64
#: Seconds between two looks at the notes of other processes.
_POLL_SECONDS = 0.5
#: Seconds in which a file of one host appears on the others. NFS keeps lists of folders for up to a minute.
_SEEN_SECONDS = 90.0
#: Seconds between two signs of a process, and those without a sign after which it is taken for lost. A process gives signs while
#: it computes: PyTorch lets other threads run.
_SIGN_SECONDS, _LOST_SECONDS = 30.0, 600.0


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive entities that one process works on.

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


def work_units(num_rows: int, shard_rows: int, step: int) -> list[WorkUnit]:
    """Divides entities into units, in order. A unit starts with a window, so that batches are those of one process.

    Args:
        num_rows (`int`): Number of entities.
        shard_rows (`int`): Rows of a full shard, a multiple of `step`.
        step (`int`): Rows of a window ([`~hf_mel.inference.encode.window_rows`]).
    """
    num_shards = -(-num_rows // shard_rows)
    units: list[WorkUnit] = []
    for shard in range(num_shards):
        first, stop = shard * shard_rows, min((shard + 1) * shard_rows, num_rows)
        windows = -(-(stop - first) // step)
        parts = min(windows, -(-_MIN_UNITS // num_shards))
        for part in range(parts):
            chosen = part_of(windows, part, parts)
            rows = range(first + chosen.start * step, min(first + chosen.stop * step, stop))
            units.append(WorkUnit(len(units), shard, rows, parts == 1))
    return units


def work_together(
    target: Path,
    fingerprint: Mapping[str, Any],
    units: Sequence[WorkUnit],
    group: SingleProcess,
    work_on: Callable[[SharedFolder, list[WorkUnit]], None],
    finish: Callable[[SharedFolder], None],
    *,
    lock: Callable[[], AbstractContextManager[None]],
    prepare: Callable[[Path], list[Path]] = lambda _: [],
) -> None:
    """Works on units in several processes, which all make this call with the same arguments, or in one.

    Args:
        target (`Path`): What is made. The working folder is beside it.
        fingerprint (mapping): Everything that the units depend on. Units of other work are deleted.
        units (list of [`WorkUnit`]): All units.
        group: The processes.
        work_on: Called by each process with its units that are not finished, in ascending order; calls
            [`SharedFolder.finish`] for each.
        finish: Called by the first process when all units are finished. It makes the result.
        lock: Gives the lock that the first process holds meanwhile.
        prepare: Called by the first process with the working folder, before any unit. Returns files in it that are kept.

    Raises:
        KnowledgeBaseError: The processes do not see one folder.
        LostProcessError: Another process was killed, or its host no longer runs. Each process finds this out by itself.
        Exception: The error of the first process that has one; all processes raise it. It says whether finished units are
            kept, with which the same call goes on.
    """
    stage, run, is_first = building_path(target), uuid.uuid4().hex, group.index == 0
    with ExitStack() as stack:
        with group.raise_together():
            if is_first:
                stack.enter_context(lock())
                text = json.dumps(fingerprint, sort_keys=True)
                stack.enter_context(building_folder(target, text, survives_errors=True))
                _start_run(stage, units, run, prepare(stage))
        run = group.gather(run)[0]
        work = SharedFolder(stage, run, group)
        with group.raise_together():
            wait_for(work.going.is_dir, stage, "The folder of the first process is not seen by this one.")
            work.enter()
        with group.raise_together():
            wait_for(lambda: not work.has_failed(), stage, "The files of another process are not seen by this one.")
        todo = group.gather([unit.number for unit in units if read_json(stage / "notes" / unit.note) is None])[0]
        if is_first and len(todo) < len(units):
            done = sum(len(unit.rows) for unit in units) - sum(len(units[number].rows) for number in todo)
            logger.info("Resuming the interrupted build of %s; %s entities are done.", target, f"{done:,}")
        share = part_of(len(todo), group.index, group.size)
        with _saying_what_is_kept(stage), group.raise_together(), work.telling_others():
            work_on(work, [units[number] for number in todo[share.start : share.stop]])
            work.wait_until(lambda: work.num_finished() == len(units))
            if is_first:
                finish(work)
                work.joining.rename(work.joined)
            work.wait_until(work.joined.exists)


@contextmanager
def held_by_first(lock: AbstractContextManager[None], group: SingleProcess) -> Iterator[None]:
    """Holds a lock in the first process. If it is not to be had, all processes raise the error."""
    with ExitStack() as stack:
        with group.without_limit(), group.raise_together():  # it may wait for the lock
            if group.index == 0:
                stack.enter_context(lock)
        yield


def check_same_settings(group: SingleProcess, settings: Mapping[str, Any], target: str | Path | None) -> None:
    """Checks that all processes work on the same.

    Raises:
        KnowledgeBaseError: They have other settings; `settings` has their names.
    """
    every = group.gather(dict(settings))
    for number, other in enumerate(every):
        if names := sorted(key for key in every[0] if other[key] != every[0][key]):
            raise KnowledgeBaseError(
                f"Process {number} has another {' and '.join(names)} than process 0.",
                file=target,
                remedy="Start all processes with the same command, and give all hosts the same models, data and images.",
            )


def _start_run(stage: Path, units: Sequence[WorkUnit], run: str, kept_files: Sequence[Path]) -> None:
    """Clears what interrupted runs left in the working folder, but for finished units and kept files, and lets others in."""
    folders = [stage / name for name in ("kb", "parts", "notes")]
    with write_errors(stage):
        for folder in folders:
            folder.mkdir(exist_ok=True)
        kept = {*folders, *kept_files, stage / "fingerprint"}
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
    """Returns the files of the note of a unit; none if one is missing or has another size."""
    try:
        sizes = {folder / part["file"]: part["bytes"] for part in _files(entry)}
    except (KeyError, TypeError, AttributeError):
        return []
    is_complete = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return list(sizes) if is_complete else []


def _files(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the entries of files in the note of a unit."""
    return [part for part in entry.values() if isinstance(part, dict)]


def wait_for(is_true: Callable[[], bool], file: Path, problem: str) -> None:
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


class SharedFolder:
    """The working folder of a run, as one process uses it.

    Args:
        stage (`Path`): The folder.
        run (`str`): An id of the run, which processes of a killed run do not have.
        group ([`~hf_mel.inference.ranking.SingleProcess`]): The processes.
    """

    def __init__(self, stage: Path, run: str, group: SingleProcess):
        self.stage = stage
        folder = stage / f"run-{run}"
        self.own, self.going = folder / f"process-{group.index}", folder / "going"
        # Renamed, and not made, because the disk may be full by then.
        self.joining, self.joined = folder / "joining", folder / "joined"
        self._signs = [self.going / str(number) for number in range(group.size)]
        self._sign = self._signs[group.index]
        #: The last sign of each process that this one has seen, and the seconds for which it has seen no other.
        self._seen: list[tuple[int, float]] = [(0, 0.0)] * group.size
        self._last_look = time.monotonic()

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

    def stop_with_others(self) -> None:
        """Ends the work of this process if another one has an error."""
        if self.has_failed():
            raise _OthersFailed

    def _check_others(self) -> None:
        """Raises an error if another process has failed or is lost.

        Clocks of hosts differ, so changes are counted and times are not compared. Time in which this process did not look
        does not count, because a disk that hangs stops all processes.
        """
        self.stop_with_others()
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

    def finish(self, unit: WorkUnit, entry: Mapping[str, Any]) -> None:
        """Moves the files of a unit from the folder of this process to their place, and notes it.

        `entry` is the note. It has an entry with `file` and `bytes` for each of the files.
        """
        with write_errors(self.stage):
            for part in _files(entry):
                os.replace(self.own / part["file"], self.stage / unit.folder / part["file"])
        write_text(self.stage / "notes" / unit.note, [json.dumps(entry)])

    def entry_of(self, unit: WorkUnit) -> dict[str, Any]:
        """Returns the note of a finished unit."""
        return read_json(self.stage / "notes" / unit.note)

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
