"""Keeps one copy of a data-set folder in the cache of `datasets`: that of its present files.

`datasets` turns the files of a folder into Arrow files in its cache, and identifies a folder by its name and card only.
With one cache, a folder that was built again, or another one of the same name, would return the rows of the first. So
every state of a folder has a place of its own in the cache:

    hf_mel/<digest of the folder's path>/<digest of its files>/

A process holds a lock in the place that it reads (`readers/`), until it ends or reads a later state. The places of
earlier states that nobody reads are deleted when the present one has been read.

`datasets` also takes a path for a pattern: `out[1]` means `out1`. The place of a folder whose path could be read so
holds links to its files (`links/`), which are loaded instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import filelock

from hf_mel.errors import UnknownDatasetError

#: Characters of a path that nothing takes for a pattern or an address: letters, digits, `_`, and these.
_LITERAL_PATH = re.compile(r"[\w /.,+=@()-]*")
#: The name of a place, or what is left of one whose deletion was interrupted.
_PLACE = re.compile(r"[0-9a-f]{16}(\.old)?")

_locks_of_this_process: dict[Path, filelock.BaseFileLock] = {}
_threads = threading.Lock()


def is_literal(folder: str | os.PathLike[str]) -> bool:
    """Returns whether `datasets` reads the absolute path of a folder as a plain path, not as a pattern or an address."""
    path = Path(folder).resolve()
    return _LITERAL_PATH.fullmatch(path.as_posix().removeprefix(path.drive)) is not None


@dataclass
class FolderCopy:
    """The place in the cache for one state of a folder.

    Args:
        folder (`Path`): The folder, an absolute path without links.
        place (`Path`): Its place in the cache, the `cache_dir` of `datasets`.
        source (`str`): The folder to load: `folder`, or one of links to its files.
    """

    folder: Path
    place: Path
    source: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FolderCopy:
        """Returns the place for the present state of a folder, and keeps other processes from deleting it.

        Raises:
            UnknownDatasetError: `datasets` would take the path of the folder for a pattern, and links cannot be made.
        """
        root = Path(folder).resolve()
        places = Path(datasets.config.HF_DATASETS_CACHE) / "hf_mel" / _digest(str(root))
        with _locked(places):
            place = places / _state(root)
            _keep(place)
            source = str(root) if is_literal(root) else _link_files(root, place / "links" / "data")
        return cls(root, place, source)

    def delete_earlier(self) -> None:
        """Deletes the places of earlier states of the folder, except those that another process reads."""
        places = self.place.parent
        with _locked(places):
            if _state(self.folder) != self.place.name:
                return  # the folder was built again in the meantime, so that another place may be the present one
            for place in places.iterdir():
                if place == self.place or not _PLACE.fullmatch(place.name) or not place.is_dir():
                    continue
                with _threads:
                    if lock := _locks_of_this_process.pop(place, None):
                        lock.release()
                if not _is_read(place):
                    _delete(place)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _state(root: Path) -> str:
    """Returns a digest of names, sizes and modification times of all files of a folder."""
    files = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            files.append(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n")
    return _digest("".join(files))


def _link_files(root: Path, links: Path) -> str:
    """Fills `links` with links to the files of `root`, once, because `datasets` notices their times. Returns its path.

    Raises:
        UnknownDatasetError: The links cannot be made, or their path would be taken for a pattern, too.
    """
    try:
        if not is_literal(links.parent):
            raise OSError(f"the path of the cache, {links.parents[4]}, has such characters, too")
        if not links.exists():
            work = links.with_name(f"{links.name}.{uuid.uuid4().hex}")
            for path in (path for path in root.rglob("*") if path.is_file()):
                link = work / path.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
            work.mkdir(parents=True, exist_ok=True)
            work.rename(links)
    except OSError as error:
        raise UnknownDatasetError(
            f"The path has characters that `datasets` takes for a pattern, and no links to the files can be made "
            f"({error}).",
            file=root,
            remedy="Rename the folder: use letters, digits, spaces, and _ - . only.",
        ) from error
    return str(links.absolute())


@contextmanager
def _locked(places: Path) -> Iterator[None]:
    """Admits one process at a time to the places of a folder."""
    places.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(places / "lock"):
        yield


def _keep(place: Path) -> None:
    """Takes a lock in a place for the rest of the process, or until the process reads a later state."""
    with _threads:
        if place in _locks_of_this_process and place.exists():
            return
        (place / "readers").mkdir(parents=True, exist_ok=True)
        _is_read(place)  # deletes what readers that have ended left behind
        lock = filelock.FileLock(place / "readers" / f"{uuid.uuid4().hex}.lock")
        lock.acquire()
        _locks_of_this_process[place] = lock


def _is_read(place: Path) -> bool:
    """Whether a process reads a place. Deletes the lock files of processes that have ended."""
    is_read = False
    readers = place / "readers"
    for path in readers.iterdir() if readers.is_dir() else ():
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            is_read = True
        else:
            lock.release()
            path.unlink(missing_ok=True)
    return is_read


def _delete(place: Path) -> None:
    old = place if place.suffix else place.with_name(f"{place.name}.old")
    try:
        if old != place:
            place.rename(old)  # at once, and impossible on Windows while a file is open
    except OSError:
        return
    shutil.rmtree(old, ignore_errors=True)
