"""Locks that admit one writer at a time to a folder, between processes and between machines that share a file system.

A lock is a file that records who holds it: host, process and the time. On one machine the kernel decides with `flock`,
so the lock of a process that has ended is free, whatever ended it. Some shared file systems do not pass `flock` on to
other machines. There the file itself is the lock: only one process can create it, and another machine never takes a lock
over. The file is deleted when the lock is released.

Another lock is for the threads of one process that load models.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hf_mel.errors import LockedError, MelError

fcntl: Any
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

#: Held while transformers makes or loads a model. It changes the whole process meanwhile: functions such as
#: `PreTrainedModel.tie_weights`, and PyTorch's default dtype. Of two threads, the later one would put back what the earlier one
#: had put in their place: later models would not tie their weights, or would be made in another dtype.
LOADING = threading.RLock()

#: Seconds between two attempts while waiting.
_POLL_SECONDS = 0.1
#: Seconds that a process may take between creating a lock file and recording itself in it.
_EMPTY_SECONDS = 2.0


@dataclass(frozen=True)
class _Holder:
    """Content of a lock file.

    Args:
        host (`str`): The name of the host.
        boot (`str`, *optional*): The id of the current start of the machine. All its containers have the same.
        pid (`int`): The process.
        started (`str`, *optional*): The start time of the process, because process ids are used again.
        since (`str`): The time at which the lock was taken.
    """

    host: str
    boot: str | None
    pid: int
    started: str | None
    since: str

    @classmethod
    def current(cls) -> _Holder:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _process_start(os.getpid()), since)

    @property
    def is_local(self) -> bool:
        """Whether the process runs, or ran, on this machine."""
        return self.host == socket.gethostname() or (self.boot is not None and self.boot == _boot_id())

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs, for a process of this machine."""
        if self.boot != _boot_id():
            return False  # the machine was started again
        if self.started is not None:
            return _process_start(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # the process of another user
        return True


@contextmanager
def writer_lock(
    path: str | os.PathLike[str], *, busy: str, remedy: str, target: str | os.PathLike[str], wait: float = 0.0
) -> Iterator[None]:
    """Holds the lock file `path` for the block.

    Args:
        path (`str` or `os.PathLike`): The lock file, in a folder that exists.
        busy (`str`): The state to report if another writer holds the lock, for instance "The output is being built".
        remedy (`str`): What the user can do then, in the imperative.
        target (`str` or `os.PathLike`): The file or folder that the lock protects, for errors.
        wait (`float`): Seconds to wait for another writer.

    Raises:
        LockedError: Another writer holds the lock; names its process and host, and since when.
        MelError: The lock file cannot be written, for instance because the file system is read-only.
    """
    lock = _LockFile(Path(path))
    deadline = time.monotonic() + wait
    try:
        while not lock.try_acquire():
            patience = 0.0 if lock.holder is not None else 2 * _EMPTY_SECONDS
            if time.monotonic() >= deadline + patience:
                raise _locked_error(lock.path, lock.holder, busy, remedy, target)
            time.sleep(_POLL_SECONDS if lock.holder is not None else _POLL_SECONDS / 10)
    except OSError as error:
        raise MelError(
            f"The folder cannot be written ({error.strerror or error}).",
            file=target,
            remedy="Check the path and that you may write to it, or choose another folder.",
        ) from error
    try:
        yield
    finally:
        lock.release()


class _LockFile:
    """A lock file, held or not.

    Attributes:
        holder ([`_Holder`], *optional*): The holder that the last attempt met. `None` if the file said nothing, because
            it was being created or deleted at that moment.
    """

    def __init__(self, path: Path):
        self.path = path
        self.holder: _Holder | None = None
        self._descriptor: int | None = None
        self._empty: tuple[os.stat_result, float] | None = (
            None  # a file without a holder, and the time it was first seen
        )

    def try_acquire(self) -> bool:
        """Takes the lock if it is free. Returns whether it is held now.

        Raises:
            OSError: The file cannot be created.
        """
        self.holder = None
        is_new = True
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            is_new = False
            try:
                descriptor = os.open(self.path, os.O_RDWR)
            except FileNotFoundError:
                return False  # released in the meantime
            except PermissionError:
                self.holder = _read_holder(self.path)  # another user's
                if self.holder is None:
                    raise
                return False
        try:
            if self._may_take(descriptor, is_new):
                self._descriptor = descriptor
        finally:
            if self._descriptor is None:
                os.close(descriptor)
        return self._descriptor is not None

    def _may_take(self, descriptor: int, is_new: bool) -> bool:
        """Locks the open file and records this process in it, unless another process holds it."""
        is_locked = _flock(descriptor)
        holder = _read_holder(self.path)
        if is_locked is False or not _is_same_file(descriptor, self.path):
            self.holder = holder
            return False
        if not is_new:
            if holder is None and not self._is_abandoned(descriptor):
                return False
            if holder is not None and (not holder.is_local or (is_locked is None and holder.is_alive)):
                self.holder = holder
                return False
        current = _Holder.current()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(current)).encode(), 0)
        os.fsync(descriptor)
        if not is_new and is_locked is None:
            time.sleep(_POLL_SECONDS)  # another process may take over from the same dead holder
            holder = _read_holder(self.path)
            if holder != current:
                self.holder = holder
                return False
        return True

    def _is_abandoned(self, descriptor: int) -> bool:
        """Whether the file has been without a holder for so long that the process that created it must have ended."""
        stat = os.fstat(descriptor)
        if self._empty is None or not os.path.samestat(self._empty[0], stat):
            self._empty = stat, time.monotonic()
        return time.monotonic() - self._empty[1] > _EMPTY_SECONDS

    def release(self) -> None:
        """Deletes the file, then frees the lock."""
        assert self._descriptor is not None
        with suppress(OSError):
            # Someone may have deleted the file by hand, and another process may have created its own since.
            if _is_same_file(self._descriptor, self.path):
                self.path.unlink()
        if fcntl is not None:
            with suppress(OSError):
                # Closing alone would not free the lock while a forked process has the file open.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None


def _flock(descriptor: int) -> bool | None:
    """Locks an open file. Returns whether the lock was free; `None` if the file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> _Holder | None:
    try:
        return _Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _locked_error(
    path: Path, holder: _Holder | None, busy: str, remedy: str, target: str | os.PathLike[str]
) -> LockedError:
    if holder is None:
        return LockedError(f"{busy} already, by an unknown process.", file=target, remedy=remedy)
    host = f"this host ({holder.host})" if holder.is_local else f"the host {holder.host}"
    if not holder.is_local:
        remedy += f" If that process has ended, delete {path}."
    return LockedError(
        f"{busy} already, by process {holder.pid} on {host} since {holder.since}.", file=target, remedy=remedy
    )


@cache
def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Returns the start time of a process in clock ticks since the machine started; `None` if it does not run."""
    try:
        # The second field, the name in parentheses, may contain spaces.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
